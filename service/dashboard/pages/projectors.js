// Projectors: how well a network tells which capabilities rows call for, and those of a pool and of what was chosen from it.

import { get } from "../api.js";
import { GREY, HALF, bar, curves, legend } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, called, decimal, duration, percent, plural, whole } from "../format.js";
import { LISTED, listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, choice, empty, facts, heading, into, listed, matrix, named, panel, table, toJob } from "../parts.js";

const STREAMS = ["gradients", "hidden", "routing"];

/** Fill the page: all projectors, or the one that the address names. */
export async function show(main, context) {
  if (!context.parts[1]) return showAll(main, context);
  return showJob(main, "projectors", { back: ["All projectors", "#/projectors"], doing: "Training", shown: (job) => projector(job, context), meanwhile: soFar(context) }, context);
}

async function showAll(main, context) {
  const none = empty("No projector has been trained yet.", "gradstore projectors create --gradients gradients --annotations labels");
  const all = await listPanel("projectors", (jobs) => (jobs.length ? list(jobs) : none), context);
  fill(main, heading("Projectors", "Networks that tell which capabilities a row calls for, and place rows by them."), all);
}

function list(jobs) {
  return table("Projectors, the newest first", [
    { title: "projector", cell: (job) => named(job, `#/projectors/${encodeURIComponent(job.id)}`) },
    { title: "streams", cell: ({ request }) => streams(request) },
    { title: "labels", cell: ({ request }) => toAnnotation(request.annotations) },
    { title: "capabilities", number: true, cell: ({ result }) => (result ? whole(result.capabilities.length) : "–") },
    { title: "F1", number: true, cell: ({ result }) => decimal(result?.f1) },
    { title: "macro F1", number: true, cell: ({ result }) => decimal(result?.macro_f1) },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "asked for", cell: ({ created_at: when }) => ago(when) },
  ], jobs);
}

const streams = ({ streams: of }) => listed(STREAMS.filter((name) => of[name]).map((name) => h("a", { href: `#/streams/${encodeURIComponent(of[name])}` }, of[name])));
const toAnnotation = (reference) => h("a", { href: `#/annotations/${encodeURIComponent(reference)}` }, reference);

// One projector

/** Shows the epochs that have ended of a projector that is trained now; until another ends, what is open stays open. */
function soFar({ signal }) {
  let ended = 0, shown = null;
  return async ({ id }) => {
    const { data } = await get(`projectors/${encodeURIComponent(id)}/epochs`, {}, signal);
    if (data.length !== ended) [ended, shown] = [data.length, panel("Training so far", training(data))];
    return shown;
  };
}

function projector(job, context) {
  const { id, request, result } = job;
  return [
    panel("At a glance", facts([
      ["streams", streams(request)],
      ["labels", toAnnotation(request.annotations)],
      ["trained on", plural(result.training_rows, "row")],
      ["held out", plural(result.validation_rows, "row")],
      ["without labels", plural(result.unlabelled_rows, "row")],
      ["absent from a stream", plural(result.absent_rows, "row")],
      ["precision", decimal(result.precision)],
      ["recall", decimal(result.recall)],
      ["F1", decimal(result.f1)],
      ["macro F1", result.macro_f1 === null ? null : decimal(result.macro_f1)],
      ["all capabilities right", percent(result.exact_match)],
      ["Gram error", decimal(result.gram_error)],
      ["numbers in the network", whole(result.parameters)],
      ["time", duration(result.seconds)],
      ["job", toJob(id, "request and progress")],
    ])),
    panel("Capabilities, on held-out rows", capabilities(result.capabilities)),
    panel("Training", training(result.epochs)),
    panel("Base vectors", gram(result)),
    histogram(id, context),
  ];
}

function capabilities(scores) {
  const share = (number) => h("div", { class: "cell" }, h("span", {}, decimal(number)), bar(number ?? 0));
  return table("Precision, recall and F1 of each capability", [
    { title: "capability", cell: ({ name }) => name },
    { title: "trained on", number: true, cell: ({ training_rows: rows }) => whole(rows) },
    { title: "held out", number: true, cell: ({ rows }) => whole(rows) },
    { title: "predicted", number: true, cell: ({ predicted }) => whole(predicted) },
    { title: "precision", cell: ({ precision }) => share(precision) },
    { title: "recall", cell: ({ recall }) => share(recall) },
    { title: "F1", cell: ({ f1 }) => share(f1) },
  ], scores);
}

