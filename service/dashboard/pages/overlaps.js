// What the selections of several tasks share: a matrix of numbers, for one fraction of the pool.

import { getScored } from "../api.js";
import { allTasks, question } from "../asking.js";
import { fill, fresh, h } from "../dom.js";
import { percent, whole } from "../format.js";
import { empty, heading, into, loading, matrix, panel, percentField, percentOf } from "../parts.js";

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
  const amount = percentField(percentOf(params), (pct) => (remember({ pct: String(pct) }), load()));
  const boxes = tasks.map(({ name }) => {
    const id = fresh("task");
    const box = h("input", { type: "checkbox", id, checked: chosen.has(name), onchange: () => (box.checked ? chosen.add(name) : chosen.delete(name), load()) });
    return h("span", { class: "check" }, box, h("label", { for: id }, name));
  });
  const load = () => into(place, (signal) => compared(context, tasks, [...chosen], percentOf(params), place, signal), context);
  fill(main, title, h("div", { class: "panel" }, h("div", { class: "filters" },
    h("fieldset", {}, h("legend", {}, "Tasks"), h("div", { class: "checks" }, boxes)),
    amount.field)), place);
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
        return [percent(jaccard), `${whole(shared)} rows`, jaccard];
      })),
    panel("Agreement on the whole pool", h("p", { class: "note" }, "Spearman's rank correlation of the two tasks' scores: 1 where they order all rows alike, 0 where they have nothing to do with each other."),
      matrix("Rank correlation of each pair of tasks", names, (one, other) => {
        const value = pair(one, other).rank_correlation;
        return [value === null ? "–" : value.toFixed(2), null, value ?? 0];
      }, (value) => (value > 0 ? 1 : 8))),
  ];
}
