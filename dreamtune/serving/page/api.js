// The server: requests with the key, errors as sentences, and streams of events.

const KEY = "dreamtune-key";
const STREAMS = 2; // open at once: a browser has six connections to a server, others need them too
const TURN = 3000; // milliseconds of a stream while others wait for one
const AGAIN = 2000;
const heard = new Set();
let askForKey = null; // answered by the page: () => Promise of a key
let asking = null;

export class Failure extends Error {
  /** status 0: the server could not be reached. */
  constructor(status, text, retry = 0) {
    super(text);
    this.status = status;
    this.retry = retry;
  }
}

export const onReach = (listener) => heard.add(listener);
export const onKey = (asks) => { askForKey = asks; };

function tell(reached) {
  for (const listener of heard) listener(reached);
}

function headersOf(more) {
  const key = sessionStorage.getItem(KEY);
  return { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...more };
}

/** The answer, once the key is right. Raises Failure, and AbortError where `signal` says so. */
export async function ask(path, { headers = {}, ...options } = {}) {
  for (;;) {
    const sent = sessionStorage.getItem(KEY);
    let answer;
    try {
      answer = await fetch(path, { ...options, headers: headersOf(headers) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      tell(false);
      throw new Failure(0, "The server cannot be reached.");
    }
    tell(true);
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await newKey(sent);
      continue;
    }
    throw new Failure(answer.status, await sentences(answer), Number(answer.headers.get("Retry-After")));
  }
}

/** Asked once, however many requests were refused for the same key. */
async function newKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return;
  asking ??= askForKey(refused !== null).finally(() => { asking = null; });
  sessionStorage.setItem(KEY, await asking);
}

async function sentences(answer) {
  try {
    const told = await answer.json();
    const parts = [told.error];
    if (told.got != null && typeof told.got !== "object") parts.push(`Got ${told.got}.`);
    if (told.way_out) parts.push(told.way_out);
    return parts.join(" ");
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

export async function json(path, options) {
  return (await ask(path, options)).json();
}

export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return json(path, { method: "POST", body: JSON.stringify(body), headers, signal });
}

/** A URL of a picture that needs the key; whoever asked revokes it. */
export async function pictureURL(path) {
  return URL.createObjectURL(await (await ask(path)).blob());
}

export const wait = (time) => new Promise((done) => { setTimeout(done, time); });

let open = 0;
const waiting = [];

async function turn() {
  if (open >= STREAMS) await new Promise((go) => { waiting.push(go); });
  else open += 1;
}

function over() {
  const next = waiting.shift();
  if (next) next(); // it takes the place
  else open -= 1;
}

/**
 * Calls `heard` with each event of a stream, by number, until the stream is over: an event's kind is
 * in `last`, or the server has nothing more to tell. A connection that breaks is made again from the
 * last event on. Ends when `signal` does.
 */
export async function follow(path, last, heard, signal) {
  let after = "0";
  while (!signal.aborted) {
    await turn();
    const ended = new AbortController();
    const stop = () => ended.abort();
    signal.addEventListener("abort", stop);
    const clock = setInterval(() => { if (waiting.length) ended.abort(); }, TURN);
    try {
      const options = { headers: { "Last-Event-ID": after }, signal: ended.signal };
      const answer = await ask(path, options);
      if (answer.status === 204) return;
      for await (const event of parsed(answer.body)) {
        after = event.id ?? after;
        heard(event.data);
        if (last.includes(event.data.kind)) return;
      }
    } catch (error) {
      if (error.status >= 400 && error.status !== 503) throw error;
    } finally {
      clearInterval(clock);
      signal.removeEventListener("abort", stop);
      ended.abort();
      over();
    }
    await wait(AGAIN);
  }
}

/** Server-sent events of a body: {id, data}, data being JSON. */
export async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split("\n")) {
        const at = line.indexOf(": ");
        if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
      }
      if (fields.data) yield { id: fields.id, data: JSON.parse(fields.data) };
    }
  }
}
