// A row of what is to be drawn: a prompt, subjects with their strengths, a seed.

import { el, fresh } from "./dom.js";

const STRONGEST = 1.5;

/** The prompt with the words of one subject in the place of another's; an empty one becomes them. */
export function reworded(prompt, adapters, own) {
  if (!own?.prompt) return prompt;
  const found = adapters.map((adapter) => adapter.prompt).filter((words) => words && prompt.includes(words));
  const [longest] = found.sort((a, b) => b.length - a.length);
  return longest ? prompt.replace(longest, () => own.prompt) : prompt || own.prompt;
}

export class Row {
  /**
   * known: () => adapters that are served; most: of them in a picture; changed: called when the
   * number of rows or what stands in one changes; from: {prompt, adapters: name -> strength, seed}.
   */
  constructor({ known, most, longest, changed, remove, from = {} }) {
    this.known = known;
    this.most = most;
    this.changed = changed;
    this.strengths = new Map(Object.entries(from.adapters ?? {}));
    const ids = { prompt: fresh("prompt"), seed: fresh("seed"), adapter: fresh("adapter") };
    this.prompt = el("input", {
      id: ids.prompt, type: "text", maxlength: longest, autocomplete: "off", class: "prompt",
      placeholder: "a sks fox in the snow", oninput: changed,
    });
    this.prompt.value = from.prompt ?? "";
    this.seed = el("input", {
      id: ids.seed, type: "number", min: 0, step: 1, placeholder: "any", class: "seed",
    });
    this.seed.value = from.seed ?? "";
    this.choice = el("select", { id: ids.adapter, onchange: () => this.chosen() });
    this.sliders = el("ul", { class: "sliders", "aria-label": "Strengths" });
    this.legend = el("legend", {});
    this.removal = el("button", { type: "button", class: "corner", onclick: () => remove(this) }, "×");
    this.node = el("fieldset", { class: "row" },
      this.legend,
      this.removal,
      el("div", { class: "field" }, el("label", { for: ids.prompt }, "Prompt"), this.prompt),
      el("div", { class: "row-more" },
        el("div", { class: "field" }, el("label", { for: ids.adapter }, "Subject"), this.choice),
        el("div", { class: "field narrow" }, el("label", { for: ids.seed }, "Seed"), this.seed)),
      this.sliders);
    this.draw();
  }

  get adapters() {
    return Object.fromEntries(this.strengths);
  }

  /** As POST /generate takes it. */
  get body() {
    const names = [...this.strengths.keys()];
    const plain = names.length === 1 && this.strengths.get(names[0]) === 1;
    const seed = this.seed.value.trim();
    return {
      prompt: this.prompt.value.trim(),
      adapter: plain ? names[0] : names.length ? this.adapters : null,
      ...(seed === "" ? {} : { seed: Number(seed) }),
    };
  }

  get state() {
    return { prompt: this.prompt.value, adapters: this.adapters, seed: this.seed.value };
  }

  number(n, alone) {
    this.legend.textContent = `Picture ${n}`;
    this.removal.hidden = alone;
    this.removal.setAttribute("aria-label", `Remove picture ${n}`);
  }

  chosen() {
    const name = this.choice.value;
    if (!name) return;
    const own = this.known().find((adapter) => adapter.name === name);
    if (!this.strengths.size) this.prompt.value = reworded(this.prompt.value, this.known(), own);
    this.strengths.set(name, 1);
    this.draw();
    this.choice.focus();
    this.changed();
  }

  /** The choice and the sliders anew: the adapters that are served change. */
  draw() {
    const names = this.known().map((adapter) => adapter.name);
    const left = names.filter((name) => !this.strengths.has(name));
    const full = this.strengths.size >= this.most;
    const first = this.strengths.size ? (full ? "no more" : "one more…") : "the base";
    this.choice.replaceChildren(
      el("option", { value: "" }, first),
      ...(full ? [] : left.map((name) => el("option", { value: name }, name))),
    );
    this.choice.disabled = full || !left.length;
    this.sliders.replaceChildren(...[...this.strengths].map(([name, value]) => this.slider(name, value, names)));
  }

  slider(name, value, names) {
    const id = fresh("strength");
    const shown = el("output", { for: id }, value.toFixed(2));
    const input = el("input", {
      id, type: "range", min: 0, max: Math.max(STRONGEST, value), step: 0.05,
      oninput: ({ target }) => {
        this.strengths.set(name, Number(target.value));
        shown.textContent = Number(target.value).toFixed(2);
        this.changed();
      },
    });
    input.value = value;
    const remove = el("button", {
      type: "button", class: "quiet", "aria-label": `Without ${name}`,
      onclick: () => {
        this.strengths.delete(name);
        this.draw();
        this.choice.focus();
        this.changed();
      },
    }, "×");
    const gone = names.includes(name) ? null : el("span", { class: "error small" }, "not served");
    return el("li", {}, el("label", { for: id, title: name }, name), input, shown, remove, gone);
  }
}
