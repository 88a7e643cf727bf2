// Pictures of numbers, as SVG that follows the colours of the page. Each has its numbers as text beside it.

import { h, s } from "./dom.js";
import { percent, whole } from "./format.js";

const COLOURS = 8;
/** The place of the colour of what is not meant. */
export const GREY = COLOURS;

/** The colour class of the n-th of several things; beyond the eighth all share the last, grey. */
export const colour = (number) => `colour-${Math.min(number, COLOURS)}`;

/** Shares of a whole as one bar. `parts` are [name, number], and the place of their colour where it is not their own. */
export function stack(parts, label) {
  const total = parts.reduce((sum, [, number]) => sum + number, 0) || 1;
  let left = 0;
  const bars = parts.map(([name, number, place], own) => {
    const width = (100 * number) / total;
    const bar = s("rect", { x: left, y: 0, width, height: 10, class: colour(place ?? own) }, s("title", {}, `${name}: ${percent(number / total)}`));
    left += width;
    return bar;
  });
  return s("svg", { class: "stack", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label }, bars);
}

/** A bar in a table's cell; the number stands beside it. */
export function bar(share, place = 0) {
  const filled = s("rect", { x: 0, y: 0, width: 100 * share, height: 10, class: colour(place) });
  return s("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, filled);
}

/** Columns of equal width, one a number. */
export function columns(numbers, label, place = 0, highest = Math.max(...numbers, 1)) {
  const bars = numbers.map((number, column) => {
    const height = (40 * number) / highest;
    return s("rect", { x: column + 0.05, y: 40 - height, width: 0.9, height, class: colour(place) }, s("title", {}, whole(number)));
  });
  return s("svg", { class: "columns", viewBox: `0 0 ${numbers.length} 40`, preserveAspectRatio: "none", role: "img", "aria-label": label }, bars);
}

const CELL = { width: 44, height: 18, left: 150, top: 20 };

/**
 * Parts of a whole in rows, the darker the larger. `rows` and `columns` are names; `cell(row, column)` is a number from 0 to
 * 1, or undefined where there is none. What it says stands in a table beside.
 */
export function grid({ rows, columns: names, cell }, label) {
  const [width, height] = [CELL.left + CELL.width * names.length, CELL.top + CELL.height * rows.length];
  const head = names.map((name, column) => s("text", { class: "tick", x: CELL.left + CELL.width * (column + 0.5), y: 13, "text-anchor": "middle" }, name));
  const lines = rows.map((name, row) => [
    s("text", { class: "tick", x: CELL.left - 8, y: CELL.top + CELL.height * (row + 0.7), "text-anchor": "end" }, name),
    names.map((_, column) => [column, cell(row, column)]).filter(([, part]) => part !== undefined).map(([column, part]) =>
      s("rect", { x: CELL.left + CELL.width * column + 1, y: CELL.top + CELL.height * row + 1, width: CELL.width - 2, height: CELL.height - 2, class: colour(0), "fill-opacity": Math.max(part, 0.04) }, s("title", {}, `${name}, ${names[column]}: ${percent(part)}`))),
  ]);
  const picture = s("svg", { class: "parts", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, head, lines);
  return h("div", { class: "scrolling", tabindex: "0", role: "region", "aria-label": `${label}, as a picture` }, picture);
}

/** What each colour means: names, or [name, place] where its colour is not that of its own place. */
export function legend(names) {
  const places = names.map((each, own) => [each, own].flat().slice(0, 2));
  return h("ul", { class: "legend" }, places.map(([name, place]) => h("li", {}, h("span", { class: `swatch ${colour(place)}`, "aria-hidden": "true" }), name)));
}

const PLOT = { width: 720, height: 270, left: 48, right: 12, top: 22, bottom: 30 };
export const HALF = 440; // width of a plot that stands beside another one: what is written in it keeps its size

/** Lines over a common axis. `lines` are {name, points: [[x, y], …]}; what they say stands in a table beside. */
export function curves(lines, label, { width = PLOT.width, ...names }) {
  const points = lines.flatMap((line) => line.points);
  const { across, up, drawn } = frame(points.map(([x]) => x), [0, ...points.map(([, y]) => y)], names, width);
  const alone = lines.flatMap(({ name, points: [first, ...others] }, place) => (others.length ? [] : s("circle", { class: colour(place), cx: across(first[0]), cy: up(first[1]), r: 4 }, s("title", {}, name))));
  const paths = lines.map((line, place) => s("path", { class: `${colour(place)} dash-${place % 4}`, d: line.points.map((point, number) => `${number ? "L" : "M"}${across(point[0]).toFixed(1)} ${up(point[1]).toFixed(1)}`).join("") }, s("title", {}, line.name)));
  return plot(width, label, drawn, paths, alone);
}

/**
 * Points, and how far from the line on which both their numbers are the same. `groups` are lists of {name, x, y}, where
 * `low` and `high` may be the range of y; what they say stands in a table beside.
 */
export function scatter(groups, label, { width = PLOT.width, ...names }) {
  const points = groups.flat();
  const ys = points.flatMap(({ y, low, high }) => [y, low ?? y, high ?? y]);
  const { across, up, drawn, shared: [from, to] } = frame(padded(points.map(({ x }) => x)), padded(ys), names, width);
  const same = from < to && s("line", { class: "held", x1: across(from), y1: up(from), x2: across(to), y2: up(to) });
  const ranges = points.filter(({ low }) => low !== undefined).map(({ x, low, high }) => s("line", { class: "whisker", x1: across(x), x2: across(x), y1: up(low), y2: up(high) }));
  const dots = groups.map((group, place) => group.map(({ name, x, y }) => s("circle", { class: `${colour(place)} ${place ? "ring" : ""}`, cx: across(x), cy: up(y), r: 4.5 }, s("title", {}, name))));
  return plot(width, label, drawn, same || null, ranges, dots);
}

/** Numbers, and a little more on both sides. */
function padded(numbers) {
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const margin = (high - low || 1) / 20;
  return [low - margin, high + margin];
}

/** The axes of a plot over all of these numbers: the places of both, what is drawn of them, and the range that they share. */
function frame(xs, ys, { x, y }, width) {
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const across = scale(left, right, PLOT.left, width - PLOT.right);
  const up = scale(low, high, PLOT.height - PLOT.bottom, PLOT.top);
  const grid = ticks(low, high).map((value) => [
    s("line", { class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: up(value), y2: up(value) }),
    s("text", { class: "tick", x: PLOT.left - 6, y: up(value) + 4, "text-anchor": "end" }, round(value)),
  ]);
  const below = ticks(left, right).map((value) => s("text", { class: "tick", x: across(value), y: PLOT.height - 15, "text-anchor": "middle" }, round(value)));
  const words = [s("text", { class: "tick", x: width - PLOT.right, y: PLOT.height - 4, "text-anchor": "end" }, x), s("text", { class: "tick", x: 2, y: 11 }, y)];
  return { across, up, drawn: [grid, below, words], shared: [Math.max(left, low), Math.min(right, high)] };
}

const plot = (width, label, ...children) => s("svg", { class: "curves", viewBox: `0 0 ${width} ${PLOT.height}`, role: "img", "aria-label": label }, children);

const LANE = 26; // height of one of several values below each other

/**
 * Values with their intervals, one below the other. `items` are {name, value, interval, place}. With `from` they are bars
 * that begin there, else points; `line` is a value that all are to be held against. What they say stands in a table beside.
 */
export function intervals(items, label, { from = null, line = null }) {
  const ends = items.flatMap(({ value, interval }) => [value, interval.low, interval.high]).concat(from ?? [], line ?? []);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const margin = (high - low || 1) / 20;
  const across = scale(low - margin, high + margin, INTERVALS.left, INTERVALS.width - INTERVALS.right);
  const bottom = items.length * LANE + 6;
  const grid = ticks(low, high).map((value) => [
    s("line", { class: "grid", x1: across(value), x2: across(value), y1: 4, y2: bottom }),
    s("text", { class: "tick", x: across(value), y: bottom + 14, "text-anchor": "middle" }, round(value)),
  ]);
  const drawn = items.map(({ name, value, interval, place }, number) => {
    const middle = 4 + LANE * (number + 0.5);
    const whisker = (end) => s("line", { class: "whisker", x1: across(end), x2: across(end), y1: middle - 5, y2: middle + 5 });
    const [left, right] = [across(value), across(from ?? value)].sort((one, other) => one - other);
    return s("g", {}, s("title", {}, `${name}: ${round(value)} (${round(interval.low)} to ${round(interval.high)})`),
      s("text", { class: "tick", x: INTERVALS.left - 8, y: middle + 4, "text-anchor": "end" }, name.length > NAME ? `${name.slice(0, NAME - 1)}…` : name),
      from !== null && s("rect", { class: colour(place), x: left, y: middle - 7, width: right - left, height: 14 }),
      s("line", { class: "whisker", x1: across(interval.low), x2: across(interval.high), y1: middle, y2: middle }), whisker(interval.low), whisker(interval.high),
      from === null && s("circle", { class: colour(place), cx: across(value), cy: middle, r: 5 }));
  });
  const held = [from, line].filter((value) => value !== null).map((value) => s("line", { class: "held", x1: across(value), x2: across(value), y1: 4, y2: bottom }));
  return s("svg", { class: "intervals", viewBox: `0 0 ${INTERVALS.width} ${bottom + 20}`, role: "img", "aria-label": label }, grid, drawn, held);
}

const INTERVALS = { width: 720, left: 170, right: 20 };
const NAME = 28; // characters of a name that fit beside the picture

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

/** Some four round numbers between two. */
function ticks(low, high) {
  const rough = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

const round = (value) => String(Number(value.toPrecision(6)));

/** A histogram of several origins, stacked, its highest values at the left. `counts` are lists of equal length. */
export function stackedHistogram(counts, label) {
  const bins = counts[0]?.length ?? 0;
  const totals = Array.from({ length: bins }, (_, bin) => counts.reduce((sum, own) => sum + own[bin], 0));
  const highest = Math.max(...totals, 1);
  const bars = [];
  for (let bin = 0; bin < bins; bin += 1) {
    let top = 100;
    counts.forEach((own, place) => {
      const height = (100 * own[bin]) / highest;
      top -= height;
      if (height) bars.push(s("rect", { x: bins - 1 - bin + 0.04, y: top, width: 0.92, height, class: colour(place) }));
    });
  }
  return s("svg", { class: "histogram", viewBox: `0 0 ${bins} 100`, preserveAspectRatio: "none", role: "img", "aria-label": label }, bars);
}
