// Numbers, times and names as people read them.

import { h } from "./dom.js";

const WHOLE = new Intl.NumberFormat("en");
const ONE_DIGIT = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const LOCAL = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "medium" });
const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

/** 1234567 → 1,234,567 */
export const whole = (number) => WHOLE.format(number);

/** Bytes, in powers of 1,000: 1234567 → 1.2 MB */
export function bytes(number) {
  let unit = 0;
  while (number >= 999.5 && unit < UNITS.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${UNITS[unit]}`;
}

/** A share of a whole, 0.0512 → 5.1 % */
export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${ONE_DIGIT.format(share * 100)} %`;
}

/** A score, a loss, a rate: three digits that count. */
export function decimal(number) {
  if (number === null || number === undefined) return "–";
  const size = Math.abs(number);
  if (size !== 0 && size < 0.001) return number.toExponential(2);
  if (size >= 100) return whole(Math.round(number));
  return number.toFixed(size < 1 ? 3 : size < 10 ? 2 : 1);
}

/** Seconds: 75 → 1 min 15 s */
export function duration(seconds) {
  if (seconds < 60) return `${seconds < 10 ? ONE_DIGIT.format(seconds) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return seconds < 600 ? `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** A moment, as how long ago it was; the moment itself is in the tooltip. */
export function ago(text) {
  if (!text) return "–";
  const moment = new Date(text);
  const seconds = Math.max(0, (Date.now() - moment) / 1000);
  const [length, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"]].find(([size]) => seconds >= size) ?? [1, "second"];
  const count = Math.floor(seconds / length);
  const words = seconds < 5 ? "just now" : `${count} ${unit}${count === 1 ? "" : "s"} ago`;
  return h("time", { datetime: text, title: LOCAL.format(moment) }, words);
}

/** What a thing is called: its name, else its id. */
export const called = (thing) => thing.name ?? thing.id;

/** One thing or several: plural(2, "row") → 2 rows */
export const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
