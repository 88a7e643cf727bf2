// Selections: what was chosen, from which origins, and why: score per subtask and the nearest validation example.

import { get, save } from "../api.js";
import { allDatasets, allTasks, namesOf } from "../asking.js";
import { bar, colour } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, called, decimal, percent, plural, whole } from "../format.js";
import { listPanel } from "../lists.js";
import { conversation, empty, facts, heading, named, panel, table } from "../parts.js";
import { ROWS, rowsPanel, wholePage } from "../rows.js";

const SUBTASKS = 5; // shown before the rest is folded

/** Fill the page: all selections, or the one that the address names. */
export async function show(main, context) {
  await (context.parts[1] ? showOne(main, context) : showAll(main, context));
}

function amount({ pct, k }) {
  if (pct !== null) return percent(pct);
  return k === null ? "as many as matched" : plural(k, "row");
}

/** Whether rows can be explained: some methods read no features. */
const hasFeatures = ({ recipe }) => recipe.kind !== null;

// All selections

async function showAll(main, context) {
  const [tasks, datasets] = await Promise.all([allTasks(context.signal), allDatasets(context.signal)]);
  const names = namesOf([...tasks, ...datasets]);
  const all = await listPanel("selections", (found) => (found.length ? list(found, names) : empty("Nothing has been selected yet.", "gradstore select --task mmlu --pct 0.05")), context);
  fill(main, heading("Selections", "The rows that help a task most, as they were chosen."), all);
}

function list(selections, names) {
  return table("Selections, the newest first", [
    { title: "selection", cell: (selection) => named(selection, `#/selections/${selection.id}`) },
    { title: "method", cell: ({ recipe }) => recipe.method },
    { title: "tasks", cell: ({ recipe }) => recipe.tasks.map((task) => names[task] ?? task).join(", ") || "–" },
    { title: "pool", cell: ({ recipe }) => recipe.datasets.map((dataset) => names[dataset] ?? dataset).join(", ") },
    { title: "asked for", number: true, cell: ({ recipe }) => amount(recipe) },
    { title: "rows", number: true, cell: ({ count }) => whole(count) },
    { title: "of", number: true, cell: ({ pool }) => whole(pool) },
    { title: "made", cell: (selection) => ago(selection.created_at) },
  ], selections);
}

// One selection

async function showOne(main, context) {
  const id = encodeURIComponent(context.parts[1]);
  const [selection, tasks] = await Promise.all([get(`selections/${id}`, { limit: 0 }, context.signal), allTasks(context.signal)]);
  const names = namesOf(tasks);
  const { recipe } = selection;
  const failed = h("div");
  const download = (text, accept, ending) => h("button", { type: "button", class: "quiet", onclick: () => save(`selections/${id}/content`, {}, `${called(selection)}.${ending}`, accept).catch((error) => context.failed(error, failed)) }, text);
  fill(
    main,
    h("p", {}, h("a", { href: "#/selections" }, "← All selections")),
    heading(called(selection), selection.name ? selection.id : null, h("div", { class: "filters" }, download("Download rows", "application/x-ndjson", "jsonl"), download("Download table", "text/csv", "csv"))),
    failed,
    panel("At a glance", facts([
      ["rows", `${whole(selection.count)} of ${whole(selection.pool)}`],
      ["asked for", amount(recipe)],
      ["method", recipe.method],
      ["tasks", recipe.tasks.map((task) => names[task] ?? task).join(", ") || null],
      ["score", recipe.nearness ? `nearness to shots (${recipe.nearness})` : recipe.aggregate],
      ["strategy", recipe.strategy === "top" ? null : recipe.strategy],
      ["passed over", selection.shots ? `${whole(selection.shots.passed_over)} of the ${whole(selection.shots.near)} nearest: a cosine over ${recipe.tau} with one taken before` : null],
      ["features", hasFeatures(selection) ? `${recipe.kind} × ${recipe.task_kind}, ${whole(recipe.dim)} dims` : null],
      ["made", ago(selection.created_at)],
    ]), h("p"), h("details", {}, h("summary", {}, "Recipe"), h("pre", {}, h("code", {}, JSON.stringify(recipe, null, 2))))),
    panel("Origins", originsTable(selection)),
    rows(selection, names, context),
  );
}

