// Rows are sent together, and their pictures fill their places as they come.

import { $, el, say, seconds } from "./dom.js";
import { post, wait } from "./api.js";
import { reworded, Row } from "./rows.js";
import { History } from "./history.js";
import { Tile } from "./tile.js";

const KEPT = "dreamtune-rows"; // what is being written survives a reload
const PATIENCE = 60; // seconds that a full server may ask to wait in all

export class Generator {
  /** about: what GET /about says. */
  constructor(about) {
    this.about = about;
    this.adapters = [];
    this.rows = [];
    this.history = new History((record) => this.reuse(record));
    $("steps").placeholder = about.steps;
    $("steps").max = about.max_steps;
    $("guidance").placeholder = about.guidance_scale;
    $("negative").maxLength = about.max_prompt;
    $("size").append(...about.sizes.map((size) => el("option", { value: size }, `${size} × ${size}`)));
    $("size").disabled = about.sizes.length === 1;
    for (const from of kept() ?? [{}]) this.add(from);
    $("add-row").addEventListener("click", () => {
      const last = this.rows.at(-1)?.state ?? {};
      this.add({ prompt: last.prompt, adapters: {}, seed: last.seed }).prompt.focus();
    });
    $("row-each").addEventListener("click", () => this.each());
    $("generate").addEventListener("submit", (event) => {
      event.preventDefault();
      this.draw();
    });
    $("stop").addEventListener("click", () => this.running?.abort());
    this.history.show();
  }

  /** The adapters that are served now. */
  serve(adapters) {
    this.adapters = adapters;
    for (const row of this.rows) row.draw();
    $("row-each").hidden = adapters.length < 2;
  }

  add(from = {}) {
    const row = new Row({
      known: () => this.adapters,
      most: this.about.adapters_in_a_picture,
      longest: this.about.max_prompt,
      changed: () => this.keep(),
      remove: (gone) => this.remove(gone),
      from,
    });
    this.rows.push(row);
    $("rows").append(row.node);
    this.keep();
    return row;
  }

  remove(row) {
    const at = this.rows.indexOf(row);
    this.rows.splice(at, 1);
    row.node.remove();
    this.keep();
    this.rows[Math.min(at, this.rows.length - 1)].prompt.focus();
  }

  keep() {
    this.rows.forEach((row, i) => row.number(i + 1, this.rows.length === 1));
    const count = this.rows.length;
    $("draw").textContent = count === 1 ? "Draw" : `Draw ${count} pictures`;
    sessionStorage.setItem(KEPT, JSON.stringify(this.rows.map((row) => row.state)));
  }

  /** The first row's prompt for each subject, in that one's own words. */
  each() {
    const { prompt, seed } = this.rows[0].state;
    for (const row of this.rows) row.node.remove();
    this.rows = [];
    for (const adapter of this.adapters) {
      const words = reworded(prompt, this.adapters, adapter);
      this.add({ prompt: words, adapters: { [adapter.name]: 1 }, seed });
    }
    this.rows[0].prompt.focus();
  }

  reuse({ asked, settings }) {
    const [first] = this.rows;
    const empty = this.rows.length === 1 && !first.prompt.value && !first.strengths.size;
    const row = this.add({
      prompt: asked.prompt, adapters: strengthsOf(asked.adapter), seed: asked.seed,
    });
    if (empty) this.remove(first);
    for (const [id, name] of [["steps", "steps"], ["guidance", "guidance_scale"], ["negative", "negative_prompt"]]) {
      $(id).value = settings[name] ?? "";
    }
    if (this.about.sizes.includes(settings.size)) $("size").value = settings.size;
    say($("draw-status"), `Picture ${this.rows.length} has the settings of that one.`);
    row.prompt.focus();
  }

  get settings() {
    const found = { size: Number($("size").value) };
    if ($("steps").value) found.steps = Number($("steps").value);
    if ($("guidance").value) found.guidance_scale = Number($("guidance").value);
    if ($("negative").value.trim()) found.negative_prompt = $("negative").value.trim();
    return found;
  }

  async draw() {
    const empty = this.rows.find((row) => !row.body.prompt);
    if (empty) {
      say($("draw-status"), "Each row needs a prompt.", "error");
      empty.prompt.focus();
      return;
    }
    if (this.running) return;
    this.running = new AbortController();
    const { signal } = this.running;
    const { settings } = this;
    $("draw").disabled = true;
    $("stop").hidden = false;
    const began = performance.now();
    const tiles = this.rows.map((row) => new Tile(row.body, settings, (record) => this.reuse(record)));
    $("results").replaceChildren(...tiles.map((tile) => tile.node));
    say($("draw-status"), `Drawing ${tiles.length === 1 ? "a picture" : `${tiles.length} pictures`}…`);
    const made = await Promise.all(tiles.map((tile) => this.fill(tile, signal)));
    const count = made.filter(Boolean).length;
    const took = seconds((performance.now() - began) / 1000);
    const failed = signal.aborted ? "stopped" : `${tiles.length - count} failed`;
    const drawn = count ? `${count} of ${tiles.length} drawn in ${took}` : "Nothing was drawn";
    const rest = count < tiles.length ? `, ${failed}` : "";
    say($("draw-status"), `${drawn}${rest}.`, rest && "error");
    $("draw").disabled = false;
    $("stop").hidden = true;
    this.running = null;
  }

  /** Whether the picture came. */
  async fill(tile, signal) {
    try {
      const answer = await patient({ ...tile.asked, ...tile.settings }, signal, (text) => tile.say(text));
      await this.history.add(tile.done(answer));
      return true;
    } catch (error) {
      tile.failed(error.name === "AbortError" ? "Stopped." : error.message);
      return false;
    }
  }
}

/** Asked again when a full server says so. */
async function patient(body, signal, told) {
  const until = Date.now() + PATIENCE * 1000;
  for (;;) {
    try {
      return await post("/generate", body, signal);
    } catch (error) {
      if (error.status !== 503 || !error.retry || Date.now() + error.retry * 1000 > until) throw error;
      told(`Many are asking: again in ${error.retry} s…`);
      await wait(error.retry * 1000);
      signal.throwIfAborted();
    }
  }
}

export function strengthsOf(adapter) {
  if (adapter === null) return {};
  return typeof adapter === "string" ? { [adapter]: 1 } : adapter;
}

function kept() {
  try {
    const rows = JSON.parse(sessionStorage.getItem(KEPT));
    return Array.isArray(rows) && rows.length ? rows : null;
  } catch {
    return null;
  }
}
