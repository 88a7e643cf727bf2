// A task's scores: their histogram by origin, and a cut that shows how many rows, and whose, a fraction takes.

import { getScored } from "../api.js";
import { allTasks, question } from "../asking.js";
import { bar, colour, legend, stackedHistogram } from "../charts.js";
import { cutOver } from "../cut.js";
import { fill, fresh, h } from "../dom.js";
import { decimal, percent, whole } from "../format.js";
import { choice, empty, heading, into, loading, panel, table } from "../parts.js";

const STEPS = 1000; // a tenth of a percent each
const BINS = 60;
const SHOWN = 8; // origins with a colour of their own

/** Fill the page. */
export async function show(main, context) {
  const { params, remember, signal } = context;
  const tasks = await allTasks(signal);
  const title = heading("Scores", "How much each row of the pool helps a task, and what a cut takes.");
  if (!tasks.length) {
    fill(main, title, empty("There is no task yet: upload a few examples of what the model should get better at.", "gradstore tasks upload mmlu.zip --kind mmlu --name mmlu"));
    return;
  }
  const place = h("div");
  if (!params.has("task")) remember({ task: tasks[0].name });
  const pick = (name, value) => (remember({ [name]: value }), load());
  const aggregates = [["less", "best subtask mean (LESS)"], ["avg", "mean of all validation rows"], ["max", "nearest validation row"], ["min", "farthest validation row"]];
  fill(main, title, h("div", { class: "filters" },
    choice("Task", tasks.map(({ name }) => [name, name]), params.get("task"), (value) => pick("task", value)),
    choice("Score", aggregates, params.get("aggregate") ?? "less", (value) => pick("aggregate", value === "less" ? null : value))), place);
  const load = () => into(place, (signal) => distribution(context, place, signal), context);
  await load();
}

async function distribution(context, place, signal) {
  const onJob = (job) => fill(place, loading(`Computing scores: ${whole(job.progress.done)} of ${whole(job.progress.total)} ${job.progress.unit} …`));
  const found = await getScored("scores/distribution", { ...question(context.params), bins: BINS, steps: STEPS }, signal, onJob);
  const names = Object.keys(found.counts);
  const counts = folded(names.map((name) => found.counts[name]));
  const picture = stackedHistogram(counts, `Histogram of ${whole(found.scored)} scores from ${decimal(found.edges.at(-1))} to ${decimal(found.edges[0])}, the best at the left`);
  const taken = h("div"), told = h("p", { class: "told", role: "status" });
  const shown = names.slice(0, SHOWN);
  if (names.length > SHOWN) shown.push("other origins");

  const { cuts, edges } = found;
  const span = edges.at(-1) - edges[0];
  let at = 0;
  const exact = h("input", { id: fresh("percent"), type: "number", min: "0.1", max: "100", step: "0.1", onchange: () => cut.move(Math.round(Number(exact.value) * 10) - 1) });
  const cut = cutOver(picture, {
    steps: STEPS,
    label: "Cut: fraction of the pool that is taken, in percent",
    placeOf: (step) => (edges.at(-1) - cuts.scores[step]) / span,
    describe: (step) => ({ now: stepPercent(step), text: `${stepPercent(step)} %: ${whole(cuts.rows[step])} rows with a score of ${decimal(cuts.scores[step])} or more` }),
    onMove(step) {
      at = step;
      exact.value = String(stepPercent(step));
      fill(told, h("strong", {}, `${whole(cuts.rows[step])} of ${whole(found.rows)} rows`), ` (${stepPercent(step)} %) have a score of ${decimal(cuts.scores[step])} or more.`);
      fill(taken, originsTable(found, names, step));
      context.remember({ pct: String(stepPercent(step)) });
    },
  });
  const failed = h("div");
  const select = h("button", { type: "button", onclick: () => choose(context, stepPercent(at), failed) }, "Select these rows");
  cut.move(Math.round(Number(context.params.get("pct") ?? 5) * 10) - 1);
  const axis = h("p", { class: "axis", "aria-hidden": "true" }, h("span", {}, `best ${decimal(edges.at(-1))}`), h("span", {}, decimal((edges[0] + edges.at(-1)) / 2)), h("span", {}, `${decimal(edges[0])} worst`));
  const without = found.rows - found.scored;
  return [
    panel("Distribution", legend(shown), cut.frame, axis,
      h("p", { class: "note" }, "Drag the line, or move it with the arrow keys; Page Up and Page Down go by one percent.", without ? ` ${whole(without)} rows have no score.` : ""),
      h("div", { class: "filters" }, h("div", { class: "field" }, h("label", { for: exact.id }, "Percent of the pool"), exact), select), failed),
    panel("What the cut takes", told, taken),
  ];
}

/** A step as a percentage, without the noise of binary fractions. */
const stepPercent = (step) => (step + 1) / 10;

function folded(counts) {
  if (counts.length <= SHOWN) return counts;
  const rest = counts.slice(SHOWN).reduce((sum, own) => sum.map((count, bin) => count + own[bin]));
  return [...counts.slice(0, SHOWN), rest];
}

function originsTable({ cuts }, names, step) {
  const total = cuts.rows[step];
  const all = names.reduce((sum, name) => sum + cuts.origins[name].at(-1), 0);
  const items = names.map((name, place) => {
    const own = cuts.origins[name];
    return { name, place, taken: own[step], share: own[step] / total, pool: own.at(-1) / all };
  });
  return table("Rows of each origin that the cut takes", [
    { title: "origin", cell: ({ name, place }) => h("span", { class: "named" }, h("span", { class: `swatch ${colour(place)}`, "aria-hidden": "true" }), name) },
    { title: "", cell: ({ share, place }) => bar(share, place) },
    { title: "rows taken", number: true, cell: ({ taken }) => whole(taken) },
    { title: "of those taken", number: true, cell: ({ share }) => percent(share) },
    { title: "of the pool", number: true, cell: ({ pool }) => percent(pool) },
    { title: "against the pool", number: true, cell: ({ share, pool }) => (pool ? `${(share / pool).toFixed(2)} ×` : "–") },
  ], items);
}

async function choose(context, percents, place) {
  const onJob = () => fill(place, loading("Computing scores …"));
  try {
    const selection = await getScored("select", { ...question(context.params), pct: percents / 100, limit: 0 }, context.signal, onJob);
    location.hash = `#/selections/${selection.id}`;
  } catch (error) {
    context.failed(error, place);
  }
}
