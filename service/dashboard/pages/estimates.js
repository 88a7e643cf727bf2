// Estimates: what training on parts of a pool would give, of which groups, and how that agrees with real trainings.

import { get } from "../api.js";
import { ownerNames } from "../asking.js";
import { bar, columns, curves, intervals, legend, scatter } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, decimal, duration, percent, plural, whole } from "../format.js";
import { growingPanel, listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, empty, facts, heading, listed, named, panel, table, toDataset, toJob, toTask } from "../parts.js";

const BACK = ["All estimates", "#/estimates"];
const PAGE = 20; // subsets
const DRAWN = 24; // groups with a picture
const BINS = 24; // of the picture of losses
const NAMED = 6; // groups of a subset

/** Fill the page: all estimates and their validations, or the one that the address names. */
export async function show(main, context) {
  const [path, one] = context.parts;
  const names = await ownerNames(context.signal);
  if (!one) return showAll(main, names, context);
  if (path === "estimate-validations") return showJob(main, "estimates/validations", { back: BACK, doing: "Training", shown: (job) => validation(job, names) }, context);
  return showJob(main, path, { back: BACK, doing: "Estimating", shown: (job) => estimates(job, names, context) }, context);
}

// All of them

async function showAll(main, names, context) {
  const none = empty("Nothing has been estimated yet.", "gradstore estimates create --dataset pool --task mmlu --name estimates");
  const untrained = empty("No estimates have been compared with trainings yet.", "gradstore estimate-validations create --estimates estimates --model Qwen/Qwen3-0.6B");
  const [made, validated] = await Promise.all([
    listPanel("estimates", (jobs) => (jobs.length ? estimatesTable(jobs, names) : none), context, "Estimates"),
    listPanel("estimates/validations", (jobs) => (jobs.length ? validationsTable(jobs) : untrained), context, "Validations"),
  ]);
  fill(main, heading("Estimates", "What training on parts of a pool would give, without training; and how real trainings agree."), made, validated);
}

const state = [
  { title: "state", cell: ({ status }) => badge(status) },
  { title: "asked for", cell: ({ created_at: when }) => ago(when) },
];

function estimatesTable(jobs, names) {
  return table("Estimates, the newest first", [
    { title: "estimates", cell: (job) => named(job, `#/estimates/${encodeURIComponent(job.id)}`) },
    { title: "pool", cell: ({ request }) => toDataset(request.dataset, names) },
    { title: "tasks", cell: ({ request }) => listed(request.tasks.map((task) => toTask(task, names))) },
    { title: "groups by", cell: ({ request }) => request.group_by },
    { title: "search", cell: ({ request }) => request.search },
    { title: "subsets", number: true, cell: ({ result }) => (result ? whole(result.subsets) : "–") },
    ...state,
  ], jobs);
}

function validationsTable(jobs) {
  return table("Validations of estimates, the newest first", [
    { title: "validation", cell: (job) => named(job, `#/estimate-validations/${encodeURIComponent(job.id)}`) },
    { title: "of", cell: ({ request }) => h("a", { href: `#/estimates/${encodeURIComponent(request.estimates)}` }, request.estimates) },
    { title: "trainings", number: true, cell: ({ result, request }) => whole(result ? result.subsets.length : request.subsets) },
    { title: "Spearman", number: true, cell: ({ result }) => decimal(result?.own.spearman) },
    { title: "relative RSS", number: true, cell: ({ result }) => decimal(result?.own.relative_rss) },
    ...state,
  ], jobs);
}

// One job of estimates

function estimates(job, names, context) {
  const { id, request, result } = job;
  const { surrogate } = result;
  return [
    panel("At a glance", facts([
      ["pool", toDataset(request.dataset, names)],
      ["tasks", listed(request.tasks.map((task) => toTask(task, names)))],
      ["groups", `${whole(result.groups.length)} by ${request.group_by}`],
      ["search", request.search],
      ["subsets estimated", whole(result.subsets)],
      ["rows in groups", whole(result.rows)],
      ["rows without a feature", whole(result.missing_rows)],
      ["rows in no group", whole(result.ungrouped_rows)],
      ["surrogate: Spearman", surrogate && `${decimal(surrogate.spearman)} on ${plural(surrogate.held_out, "held-out subset")}`],
      ["surrogate: relative RSS", surrogate && decimal(surrogate.relative_rss)],
      ["time", duration(result.seconds)],
      ["job", toJob(id, "request and progress")],
    ])),
    result.chosen && panel("Chosen groups", chosen(result, request)),
    panel("Groups", groups(result, request)),
    panel("At the checkpoint", targets(result.targets, names)),
    subsets(job, names, context),
  ];
}

