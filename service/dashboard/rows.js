// Rows a page at a time, with their text: searched by text and origin, forth and back, to a row by its place.

import { get, successive } from "./api.js";
import { fill, fresh, h } from "./dom.js";
import { choice, empty, loading, panel } from "./parts.js";

export const ROWS = 10; // of a page

/** The panel of rows. `read(wanted, after, signal, onPart)` answers a page as {data, next}; `shown(row)` is a list item;
 * `told(data, isSearch)` says where the page lies; `origins` are those to choose from, null where nothing can be searched;
 * `last` is the last place to go to by number, null where there is none. */
export function rowsPanel(title, { read, shown, told, nothing, origins, last = null }, context) {
  const { params, remember, signal } = context;
  const place = h("div"), note = h("p", { class: "note", role: "status" });
  const before = []; // where the pages before this one began
  const newest = successive(signal);
  let following = null;
  const here = () => Number(params.get("after") ?? 0);
  const list = (data) => h("ol", { class: "rows" }, data.map(shown));
  const back = h("button", { type: "button", class: "quiet", onclick: () => load(before.pop() ?? 0) }, "Previous");
  const forth = h("button", { type: "button", class: "quiet", onclick: () => go(following) }, "Next");

  async function load(after) {
    const own = newest();
    remember({ after: after ? String(after) : null });
    const wanted = { origin: params.get("origin"), q: params.get("q") };
    back.disabled = forth.disabled = true;
    fill(place, loading());
    try {
      const found = await read(wanted, after, own, (data, text) => fill(place, list(data), loading(text)));
      following = found.next;
      fill(place, found.data.length ? list(found.data) : empty(nothing));
      note.textContent = found.data.length ? told(found.data, Boolean(wanted.q || wanted.origin)) : "";
      back.disabled = !before.length && !after;
      forth.disabled = following === null;
    } catch (error) {
      if (!own.aborted) context.failed(error, place, () => load(after));
    }
  }

  function go(after) {
    before.push(here());
    load(after);
  }

  function start(changes) {
    remember(changes);
    before.length = 0;
    load(0);
  }

  load(here());
  return panel(title, origins && search(origins, params, start), place, pager([back, forth, note], last, go));
}

function search(origins, params, start) {
  const text = fresh("search");
  return h("form", { class: "filters", role: "search", onsubmit: (event) => (event.preventDefault(), start({ q: event.target.elements.q.value })) },
    h("div", { class: "field wide" }, h("label", { for: text }, "Text"), h("input", { id: text, name: "q", type: "search", value: params.get("q") ?? "" })),
    choice("Origin", [["", "all origins"], ...origins.map((name) => [name, name])], params.get("origin") ?? "", (origin) => start({ origin })),
    h("button", { type: "submit" }, "Search"));
}

function pager(parts, last, go) {
  if (last === null) return h("div", { class: "pager" }, parts);
  const jump = fresh("row");
  return h("form", { class: "pager", onsubmit: (event) => (event.preventDefault(), go(Number(event.target.elements.row.value))) },
    parts,
    h("label", { for: jump, class: "note" }, "Go to row"),
    h("input", { id: jump, name: "row", type: "number", min: "0", max: String(last), required: true }),
    h("button", { type: "submit", class: "quiet" }, "Go"));
}

/** A whole page of `path`: a search looks through a part of the rows at once, so it is asked until the page is full;
 * `onPart(found, next)` is told what there is before each question. */
export async function wholePage(path, wanted, after, signal, onPart = () => {}) {
  const data = [];
  let next = after;
  do {
    onPart(data, next);
    const page = await get(path, { ...wanted, after: next, limit: ROWS - data.length }, signal);
    data.push(...page.data);
    next = page.next;
  } while (next !== null && data.length < ROWS);
  return { data, next };
}