/** Loss and Gram error over the epochs of both stages, one after the other. */
function training(epochs) {
  const line = (name, value) => ({ name, points: epochs.map((epoch, number) => [number + 1, epoch[value]]) });
  const losses = [line("classification, trained on", "classification_loss"), line("classification, held out", "validation_loss")];
  const second = epochs.findIndex(({ stage }) => stage === 2);
  const told = second < 0 ? "All epochs are of stage 1." : `Stage 2, in which the encoder stays and the space is adjusted, begins with epoch ${second + 1}.`;
  return h("div", {},
    h("p", { class: "note" }, told),
    h("div", { class: "columns-2" },
      h("div", {}, h("h3", {}, "Loss"), legend(losses.map(({ name }) => name)), curves(losses, "Loss by epoch; the table has the numbers", { x: "epoch", y: "loss", width: HALF })),
      h("div", {}, h("h3", {}, "Gram error"), legend(["cosines of the base vectors less the identity"]), curves([line("Gram error", "gram_error")], "Gram error by epoch; the table has the numbers", { x: "epoch", y: "Gram error", width: HALF }))),
    h("details", { class: "numbers" }, h("summary", {}, plural(epochs.length, "epoch")), table("Epochs", [
      { title: "stage", cell: ({ stage }) => `stage ${stage}` },
      { title: "epoch", number: true, cell: ({ epoch }) => whole(epoch) },
      { title: "loss", number: true, cell: ({ loss }) => decimal(loss) },
      { title: "classification", number: true, cell: ({ classification_loss: loss }) => decimal(loss) },
      { title: "held out", number: true, cell: ({ validation_loss: loss }) => decimal(loss) },
      { title: "F1", number: true, cell: ({ f1 }) => decimal(f1) },
      { title: "Gram error", number: true, cell: ({ gram_error: error }) => decimal(error) },
    ], epochs)));
}

function gram({ gram: cosines, capabilities: scores }) {
  return h("div", {},
    h("p", { class: "note" }, "Cosine of each two base vectors: 0 where capabilities are told apart wholly."),
    matrix("Cosine of each two base vectors", scores.map(({ name }) => name), (one, other) => [decimal(cosines[one][other]), null, Math.abs(cosines[one][other])]));
}

// What rows call for

/** The capabilities of a pool beside those of a selection, which is chosen above. */
function histogram(id, context) {
  const place = h("div"), counted = h("div");
  const look = (selection) => into(counted, async (signal) => shares(await get(`projectors/${encodeURIComponent(id)}/histogram`, { selection }, signal)), context);
  into(place, async (signal) => {
    const { data } = await get("selections", { limit: LISTED }, signal);
    if (!data.length) return empty("Nothing has been selected yet.", "gradstore select --method cods --task mmlu --pct 0.05");
    const asked = context.params.get("selection") ?? data[0].id;
    look(asked);
    const choose = (selection) => (context.remember({ selection }), look(selection));
    return h("div", { class: "filters" }, choice("Selection", data.map((one) => [one.id, `${called(one)} (${one.recipe.method}, ${plural(one.count, "row")})`]), asked, choose));
  }, context);
  return panel("Capabilities of a pool and of a selection", place, counted);
}

function shares({ pool, selected, selection, capabilities: counts }) {
  const largest = Math.max(...counts.flatMap(({ pool_share: one, selected_share: other }) => [one, other]), 1e-9);
  const both = ({ pool_share: one, selected_share: other }) => h("div", { class: "cell" }, bar(one / largest, GREY), bar(other / largest));
  return h("div", {},
    h("p", { class: "note" }, `Part of the ${plural(pool, "row")} of the pool, and of the ${plural(selected, "row")} of `, h("a", { href: `#/selections/${selection}` }, "the selection"), ", that call for each capability by a probability over one half."),
    legend([["pool", GREY], ["selection", 0]]),
    table("Capabilities of the pool and of the selection", [
      { title: "capability", cell: ({ name }) => name },
      { title: "", cell: both },
      { title: "pool", number: true, cell: ({ pool: rows, pool_share: share }) => `${whole(rows)} (${percent(share)})` },
      { title: "selection", number: true, cell: ({ selected: rows, selected_share: share }) => `${whole(rows)} (${percent(share)})` },
      { title: "enrichment", number: true, cell: ({ enrichment }) => (enrichment === null ? "–" : `${decimal(enrichment)} ×`) },
    ], counts));
}
