// Lists of things, the newest first, that grow at their end: a page more at each press of a button.

import { get } from "./api.js";
import { fill, h } from "./dom.js";

export const LISTED = 50; // things of a page

/** The button that shows more; `load` shows its errors itself, and the button cannot be pressed again while it is at work. */
export function moreButton(load) {
  const button = h("button", { type: "button", class: "quiet", onclick: press }, "Show more");
  async function press() {
    button.disabled = true;
    await load();
    button.disabled = false;
    if (document.activeElement === document.body) button.focus({ preventScroll: true }); // a disabled button loses the focus
  }
  return button;
}

/** The panel of all things of `path`, once its first page is there; `shown(things)` is what stands in it. */
export async function listPanel(path, shown, context) {
  const place = h("div"), failed = h("div");
  const more = moreButton(() => load().catch((error) => context.failed(error, failed, () => more.click())));
  const found = [];
  async function load() {
    fill(failed);
    const page = await get(path, { limit: LISTED, after: found.at(-1)?.id }, context.signal);
    found.push(...page.data);
    more.hidden = !page.has_more;
    fill(place, shown(found));
  }
  await load();
  return h("div", { class: "panel" }, place, failed, h("div", { class: "pager" }, more));
}
