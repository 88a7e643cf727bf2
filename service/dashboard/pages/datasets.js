// Datasets: where their rows come from, how long these are, and the rows themselves, a page at a time.

import { get } from "../api.js";
import { bar, colour, columns, stack } from "../charts.js";
import { fill, h } from "../dom.js";
import { ago, bytes, called, percent, plural, whole } from "../format.js";
import { listPanel } from "../lists.js";
import { conversation, empty, facts, heading, into, named, panel, table } from "../parts.js";
import { rowsPanel, wholePage } from "../rows.js";

const SHOWN = 12; // origins before the rest is folded
const DRAWN = 6; // origins with a picture of their lengths

/** Fill the page: all datasets, or the one that the address names. */
export async function show(main, context) {
  await (context.parts[1] ? showOne(main, context) : showAll(main, context));
}

// All datasets

async function showAll(main, context) {
  const all = await listPanel("datasets", (found) => (found.length ? list(found) : empty("There is no dataset yet: upload a pool of examples.", "gradstore datasets upload pool.jsonl --name pool")), context);
  fill(main, heading("Datasets", "Pools of examples to choose from, named by their content."), all);
}

function list(datasets) {
  return table("Datasets, the newest first", [
    { title: "dataset", cell: (dataset) => named(dataset, `#/datasets/${dataset.id}`) },
    { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    { title: "size", number: true, cell: ({ bytes: size }) => bytes(size) },
    { title: "origins", cell: ({ origins }) => makeUp(origins) },
    { title: "uploaded", cell: (dataset) => ago(dataset.created_at) },
  ], datasets);
}

function makeUp(origins) {
  const sorted = ordered(origins);
  const picture = stack(sorted, sorted.map(([name, rows]) => `${name} ${whole(rows)}`).slice(0, 8).join(", "));
  picture.classList.add("small");
  return h("span", { class: "named" }, picture, h("span", { class: "beside" }, plural(sorted.length, "origin")));
}

const ordered = (origins) => Object.entries(origins).sort(([, one], [, other]) => other - one);

// One dataset

async function showOne(main, context) {
  const id = encodeURIComponent(context.parts[1]);
  const dataset = await get(`datasets/${id}`, {}, context.signal);
  const origins = ordered(dataset.origins);
  const pictures = h("div");
  fill(
    main,
    h("p", {}, h("a", { href: "#/datasets" }, "← All datasets")),
    heading(called(dataset), dataset.name ? dataset.id : null),
    panel("At a glance", facts([
      ["rows", whole(dataset.rows)],
      ["size", bytes(dataset.bytes)],
      ["origins", whole(origins.length)],
      ["uploaded", ago(dataset.created_at)],
      ["begins with", dataset.prefix && h("a", { href: `#/datasets/${dataset.prefix}` }, dataset.prefix)],
      ["files", dataset.sources.map(({ filename }) => filename).join(", ")],
    ])),
    h("div", { class: "columns-2" }, panel("Origins", originsTable(origins, dataset.rows)), panel("Length of rows", pictures)),
    rows(dataset, origins, context),
  );
  into(pictures, async (signal) => lengths(await get(`datasets/${id}/lengths`, { bins: 30 }, signal)), context);
}

function originsTable(origins, total) {
  const numbered = origins.map(([name, rows], place) => ({ name, rows, place }));
  const made = (items) => table("Rows of each origin", [
    { title: "origin", cell: ({ name, place }) => h("span", { class: "named" }, h("span", { class: `swatch ${colour(place)}`, "aria-hidden": "true" }), name) },
    { title: "", cell: ({ rows, place }) => bar(rows / numbered[0].rows, place) },
    { title: "rows", number: true, cell: ({ rows }) => whole(rows) },
    { title: "share", number: true, cell: ({ rows }) => percent(rows / total) },
  ], items);
  if (numbered.length <= SHOWN) return made(numbered);
  const rest = numbered.slice(SHOWN);
  return h("div", {}, made(numbered.slice(0, SHOWN)), h("details", {}, h("summary", {}, `${plural(rest.length, "more origin")}`), made(rest)));
}

function lengths({ edges, origins }) {
  const names = Object.keys(origins);
  const axis = () => h("p", { class: "axis", "aria-hidden": "true" }, h("span", {}, bytes(edges[0])), h("span", {}, bytes(edges[Math.floor(edges.length / 2)])), h("span", {}, bytes(edges.at(-1) - 1)));
  const pictures = names.slice(0, DRAWN).map((name, place) => {
    const { median, counts } = origins[name];
    const label = `${name}: half of its rows are shorter than ${bytes(median)}`;
    return h("div", {}, h("h3", {}, h("span", { class: `swatch ${colour(place)}`, "aria-hidden": "true" }), name), columns(counts, label, place), axis());
  });
  const numbers = table("Bytes of a row by origin", [
    { title: "origin", cell: (name) => name },
    { title: "shortest", number: true, cell: (name) => bytes(origins[name].shortest) },
    { title: "median", number: true, cell: (name) => bytes(origins[name].median) },
    { title: "longest", number: true, cell: (name) => bytes(origins[name].longest) },
  ], names);
  return h("div", {}, h("p", { class: "note" }, "Rows by their bytes as JSON; each step of the axis is the same ratio.", names.length > DRAWN && ` Of the ${whole(names.length)} origins ${DRAWN} are drawn, and all are below as numbers.`), h("div", { class: "multiples" }, pictures), h("details", { class: "numbers" }, h("summary", {}, "The same as numbers"), numbers));
}

// Its rows

function rows(dataset, origins, context) {
  const read = (wanted, after, signal, onPart) => wholePage(`datasets/${dataset.id}/rows`, wanted, after, signal, (data, next) => onPart(data, `Looking through row ${whole(next)} …`));
  const told = (data, isSearch) => isSearch ? `${plural(data.length, "row")} found between row ${whole(data[0].row)} and row ${whole(data.at(-1).row)}` : `rows ${whole(data[0].row)} to ${whole(data.at(-1).row)} of ${whole(dataset.rows)}`;
  return rowsPanel("Rows", { read, shown, told, nothing: "No row is like this.", origins: origins.map(([name]) => name), last: dataset.rows - 1 }, context);
}

function shown({ row, id, origin, turns }) {
  return h("li", { class: "row" }, h("header", {}, h("h3", {}, `Row ${whole(row)}`), id !== null && h("span", { class: "id" }, id), h("span", {}, origin)), conversation(turns));
}
