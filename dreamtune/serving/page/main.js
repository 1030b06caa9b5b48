// The page: what the server offers, and whether it is there.

import { $, say } from "./dom.js";
import { json, onKey, onReach } from "./api.js";
import { Generator } from "./generate.js";
import { startTraining } from "./train.js";

const EVERY = 5000; // milliseconds between looks at the server
let adapters = [];
let generator = null;

function reach(reached) {
  $("offline").hidden = reached;
  say($("offline"), reached ? "" : "The server cannot be reached. What you wrote stays here; asking again…");
  if (!reached) say($("server"), "offline", "error");
}

onReach(reach);

onKey((wrong) => new Promise((resolve) => {
  const dialog = $("key-dialog");
  if (wrong) say($("key-why"), "That key was not taken. Try again.", "error");
  $("key").value = "";
  dialog.showModal();
  dialog.oncancel = (event) => event.preventDefault(); // nothing goes without
  $("key-form").onsubmit = () => resolve($("key").value.trim());
}));

async function serve() {
  ({ adapters } = await json("/adapters"));
  generator.serve(adapters);
}

/** Whether an adapter of that name is served now. */
async function trained(name, isNew) {
  const before = adapters.some((adapter) => adapter.name === name);
  if (isNew || !before) await serve();
  return adapters.some((adapter) => adapter.name === name);
}

async function look() {
  try {
    const found = await (await fetch("/health", { cache: "no-store" })).json();
    reach(true);
    const count = `${found.adapters} ${found.adapters === 1 ? "subject" : "subjects"}`;
    const queue = found.queue ? `, ${found.queue} waiting` : "";
    const state = found.ready ? `ready${queue}` : found.live ? "shutting down" : "cannot draw";
    say($("server"), `${count} · ${found.device} · ${state}`, found.ready ? "" : "error");
    return true;
  } catch {
    reach(false);
    return false;
  }
}

const pause = () => new Promise((done) => { setTimeout(done, EVERY); });

async function start() {
  while (!(await look())) await pause();
  const about = await json("/about");
  document.title = `dreamtune · ${about.base}`;
  generator = new Generator(about);
  await serve();
  startTraining(about.training, () => adapters.map(({ name }) => name), trained);
  document.body.dataset.ready = "yes";
  for (;;) {
    await pause();
    if (!document.hidden) await look();
  }
}

start().catch((error) => {
  $("offline").hidden = false;
  say($("offline"), `The page cannot begin: ${error.message} Reload it to try again.`);
});
