// Streams: rows of numbers that an ability space is learnt from, which rows have them, and the numbers as files.

import { save } from "../api.js";
import { ownerNames } from "../asking.js";
import { legend, stack } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, called, percent, plural, whole } from "../format.js";
import { listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, empty, facts, heading, named, panel, table, toJob, toOwner } from "../parts.js";

const KINDS = { gradients: "gradients of this store", hidden: "pooled hidden states", routing: "routing weights", upload: "uploaded" };

const IS_ID = /^[a-z]+_[0-9a-f]{24}$/; // a name may be of jobs of several kinds

/** Fill the page: all streams, or the one that the address names. */
export async function show(main, context) {
  const names = await ownerNames(context.signal);
  if (!context.parts[1]) return showAll(main, names, context);
  return showJob(main, "streams", { back: ["All streams", "#/streams"], doing: "Computing", shown: (job) => stream(job, names, context) }, context);
}

async function showAll(main, names, context) {
  const none = empty("There is no stream yet.", "gradstore streams create --kind hidden --dataset pool --checkpoint base");
  const all = await listPanel("streams", (jobs) => (jobs.length ? list(jobs, names) : none), context);
  fill(main, heading("Streams", "Rows of numbers that an ability space is learnt from."), all);
}

function list(jobs, names) {
  return table("Streams, the newest first", [
    { title: "stream", cell: (job) => named(job, `#/streams/${encodeURIComponent(job.id)}`) },
    { title: "kind", cell: ({ request }) => KINDS[request.kind] },
    { title: "of", cell: ({ result }) => (result ? toOwner(result, names) : "–") },
    { title: "rows", number: true, cell: ({ result }) => (result ? whole(result.present_rows) : "–") },
    { title: "dim", number: true, cell: ({ result }) => (result ? whole(result.dim) : "–") },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "made", cell: ({ created_at: when }) => ago(when) },
  ], jobs);
}

function stream(job, names, context) {
  const { id, request, result } = job;
  const failed = h("div");
  const download = (text, ending, accept) => h("button", { type: "button", class: "quiet", onclick: () => save(`streams/${encodeURIComponent(id)}/content`, {}, `${called(job)}.${ending}`, accept).catch((error) => context.failed(error, failed)) }, text);
  return [
    failed,
    panel("At a glance", facts([
      ["kind", KINDS[result.kind]],
      ["of", toOwner(result, names)],
      ["rows", `${whole(result.present_rows)} of ${whole(result.rows)}`],
      ["dim", whole(result.dim)],
      ["checkpoint", request.checkpoint],
      ["layers", result.layers?.join(", ")],
      ["gradients", request.gradients && (IS_ID.test(request.gradients) ? toJob(request.gradients) : request.gradients)],
      ["feature set", result.feature_set],
      ["job", toJob(id, "request and progress")],
    ]), h("div", { class: "pager" }, download("Download as npy", "npy", "application/x-npy"), download("Download as safetensors", "safetensors", "application/x-safetensors"))),
    panel("Which rows it has", presence(result)),
    result.total_problems > 0 && panel("Left out of the upload", leftOut(result.total_problems, result.problems)),
  ];
}

function presence({ rows, present_rows: present, zero_rows: zeros, total_absent: absent, absent: first }) {
  const parts = [["with numbers", present - zeros], ["zeros alone", zeros], ["absent", absent]];
  return h("div", {},
    stack(parts, parts.map(([name, count]) => `${name} ${whole(count)}`).join(", ")),
    legend(parts.map(([name, count]) => `${name}: ${whole(count)} (${percent(count / (rows || 1))})`)),
    absent > 0 && h("details", {}, h("summary", {}, absent > first.length ? `The first ${whole(first.length)} of ${plural(absent, "absent row")}` : plural(absent, "absent row")), table("Absent rows", [
      { title: "row", cell: ({ row }) => whole(row) },
      { title: "id", cell: ({ id }) => id ?? "–" },
      { title: "why", cell: ({ reason }) => reason },
    ], first)));
}

/** Entries of an upload that could not be taken. */
export function leftOut(total, problems) {
  return h("div", {}, total > problems.length && h("p", { class: "note" }, `The first ${whole(problems.length)} of ${whole(total)}.`), table("Entries that were left out", [
    { title: "entry", cell: ({ line }) => whole(line) },
    { title: "why", cell: ({ detail }) => detail },
  ], problems));
}
