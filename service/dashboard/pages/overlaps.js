// What the selections of several tasks share: a matrix of numbers, for one fraction of the pool.

import { getScored } from "../api.js";
import { allTasks, question } from "../asking.js";
import { bar } from "../charts.js";
import { fill, fresh, h } from "../dom.js";
import { percent, whole } from "../format.js";
import { empty, heading, into, loading, panel, scrolling } from "../parts.js";

const COMPARED = 8; // tasks at first

/** Fill the page. */
export async function show(main, context) {
  const { params, remember, signal } = context;
  const tasks = await allTasks(signal);
  const title = heading("Overlap", "How much the selections of several tasks have in common.");
  if (tasks.length < 2) {
    fill(main, title, empty("Two tasks are needed to compare their selections.", "gradstore tasks upload bbh.zip --kind bbh --name bbh"));
    return;
  }
  const chosen = new Set(params.getAll("task"));
  if (!chosen.size) for (const { name } of tasks.slice(0, COMPARED)) chosen.add(name);
  const place = h("div");
  const amount = h("input", { id: fresh("percent"), type: "number", min: "0.1", max: "100", step: "0.1", value: params.get("pct") ?? "5", onchange: () => (remember({ pct: amount.value }), load()) });
  const boxes = tasks.map(({ name }) => {
    const id = fresh("task");
    const box = h("input", { type: "checkbox", id, checked: chosen.has(name), onchange: () => (box.checked ? chosen.add(name) : chosen.delete(name), load()) });
    return h("span", { class: "check" }, box, h("label", { for: id }, name));
  });
  const load = () => into(place, (signal) => compared(context, tasks, [...chosen], Number(amount.value), place, signal), context);
  fill(main, title, h("div", { class: "panel" }, h("div", { class: "filters" },
    h("fieldset", {}, h("legend", {}, "Tasks"), h("div", { class: "checks" }, boxes)),
    h("div", { class: "field" }, h("label", { for: amount.id }, "Percent of the pool"), amount))), place);
  await load();
}

async function compared(context, tasks, chosen, percents, place, signal) {
  if (chosen.length < 2) return empty("Choose two tasks or more.");
  const onJob = (job) => fill(place, loading(`Computing scores: ${whole(job.progress.done)} of ${whole(job.progress.total)} ${job.progress.unit} …`));
  const found = await getScored("overlaps", { ...question(context.params), task: chosen, pct: percents / 100 }, signal, onJob);
  const ids = found.recipe.tasks;
  const names = ids.map((id) => tasks.find((task) => task.id === id)?.name ?? id);
  const pair = (one, other) => found.pairs.find(({ tasks: both }) => both.includes(ids[one]) && both.includes(ids[other]));
  return [
    panel("Shared rows", h("p", { class: "note" }, `Each task selects ${whole(found.count)} rows. A cell has the part of both selections' rows that both hold (Jaccard), and their number.`),
      matrix("Shared rows of each pair of tasks", names, (one, other) => {
        const { jaccard, shared } = pair(one, other);
        return h("div", { class: "cell" }, h("strong", {}, percent(jaccard)), h("span", { class: "note" }, `${whole(shared)} rows`), bar(jaccard));
      })),
    panel("Agreement on the whole pool", h("p", { class: "note" }, "Spearman's rank correlation of the two tasks' scores: 1 where they order all rows alike, 0 where they have nothing to do with each other."),
      matrix("Rank correlation of each pair of tasks", names, (one, other) => {
        const value = pair(one, other).rank_correlation;
        return h("div", { class: "cell" }, h("strong", {}, value === null ? "–" : value.toFixed(2)), bar(Math.max(value ?? 0, 0), value > 0 ? 1 : 8));
      })),
  ];
}

function matrix(caption, names, cell) {
  const head = h("tr", {}, h("td"), names.map((name) => h("th", { scope: "col" }, name)));
  const rows = names.map((name, one) => h("tr", {}, h("th", { scope: "row" }, name), names.map((_, other) => h("td", {}, one === other ? h("span", { class: "note" }, "same") : cell(one, other)))));
  return scrolling(caption, h("table", { class: "matrix" }, h("caption", { class: "unseen" }, caption), h("thead", {}, head), h("tbody", {}, rows)));
}
