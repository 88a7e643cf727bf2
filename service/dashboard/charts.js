// Pictures of numbers, as SVG that follows the colours of the page. Each has its numbers as text beside it.

import { h, s } from "./dom.js";
import { percent, whole } from "./format.js";

const COLOURS = 8;

/** The colour class of the n-th of several things; beyond the eighth all share the last, grey. */
export const colour = (number) => `colour-${Math.min(number, COLOURS)}`;

/** Shares of a whole as one bar. `parts` are [name, number]. */
export function stack(parts, label) {
  const total = parts.reduce((sum, [, number]) => sum + number, 0) || 1;
  let left = 0;
  const bars = parts.map(([name, number], place) => {
    const width = (100 * number) / total;
    const bar = s("rect", { x: left, y: 0, width, height: 10, class: colour(place) }, s("title", {}, `${name}: ${percent(number / total)}`));
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

/** What each colour means. */
export function legend(names) {
  return h("ul", { class: "legend" }, names.map((name, place) => h("li", {}, h("span", { class: `swatch ${colour(place)}`, "aria-hidden": "true" }), name)));
}

const PLOT = { width: 720, height: 260, left: 48, right: 12, top: 12, bottom: 30 };

/** Lines over a common axis. `lines` are {name, points: [[x, y], …]}; what they say stands in a table beside. */
export function curves(lines, label, { x, y }) {
  const points = lines.flatMap((line) => line.points);
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const across = scale(Math.min(...xs), Math.max(...xs), PLOT.left, PLOT.width - PLOT.right);
  const low = Math.min(0, ...ys);
  const up = scale(low, Math.max(...ys), PLOT.height - PLOT.bottom, PLOT.top);
  const grid = ticks(low, Math.max(...ys)).map((value) => [
    s("line", { class: "grid", x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: up(value), y2: up(value) }),
    s("text", { class: "tick", x: PLOT.left - 6, y: up(value) + 4, "text-anchor": "end" }, round(value)),
  ]);
  const below = ticks(Math.min(...xs), Math.max(...xs)).map((value) => s("text", { class: "tick", x: across(value), y: PLOT.height - 12, "text-anchor": "middle" }, round(value)));
  const names = [s("text", { class: "tick", x: PLOT.width - PLOT.right, y: PLOT.height - 1, "text-anchor": "end" }, x), s("text", { class: "tick", x: 2, y: 11 }, y)];
  const drawn = lines.map((line, place) => s("path", { class: `${colour(place)} dash-${place % 4}`, d: line.points.map((point, number) => `${number ? "L" : "M"}${across(point[0]).toFixed(1)} ${up(point[1]).toFixed(1)}`).join("") }, s("title", {}, line.name)));
  return s("svg", { class: "curves", viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": label }, grid, below, names, drawn);
}

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
