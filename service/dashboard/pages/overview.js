// The landing page: what the store holds, what it weighs, who works, and what to do next.

import { get } from "../api.js";
import { stack } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, bytes, percent, plural, whole } from "../format.js";
import { badge, empty, heading, named, panel, table } from "../parts.js";

const CARDS = [
  ["datasets", "dataset", "#/datasets"],
  ["tasks", "task", "#/scores"],
  ["runs", "run", null],
  ["gradients", "gradients job", "#/jobs?kind=gradients"],
  ["selections", "selection", "#/selections"],
  ["attributions", "attribution", "#/attributions"],
  ["finetunes", "fine-tune", "#/training"],
  ["evaluations", "evaluation", "#/training"],
];

const PARTS = 6; // of the store before the rest is folded

/** The way from an empty store to a measured model: what is done, by the store's counts, and the command for the rest. */
const STEPS = [
  [(counts) => counts.datasets, "Upload a pool of examples to choose from", "gradstore datasets upload pool.jsonl --name pool"],
  [(counts) => counts.tasks, "Upload a few examples of what the model should get better at", "gradstore tasks upload mmlu.zip --kind mmlu --name mmlu"],
  [(counts) => counts.runs, "Warm a model up on a part of the pool", "gradstore finetunes create --dataset pool --fraction 0.05 --model Qwen/Qwen3-0.6B --name warmup"],
  [(counts) => counts.gradients > 1, "Compute the gradients of pool and task", "gradstore gradients create --dataset pool --run <run>\ngradstore gradients create --task mmlu --run <run>"],
  [(counts) => counts.selections, "Select the examples that help", "gradstore select --task mmlu --pct 0.05"],
  [(counts) => counts.finetunes > 1, "Train on the selection", "gradstore finetunes create --selection <selection> --model Qwen/Qwen3-0.6B"],
  [(counts) => counts.evaluations, "Measure what it brought", "gradstore evaluations create --finetune <fine-tune> --task mmlu"],
];

const PART_NAMES = {
  "features-cache": "features read from a bucket",
  imports: "files to be imported",
  matrices: "rows of streams, and labels",
  ngrams: "word runs of tasks",
  questions: "questions of attributions",
  trainings: "trainings of validations and comparisons",
  work: "unfinished trainings",
  other: "catalog and uploads",
};

/** Fill the page. */
export async function show(main, context) {
  const [usage, service, recent] = await Promise.all([
    get("usage", {}, context.signal),
    get("ready", {}, context.signal),
    get("jobs", { limit: 5 }, context.signal),
  ]);
  const steps = nextSteps(usage.counts);
  fill(
    main,
    heading("Overview", `gradstore ${service.version} at ${location.host}`),
    cards(usage.counts),
    steps,
    h("div", { class: "columns-2" }, size(usage), panel("Workers", workers(service))),
    panel("Latest jobs", latest(recent.data)),
  );
}

function cards(counts) {
  const cells = CARDS.map(([noun, name, address]) => {
    const number = counts[noun] ?? 0;
    const words = plural(number, name).slice(whole(number).length + 1);
    const what = address && number ? h("a", { class: "what", href: address }, words) : h("span", { class: "what" }, words);
    return h("li", {}, h("span", { class: "count" }, whole(number)), what);
  });
  return h("ul", { class: "cards", "aria-label": "What the store holds" }, cells);
}

function nextSteps(counts) {
  const next = STEPS.findIndex(([isDone]) => !isDone({ ...{ gradients: 0, finetunes: 0 }, ...counts }));
  if (next < 0) return null;
  const items = STEPS.map(([isDone, words, command], place) => {
    const done = Boolean(isDone({ ...{ gradients: 0, finetunes: 0 }, ...counts }));
    const sign = h("span", { class: "sign", "aria-hidden": "true" }, done ? "✓" : place === next ? "→" : "○");
    const state = h("span", { class: "unseen" }, done ? " (done)" : place === next ? " (next)" : "");
    return h("li", { class: done ? "done" : place === next && "next" }, sign, h("span", {}, words, state), place === next && h("pre", {}, h("code", {}, command)));
  });
  return panel("What to do next", h("ol", { class: "steps" }, items));
}

function size({ bytes: parts, free_bytes: free }) {
  const used = Object.entries(parts).filter(([, number]) => number > 0).sort(([, one], [, other]) => other - one);
  const total = used.reduce((sum, [, number]) => sum + number, 0);
  const names = used.map(([part]) => PART_NAMES[part] ?? part);
  const rows = used.map(([, number], place) => ({ name: names[place], number, place }));
  return panel(
    "Size on disk",
    h("p", {}, h("strong", {}, bytes(total)), ` in the store, ${bytes(free)} free on its disk`),
    stack(used.map(([, number], place) => [names[place], number]), "Parts of the store"),
    partsTable(rows.slice(0, PARTS), total),
    rows.length > PARTS && h("details", {}, h("summary", {}, plural(rows.length - PARTS, "smaller part")), partsTable(rows.slice(PARTS), total)),
  );
}

function partsTable(rows, total) {
  return table("Bytes by part of the store", [
    { title: "part", cell: ({ name, place }) => h("span", { class: "named" }, legendMark(place), name) },
    { title: "size", number: true, cell: ({ number }) => bytes(number) },
    { title: "share", number: true, cell: ({ number }) => percent(number / (total || 1)) },
  ], rows);
}

const legendMark = (place) => h("span", { class: `swatch colour-${Math.min(place, 8)}`, "aria-hidden": "true" });

function workers({ workers: seen }) {
  if (!seen.length) {
    return empty("No worker has been seen in the last minute. Jobs wait until one starts.", "gradstore worker");
  }
  return table("Workers of the last minute", [
    { title: "worker", cell: ({ id }) => h("span", { class: "id" }, id) },
    { title: "device", cell: ({ device }) => device },
    { title: "memory", cell: ({ memory }) => (memory ? `${bytes(memory.used)} of ${bytes(memory.total)}` : "unknown") },
    { title: "at work on", cell: task },
    { title: "started", cell: ({ started_at: started }) => (started ? ago(started) : "unknown") },
    { title: "seen", cell: ({ seen_at: seen }) => ago(seen) },
  ], seen);
}

/** What a worker is at. */
function task({ job, shard }) {
  if (!job) return "nothing";
  return [h("a", { href: `#/jobs/${job}`, class: "id" }, job), shard === null ? "" : ` shard ${whole(shard)}`];
}

function latest(jobs) {
  if (!jobs.length) return empty("Nothing has been started yet.");
  return table("The five latest jobs", [
    { title: "job", cell: (job) => named(job, `#/jobs/${job.id}`) },
    { title: "kind", cell: ({ kind }) => kind },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "started", cell: (job) => ago(job.created_at) },
  ], jobs);
}
