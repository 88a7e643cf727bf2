// Why a model has said something: the training examples that speak for it and against it, for a typed prompt and answer.

import { follow, get, post } from "../api.js";
import { allDatasets, namesOf, pools, question } from "../asking.js";
import { fill, fresh, h } from "../dom.js";
import { ago, called, decimal, duration, percent, whole } from "../format.js";
import { badge, choice, empty, facts, failure, heading, loading, panel, table } from "../parts.js";

const NUMBERS = ["dim", "seed", "max_length"];
const SEVERAL = { dataset: "datasets", checkpoint: "checkpoints", weights: "weights" };
const UNASKED = ["task", "method", "by", "neighbours", "beta", "capabilities", "strategy", "nearness", "bandwidth", "aggregate", "combine", "projection_id", "selection_seed"]; // of scores only
const LISTED = 20; // earlier ones
const draft = { prompt: "", answer: "", count: "10" }; // what was typed and not asked yet; kept over a visit of other pages

/** Fill the page: the form and what was asked before, or the answer that the address names. */
export async function show(main, context) {
  await (context.parts[1] ? showOne(main, context) : showForm(main, context));
}

// The question

async function showForm(main, context) {
  const { params, remember, signal } = context;
  const [datasets, before] = await Promise.all([allDatasets(signal), get("attributions", { limit: LISTED }, signal)]);
  const failed = h("div");
  const prompt = fresh("prompt"), answer = fresh("answer"), count = fresh("count");
  const send = h("button", { type: "submit" }, "Find examples");

  const chosen = namesOf(datasets)[params.get("dataset")] ?? params.get("dataset") ?? "";

  async function ask(event) {
    event.preventDefault();
    const { elements } = event.target;
    const row = { prompt: elements.prompt.value, completion: elements.answer.value };
    send.disabled = true;
    fill(failed);
    try {
      const job = await post("attributions", { ...asked(params), rows: [row], k: Number(elements.count.value) }, signal);
      Object.assign(draft, { prompt: "", answer: "" });
      location.hash = `#/attributions/${job.id}`;
    } catch (error) {
      context.failed(error, failed);
    } finally {
      send.disabled = false;
    }
  }

  fill(
    main,
    heading("Attribution", "Which training examples make a model say this, and which speak against it."),
    h("form", { class: "panel question", onsubmit: ask, oninput: ({ target }) => target.name in draft && (draft[target.name] = target.value) },
      h("div", { class: "field" }, h("label", { for: prompt }, "Prompt"), h("textarea", { id: prompt, name: "prompt", rows: "4", required: true, value: draft.prompt })),
      h("div", { class: "field" }, h("label", { for: answer }, "Answer of the model"), h("textarea", { id: answer, name: "answer", rows: "3", required: true, value: draft.answer })),
      h("div", { class: "filters" },
        choice("Pool", pools(datasets), chosen, (dataset) => remember({ dataset })),
        h("div", { class: "field" }, h("label", { for: count }, "Examples of each sign"), h("input", { id: count, name: "count", type: "number", min: "1", max: "100", value: draft.count, required: true })),
        send),
      failed),
    panel("Asked before", before.data.length ? earlier(before.data) : empty("Nothing has been asked yet. The same from a shell:", 'gradstore why "prompt" "answer"')),
  );
}

/** What the address says about the features, as the request takes it. */
function asked(params) {
  const fields = Object.entries(question(params)).filter(([name]) => !UNASKED.includes(name));
  return Object.fromEntries(fields.map(([name, values]) => {
    if (name in SEVERAL) return [SEVERAL[name], values];
    return [name, NUMBERS.includes(name) ? Number(values[0]) : values[0]];
  }));
}

function earlier(jobs) {
  return table("Attributions, the newest first", [
    { title: "prompt", cell: (job) => h("a", { href: `#/attributions/${job.id}` }, job.name ?? beginning(textOf(job.request.rows[0]))) },
    { title: "rows", number: true, cell: ({ request }) => whole(request.rows.length) },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "asked", cell: (job) => ago(job.created_at) },
  ], jobs);
}

const textOf = (row) => row.prompt ?? row.instruction ?? row.messages?.[0]?.content ?? JSON.stringify(row);
const beginning = (text) => (text.length > 80 ? `${text.slice(0, 79)}…` : text);

// The answer

async function showOne(main, context) {
  const id = encodeURIComponent(context.parts[1]);
  const job = await get(`attributions/${id}`, {}, context.signal);
  const place = h("div");
  fill(
    main,
    h("p", {}, h("a", { href: "#/attributions" }, "← Another question")),
    heading("Attribution", h("span", {}, "job ", h("a", { href: `#/jobs/${job.id}` }, called(job)))),
    panel("What was said", h("div", { class: "rows" }, job.request.rows.map(said))),
    place,
  );
  shown(job, place);
  if (job.result) return;
  watch(context, job.id, place).catch((error) => context.failed(error, place, () => watch(context, job.id, place)));
}

async function watch(context, id, place) {
  for await (const state of follow(id, context.signal)) {
    shown(state, place);
    if (state.finished_at) context.announce(`The attribution is ${state.status}`);
  }
}

function shown(job, place) {
  if (job.result) fill(place, found(job.result));
  else if (job.error) fill(place, panel("Why it failed", failure({ body: job.error, message: job.error.detail })));
  else fill(place, loading(job.status === "queued" ? "Waiting for a worker …" : `${job.status}: ${whole(job.progress.done)} of ${whole(job.progress.total)} ${job.progress.unit} …`));
}

function said(row) {
  const answer = row.completion ?? row.output ?? row.messages?.at(-1)?.content;
  return h("div", { class: "turns" },
    h("div", { class: "turn" }, h("span", { class: "role" }, "prompt"), h("p", { class: "text" }, textOf(row))),
    answer !== undefined && h("div", { class: "turn" }, h("span", { class: "role" }, "answer"), h("p", { class: "text" }, answer)));
}

function found({ data, searches, seconds }) {
  const parts = data.map(({ reason, loss, tokens, most, least }, number) => [
    data.length > 1 && h("h2", {}, `Row ${number + 1}`),
    reason !== null
      ? panel("Nothing was found", h("p", {}, `The row has no feature: ${reason}.`))
      : h("div", { class: "columns-2" }, ends("Speak for it", most), ends("Speak against it", least)),
    reason === null && h("p", { class: "note" }, `${whole(tokens)} tokens of the answer were looked at, with a loss of ${decimal(loss)}.`),
  ]);
  const how = table("How the examples were found", [
    { title: "pool", cell: ({ dataset }) => h("a", { href: `#/datasets/${dataset}`, class: "id" }, dataset) },
    { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    { title: "by", cell: ({ method }) => (method === "exact" ? "reading all features" : "an index") },
    { title: "recall", number: true, cell: ({ recall }) => (recall === null ? "exact" : percent(recall)) },
    { title: "time", number: true, cell: ({ seconds: time }) => duration(time) },
  ], searches);
  return h("div", {}, parts.flat(), panel("How they were found", how, facts([["in all", duration(seconds)]])));
}

function ends(title, rows) {
  const items = rows.map(({ rank, score, origin, dataset, row, id, text }) =>
    h("li", { class: "row" },
      h("header", {}, h("h3", {}, `${rank}`), h("span", {}, `influence ${decimal(score)}`), h("span", {}, origin), h("a", { href: `#/datasets/${dataset}?after=${row}` }, `row ${whole(row)}`), id !== null && h("span", { class: "id" }, id)),
      text !== null && h("p", { class: "text" }, text)));
  return panel(title, items.length ? h("ol", { class: "rows" }, items) : empty("No example."));
}
