// Annotations and taxonomies: which capabilities rows call for, and what these are.

import { get } from "../api.js";
import { ownerNames } from "../asking.js";
import { bar } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, called, percent, plural, whole } from "../format.js";
import { growingPanel, listPanel } from "../lists.js";
import { showJob } from "../outcomes.js";
import { badge, empty, facts, heading, named, panel, table, toJob, toOwner } from "../parts.js";
import { leftOut } from "./streams.js";

const BACK = ["All annotations", "#/annotations"];
const PAGE = 20; // rows
const SOURCES = { upload: "a file", origin: "the rows' origins", labeller: "a labeller" };

/** Fill the page: all annotations and taxonomies, or the one that the address names. */
export async function show(main, context) {
  const [path, one] = context.parts;
  if (path === "taxonomies" && one) return showTaxonomy(main, context);
  const names = await ownerNames(context.signal);
  if (!one) return showAll(main, names, context);
  return showJob(main, path, { back: BACK, doing: "Labelling", shown: (job) => annotation(job, names, context) }, context);
}

// All of them

async function showAll(main, names, context) {
  const none = empty("No rows have been labelled yet.", "gradstore annotations create --dataset pool --by origin");
  const untold = empty("No taxonomy has been recorded yet; annotations without one use the thirteen capabilities of CODS.", "gradstore taxonomies create");
  const [labelled, known] = await Promise.all([
    listPanel("annotations", (jobs) => (jobs.length ? annotations(jobs, names) : none), context, "Annotations"),
    listPanel("taxonomies", (found) => (found.length ? taxonomies(found) : untold), context, "Taxonomies"),
  ]);
  fill(main, heading("Annotations", "Which capabilities rows call for."), labelled, known);
}

function annotations(jobs, names) {
  return table("Annotations, the newest first", [
    { title: "annotation", cell: (job) => named(job, `#/annotations/${encodeURIComponent(job.id)}`) },
    { title: "by", cell: ({ request, result }) => SOURCES[result?.by ?? request.by] },
    { title: "of", cell: ({ result }) => (result ? toOwner(result, names) : "–") },
    { title: "labelled", number: true, cell: ({ result }) => (result ? `${whole(result.labelled_rows)} of ${whole(result.rows)}` : "–") },
    { title: "capabilities", number: true, cell: ({ result }) => (result ? whole(result.capabilities.length) : "–") },
    { title: "state", cell: ({ status }) => badge(status) },
    { title: "made", cell: ({ created_at: when }) => ago(when) },
  ], jobs);
}

function taxonomies(found) {
  return table("Taxonomies, the newest first", [
    { title: "taxonomy", cell: (taxonomy) => named(taxonomy, toTaxonomy(taxonomy.id)) },
    { title: "capabilities", number: true, cell: ({ capabilities }) => whole(capabilities.length) },
    { title: "the first", cell: ({ capabilities }) => capabilities.slice(0, 4).map(({ name }) => name).join(", ") },
    { title: "recorded", cell: ({ created_at: when }) => ago(when) },
  ], found);
}

const toTaxonomy = (id) => `#/taxonomies/${encodeURIComponent(id)}`;

// One annotation

function annotation({ id, result }, names, context) {
  const most = Math.max(...result.capabilities.map(({ rows }) => rows), 1);
  return [
    panel("At a glance", facts([
      ["of", toOwner(result, names)],
      ["by", SOURCES[result.by]],
      ["labelled", `${whole(result.labelled_rows)} of ${plural(result.rows, "row")}`],
      ["replies that could not be read", result.by === "labeller" ? whole(result.total_unparsed) : null],
      ["taxonomy", h("a", { href: toTaxonomy(result.taxonomy) }, "what they are")],
      ["job", toJob(id, "request and progress")],
    ])),
    panel("Capabilities", table("Rows that call for each capability", [
      { title: "capability", cell: ({ name }) => name },
      { title: "", cell: ({ rows }) => bar(rows / most) },
      { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
      { title: "share of the labelled", number: true, cell: ({ rows }) => percent(rows / (result.labelled_rows || 1)) },
    ], result.capabilities)),
    result.total_unparsed > 0 && panel("Replies that could not be read", unparsed(result)),
    result.total_problems > 0 && panel("Left out of the file", leftOut(result.total_problems, result.problems)),
    rows(id, result, context),
  ];
}

function unparsed({ unparsed: first, total_unparsed: total }) {
  return h("div", {}, total > first.length && h("p", { class: "note" }, `The first ${whole(first.length)} of ${whole(total)}.`), table("Replies that could not be read", [
    { title: "row", cell: ({ row }) => whole(row) },
    { title: "id", cell: ({ id }) => id ?? "–" },
    { title: "reply", cell: ({ reply }) => reply },
  ], first));
}

/** The rows and their labels, a page more at each press of a button. */
function rows(id, { dataset }, context) {
  const read = (found) => get(`annotations/${encodeURIComponent(id)}/rows`, { after: found.length, limit: PAGE }, context.signal);
  const shown = (found) => table("Rows and their labels", [
    { title: "row", cell: ({ row }) => (dataset === null ? whole(row) : h("a", { href: `#/datasets/${dataset}?after=${row}` }, whole(row))) },
    { title: "id", cell: ({ id: own }) => own ?? "–" },
    { title: "calls for", cell: ({ categories }) => (categories === null ? "not known" : categories.join(", ") || "none of the taxonomy") },
  ], found);
  return growingPanel("Rows", read, shown, context);
}

// One taxonomy

async function showTaxonomy(main, context) {
  const taxonomy = await get(`taxonomies/${encodeURIComponent(context.parts[1])}`, {}, context.signal);
  fill(main,
    h("p", {}, h("a", { href: BACK[1] }, "← All annotations and taxonomies")),
    heading(called(taxonomy), taxonomy.name ? taxonomy.id : null),
    panel("Capabilities", table("Capabilities in their order", [
      { title: "capability", cell: ({ name }) => name },
      { title: "what it is", cell: ({ definition }) => definition || "–" },
    ], taxonomy.capabilities)));
}
