// What several pages are made of: headings, tables, panels, errors, empty states, a row's text.

import { NoAnswer, successive } from "./api.js";
import { bar } from "./charts.js";
import { inCommands } from "./commands.js";
import { fill, fresh, h } from "./dom.js";

/** The head of a page. */
export function heading(title, lead = null, ...beside) {
  return h("div", { class: "heading" }, h("div", {}, h("h1", { tabindex: "-1" }, title), lead && h("p", { class: "lead" }, lead)), ...beside);
}

/** A titled part of a page. */
export function panel(title, ...children) {
  const id = fresh("panel");
  return h("section", { class: "panel", "aria-labelledby": id }, h("h2", { id }, title), ...children);
}

/** A table: columns are {title, number?, cell: item → node}. It scrolls by itself where it is too wide. */
export function table(caption, columns, items) {
  const head = columns.map(({ title, number }) => h("th", { scope: "col", class: number && "number" }, title));
  const rows = items.map((item) => h("tr", {}, columns.map((column, place) => tableCell(column, item, place))));
  return scrolling(caption, h("table", {}, h("caption", { class: "unseen" }, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows)));
}

function tableCell({ number, cell }, item, place) {
  return place ? h("td", { class: number && "number" }, cell(item)) : h("th", { scope: "row", class: number && "number" }, cell(item));
}

/** A square table of things by themselves; `cell(one, other)` has a number, a note under it, and a bar's share. */
export function matrix(caption, names, cell, colourOf = () => 0) {
  const filled = (one, other) => {
    const [number, note, share] = cell(one, other);
    return h("div", { class: "cell" }, h("strong", {}, number), note && h("span", { class: "note" }, note), bar(Math.max(share, 0), colourOf(share)));
  };
  const head = h("tr", {}, h("td"), names.map((name) => h("th", { scope: "col" }, name)));
  const rows = names.map((name, one) => h("tr", {}, h("th", { scope: "row" }, name), names.map((_, other) => h("td", {}, one === other ? h("span", { class: "note" }, "same") : filled(one, other)))));
  return scrolling(caption, h("table", { class: "matrix" }, h("caption", { class: "unseen" }, caption), h("thead", {}, head), h("tbody", {}, rows)));
}

/** What is wider than the window scrolls, by keyboard, too. */
export function scrolling(label, child) {
  return h("div", { class: "scrolling", tabindex: "0", role: "region", "aria-label": label }, child);
}

