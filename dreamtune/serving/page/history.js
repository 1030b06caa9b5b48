// Pictures that were drawn in this browser: in IndexedDB, the oldest go first.

import { $, say } from "./dom.js";
import { Tile } from "./tile.js";

const NAME = "dreamtune", STORE = "pictures";
const MOST = 60; // pictures
const BYTES = 48 << 20; // of their texts

export class History {
  constructor(reuse) {
    this.reuse = reuse;
    this.base = opened();
    this.base.catch(() => {}); // `show` and `add` say so
    this.queue = Promise.resolve(); // one change after the other
    $("clear").addEventListener("click", () => this.clear());
  }

  async show() {
    try {
      const records = await all(await this.base);
      $("past").replaceChildren(...records.reverse().map((r) => Tile.of(r, this.reuse).node));
      this.count(records.length);
    } catch {
      this.cannot();
    }
  }

  add(record) {
    this.queue = this.queue.then(() => this.added(record));
    return this.queue;
  }

  async added(record) {
    $("past").prepend(Tile.of(record, this.reuse).node);
    try {
      const base = await this.base;
      await done(base.transaction(STORE, "readwrite").objectStore(STORE).add(record));
      const kept = await trimmed(base);
      while ($("past").children.length > kept) $("past").lastElementChild.remove();
      this.count(kept);
    } catch {
      this.cannot();
    }
  }

  async clear() {
    if (!window.confirm("Remove all pictures of the history from this browser?")) return;
    try {
      await done((await this.base).transaction(STORE, "readwrite").objectStore(STORE).clear());
      $("past").replaceChildren();
      this.count(0);
      $("history").focus();
    } catch {
      this.cannot();
    }
  }

  count(number) {
    $("clear").hidden = !number;
    const last = number >= MOST ? `, the last ${MOST}` : "";
    say($("history-status"), number
      ? `${number === 1 ? "1 picture" : `${number} pictures`}, kept in this browser alone${last}. Choose one to use its settings again.`
      : "Nothing has been drawn yet. Pictures are kept here, in this browser alone.");
  }

  cannot() {
    say($("history-status"), "This browser keeps no history here: pictures are gone when the page is.", "error");
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const all = (base) => done(base.transaction(STORE).objectStore(STORE).getAll());

/** Removes the oldest beyond what is kept; how many are left. */
async function trimmed(base) {
  const store = base.transaction(STORE, "readwrite").objectStore(STORE);
  const [keys, records] = await Promise.all([done(store.getAllKeys()), done(store.getAll())]);
  let left = records.length;
  let bytes = records.reduce((sum, { image }) => sum + image.length, 0);
  for (let i = 0; left > MOST || (bytes > BYTES && left > 1); i += 1) {
    store.delete(keys[i]);
    bytes -= records[i].image.length;
    left -= 1;
  }
  return left;
}
