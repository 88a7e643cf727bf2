// The bank of adapters, and choices: which of them to mix for a task, by what ranks, and how alike they are.

import { get } from "../api.js";
import { ownerNames } from "../asking.js";
import { legend, scatter } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, decimal, duration, percent, plural, whole } from "../format.js";
import { growingPanel, listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, empty, facts, heading, listed, matrix, named, panel, table, toDataset, toJob, toTask } from "../parts.js";

const BACK = ["All adapters", "#/adapters"];
const PAGE = 20; // sets, or shots
const STANDING = ["chosen", "candidate", "not a candidate"];

/** Fill the page: the bank and all choices, or the choice that the address names. */
export async function show(main, context) {
  const [path, one] = context.parts;
  const names = await ownerNames(context.signal);
  if (path !== "adapter-choices" || !one) return showAll(main, names, context);
  return showJob(main, "adapters/choices", { back: BACK, doing: "Scoring", shown: (job) => choice(job, names, context) }, context);
}

// All of them

async function showAll(main, names, context) {
  const none = empty("The bank is empty.", "gradstore adapters register --finetune tuned --name mine");
  const unchosen = empty("No adapters have been chosen for a task yet.", "gradstore adapters choose --task mmlu --base-model Qwen/Qwen3-0.6B");
  const [bank, chosen] = await Promise.all([
    listPanel("adapters", (adapters) => (adapters.length ? bankTable(adapters, names) : none), context, "Bank"),
    listPanel("adapters/choices", (jobs) => (jobs.length ? choicesTable(jobs, names) : unchosen), context, "Choices"),
  ]);
  fill(main, heading("Adapters", "The bank of LoRA adapters, and which of them were chosen to be mixed for a task."), bank, chosen);
}

function bankTable(adapters, names) {
  return table("Adapters, the newest first", [
    { title: "adapter", cell: ({ id, name }) => name ?? h("span", { class: "id" }, id) },
    { title: "base model", cell: ({ base_model: model }) => model },
    { title: "rank", number: true, cell: ({ rank }) => whole(rank) },
    { title: "scaling", number: true, cell: ({ scaling }) => decimal(scaling) },
    { title: "targets", cell: ({ targets }) => targets.join(", ") },
    { title: "trained on", cell: ({ trained_on: words, dataset }) => words ?? (dataset ? toDataset(dataset, names) : "–") },
    { title: "came", cell: ({ created_at: when }) => ago(when) },
  ], adapters);
}

function choicesTable(jobs, names) {
  return table("Choices, the newest first", [
    { title: "choice", cell: (job) => named(job, `#/adapter-choices/${encodeURIComponent(job.id)}`) },
    { title: "task", cell: ({ request }) => toTask(request.task, names) },
    { title: "chosen", cell: ({ result }) => (result ? result.adapters.filter(({ chosen }) => chosen).map(called).join(", ") : "–") },
    { title: "of", number: true, cell: ({ result }) => (result ? whole(result.adapters.length) : "–") },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "asked for", cell: ({ created_at: when }) => ago(when) },
  ], jobs);
}

// One choice

const called = ({ name, adapter }) => name ?? adapter;
const standing = ({ chosen, candidate }) => (chosen ? 0 : candidate ? 1 : 2);

function choice(job, names, context) {
  const { id, request, result } = job;
  const nameOf = Object.fromEntries(result.adapters.map((one) => [one.adapter, called(one)]));
  return [
    panel("At a glance", facts([
      ["task", toTask(request.task, names)],
      ["chosen", listed(result.chosen.members.map((member) => h("strong", {}, nameOf[member])))],
      ["of", `${plural(result.adapters.length, "adapter")}, ${plural(result.candidates.length, "candidate")}, ${plural(result.sets, "set")}`],
      ["shots", whole(result.shots)],
      ["similarity", request.similarity],
      ["base model", result.base_model],
      ["chat format", result.template],
      ["scored for this choice", whole(result.scored_adapters)],
      ["time", duration(result.seconds)],
      ["job", toJob(id, "request and progress")],
    ])),
    panel("Adapters", ranks(result.adapters)),
    panel("Similarity of the candidates", matrix(`Similarity of the candidates (${request.similarity})`, result.candidates.map((one) => nameOf[one]), (one, other) => {
      const value = result.similarities[one][other];
      return [decimal(value), null, value];
    })),
    sets(id, nameOf, result.chosen, context),
    shots(id, nameOf, context),
  ];
}

