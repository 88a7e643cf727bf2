// Ways to select side by side: what each selects and costs, what each two share, and what training on it has given.

import { intervals } from "../charts.js";
import { inCommands } from "../commands.js";
import { fill, h } from "../dom.js";
import { ago, decimal, duration, percent, plural, whole } from "../format.js";
import { listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, empty, heading, matrix, named, panel, table } from "../parts.js";

const SOURCES = 3; // origins told of a selection

/** Fill the page: all comparisons, or the one that the address names. */
export async function show(main, context) {
  await (context.parts[1] ? showOne(main, context) : showAll(main, context));
}

async function showAll(main, context) {
  const listed = (jobs) => (jobs.length ? comparisons(jobs) : empty("Nothing has been compared yet.", "gradstore compare --dataset pool --task mmlu --pct 0.05"));
  const found = await listPanel("comparisons", listed, context);
  fill(main, heading("Comparison", "Several ways to select, from the same pool and with the same number of rows."), found);
}

function comparisons(jobs) {
  return table("Comparisons", [
    { title: "comparison", cell: (job) => named(job, `#/comparisons/${encodeURIComponent(job.id)}`) },
    { title: "tasks", cell: ({ request, result }) => (result ? result.tasks.map(({ task_name: name }) => name) : request.tasks).join(", ") },
    { title: "contestants", cell: ({ result }) => (result ? [...new Set(result.rows.map(({ contestant }) => contestant))].join(", ") : "–") },
    { title: "trainings", number: true, cell: ({ result }) => (result ? whole(result.trainings) : "–") },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "asked for", cell: ({ created_at: when }) => ago(when) },
  ], jobs);
}

const showOne = (main, context) => showJob(main, "comparisons", { back: ["All comparisons", "#/comparisons"], doing: "Comparing", shown: (job) => result(job.result) }, context);

function result(found) {
  return [
    ...found.tasks.map((task) => ofTask(found, task, found.rows.filter((row) => row.task === task.task))),
    found.left_out.length > 0 && panel("Left out", h("ul", {}, found.left_out.map(({ method, detail }) => h("li", {}, h("strong", {}, method), ": ", inCommands(detail))))),
  ];
}

function ofTask(found, task, rows) {
  const measured = task.base_loss !== null;
  return panel(task.task_name,
    measured && losses(found, task, rows),
    table(`Selections for ${task.task_name}`, [
      { title: "contestant", cell: ({ contestant, selection }) => h("a", { href: `#/selections/${selection}` }, contestant) },
      { title: "rows", number: true, cell: (row) => whole(row.rows) },
      { title: "most from", cell: sources },
      { title: "scoring", number: true, cell: ({ cost }) => seconds(cost.scoring_seconds) },
      { title: "rests on", number: true, cell: ({ cost }) => seconds(cost.rests_on_seconds) },
      ...(measured ? [
        { title: "loss (95 %)", number: true, cell: ({ loss }) => withInterval(loss.value, loss.interval) },
        { title: `less ${found.against ?? "random"}'s (95 %)`, number: true, cell: ({ loss }) => withInterval(loss.difference, loss.difference_interval) },
      ] : []),
    ], rows),
    rows.length > 1 && [h("h3", { class: "later" }, "Common rows"), shared(found.pairs.filter((pair) => pair.task === task.task), rows, task)]);
}

/** The picture of the losses, and of the differences where there are some. */
function losses(found, task, rows) {
  const names = rows.map(({ contestant }) => contestant);
  const told = `Loss on ${task.task_name} after training on each selection, with intervals; the table below has the numbers`;
  const differing = rows.filter(({ loss }) => loss.difference !== null);
  const against = `Difference of the loss from that of ${found.against}, below 0 is better; the table below has the numbers`;
  return h("div", {},
    h("p", { class: "note" }, `Loss over ${plural(task.measured_rows, "row")}, less is better; the broken line is the model before training (${decimal(task.base_loss)}). Intervals of 95 % for other seeds and other rows of the task.`),
    intervals(rows.map(({ contestant, loss }, place) => ({ name: contestant, value: loss.value, interval: loss.interval, place })), told, { line: task.base_loss }),
    differing.length > 0 && [
      h("h3", {}, `Beside ${found.against}`),
      h("p", { class: "note" }, "Difference of the loss in pairs of the same seed: what lies left of 0 is better."),
      intervals(differing.map(({ contestant, loss }) => ({ name: contestant, value: loss.difference, interval: loss.difference_interval, place: names.indexOf(contestant) })), against, { from: 0 }),
    ]);
}

/** Which part of the smaller selection's rows each two share. */
function shared(pairs, rows, task) {
  const names = rows.map(({ contestant }) => contestant);
  const pair = (one, other) => pairs.find(({ contestants }) => contestants.includes(names[one]) && contestants.includes(names[other]));
  return matrix(`Rows that each two selections for ${task.task_name} share`, names, (one, other) => {
    const { share, shared: count } = pair(one, other);
    return [percent(share), `${whole(count)} rows`, share];
  });
}

function sources({ origins, rows }) {
  return Object.entries(origins).slice(0, SOURCES).map(([origin, count]) => `${origin} ${percent(count / rows)}`).join(", ");
}

const seconds = (number) => (number === null ? "–" : duration(number));

function withInterval(value, range) {
  if (value === null) return "–";
  return h("span", {}, decimal(value), h("span", { class: "note" }, ` (${decimal(range.low)} – ${decimal(range.high)})`));
}