/** Facts as name and value. */
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined);
  return h("dl", { class: "facts" }, shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** A link to a thing by its name, or by its id where it has none. */
export const named = (thing, href) => h("a", { href, class: !thing.name && "id" }, thing.name ?? thing.id);

/** A link to a dataset, by its name where `names` has one for the id. */
export const toDataset = (reference, names = {}) => h("a", { href: `#/datasets/${encodeURIComponent(reference)}` }, names[reference] ?? reference);

/** A link to the scores of a task, which are what there is to see of it. */
export const toTask = (reference, names = {}) => h("a", { href: `#/scores?task=${encodeURIComponent(reference)}` }, names[reference] ?? reference);

/** A link to the dataset or the task that rows are of; the one that it is not is null. */
export const toOwner = ({ dataset, task }, names = {}) => (dataset === null ? toTask(task, names) : toDataset(dataset, names));

/** A link to the page of a job: what was asked for, and how it went. */
export const toJob = (id, text = id) => h("a", { href: `#/jobs/${encodeURIComponent(id)}`, class: text === id && "id" }, text);

/** Several things with commas between them. */
export const listed = (things) => things.flatMap((thing, number) => (number ? [", ", thing] : [thing]));

/** What stands where nothing is yet, and what to do about it. */
export function empty(text, command = null) {
  return h("div", { class: "empty" }, h("p", {}, text), command && h("pre", {}, h("code", {}, command)));
}

/** While something is on its way. */
export const loading = (text = "Loading …") => h("p", { class: "loading", role: "status" }, text);

/** An error in the server's words; `again` tries once more. */
export function failure(error, again = null) {
  const body = error.body;
  const title = body ? body.title : error instanceof NoAnswer ? "No answer" : "This page failed";
  const ambiguous = body?.type === "ambiguous";
  const places = (body?.errors ?? []).filter(({ detail }) => !body.detail.includes(detail) || ambiguous);
  return h(
    "div",
    { class: "failure", role: "alert" },
    h("h2", {}, title),
    h("p", {}, ambiguous ? `${body.detail.split(";")[0]}: say which one is meant.` : inCommands(error.message)),
    places.length > 0 && h("ul", {}, ambiguous ? choices(places) : places.map(({ detail }) => h("li", {}, inCommands(detail)))),
    body?.instance && h("p", { class: "note" }, `The server's log has it under ${body.instance}.`),
    again && h("button", { type: "button", onclick: again }, "Try again"),
  );
}

/** Links to this page with each of the questions that the server offers, named by what tells them apart. */
function choices(places) {
  const questions = places.map(({ detail }) => new URL(detail, document.baseURI).searchParams);
  const names = [...new Set(questions.flatMap((one) => [...one.keys()]))];
  const telling = names.filter((name) => new Set(questions.map((one) => one.getAll(name).join())).size > 1);
  const page = location.hash.split("?")[0];
  return questions.map((one) => h("li", {}, h("a", { href: `${page}?${one}` }, telling.filter((name) => one.has(name)).map((name) => `${name} ${one.getAll(name).join(", ")}`).join(", "))));
}

const SIGNS = { queued: "○", running: "◐", succeeded: "✓", failed: "✕", cancelled: "–" };

/** A job's state as a word with a sign. */
export function badge(status) {
  return h("span", { class: `badge ${status}` }, h("span", { "aria-hidden": "true" }, SIGNS[status]), ` ${status}`);
}

/** A labelled choice. */
export function choice(label, options, chosen, onchange) {
  const id = fresh("choice");
  const made = options.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
  return h("div", { class: "field" }, h("label", { for: id }, label), h("select", { id, onchange: (event) => onchange(event.target.value) }, made));
}

const USUAL = 5; // percent of a pool

/** The percentage of a pool that an address asks for; the usual one where it says none, or nothing that is one. */
export function percentOf(params) {
  const said = Number(params.get("pct") ?? USUAL);
  return said >= 0.1 && said <= 100 ? said : USUAL;
}

/** A field for a percentage of the pool; what is none is taken back. `input.value` is changed by who moves it otherwise. */
export function percentField(value, onchange) {
  const input = h("input", { id: fresh("percent"), type: "number", min: "0.1", max: "100", step: "any", required: true, value: String(value), onchange: change });
  let before = input.value;
  input.addEventListener("focus", () => (before = input.value));
  function change() {
    if (!input.checkValidity()) input.value = before;
    else if (input.value !== before) onchange(Number(input.value));
    before = input.value; // which may have been rounded
  }
  return { input, field: h("div", { class: "field" }, h("label", { for: input.id }, "Percent of the pool"), input) };
}

const LONG = 700; // characters beyond which a text is folded

/** A row of a dataset or a task as it is read, turn after turn. */
export function conversation(turns) {
  return h("div", { class: "turns" }, turns.map(({ role, prefix, content }) => h("div", { class: `turn ${role}` }, h("span", { class: "role" }, role), foldable(prefix ? `${prefix} ${content}` : content))));
}

function foldable(text) {
  const shown = h("p", { class: "text" }, text.length > LONG ? `${text.slice(0, LONG)} …` : text);
  if (text.length <= LONG) return shown;
  const button = h("button", { type: "button", class: "link", "aria-expanded": "false", onclick: () => unfold() }, "Show all");
  let open = false;
  function unfold() {
    open = !open;
    shown.textContent = open ? text : `${text.slice(0, LONG)} …`;
    button.textContent = open ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(open));
  }
  return h("div", {}, shown, button);
}

const signals = new WeakMap(); // of the work that is to fill a place

/**
 * Run `work`, which is given a signal, and put what it returns into `place`; an error stands there with a button that
 * tries again. Work that was to fill the same place before is given up.
 */
export async function into(place, work, context) {
  if (!signals.has(place)) signals.set(place, successive(context.signal));
  const signal = signals.get(place)();
  fill(place, loading());
  try {
    const found = await work(signal);
    if (!signal.aborted) fill(place, found);
  } catch (error) {
    if (!signal.aborted) context.failed(error, place, () => into(place, work, context));
  }
}
