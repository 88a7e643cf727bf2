// Influence predictors and cascades: how well what is cheap predicts what is dear, and what was computed and what was not.

import { ownerNames } from "../asking.js";
import { GREY, HALF, bar, curves, legend, scatter, stack } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, decimal, duration, percent, plural, whole } from "../format.js";
import { listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, empty, facts, heading, named, panel, scrolling, table, toDataset, toJob, toTask } from "../parts.js";

const BACK = ["All predictors", "#/predictors"];
const CONTROLS = { "random-features": "from random numbers", "label-shuffle": "scores shuffled", "length-only": "from lengths alone" };

/** Fill the page: all predictors and cascades, or the one that the address names. */
export async function show(main, context) {
  const names = await ownerNames(context.signal);
  const [path, one] = context.parts;
  if (!one) return showAll(main, names, context);
  if (path === "cascades") return showJob(main, path, { back: BACK, doing: "At work", shown: (job) => cascade(job, names) }, context);
  return showJob(main, path, { back: BACK, doing: "Learning", shown: (job) => predictor(job, names) }, context);
}

// All of them

async function showAll(main, names, context) {
  const none = {
    predictors: empty("Nothing has learnt to predict influence yet.", "gradstore predictors create --dataset pool --task mmlu --fraction 0.1"),
    cascades: empty("No cascade has been computed yet.", "gradstore cascades create --dataset pool --task mmlu --budget 0.2"),
  };
  const [learnt, computed] = await Promise.all([
    listPanel("predictors", (jobs) => (jobs.length ? predictors(jobs, names) : none.predictors), context, "Predictors"),
    listPanel("cascades", (jobs) => (jobs.length ? cascades(jobs, names) : none.cascades), context, "Cascades"),
  ]);
  fill(main, heading("Predictors", "Influence predicted from what is cheap, and true gradients for the rows predicted best."), learnt, computed);
}

const common = (path, names) => [
  { title: path.slice(0, -1), cell: (job) => named(job, `#/${path}/${encodeURIComponent(job.id)}`) },
  { title: "pool", cell: ({ request }) => toDataset(request.dataset, names) },
  { title: "task", cell: ({ request }) => toTask(request.task, names) },
];

const state = [
  { title: "state", cell: ({ status }) => badge(status) },
  { title: "asked for", cell: ({ created_at: when }) => ago(when) },
];

function predictors(jobs, names) {
  return table("Predictors, the newest first", [
    ...common("predictors", names),
    { title: "model", cell: ({ result }) => result?.model ?? "–" },
    { title: "sample", number: true, cell: ({ result }) => (result ? whole(result.sample_rows) : "–") },
    { title: "R²", number: true, cell: ({ result }) => decimal(result?.report.r2) },
    { title: "Spearman", number: true, cell: ({ result }) => decimal(result?.report.spearman) },
    ...state,
  ], jobs);
}

function cascades(jobs, names) {
  return table("Cascades, the newest first", [
    ...common("cascades", names),
    { title: "budget", number: true, cell: ({ request }) => percent(request.budget) },
    { title: "computed", number: true, cell: ({ result }) => (result ? whole(result.computed_rows) : "–") },
    { title: "saved", number: true, cell: ({ result }) => (result ? whole(result.saved_rows) : "–") },
    ...state,
  ], jobs);
}

// One predictor

function predictor({ id, request, result }, names) {
  const { report } = result;
  const tested = result.tested_on === "outside" ? `${plural(result.tested_rows, "row")} outside the sample` : `the sample's ${plural(result.tested_rows, "row")}, out of fold`;
  return [
    panel("At a glance", facts([
      ["pool", toDataset(request.dataset, names)],
      ["task", toTask(request.task, names)],
      ["R²", report.r2 === null ? null : decimal(report.r2)],
      ["Spearman", decimal(report.spearman)],
      ["accuracy", report.accuracy === null ? null : percent(report.accuracy)],
      ["tested on", tested],
      ["sample", `${whole(result.sample_rows)} of ${plural(result.rows, "row")}`],
      ["predicted", plural(result.predicted_rows, "row")],
      ["predicted from", `${request.features.join(", ")}: ${plural(result.columns, "column")}`],
      ["model", result.model],
      ["time", duration(result.seconds)],
      ["job", toJob(id, "request and progress")],
    ])),
    h("div", { class: "columns-2" },
      panel("Recall of the true best 5 %", recalls(result)),
      panel("Calibration", calibration(result.calibration))),
    report.confusion && panel("Levels: true and predicted", confusion(report.confusion, result.borders)),
    h("div", { class: "columns-2" },
      result.controls.length > 0 && panel("Beside what should fail", controls(result)),
      panel("Models tried", tried(result))),
  ];
}

function recalls({ report, controls: beside }) {
  const points = ({ recalls: found }) => [[0, 0], ...found.map(({ budget, recall }) => [budget, recall])];
  const lines = [{ name: "predictor", points: points(report) }, { name: "chance", points: [[0, 0], [1, 1]].map(([x, y]) => [x * last(report), y * last(report)]) }, ...beside.map(({ control, report: its }) => ({ name: CONTROLS[control], points: points(its) }))];
  return h("div", {},
    h("p", { class: "note" }, "Part of the rows of highest true influence that is found when gradients are computed for the rows predicted best."),
    legend(lines.map(({ name }) => name)),
    curves(lines, "Recall of the true best 5 % by budget; the table has the numbers", { x: "budget", y: "recall", width: HALF }),
    table("Recall by budget", [
      { title: "budget", cell: ({ budget }) => percent(budget) },
      { title: "", cell: ({ recall }) => bar(recall) },
      { title: "recall", number: true, cell: ({ recall }) => percent(recall) },
    ], report.recalls));
}

