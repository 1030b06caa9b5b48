// The card of one training: how far it is, its scores, its pictures.

import { el, say, seconds } from "./dom.js";
import { ask, follow, json, pictureURL } from "./api.js";
import { chart, lastOf, TITLES } from "./chart.js";

const OVER = ["done", "failed", "cancelled"];
const QUARTERS = 4; // how often progress is read out

export class JobCard {
  /**
   * job: as GET /jobs gives it; onDone: told the name of an adapter that is trained
   * now, and whether it is new here; answers whether it is served.
   */
  constructor(job, onDone) {
    this.job = job;
    this.onDone = onDone;
    this.points = [];
    this.steps = job.steps ?? 0;
    this.told = -1;
    this.ended = new AbortController();
    this.title = el("h4", {}, job.name);
    this.badge = el("span", { class: "badge" });
    this.bar = el("progress", { max: 1, value: 0, "aria-label": `Training of ${job.name}` });
    this.status = el("p", { class: "small soft" });
    this.live = el("p", { class: "unseen", role: "status" });
    this.scores = el("div", { class: "scores" });
    this.samples = el("div", { class: "samples" });
    this.cancel = el("button", {
      type: "button", class: "quiet", onclick: () => this.stop(), "aria-label": `Cancel ${job.name}`,
    }, "Cancel");
    const words = `“${job.prompt}”, ${job.method}, ${job.photos} ${job.photos === 1 ? "photo" : "photos"}`;
    this.node = el("article", { class: "card job", "aria-label": `Training of ${job.name}` },
      el("div", { class: "title" }, this.title, this.badge, this.cancel),
      el("p", { class: "small soft" }, words),
      this.bar, this.status, this.live, this.scores, this.samples);
    this.state(job.state);
  }

  /** isNew: it was asked for here, and is looked at. */
  async start(isNew) {
    if (isNew) this.node.scrollIntoView({ block: "nearest" });
    try {
      await follow(`/jobs/${this.job.id}/events`, OVER, (e) => this.heard(e), this.ended.signal);
    } catch (error) {
      say(this.status, error.message, "error");
    }
  }

  state(kind) {
    this.node.dataset.state = kind;
    this.badge.textContent = STATES[kind] ?? kind;
    const over = OVER.includes(kind);
    this.cancel.hidden = over;
    this.bar.hidden = over;
  }

  heard(event) {
    const { kind } = event;
    if (kind === "progress") {
      if (event.scores) this.score(event);
      else this.progress(event);
    } else if (kind === "sample") this.sample(event.step);
    else if (kind === "started") {
      this.state("running");
      const beside = event.jobs > 1 ? `, with ${event.jobs - 1} others at once` : "";
      this.tell(`Training has begun${beside}. The base is being loaded…`);
    } else if (OVER.includes(kind)) this.end(event);
    else this.tell(SAID[kind] ? `${SAID[kind]}${event.message ? `: ${event.message}` : ""}.` : kind);
  }

  tell(text, kind = "") {
    say(this.status, text, kind);
    say(this.live, `${this.job.name}: ${text}`);
  }

  progress({ step, steps, loss, seconds_left: left }) {
    this.state("running");
    this.steps = steps;
    this.bar.max = steps;
    this.bar.value = step;
    const time = step < steps ? `, about ${seconds(left)} left` : "";
    const error = loss === null ? "" : `, loss ${loss.toFixed(3)}`;
    const text = `Step ${step} of ${steps}${error}${time}`;
    say(this.status, text);
    const quarter = Math.floor((QUARTERS * step) / steps);
    if (quarter > this.told) say(this.live, `${this.job.name}: ${text}`);
    this.told = Math.max(this.told, quarter);
  }

  score({ step, scores }) {
    this.points.push({ step, scores });
    if (this.steps) this.bar.max = this.steps;
    this.bar.value = Math.max(this.bar.value, this.steps ? step : 0);
    const known = Object.keys(TITLES).filter((key) => lastOf(this.points, key) !== undefined);
    if (!known.length) return;
    const legend = known.map((key) => el("li", {},
      el("span", { class: `swatch ${key}` }), `${TITLES[key]} ${lastOf(this.points, key).toFixed(3)}`));
    this.scores.replaceChildren(el("ul", { class: "legend" }, ...legend), chart(this.points, this.steps));
  }

  async sample(step) {
    const picture = el("img", { alt: `Pictures of ${this.job.name} at step ${step}` });
    const figure = el("figure", {}, picture, el("figcaption", { class: "small soft" }, `Step ${step}`));
    this.samples.prepend(figure); // the newest is seen first
    try {
      const url = await pictureURL(`/jobs/${this.job.id}/samples/${step}`);
      picture.addEventListener("load", () => URL.revokeObjectURL(url));
      picture.src = url;
    } catch (error) {
      figure.replaceChildren(el("p", { class: "small error" }, `Step ${step}: ${error.message}`));
    }
  }

  async end(event) {
    this.state(event.kind);
    const why = event.message ? `: ${event.message}` : "";
    if (event.kind !== "done") {
      this.tell(`${STATES[event.kind]}${why}`, event.kind === "failed" ? "error" : "");
      return;
    }
    const best = `Done. The best step was ${event.best_step}`;
    this.tell(`${best}.`);
    if (await this.onDone(this.job.name, this.job.state !== "done")) {
      this.tell(`${best}; ${this.job.name} can be drawn now.`);
      return;
    }
    const { message } = await json(`/jobs/${this.job.id}`);
    this.tell(`${best}, but it is not served${message ? `: ${message}` : "."}`, "error");
  }

  async stop() {
    this.cancel.disabled = true;
    try {
      await ask(`/jobs/${this.job.id}`, { method: "DELETE" });
      if (this.node.dataset.state === "running") say(this.status, "Cancelled after this step…");
    } catch (error) {
      say(this.status, error.message, "error");
    } finally {
      this.cancel.disabled = false;
    }
  }
}

const STATES = {
  waiting: "waiting", running: "training", done: "done", failed: "failed", cancelled: "cancelled",
};
const SAID = {
  queued: "In the queue", waiting: "Waiting", interrupted: "Interrupted", retried: "Started again",
};
