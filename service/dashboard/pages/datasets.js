// Datasets: where their rows come from, how long these are, and the rows themselves, a page at a time.

import { get } from "../api.js";
import { bar, colour, columns, stack } from "../charts.js";
import { fill, fresh, h } from "../dom.js";
import { ago, bytes, called, percent, plural, whole } from "../format.js";
import { choice, conversation, empty, facts, heading, into, loading, named, panel, table } from "../parts.js";

const ROWS = 10; // of a page
const SHOWN = 12; // origins before the rest is folded

/** Fill the page: all datasets, or the one that the address names. */
export async function show(main, context) {
  await (context.parts[1] ? showOne(main, context) : showAll(main, context));
}

// All datasets

async function showAll(main, context) {
  const place = h("div");
  const more = h("button", { type: "button", class: "quiet", onclick: () => load() }, "Show more");
  const found = [];
  async function load() {
    const page = await get("datasets", { limit: 50, after: found.at(-1)?.id }, context.signal);
    found.push(...page.data);
    more.hidden = !page.has_more;
    fill(place, found.length ? list(found) : empty("There is no dataset yet: upload a pool of examples.", "gradstore datasets upload pool.jsonl --name pool"));
  }
  await load();
  fill(main, heading("Datasets", "Pools of examples to choose from, named by their content."), h("div", { class: "panel" }, place, h("div", { class: "pager" }, more)));
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
    rowsPanel(dataset, origins, context),
  );
  into(pictures, async () => lengths(await get(`datasets/${id}/lengths`, { bins: 30 }, context.signal)), context);
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
  const pictures = names.slice(0, 6).map((name, place) => {
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
  return h("div", {}, h("p", { class: "note" }, "Rows by their bytes as JSON; each step of the axis is the same ratio."), h("div", { class: "multiples" }, pictures), h("details", { class: "numbers" }, h("summary", {}, "The same as numbers"), numbers));
}

// Its rows

function rowsPanel(dataset, origins, context) {
  const { params, remember, signal } = context;
  const place = h("div"), note = h("p", { class: "note", role: "status" });
  const before = []; // where the pages before this one began
  let following = null;
  let asked = null;
  const back = h("button", { type: "button", class: "quiet", onclick: () => load(before.pop() ?? 0) }, "Previous");
  const forth = h("button", { type: "button", class: "quiet", onclick: () => (before.push(Number(params.get("after") ?? 0)), load(following)) }, "Next");

  async function load(after) {
    asked?.abort();
    asked = new AbortController();
    const together = AbortSignal.any([signal, asked.signal]);
    remember({ after: after ? String(after) : null });
    const wanted = { origin: params.get("origin"), q: params.get("q") };
    back.disabled = forth.disabled = true;
    try {
      const found = await search(dataset, wanted, after, together, (row, data) => fill(place, rows(data), loading(`Looking through row ${whole(row)} …`)));
      following = found.next;
      fill(place, found.data.length ? rows(found.data) : empty("No row is like this."));
      note.textContent = found.data.length ? `rows ${whole(found.data[0].row)} to ${whole(found.data.at(-1).row)} of ${whole(dataset.rows)}` : "";
      back.disabled = !before.length && !after;
      forth.disabled = following === null;
    } catch (error) {
      if (!asked.signal.aborted || signal.aborted) context.failed(error, place, () => load(after));
    }
  }

  function start(changes) {
    remember(changes);
    before.length = 0;
    load(0);
  }

  const text = fresh("search"), jump = fresh("row");
  const searching = h("form", { class: "filters", role: "search", onsubmit: (event) => (event.preventDefault(), start({ q: event.target.elements.q.value })) },
    h("div", { class: "field wide" }, h("label", { for: text }, "Text"), h("input", { id: text, name: "q", type: "search", value: params.get("q") ?? "" })),
    choice("Origin", [["", "all origins"], ...origins.map(([name]) => [name, name])], params.get("origin") ?? "", (origin) => start({ origin })),
    h("button", { type: "submit" }, "Search"));
  const jumping = h("form", { class: "pager", onsubmit: (event) => (event.preventDefault(), before.push(Number(params.get("after") ?? 0)), load(Number(event.target.elements.row.value))) },
    back, forth, note,
    h("label", { for: jump, class: "note" }, "Go to row"),
    h("input", { id: jump, name: "row", type: "number", min: "0", max: String(dataset.rows - 1), required: true }),
    h("button", { type: "submit", class: "quiet" }, "Go"));
  load(Number(params.get("after") ?? 0));
  return panel("Rows", searching, place, jumping);
}

/** A page of rows: a search looks through a part of the dataset at once, so it is asked until the page is full; what
 * has been found is shown meanwhile. */
async function search(dataset, wanted, after, signal, onRow) {
  const found = [];
  let next = after;
  do {
    onRow(next, found);
    const page = await get(`datasets/${dataset.id}/rows`, { ...wanted, after: next, limit: ROWS - found.length }, signal);
    found.push(...page.data);
    next = page.next;
  } while (next !== null && found.length < ROWS);
  return { data: found, next };
}

function rows(data) {
  return h("ol", { class: "rows" }, data.map(({ row, id, origin, turns }) =>
    h("li", { class: "row" }, h("header", {}, h("h3", {}, `Row ${whole(row)}`), id !== null && h("span", { class: "id" }, id), h("span", {}, origin)), conversation(turns))));
}
