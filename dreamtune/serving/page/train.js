// A subject is asked for; the cards of those that train.

import { $, el, say } from "./dom.js";
import { json } from "./api.js";
import { labelled, Photos } from "./photos.js";
import { JobCard } from "./job.js";

const SHOWN = 6; // jobs that are over, beside those that are not

/** about: what GET /about says of training; names: () => those that are served. */
export function startTraining(about, names, onDone) {
  if (!about) {
    $("no-training").hidden = false;
    $("train").hidden = true;
    return;
  }
  const photos = new Photos(about, (words) => fitName(words, taken));
  const cards = new Map();
  const taken = () => new Set([...names(), ...[...cards.values()].map((c) => c.job.name)]);
  $("train-method").append(...about.methods.map((name) => el("option", { value: name }, name)));
  $("train-method").value = about.method;
  $("train-prompt").maxLength = about.prompt;
  $("train-steps").max = about.max_steps;

  const show = (job, isNew) => {
    if (cards.has(job.id)) return;
    const card = new JobCard(job, onDone);
    cards.set(job.id, card);
    $("jobs").prepend(card.node);
    $("jobs-part").hidden = false;
    card.start(isNew);
  };
  $("train-name").addEventListener("input", ({ target }) => {
    target.dataset.own = target.value ? "yes" : "";
  });
  $("train").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(photos, (job) => show(job, true));
  });
  listed().then((jobs) => jobs.forEach((job) => show(job, false)), () => {});
}

/** The oldest first, all that are not over. */
async function listed() {
  const { jobs } = await json("/jobs");
  const over = jobs.filter((job) => job.ended !== null).slice(-SHOWN);
  return jobs.filter((job) => job.ended === null || over.includes(job));
}

/** The name of what the words name, until the user writes one. */
function fitName(words, taken) {
  const field = $("train-name");
  if (field.dataset.own || !words) return;
  const noun = words.class_noun.replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40);
  const used = new Set([...taken()].map((name) => name.toLowerCase()));
  let name = noun || "subject";
  for (let n = 2; used.has(name.toLowerCase()); n += 1) name = `${noun || "subject"}-${n}`;
  field.value = name;
}

const FIELDS = {
  prompt: "train-prompt", name: "train-name", method: "train-method", steps: "train-steps",
  seed: "train-seed", learning_rate: "train-rate", identifier: "train-identifier",
};

async function submit(photos, show) {
  const status = $("train-status");
  const button = $("train").querySelector("button.primary");
  if (button.disabled) return;
  if (!photos.good.length) {
    say(status, "Choose at least one photo that can be used first.", "error");
    $("photos").focus();
    return;
  }
  const form = new FormData();
  for (const file of photos.good) form.append("photos", file, file.name);
  for (const [name, id] of Object.entries(FIELDS)) {
    if ($(id).value.trim()) form.append(name, $(id).value.trim());
  }
  button.disabled = true;
  say(status, "Sending the photos…");
  try {
    const job = await json("/train", { method: "POST", body: form });
    say(status, `The photos of ${job.name} are sent; how it trains is told below.`);
    show(job);
    photos.clear();
    Object.assign($("train-name"), { value: "" }).dataset.own = "";
  } catch (error) {
    if (error.name !== "AbortError") say(status, labelled(error.message), "error");
  } finally {
    button.disabled = false;
  }
}
