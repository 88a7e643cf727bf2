// A task's scores: their histogram by origin, and a cut that shows how many rows, and whose, a fraction takes.

import { getScored } from "../api.js";
import { allDatasets, allTasks, forgotten, methodOf, namesOf, pools, question } from "../asking.js";
import { bar, colour, legend, stackedHistogram } from "../charts.js";
import { cutOver } from "../cut.js";
import { fill, h } from "../dom.js";
import { decimal, percent, whole } from "../format.js";
import { choice, empty, facts, heading, into, loading, panel, percentField, percentOf, table } from "../parts.js";

const STEPS = 1000; // a tenth of a percent each
const BINS = 60;
const SHOWN = 8; // origins with a colour of their own
const METHODS = [["influence", "influence on the task"], ["rds", "likeness by hidden states (RDS+)"], ["embedding", "likeness by a sentence encoder"], ["bm25", "words in common (BM25)"], ["random", "drawn at random"], ["predicted", "influence as predicted"], ["cascade", "influence of the rows predicted best"], ["gradex", "its group's estimate (GradEx)"], ["cods", "place in an ability space (CoDS)"]];
const WITHOUT_CHOICE = ["random", "predicted", "cascade", "gradex", "cods"]; // of the aggregate: there is none, or it was chosen before
const AGGREGATES = [["less", "best subtask mean (LESS)"], ["avg", "mean of all validation rows"], ["max", "nearest validation row"], ["min", "farthest validation row"]];

/** Fill the page. */
export async function show(main, context) {
  const { params, remember, signal } = context;
  const [tasks, datasets] = await Promise.all([allTasks(signal), allDatasets(signal)]);
  const title = heading("Scores", "How much each row of the pool helps a task, and what a cut takes.");
  if (!tasks.length) {
    fill(main, title, empty("There is no task yet: upload a few examples of what the model should get better at.", "gradstore tasks upload mmlu.zip --kind mmlu --name mmlu"));
    return;
  }
  const place = h("div");
  if (!params.has("task")) remember({ task: tasks[0].name });
  const pick = (name, value) => (remember({ [name]: value }), load());
  const names = { tasks: namesOf(tasks), datasets: namesOf(datasets) };
  const score = h("div");
  const showScore = () => fill(score, scoreChoice(params, pick));
  showScore();
  fill(main, title, h("div", { class: "filters" },
    choice("Task", tasks.map(({ name }) => [name, name]), params.get("task"), (value) => pick("task", value)),
    choice("Pool", pools(datasets), names.datasets[params.get("dataset")] ?? params.get("dataset") ?? "", (value) => pick("dataset", value)),
    choice("Method", METHODS, methodOf(params), (value) => (remember({ ...forgotten(), method: value }), showScore(), load())),
    score), place);
  const load = () => into(place, (signal) => distribution(context, names, place, signal), context);
  await load();
}

/** How a row's scores become one; each method has its own default, and some have nothing to take together. */
function scoreChoice(params, pick) {
  const method = methodOf(params);
  if (WITHOUT_CHOICE.includes(method)) return null;
  return choice("Score", AGGREGATES, params.get("aggregate") ?? (method === "influence" ? "less" : "max"), (value) => pick("aggregate", value));
}

/** What the scores are of, as the server understood it. */
function asUnderstood({ recipe }, names) {
  const named = (ids, known) => ids.map((id) => known[id] ?? id).join(", ");
  return facts([
    ["task", named(recipe.tasks, names.tasks) || null],
    ["pool", named(recipe.datasets, names.datasets)],
    ["method", Object.fromEntries(METHODS)[recipe.method]],
    ["score", Object.fromEntries(AGGREGATES)[recipe.aggregate]],
  ]);
}

async function distribution(context, names, place, signal) {
  const onJob = (job) => fill(place, loading(`Computing scores: ${whole(job.progress.done)} of ${whole(job.progress.total)} ${job.progress.unit} …`));
  const found = await getScored("scores/distribution", { ...question(context.params), bins: BINS, steps: STEPS }, signal, onJob);
  const origins = Object.keys(found.counts);
  const counts = folded(origins.map((name) => found.counts[name]));
  const picture = stackedHistogram(counts, `Histogram of ${whole(found.scored)} scores from ${decimal(found.edges.at(-1))} to ${decimal(found.edges[0])}, the best at the left`);
  const taken = h("div"), told = h("p", { class: "told", role: "status" });
  const shown = origins.slice(0, SHOWN);
  if (origins.length > SHOWN) shown.push("other origins");

  const { cuts, edges } = found;
  const span = edges.at(-1) - edges[0];
  let at = 0;
  const exact = percentField(percentOf(context.params), (percents) => cut.move(Math.round(percents * 10) - 1));
  const cut = cutOver(picture, {
    steps: STEPS,
    label: "Cut: fraction of the pool that is taken, in percent",
    placeOf: (step) => (edges.at(-1) - cuts.scores[step]) / span,
    describe: (step) => ({ now: stepPercent(step), text: `${stepPercent(step)} %: ${whole(cuts.rows[step])} rows with a score of ${decimal(cuts.scores[step])} or more` }),
    onMove(step) {
      at = step;
      exact.input.value = String(stepPercent(step));
      fill(told, h("strong", {}, `${whole(cuts.rows[step])} of ${whole(found.rows)} rows`), ` (${stepPercent(step)} %) have a score of ${decimal(cuts.scores[step])} or more.`);
      fill(taken, originsTable(found, origins, step));
      context.remember({ pct: String(stepPercent(step)) });
    },
  });
  const failed = h("div");
  const select = h("button", { type: "button", onclick: () => choose(context, stepPercent(at), failed) }, "Select these rows");
  cut.move(Math.round(percentOf(context.params) * 10) - 1);
  const axis = h("p", { class: "axis", "aria-hidden": "true" }, h("span", {}, `best ${decimal(edges.at(-1))}`), h("span", {}, decimal((edges[0] + edges.at(-1)) / 2)), h("span", {}, `${decimal(edges[0])} worst`));
  const without = found.rows - found.scored;
  return [
    panel("Distribution", asUnderstood(found, names), legend(shown), cut.frame, axis,
      h("p", { class: "note" }, "Drag the line, or move it with the arrow keys; Page Up and Page Down go by one percent.", without ? ` ${whole(without)} rows have no score.` : ""),
      h("div", { class: "filters" }, exact.field, select), failed),
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
