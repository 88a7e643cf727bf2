// The REST API as the pages ask it. The key is kept for the tab's session, and goes into a header, never into an address.

const BASE = new URL("../", document.baseURI);
const KEY = "gradstore key";

/** The server refused; `body` is its problem (RFC 9457). */
export class Refused extends Error {
  constructor(body) {
    super(body.detail);
    this.body = body;
  }
}

/** The server cannot be reached. */
export class NoAnswer extends Error {
  constructor() {
    super("The server does not answer. Is it running (gradstore serve)?");
  }
}

/** Whether an error only says that the user has gone to another page. */
export const isAborted = (error) => error.name === "AbortError";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The JSON answer to a GET. */
export async function get(path, params = {}, signal = undefined) {
  return (await send("GET", path, { params, signal })).json();
}

/** The JSON answer to a POST. */
export async function post(path, body = undefined, signal = undefined) {
  return (await send("POST", path, { body, signal })).json();
}

/** The JSON answer to a GET that may need scores first; `onJob` hears of the job that computes them. Its failure is thrown. */
export async function getScored(path, params, signal, onJob) {
  for (;;) {
    const response = await send("GET", path, { params: { ...params, wait: 5 }, signal });
    if (response.status !== 202) return response.json();
    let job = await response.json();
    for await (job of follow(job.id, signal)) onJob(job);
    if (job.error) throw new Refused(job.error); // asked again, the server would start it anew; of a cancelled one it says so itself
  }
}

/** Save what a GET answers under a name of the user's choice. */
export async function save(path, params, name, accept) {
  const content = await (await send("GET", path, { params, accept })).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** The states of a job until it has finished, over broken connections. */
export async function* follow(id, signal, onBreak = () => {}) {
  while (!signal.aborted) {
    try {
      const response = await send("GET", `jobs/${encodeURIComponent(id)}/events`, { signal, accept: "text/event-stream" });
      for await (const { name, data } of events(response.body)) {
        yield JSON.parse(data);
        if (name === "finished") return;
      }
    } catch (error) {
      if (isAborted(error) || error instanceof Refused) throw error;
      onBreak();
    }
    await pause(1000, signal);
  }
}

/** Wait; ends at once with the signal. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** Signals of which each gives up the one before: an answer that comes late does not stand for a newer question. */
export function successive(signal) {
  let last = null;
  return () => {
    last?.abort();
    last = new AbortController();
    return AbortSignal.any([signal, last.signal]);
  };
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (buffer + value).split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s)));
        if (fields.event) yield { name: fields.event, data: fields.data };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(method, path, { params = {}, body = undefined, signal = undefined, accept = "application/json" }) {
  const address = new URL(path, BASE);
  for (const [name, value] of Object.entries(params)) {
    for (const item of [value].flat()) if (item !== null && item !== undefined && item !== "") address.searchParams.append(name, item);
  }
  const headers = { Accept: accept };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    throw isAborted(error) ? error : new NoAnswer();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  try {
    return new Refused(await response.json());
  } catch {
    const detail = `The server answered ${response.status} and nothing that can be read.`;
    return new Refused({ title: response.statusText, status: response.status, detail, errors: [] });
  }
}