function ranks(adapters) {
  const groups = STANDING.map((_, place) => adapters.filter((one) => standing(one) === place && one.perplexity !== null)
    .map((one) => ({ name: `${called(one)}: perplexity ${decimal(one.perplexity)}, accuracy ${percent(one.accuracy)}`, x: one.perplexity, y: one.accuracy })));
  return h("div", {},
    h("p", { class: "note" }, "The smallest sum of both ranks first. Each point is an adapter: its accuracy on the shots by its perplexity."),
    legend(STANDING),
    groups.some((group) => group.length) && scatter(groups, "Accuracy by perplexity of every adapter; the table has the numbers", { x: "perplexity", y: "accuracy" }),
    table("Adapters, the best first", [
      { title: "adapter", cell: (one) => (one.chosen ? h("span", { class: "chosen" }, `✓ ${called(one)}`) : called(one)) },
      { title: "perplexity", number: true, cell: ({ perplexity }) => decimal(perplexity) },
      { title: "accuracy", number: true, cell: ({ accuracy }) => percent(accuracy) },
      { title: "rank by perplexity", number: true, cell: ({ perplexity_rank: rank }) => whole(rank) },
      { title: "rank by accuracy", number: true, cell: ({ accuracy_rank: rank }) => whole(rank) },
      { title: "", cell: (one) => STANDING[standing(one)] },
    ], adapters));
}

function sets(id, nameOf, chosen, context) {
  const read = (found) => get(`adapters/choices/${encodeURIComponent(id)}/sets`, { limit: PAGE, after: found.length }, context.signal);
  const members = (set) => set.members.map((member) => nameOf[member]).join(", ");
  const isChosen = (set) => set.members.join() === chosen.members.join();
  return growingPanel("Sets", read, (found) => table("Sets of candidates, the best first", [
    { title: "members", cell: (set) => (isChosen(set) ? h("span", { class: "chosen" }, `✓ ${members(set)}`) : members(set)) },
    { title: "similarity", number: true, cell: ({ similarity }) => decimal(similarity) },
    { title: "rank of diversity", number: true, cell: ({ diversity_rank: rank }) => whole(rank) },
    { title: "total", number: true, cell: ({ total }) => whole(total) },
  ], found), context);
}

function shots(id, nameOf, context) {
  const read = (found) => get(`adapters/choices/${encodeURIComponent(id)}/shots`, { limit: PAGE, after: found.length }, context.signal);
  const best = ({ scores }) => scores.filter(({ perplexity }) => perplexity !== null).sort((one, other) => one.perplexity - other.perplexity)[0];
  const right = ({ scores }) => scores.filter(({ value }) => value === 1).map(({ adapter }) => nameOf[adapter]);
  return growingPanel("Shots", read, (found) => table("Shots in the order of the task's rows", [
    { title: "row", number: true, cell: ({ row }) => whole(row) },
    { title: "subtask", cell: ({ subtask }) => subtask },
    { title: "rationale", cell: ({ rationale }) => (rationale ? "✓ yes" : "–") },
    { title: "lowest perplexity", cell: (shot) => (best(shot) ? `${decimal(best(shot).perplexity)} (${nameOf[best(shot).adapter]})` : "–") },
    { title: "answered right by", cell: (shot) => right(shot).join(", ") || "none" },
  ], found), context);
}
