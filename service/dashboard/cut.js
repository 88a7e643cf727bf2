// A cut through a histogram that is dragged by mouse or finger, and moved by keys: an ARIA slider.

import { h } from "./dom.js";

const KEYS = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };

/**
 * Lay a cut over `picture`. Steps are counted from 0 to `steps` - 1; `placeOf(step)` says where each stands, from 0 (left)
 * to 1, and rises with the step. `describe(step)` gives {now, text} for who cannot see it; `onMove(step)` hears of moves.
 */
export function cutOver(picture, { steps, label, placeOf, describe, onMove }) {
  const handle = h("div", { class: "handle", role: "slider", tabindex: "0", "aria-label": label, "aria-orientation": "horizontal" });
  const rest = h("div", { class: "rest", "aria-hidden": "true" });
  const frame = h("div", { class: "cut" }, picture, rest, handle);
  let at = 0;

  function move(step) {
    at = Math.min(Math.max(step, 0), steps - 1);
    const { now, text } = describe(at);
    const left = `${100 * placeOf(at)}%`;
    handle.style.left = left;
    rest.style.left = left;
    handle.setAttribute("aria-valuemin", String(describe(0).now));
    handle.setAttribute("aria-valuemax", String(describe(steps - 1).now));
    handle.setAttribute("aria-valuenow", String(now));
    handle.setAttribute("aria-valuetext", text);
    onMove(at);
  }

  function under(event) {
    const { left, width } = frame.getBoundingClientRect();
    const wanted = (event.clientX - left) / width;
    let low = 0, high = steps - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (placeOf(middle) < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  handle.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    move(at + KEYS[event.key]);
  });
  frame.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    handle.focus();
    move(under(event));
  });
  frame.addEventListener("pointermove", (event) => frame.hasPointerCapture(event.pointerId) && move(under(event)));
  return { frame, move };
}
