// Trainings and what they brought: loss curves in one picture, evaluations side by side.

import { get } from "../api.js";
import { curves, legend } from "../charts.js";
import { fill, fresh, h } from "../dom.js";
import { called, decimal, duration, whole } from "../format.js";
import { empty, heading, named, panel, table } from "../parts.js";

const LISTED = 50; // of each
const CHOSEN = 6; // at first

/** Fill the page. */
export async function show(main, context) {
  const [trained, measured] = await Promise.all([get("finetunes", { limit: LISTED }, context.signal), get("evaluations", { limit: LISTED }, context.signal)]);
  const done = ({ data }) => data.filter(({ result }) => result !== null);
  fill(main, heading("Training", "What was trained, and what it brought."), trainings(done(trained)), evaluations(done(measured)));
}

/** Boxes that choose some of several things, the first few at the start. */
function chooser(title, things, onChange) {
  const chosen = new Set(things.slice(0, CHOSEN).map(({ id }) => id));
  const boxes = things.map((thing) => {
    const id = fresh("chosen");
    const box = h("input", { type: "checkbox", id, checked: chosen.has(thing.id), onchange: () => (box.checked ? chosen.add(thing.id) : chosen.delete(thing.id), change()) });
    return h("span", { class: "check" }, box, h("label", { for: id }, titled(thing)));
  });
  const change = () => onChange(things.filter(({ id }) => chosen.has(id)));
  change();
  return h("fieldset", {}, h("legend", {}, title), h("div", { class: "checks" }, boxes));
}

// Loss curves

function trainings(jobs) {
  if (!jobs.length) return panel("Loss", empty("No training has finished yet.", "gradstore finetunes create --dataset pool --fraction 0.05 --model Qwen/Qwen3-0.6B"));
  const place = h("div");
  const boxes = chooser("Trainings", jobs, (chosen) => fill(place, chosen.length ? losses(chosen) : empty("Choose a training.")));
  return panel("Loss", boxes, place);
}

function losses(jobs) {
  const lines = jobs.map((job) => ({ name: called(job), points: job.result.loss_curve.map(({ epoch, loss }) => [epoch, loss]) })).filter(({ points }) => points.length);
  const numbers = table("Trainings", [
    { title: "training", cell: (job) => named(job, `#/jobs/${job.id}`) },
    { title: "model", cell: ({ request }) => request.model },
    { title: "rows", number: true, cell: ({ result }) => whole(result.rows) },
    { title: "steps", number: true, cell: ({ result }) => whole(result.steps) },
    { title: "first loss", number: true, cell: ({ result }) => decimal(result.loss_curve[0]?.loss) },
    { title: "last loss", number: true, cell: ({ result }) => decimal(result.loss_curve.at(-1)?.loss) },
    { title: "time", number: true, cell: ({ result }) => duration(result.seconds) },
  ], jobs);
  const picture = lines.length > 0 && [legend(lines.map(({ name }) => name)), curves(lines, `Loss of ${lines.map(({ name }) => name).join(", ")} by epoch; the table below has the first and the last`, { x: "epoch", y: "loss" })];
  return h("div", {}, picture, numbers);
}

// Evaluations

function evaluations(jobs) {
  if (!jobs.length) return panel("Evaluations", empty("Nothing has been measured yet.", "gradstore evaluations create --finetune <fine-tune> --task mmlu"));
  const place = h("div");
  const boxes = chooser("Evaluations", jobs, (chosen) => fill(place, chosen.length ? measurements(chosen) : empty("Choose an evaluation.")));
  return panel("Evaluations", boxes, place);
}

/** A line for each task and subtask, a column for each model of each evaluation; the base model only once where all agree. */
function measurements(jobs) {
  const models = columnsOf(jobs);
  const lines = new Map();
  for (const { rows } of models) for (const row of rows) lines.set(keyOf(row), row);
  const numbers = (title, value, interval, more) => table(title, [
    { title: "task", cell: ({ task_name: task, subtask }) => (subtask === null ? h("strong", {}, task) : h("span", { class: "under" }, subtask)) },
    ...models.map(({ name, rows }) => ({ title: name, number: true, cell: (line) => measured(rows.find((row) => keyOf(row) === keyOf(line)), value, interval, more) })),
  ], [...lines.values()]);
  return h("div", {},
    h("h3", {}, "Metric, more is better"), numbers("Metric of each model", ({ value }) => value, ({ interval }) => interval, ({ unparsed }) => unparsed > 0 && `, ${whole(unparsed)} unparsed`),
    h("h3", { class: "later" }, "Loss, less is better"), numbers("Loss of each model", ({ loss }) => loss, ({ loss_interval: interval }) => interval),
    h("p", { class: "note" }, "In brackets: bootstrap intervals of 95 %."));
}

const keyOf = ({ task, subtask }) => JSON.stringify([task, subtask]);

function columnsOf(jobs) {
  const found = [];
  const bases = new Set();
  for (const job of jobs) {
    const base = job.result.rows.filter(({ model }) => model === "base");
    const tuned = job.result.rows.filter(({ model }) => model === "tuned");
    const same = JSON.stringify(base);
    if (base.length && !bases.has(same)) found.unshift({ name: bases.size ? `base of ${titled(job)}` : "base", rows: base });
    bases.add(same);
    if (tuned.length) found.push({ name: titled(job), rows: tuned });
  }
  return found;
}

/** A job's name; of an evaluation of adapters without one what it measured, in words: "cat of gsm8k, arc". */
const titled = ({ name, id, request }) => name ?? (request.adapters ? `${request.combine} of ${request.adapters.join(", ")}` : (request.adapter ?? id));

function measured(row, value, interval, more = () => false) {
  if (!row || value(row) === null) return "–";
  const range = interval(row);
  return h("span", {}, decimal(value(row)), range && h("span", { class: "note" }, ` (${decimal(range.low)} – ${decimal(range.high)})`), more(row));
}
