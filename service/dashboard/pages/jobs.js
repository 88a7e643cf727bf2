// Jobs as they go: a list that keeps itself up to date, and one job with its events, its errors and what it made.

import { follow, get, isAborted, pause, post, successive } from "../api.js";
import { allDatasets, allTasks, namesOf } from "../asking.js";
import { fill, h } from "../dom.js";
import { ago, bytes, called, decimal, duration, percent, whole } from "../format.js";
import { LISTED, moreButton } from "../lists.js";
import { badge, choice, empty, facts, failure, heading, named, panel, scrolling, table } from "../parts.js";

const OF = ["dataset", "datasets", "task", "tasks", "selection", "finetune", "checkpoint", "adapter", "adapters", "gradients", "model"]; // what a request says a job is about
const PAGES = {
  "adapter-choice": "adapter-choices",
  annotation: "annotations",
  attribution: "attributions",
  cascade: "cascades",
  comparison: "comparisons",
  "estimate-validation": "estimate-validations",
  estimates: "estimates",
  generation: "generations",
  predictor: "predictors",
  projector: "projectors",
  stream: "streams",
}; // of the kinds of jobs whose results are shown elsewhere
const REFRESH = 2000; // milliseconds between two looks at the list

/** Fill the page: all jobs, or the one that the address names. */
export async function show(main, context) {
  await (context.parts[1] ? showOne(main, context) : showAll(main, context));
}

// All jobs

async function showAll(main, context) {
  const { params, signal, remember } = context;
  const body = h("tbody");
  const place = h("div");
  const note = h("p", { class: "note", role: "status" });
  const lines = new Map();
  const more = moreButton(() => ((shown += LISTED), watch().catch(failed)));
  const newest = successive(signal);
  const failed = (error) => context.failed(error, place, watch);
  let shown = LISTED;

  async function refresh(own) {
    const kind = params.get("kind"), status = params.get("status");
    const page = await get("jobs", { kind, status, limit: Math.min(shown, 1000) }, own);
    note.textContent = "";
    more.hidden = !page.has_more || shown >= 1000;
    if (!page.data.length) {
      fill(place, empty(kind || status ? "No job is like this." : "Nothing has been started yet.", kind || status ? null : "gradstore less pool.jsonl --task mmlu --model Qwen/Qwen3-0.6B"));
      return;
    }
    const listed = page.data.map((job) => line(lines, job, names, context, watch));
    if (listed.length !== body.children.length || listed.some((row, number) => row !== body.children[number])) fill(body, listed);
    if (!body.isConnected) fill(place, jobsTable(body));
  }

  /** Look at the list, and wait for a server that does not answer. */
  async function look(own) {
    try {
      await refresh(own);
    } catch (error) {
      if (isAborted(error) || error.body) throw error;
      note.textContent = "The server does not answer; trying again …";
    }
  }

  /** Look at the list now and from now on, in place of what has looked until now. */
  async function watch() {
    const own = newest();
    await look(own);
    keepFresh(look, own).catch(failed);
  }

  function filter(name) {
    return (value) => {
      remember({ [name]: value });
      watch().catch(failed);
    };
  }

  const [choices, tasks, datasets] = await Promise.all([offered(signal), allTasks(signal), allDatasets(signal)]);
  const names = namesOf([...tasks, ...datasets]);
  await refresh(signal);
  const kinds = [["", "all kinds"], ...choices("kind")];
  const states = [["", "all states"], ...choices("status")];
  fill(
    main,
    heading("Jobs", "Work that outlives its request. The list keeps itself up to date."),
    h("div", { class: "panel" },
      h("div", { class: "filters" },
        choice("Kind", kinds, params.get("kind") ?? "", filter("kind")),
        choice("State", states, params.get("status") ?? "", filter("status"))),
      place,
      h("div", { class: "pager" }, more, note)),
  );
  keepFresh(look, newest()).catch(failed);
}

/** What the server's own description says can be asked for: a new kind of job needs nothing here. */
async function offered(signal) {
  const { parameters } = (await get("openapi.json", {}, signal)).paths["/jobs"].get;
  return (name) => {
    const { schema } = parameters.find((parameter) => parameter.name === name);
    return (schema.enum ?? schema.anyOf.flatMap((one) => one.enum ?? [])).map((value) => [value, value]);
  };
}

async function keepFresh(look, signal) {
  for (;;) {
    await pause(REFRESH, signal);
    if (signal.aborted) return;
    await look(signal);
  }
}

function jobsTable(body) {
  const head = ["job", "kind", "of", "state", "progress", "started", ""].map((title) => h("th", { scope: "col" }, title || h("span", { class: "unseen" }, "actions")));
  return scrolling("Jobs", h("table", {}, h("caption", { class: "unseen" }, "Jobs, the newest first"), h("thead", {}, h("tr", {}, head)), body));
}

/** A job's line of the table, made once and changed in place, so that a button keeps the focus while numbers move. */
function line(lines, job, names, context, watch) {
  const known = lines.get(job.id);
  if (known) {
    known.update(job);
    return known.row;
  }
  const state = h("td"), done = h("td"), begun = h("td"), actions = h("td", { class: "actions" });
  let status = null;
  function update(now) {
    fill(done, progress(now));
    fill(begun, ago(now.created_at));
    if (now.status === status) return;
    if (status !== null) context.announce(`${now.kind} ${called(now)} is ${now.status}`);
    status = now.status;
    fill(state, badge(status));
    fill(actions, buttons(now, watch, (error) => context.failed(error, done, watch)));
  }
  update(job);
  const name = h("th", { scope: "row" }, named(job, `#/jobs/${encodeURIComponent(job.id)}`));
  const row = h("tr", { "data-job": job.id }, name, h("td", {}, job.kind), h("td", {}, about(job, names)), state, done, begun, actions);
  lines.set(job.id, { row, update });
  return row;
}