const last = ({ recalls: found }) => Math.max(...found.map(({ budget }) => budget));

function calibration(bins) {
  const points = bins.map(({ predicted, true: truth, low, high, rows }) => ({ name: `${plural(rows, "row")}: predicted ${decimal(predicted)}, true ${decimal(truth)}`, x: predicted, y: truth, low, high }));
  return h("div", {},
    h("p", { class: "note" }, "Tenths of the rows by prediction: mean truth with its 10th and 90th percentile. On the broken line both are the same."),
    scatter([points], "Mean truth by mean prediction of each tenth of the rows; the table has the numbers", { x: "predicted", y: "true", width: HALF }),
    h("details", { class: "numbers" }, h("summary", {}, "The same as numbers"), table("Calibration", [
      { title: "predicted", cell: ({ predicted }) => decimal(predicted) },
      { title: "true", number: true, cell: ({ true: truth }) => decimal(truth) },
      { title: "10 % below", number: true, cell: ({ low }) => decimal(low) },
      { title: "10 % above", number: true, cell: ({ high }) => decimal(high) },
      { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    ], bins)));
}

/** Rows of each true level (a line) by predicted level, with the part of the line. */
function confusion(counts, borders) {
  const name = (level) => (level === 0 ? `1 (to ${decimal(borders[0])})` : level === counts.length - 1 ? `${level + 1} (from ${decimal(borders.at(-1))})` : `${level + 1}`);
  const head = h("tr", {}, h("th", { scope: "col" }, "true level"), counts.map((_, level) => h("th", { scope: "col" }, `predicted ${level + 1}`)));
  const lines = counts.map((line, level) => {
    const total = line.reduce((sum, count) => sum + count, 0) || 1;
    return h("tr", {}, h("th", { scope: "row" }, name(level)), line.map((count, predicted) => h("td", {}, h("div", { class: "cell" }, h("strong", {}, whole(count)), h("span", { class: "note" }, percent(count / total)), bar(count / total, level === predicted ? 0 : GREY)))));
  });
  return scrolling("Levels", h("table", { class: "matrix" }, h("caption", { class: "unseen" }, "Rows of each true level by predicted level"), h("thead", {}, head), h("tbody", {}, lines)));
}

function controls({ report, controls: beside }) {
  const lines = [{ name: "this predictor", report }, ...beside.map(({ control, report: its }) => ({ name: CONTROLS[control], report: its }))];
  return table("This predictor and its controls", [
    { title: "predictor", cell: ({ name }) => name },
    ...(report.r2 === null ? [{ title: "accuracy", number: true, cell: ({ report: its }) => percent(its.accuracy) }] : [{ title: "R²", number: true, cell: ({ report: its }) => decimal(its.r2) }]),
    { title: "Spearman", number: true, cell: ({ report: its }) => decimal(its.spearman) },
    { title: "recall at 20 %", number: true, cell: ({ report: its }) => recallAt(its, 0.2) },
  ], lines);
}

function recallAt({ recalls: found }, wanted) {
  const one = found.find(({ budget }) => Math.abs(budget - wanted) < 1e-9);
  return one ? percent(one.recall) : "–";
}

function tried({ models, report }) {
  return table("Models tried, the best first", [
    { title: "model", cell: ({ model }) => model },
    { title: "settings", cell: ({ settings }) => Object.entries(settings).map(([name, value]) => `${name.replaceAll("_", " ")} ${decimal(value)}`).join(", ") || "–" },
    { title: report.r2 === null ? "accuracy over folds" : "R² over folds", number: true, cell: ({ score }) => decimal(score) },
  ], models);
}

// One cascade

function cascade({ id, request, result }, names) {
  return [
    panel("At a glance", facts([
      ["pool", toDataset(request.dataset, names)],
      ["task", toTask(request.task, names)],
      ["budget", percent(request.budget)],
      ["gradients computed", `${whole(result.computed_rows)} of ${plural(result.rows, "row")}`],
      ["with a true score", plural(result.scored_rows, "row")],
      ["saved", plural(result.saved_rows, "row")],
      ["tokens saved", result.saved_tokens === null ? null : whole(result.saved_tokens)],
      ["time", duration(result.seconds)],
      ["select by it", h("a", { href: `#/scores?task=${encodeURIComponent(request.task)}&dataset=${encodeURIComponent(request.dataset)}&method=cascade&budget=${request.budget}` }, "scores")],
      ["job", toJob(id, "request and progress")],
    ])),
    panel("What was computed", parts(result)),
  ];
}

function parts({ rows, stages }) {
  const shares = [...stages.map((stage, number) => [stageName(number), stage.rows]), ["not computed", Math.max(0, rows - stages.reduce((sum, stage) => sum + stage.rows, 0)), GREY]];
  return h("div", {},
    stack(shares, shares.map(([name, count]) => `${name} ${whole(count)}`).join(", ")),
    legend(shares.map(([name, , place], own) => [name, place ?? own])),
    table("Stages", [
      { title: "stage", cell: (stage) => h("a", { href: `#/datasets/${stage.part}` }, stageName(stages.indexOf(stage))) },
      { title: "rows", number: true, cell: (stage) => whole(stage.rows) },
      { title: "model", cell: ({ model }) => model ?? "–" },
      { title: "R² before", number: true, cell: ({ r2 }) => decimal(r2) },
      { title: "lowest prediction", number: true, cell: ({ threshold }) => decimal(threshold) },
      { title: "mean predicted", number: true, cell: ({ predicted }) => decimal(predicted) },
      { title: "mean true", number: true, cell: ({ true: truth }) => decimal(truth) },
      { title: "gradients", cell: ({ gradients }) => toJob(gradients) },
    ], stages));
}

const stageName = (number) => (number ? `predicted best, round ${number}` : "random sample");
