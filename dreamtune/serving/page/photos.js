// Photos that are chosen or dropped, and what training would see of them.

import { $, el, say } from "./dom.js";
import { json } from "./api.js";

const QUIET = 400; // milliseconds after the last letter before the words are looked at

/** about: of the server's training. onWords: told {identifier, class_noun, ...} or null. */
export class Photos {
  constructor(about, onWords) {
    this.about = about;
    this.onWords = onWords;
    this.files = [];
    this.seen = new Map(); // file -> what the server says of it
    this.words = null;
    this.asked = null;
    const drop = $("drop");
    $("photos").addEventListener("change", ({ target }) => {
      this.add(target.files);
      target.value = ""; // the same file may be chosen again
    });
    for (const kind of ["dragenter", "dragover"]) {
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      this.add(event.dataTransfer.files);
    });
    for (const id of ["train-prompt", "train-identifier"]) {
      $(id).addEventListener("input", () => this.later());
    }
  }

  /** Those that can be trained on. */
  get good() {
    return this.files.filter((file) => !this.seen.get(file)?.error);
  }

  add(files) {
    const room = this.about.photos - this.files.length;
    const chosen = [...files];
    this.files.push(...chosen.slice(0, room));
    this.left = chosen.length > room ? `At most ${this.about.photos} photos are taken. ` : "";
    this.draw();
    this.check();
  }

  remove(file) {
    const at = this.files.indexOf(file);
    this.files.splice(at, 1);
    this.seen.delete(file);
    this.left = "";
    this.draw();
    this.tell();
    ($("crops").querySelectorAll("button")[Math.min(at, this.files.length - 1)] ?? $("photos")).focus();
  }

  clear() {
    this.files = [];
    this.seen.clear();
    this.draw();
    say($("check-status"), "");
  }

  later() {
    clearTimeout(this.clock);
    this.clock = setTimeout(() => this.check(), QUIET);
  }

  /** Asks of the photos that are new, and of the words with one of those that are there. */
  async check() {
    this.asked?.abort();
    if (!this.files.length) return;
    this.asked = new AbortController();
    const { signal } = this.asked;
    const news = this.files.filter((file) => !this.seen.has(file));
    const sent = news.length ? news : [this.good[0] ?? this.files[0]];
    const form = new FormData();
    for (const file of sent) form.append("photos", file, file.name);
    for (const [name, id] of [["prompt", "train-prompt"], ["identifier", "train-identifier"]]) {
      if ($(id).value.trim()) form.append(name, $(id).value);
    }
    if (news.length) say($("check-status"), `Looking at ${photos(news.length)}…`);
    try {
      const found = await json("/photos/check", { method: "POST", body: form, signal });
      sent.forEach((file, i) => this.seen.set(file, found.photos[i]));
      this.words = found.words ?? null;
      this.draw();
      this.tell();
    } catch (error) {
      if (error.name !== "AbortError") say($("check-status"), error.message, "error");
    }
  }

  tell() {
    const bad = this.files.length - this.good.length;
    const wrong = bad ? `, ${bad} cannot be used` : ", as training sees them";
    const told = this.good.length ? `${photos(this.good.length)}${wrong}.` : "None of these can be used.";
    say($("check-status"), this.files.length ? `${this.left ?? ""}${told}` : "");
    say($("train-status"), ""); // of what was before
    const { words } = this;
    if (!words) return;
    const text = words.error
      ? `Not yet: ${labelled(words.error)}`
      : `Learned as ${words.summary.replaceAll("`", "")}. Pictures to come: “${words.first_prompt}”.`;
    say($("words"), text, words.error ? "error" : "");
    this.onWords(words.error ? null : words);
  }

  draw() {
    $("crops").replaceChildren(...this.files.map((file) => this.tile(file)));
  }

  tile(file) {
    const seen = this.seen.get(file);
    const picture = seen?.crop
      ? el("img", { src: `data:image/png;base64,${seen.crop}`, alt: `${file.name}, ${seen.size}` })
      : el("span", { class: "blank" }, seen ? "" : "…");
    const name = seen?.error
      ? el("span", { class: "error small" }, `${file.name}: ${seen.error}.`)
      : el("span", { class: "name small soft", title: file.name }, file.name);
    const remove = el("button", {
      type: "button", class: "quiet", "aria-label": `Leave out ${file.name}`,
      onclick: () => this.remove(file),
    }, "×");
    return el("li", { class: seen?.error ? "bad" : "" }, picture, name, remove);
  }
}

/** An error with the page's label for the form's field. */
export const labelled = (text) => text.replaceAll("`identifier`", "“Rare word” under “More settings”");
const photos = (count) => `${count} ${count === 1 ? "photo" : "photos"}`;
