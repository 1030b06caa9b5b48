// A place for a picture: first empty, then the picture or what went wrong.

import { el, seconds } from "./dom.js";

export function adapterText(adapter) {
  if (adapter === null) return "the base";
  if (typeof adapter === "string") return adapter;
  return Object.entries(adapter).map(([name, strength]) => `${name} ${strength.toFixed(2)}`).join(" + ");
}

/** A record of the history: {asked: {prompt, adapter, seed}, settings, image, made, took, warning}. */
export class Tile {
  constructor(asked, settings, reuse) {
    this.asked = asked;
    this.settings = settings;
    this.reuse = reuse;
    this.note = el("span", { class: "small soft" }, "Waiting…");
    this.node = el("li", { class: "tile", "aria-busy": "true" },
      el("div", { class: "blank" }, this.note), caption(asked));
  }

  static of(record, reuse) {
    const tile = new Tile(record.asked, record.settings, reuse);
    tile.show(record);
    return tile;
  }

  say(text) {
    this.note.textContent = text;
  }

  /** The record of what the server answered. */
  done(answer) {
    const { prompt } = this.asked;
    const { adapter, seed, image, warning, waited, drawn, batch } = answer;
    const record = {
      asked: { prompt, adapter, seed }, settings: this.settings, image, warning,
      took: waited + drawn, batch, made: Date.now(),
    };
    this.show(record);
    return record;
  }

  show(record) {
    const { asked, image, took, batch, warning } = record;
    const url = `data:image/png;base64,${image}`;
    const text = `${asked.prompt}, ${adapterText(asked.adapter)}, seed ${asked.seed}`;
    const facts = el("span", { class: "small soft" }, `seed ${asked.seed} · ${seconds(took)}`);
    const beside = batch > 1 ? el("span", { class: "small soft beside" }, `${batch} at once`) : null;
    const save = el("a", {
      href: url, download: `dreamtune-${asked.seed}.png`, class: "small", "aria-label": `Save: ${text}`,
    }, "Save");
    this.node.replaceChildren(
      el("button", {
        type: "button", class: "picture", title: "Use these settings again",
        "aria-label": `Use these settings again: ${text}`, onclick: () => this.reuse(record),
      }, el("img", { src: url, alt: "" })),
      caption(asked),
      el("p", { class: "facts" }, facts, save, beside),
      ...(warning ? [el("p", { class: "small error" }, warning)] : []),
    );
    this.node.removeAttribute("aria-busy");
  }

  failed(text) {
    this.node.removeAttribute("aria-busy");
    this.node.classList.add("bad");
    this.note.classList.add("error");
    this.note.textContent = text;
  }
}

function caption({ prompt, adapter }) {
  return el("p", { class: "caption" }, el("span", { class: "words" }, prompt), " ",
    el("span", { class: "small soft" }, adapterText(adapter)));
}
