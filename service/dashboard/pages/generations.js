// Generations: what a model has answered; of a mixture, how its experts share the tokens of each layer, and where each token went.

import { grid } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, called, decimal, duration, percent, plural, whole } from "../format.js";
import { listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, choice, empty, facts, heading, named, panel, table, toJob } from "../parts.js";

/** Fill the page: all generations, or the one that the address names. */
export async function show(main, context) {
  if (!context.parts[1]) return showAll(main, context);
  return showJob(main, "generations", { back: ["All generations", "#/generations"], doing: "Writing", shown: (job) => generation(job, context) }, context);
}

async function showAll(main, context) {
  const none = empty("Nothing has been generated yet.", 'gradstore generations create --checkpoint <mixture> --trace "What is a lever?"');
  const all = await listPanel("generations", (jobs) => (jobs.length ? list(jobs) : none), context);
  fill(main, heading("Generations", "What models answer, and which experts of a mixture the tokens go to."), all);
}

function list(jobs) {
  return table("Generations, the newest first", [
    { title: "generation", cell: (job) => named(job, `#/generations/${encodeURIComponent(job.id)}`) },
    { title: "of", cell: ({ request }) => request.finetune ?? request.checkpoint },
    { title: "prompts", number: true, cell: ({ request }) => whole(request.prompts.length) },
    { title: "trace", cell: ({ request }) => (request.trace ? "yes" : "no") },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "made", cell: ({ created_at: when }) => ago(when) },
  ], jobs);
}

function generation(job, context) {
  const { id, request, result } = job;
  return [
    panel("At a glance", facts([
      ["checkpoint", result.checkpoint],
      ["prompts", whole(result.data.length)],
      ["written", plural(result.data.reduce((sum, { tokens }) => sum + tokens, 0), "token")],
      ["time", duration(result.seconds)],
      ["job", toJob(id, `request and progress of ${called(job)}`)],
    ])),
    panel("Answers", h("div", { class: "rows" }, result.data.map((answer, row) => turns(request.prompts[row], answer.text)))),
    result.loads && panel("Load of the experts", loads(result.loads)),
    result.loads && routes(result.data, context),
  ];
}

function turns(prompt, text) {
  const asked = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
  return h("div", { class: "turns" }, [...asked, { role: "answer", content: text }].map(({ role, content }) =>
    h("div", { class: "turn" }, h("span", { class: "role" }, role), h("p", { class: "text" }, content))));
}

function loads(layers) {
  const most = Math.max(...layers.map(({ load }) => load.length));
  const experts = Array.from({ length: most }, (_, expert) => `${expert}`);
  return h("div", {},
    grid({ rows: layers.map(({ layer }) => `layer ${layer}`), columns: experts, cell: (row, column) => layers[row].load[column] }, "The part of each layer's choices that fell on each expert"),
    table("Load by layer and expert", [
      { title: "layer", cell: ({ layer }) => whole(layer) },
      { title: "balance", number: true, cell: ({ balance }) => decimal(balance) },
      ...experts.map((name, expert) => ({ title: `expert ${name}`, number: true, cell: ({ load }) => (expert < load.length ? percent(load[expert]) : "–") })),
    ], layers));
}

/** The experts of each traced token of one row in one module, both chosen above the picture. */
function routes(data, { params, remember }) {
  const rows = data.map((_, row) => [`${row}`, `prompt ${row + 1}`]);
  const modules = data[0].trace.modules.map(({ module }) => [module, module]);
  const place = h("div");
  const one = (name, options) => options.find(([value]) => value === params.get(name))?.[0] ?? options[0][0];
  const picture = () => fill(place, route(data[Number(one("prompt", rows))].trace, one("module", modules)));
  const chosen = (change) => (value) => {
    remember({ [change]: value });
    picture();
  };
  picture();
  return panel("Where the tokens went", h("div", { class: "filters" }, choice("Prompt", rows, one("prompt", rows), chosen("prompt")), choice("Linear layer", modules, one("module", modules), chosen("module"))), place);
}

function route({ first, tokens, modules }, path) {
  const { experts, weights, sub_routers: gates } = modules.find(({ module }) => module === path);
  const most = Math.max(...experts.flat()) + 1;
  const names = Array.from({ length: most }, (_, expert) => `${expert}`);
  const weightOf = (row, column) => weights[row][experts[row].indexOf(column)] ?? 0;
  return h("div", {},
    grid({ rows: tokens.map((token) => JSON.stringify(token)), columns: names, cell: weightOf }, "The weight of each expert for each traced token"),
    table("Experts of each traced token", [
      { title: "place", cell: (row) => whole(first + row) },
      { title: "token", cell: (row) => h("code", {}, JSON.stringify(tokens[row])) },
      { title: "experts and weights", cell: (row) => experts[row].map((expert, place) => `${expert}: ${percent(weights[row][place])}`).join(", ") },
      ...(gates ? [{ title: "sub-routers", cell: (row) => gates[row].map(percent).join(", ") }] : []),
    ], tokens.map((_, row) => row)));
}