function chosen({ chosen: best, chosen_value: value, groups: all, trace }, { metric }) {
  const points = trace.map((step, number) => [number + 1, step.value]);
  return h("div", {},
    h("p", {}, listed(best.map((group) => h("strong", {}, all[group].label))), `: estimated ${metric} ${decimal(value)}.`),
    points.length > 1 && curves([{ name: metric, points }], `Estimated ${metric} after each step of the search; the table has the numbers`, { x: "step", y: metric }),
    h("details", { class: "numbers" }, h("summary", {}, plural(trace.length, "step")), table("Steps of the search", [
      { title: "group", cell: ({ group }) => all[group].label },
      { title: metric, number: true, cell: ({ value: its }) => decimal(its) },
      { title: "kept", cell: ({ kept }) => (kept ? "✓ kept" : "–") },
    ], trace)));
}

function groups({ groups: all, chosen: best }, { metric }) {
  const sorted = [...all].sort((one, other) => (other.score ?? -Infinity) - (one.score ?? -Infinity));
  const measured = sorted.filter(({ mean, standard_error: error }) => mean !== null && error !== null);
  const items = measured.slice(0, DRAWN).map(({ label, mean, standard_error: error }) => ({ name: label, value: mean, interval: { low: mean - 1.96 * error, high: mean + 1.96 * error }, place: 0 }));
  const isChosen = ({ group }) => best?.includes(group);
  return h("div", {},
    h("p", { class: "note" }, `The best first. The picture: mean estimated ${metric} of the subsets that have a group, with 1.96 standard errors; ${metric === "loss" ? "less" : "more"} is better.${measured.length > DRAWN ? ` The first ${DRAWN} are drawn.` : ""}`),
    items.length > 0 && intervals(items, `Mean estimated ${metric} of the subsets with each group; the table has the numbers`, {}),
    table("Groups, the best first", [
      { title: "group", cell: (group) => (isChosen(group) ? h("span", { class: "chosen" }, `✓ ${group.label}`) : group.label) },
      { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
      { title: "subsets", number: true, cell: ({ subsets: count }) => whole(count) },
      { title: `mean ${metric}`, number: true, cell: ({ mean }) => decimal(mean) },
      { title: "coefficient", number: true, cell: ({ coefficient }) => decimal(coefficient) },
      { title: "score", number: true, cell: ({ score }) => decimal(score) },
    ], sorted));
}

function targets(all, names) {
  return table("Loss and accuracy at the checkpoint", [
    { title: "task", cell: ({ task, subtask }) => (subtask === null ? h("strong", {}, names[task] ?? task) : h("span", { class: "under" }, subtask)) },
    { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    { title: "loss", number: true, cell: ({ loss }) => decimal(loss) },
    { title: "accuracy", number: true, cell: ({ accuracy }) => (accuracy === null ? "–" : percent(accuracy)) },
  ], all);
}

// Its subsets

function subsets({ id, result }, names, context) {
  const wholes = result.targets.map((target, number) => ({ ...target, number })).filter(({ subtask }) => subtask === null);
  const read = (found) => get(`estimates/${encodeURIComponent(id)}/subsets`, { limit: PAGE, after: found.length }, context.signal);
  return growingPanel("Subsets", read, (found) => [spread(found, wholes[0], names), subsetsTable(found, wholes, result.groups, names)], context);
}

/** How the estimated losses of subsets spread. */
function spread(found, { number, task }, names) {
  const losses = found.map(({ estimates: of }) => of[number].loss).filter((loss) => loss !== null);
  if (losses.length < 2) return null;
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const counts = new Array(BINS).fill(0);
  for (const loss of losses) counts[Math.min(BINS - 1, Math.floor(((loss - low) / (high - low || 1)) * BINS))] += 1;
  const told = `Estimated loss on ${names[task] ?? task} of the first ${plural(losses.length, "subset")}`;
  return h("div", {}, h("p", { class: "note" }, `${told}, from ${decimal(low)} to ${decimal(high)}.`), columns(counts, told), h("p", { class: "axis", "aria-hidden": "true" }, h("span", {}, decimal(low)), h("span", {}, decimal(high))));
}

function subsetsTable(found, wholes, all, names) {
  const members = (groups) => groups.slice(0, NAMED).map((group) => all[group].label).join(", ") + (groups.length > NAMED ? ` and ${whole(groups.length - NAMED)} more` : "");
  return table("Subsets in their order", [
    { title: "subset", number: true, cell: ({ subset }) => whole(subset) },
    { title: "groups", cell: ({ groups }) => members(groups) },
    { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    ...wholes.map(({ task, number }) => ({ title: `loss on ${names[task] ?? task}`, number: true, cell: ({ estimates: of }) => decimal(of[number].loss) })),
    ...wholes.map(({ task, number }) => ({ title: `accuracy on ${names[task] ?? task}`, number: true, cell: ({ estimates: of }) => (of[number].accuracy === null ? "–" : percent(of[number].accuracy)) })),
  ], found);
}

// One validation

function validation({ id, request, result }, names) {
  const { own, best } = result;
  return [
    panel("At a glance", facts([
      ["estimates", h("a", { href: `#/estimates/${encodeURIComponent(request.estimates)}` }, request.estimates)],
      ["task", request.task && toTask(request.task, names)],
      ["model", request.model],
      ["trainings", whole(result.subsets.length)],
      ["Spearman (95 %)", `${decimal(own.spearman)} (${decimal(result.spearman_low)} – ${decimal(result.spearman_high)})`],
      ["relative RSS", decimal(own.relative_rss)],
      ["with the best scale", `${decimal(best.relative_rss)} at ${decimal(best.scale)}`],
      ["of a line", decimal(result.line_rss)],
      ["of saying the mean", decimal(result.constant_rss)],
      ["an estimate", `${decimal(result.estimate_seconds)} s`],
      ["a training", duration(result.training_seconds)],
      ["speed-up", `${whole(Math.round(result.speedup))} times`],
      ["job", toJob(id, "request and progress")],
    ])),
    panel("Estimated and trained", agreement(result.subsets)),
    panel("Length of the step", scales(result)),
  ];
}

function agreement(all) {
  const point = ({ subset, loss }, x) => ({ name: `subset ${subset}: estimated ${decimal(x)}, trained ${decimal(loss)}`, x, y: loss });
  return h("div", {},
    h("p", { class: "note" }, "Each point is a subset that was trained on: the loss after training by the estimated one. On the broken line both are the same."),
    legend(["as estimated", "with the best scale"]),
    scatter([all.map((one) => point(one, one.estimate)), all.map((one) => point(one, one.calibrated))], "Loss after training by estimated loss; the table has the numbers", { x: "estimated loss", y: "loss after training" }),
    table("Subsets that were trained on", [
      { title: "subset", number: true, cell: ({ subset }) => whole(subset) },
      { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
      { title: "estimated", number: true, cell: ({ estimate }) => decimal(estimate) },
      { title: "with the best scale", number: true, cell: ({ calibrated }) => decimal(calibrated) },
      { title: "trained", number: true, cell: ({ loss }) => decimal(loss) },
      { title: "time", number: true, cell: ({ seconds }) => duration(seconds) },
    ], all));
}

function scales({ own, best, scales: tried }) {
  const largest = Math.max(...tried.map(({ relative_rss: rss }) => rss), 1e-12);
  return table("Lengths of the step that were tried", [
    { title: "scale", cell: ({ scale }) => (scale === best.scale ? h("span", { class: "chosen" }, `✓ ${decimal(scale)}`) : decimal(scale) + (scale === own.scale ? " (as estimated)" : "")) },
    { title: "", cell: ({ relative_rss: rss }) => bar(rss / largest) },
    { title: "relative RSS", number: true, cell: ({ relative_rss: rss }) => decimal(rss) },
    { title: "mean ratio", number: true, cell: ({ mean_ratio: ratio }) => decimal(ratio) },
    { title: "Spearman", number: true, cell: ({ spearman }) => decimal(spearman) },
  ], tried);
}