/** The datasets, tasks and models that a job's request names; of scores, those of their recipe. */
function about({ request }, names) {
  const fields = { ...request, ...request.recipe };
  return OF.flatMap((name) => fields[name] ?? []).map((one) => names[one] ?? one).join(", ") || "–";
}

function progress(job) {
  const { done, total, unit, rate, eta_seconds: left } = job.progress;
  const words = [`${whole(done)} of ${whole(total)} ${unit}`];
  if (job.status === "running" && rate) words.push(`${decimal(rate)} a second`);
  if (job.status === "running" && left !== null) words.push(`${duration(left)} left`);
  const share = total ? done / total : 0;
  return h("div", {}, h("progress", { max: "1", value: share, "aria-label": `progress of ${called(job)}` }), h("span", { class: "progress-text" }, words.join(" · ")));
}

function buttons(job, then, failed) {
  const act = (verb, text) => h("button", { type: "button", class: "quiet", "aria-label": `${text} ${called(job)}`, onclick: () => post(`jobs/${encodeURIComponent(job.id)}/${verb}`).then(then).catch(failed) }, text);
  if (job.status === "queued" || job.status === "running") return act("cancel", "Cancel");
  return job.status === "failed" || job.status === "cancelled" ? act("retry", "Try again") : null;
}

// One job

async function showOne(main, context) {
  const { parts, signal } = context;
  const id = encodeURIComponent(parts[1]);
  const first = await get(`jobs/${id}`, {}, signal);
  const live = h("div", { class: "panel" }), refused = h("div"), outcome = h("div"), note = h("p", { class: "note", role: "status" });
  fill(
    main,
    h("p", {}, h("a", { href: "#/jobs" }, "← All jobs")),
    heading(called(first), `${first.kind} ${first.id}`),
    live,
    note,
    refused,
    outcome,
    panel("What was asked for", h("pre", {}, h("code", {}, JSON.stringify(first.request, null, 2)))),
  );

  const failed = (error) => context.failed(error, refused, watch);
  let status = null;
  function update(job) {
    note.textContent = "";
    const state = h("div", { class: "heading" }, badge(job.status), h("div", {}, buttons(job, watch, failed)));
    if (job.status === status) {
      fill(live.lastChild, progress(job), times(job));
      return;
    }
    if (status !== null) context.announce(`The job is ${job.status}`);
    status = job.status;
    fill(live, state, h("div", {}, progress(job), times(job)));
    fill(refused);
    fill(outcome, job.error && panel("Why it failed", failure({ body: job.error, message: job.error.detail })), job.result && panel("What it made", results(job)));
  }

  let followed = false;
  async function watch() {
    update(await get(`jobs/${id}`, {}, signal));
    if (followed) return;
    followed = true;
    try {
      for await (const job of follow(parts[1], signal, () => (note.textContent = "The server does not answer; trying again …"))) update(job);
    } finally {
      followed = false;
    }
  }
  update(first);
  watch().catch(failed);
}

function times(job) {
  const ended = job.finished_at && (new Date(job.finished_at) - new Date(job.started_at ?? job.created_at)) / 1000;
  return facts([
    ["asked for", ago(job.created_at)],
    ["started", job.started_at && ago(job.started_at)],
    ["finished", job.finished_at && ago(job.finished_at)],
    ["from start to end", job.finished_at && job.started_at && duration(ended)],
  ]);
}

function results(job) {
  const { result } = job;
  const page = PAGES[job.kind] && h("p", {}, h("a", { href: `#/${PAGES[job.kind]}/${encodeURIComponent(job.id)}` }, "Look at it"));
  const raw = h("details", {}, h("summary", {}, "All of it as JSON"), h("pre", {}, h("code", {}, JSON.stringify(result, null, 2))));
  if (job.kind === "gradients") return h("div", {}, featureSets(result), excluded(result), raw);
  const simple = Object.entries(result).filter(([, value]) => typeof value === "number" || typeof value === "string");
  return h("div", {}, page, facts(simple.map(([name, value]) => [name.replaceAll("_", " "), typeof value === "number" ? readable(name, value) : value])), h("p"), raw);
}

function readable(name, value) {
  if (name === "seconds") return duration(value);
  return Number.isInteger(value) ? whole(value) : decimal(value);
}

function featureSets({ feature_sets: sets }) {
  return table("Feature sets", [
    { title: "feature set", cell: ({ id }) => h("span", { class: "id" }, id) },
    { title: "kind", cell: ({ kind, adam }) => (adam ? `${kind} (${adam})` : kind) },
    { title: "checkpoint", cell: ({ checkpoint }) => h("span", { class: "id" }, checkpoint) },
    { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    { title: "dim", number: true, cell: ({ dim }) => whole(dim) },
    { title: "without feature", number: true, cell: ({ excluded: count, rows }) => (count ? `${whole(count)} (${percent(count / rows)})` : "0") },
    { title: "size", number: true, cell: ({ bytes: size }) => bytes(size) },
  ], sets);
}

function excluded({ excluded: rows, total_excluded: total }) {
  if (!total) return null;
  const first = total > rows.length ? `The first ${whole(rows.length)} of ${whole(total)} rows without a feature` : `${whole(total)} rows without a feature`;
  return h("details", {}, h("summary", {}, first), table(first, [
    { title: "row", number: true, cell: ({ row }) => whole(row) },
    { title: "why", cell: ({ reason }) => reason },
    { title: "checkpoint", cell: ({ checkpoint }) => h("span", { class: "id" }, checkpoint) },
  ], rows));
}