function originsTable({ origins, pool_origins: pool, count }) {
  const total = Object.values(pool).reduce((sum, rows) => sum + rows, 0);
  const items = Object.entries(pool).sort(([, one], [, other]) => other - one).map(([name, rows], place) => ({ name, place, chosen: origins[name] ?? 0, share: (origins[name] ?? 0) / count, pool: rows / total }));
  return table("Chosen rows of each origin", [
    { title: "origin", cell: ({ name, place }) => h("span", { class: "named" }, h("span", { class: `swatch ${colour(place)}`, "aria-hidden": "true" }), name) },
    { title: "", cell: ({ share, place }) => bar(share, place) },
    { title: "rows chosen", number: true, cell: ({ chosen }) => whole(chosen) },
    { title: "of those chosen", number: true, cell: ({ share }) => percent(share) },
    { title: "of the pool", number: true, cell: ({ pool: share }) => percent(share) },
  ], items);
}

// Its rows

function rows(selection, names, context) {
  const explainable = hasFeatures(selection);
  const read = (wanted, after, signal) => (explainable ? wholePage(`selections/${selection.id}/explanations`, wanted, after, signal) : plain(selection, after, signal));
  const told = (data, isSearch) => isSearch ? `${plural(data.length, "row")} found between ranks ${whole(data[0].rank)} and ${whole(data.at(-1).rank)}` : `ranks ${whole(data[0].rank)} to ${whole(data.at(-1).rank)} of ${whole(selection.count)}`;
  return rowsPanel("Chosen rows", { read, shown: (row) => explained(row, names, selection.recipe.method === "influence" ? "influence" : "cosine"), told, nothing: "No chosen row is like this.", origins: explainable ? Object.keys(selection.origins) : null }, context);
}

async function plain({ id }, after, signal) {
  const page = await get(`selections/${id}`, { after, limit: ROWS }, signal);
  const data = await Promise.all(page.data.map(async (row) => {
    const [{ turns }] = (await get(`datasets/${row.dataset}/rows`, { after: row.row, limit: 1 }, signal)).data;
    return { ...row, turns };
  }));
  return { data, next: page.has_more ? data.at(-1).rank : null };
}

function explained(row, names, measure) {
  const { nearest } = row;
  return h("li", { class: "row", "data-rank": row.rank },
    h("header", {}, h("h3", {}, `Rank ${whole(row.rank)}`), h("span", {}, `score ${decimal(row.score)}`), h("span", {}, row.origin), h("a", { href: `#/datasets/${row.dataset}?after=${row.row}` }, `row ${whole(row.row)}`), row.id !== null && h("span", { class: "id" }, row.id)),
    conversation(row.turns),
    nearest && h("div", { class: "why" },
      h("div", {}, h("h4", {}, "Score per subtask"), subtaskScores(row, names)),
      h("div", {}, h("h4", {}, "Nearest validation example"), h("p", { class: "note" }, `${place(nearest, names)}, row ${whole(nearest.row)}, ${measure} ${decimal(nearest.influence)}`), conversation(nearest.turns))));
}

const place = ({ task, subtask }, names) => ((names[task] ?? task) === subtask ? subtask : `${names[task] ?? task} / ${subtask}`);

function subtaskScores({ subtasks, rank }, names) {
  const sorted = [...subtasks].sort((one, other) => other.score - one.score);
  const largest = Math.max(...sorted.map(({ score }) => Math.abs(score)), 1e-9);
  const made = (items) => table(`Score of rank ${rank} for each subtask`, [
    { title: "subtask", cell: (item) => place(item, names) },
    { title: "", cell: ({ score }) => bar(Math.max(score, 0) / largest, score === sorted[0].score ? 0 : 8) },
    { title: "score", number: true, cell: ({ score }) => decimal(score) },
  ], items);
  if (sorted.length <= SUBTASKS) return made(sorted);
  return h("div", {}, made(sorted.slice(0, SUBTASKS)), h("details", {}, h("summary", {}, plural(sorted.length - SUBTASKS, "more subtask")), made(sorted.slice(SUBTASKS))));
}
