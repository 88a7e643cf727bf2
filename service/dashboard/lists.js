// Lists of things, the newest first, that grow at their end: a page more at each press of a button.

import { get } from "./api.js";
import { fill, h } from "./dom.js";
import { loading, panel } from "./parts.js";

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

/** The panel of all things of `path`, once its first page is there; `shown(things)` is what stands in it, under a `title`
 * where a page has several. */
export async function listPanel(path, shown, context, title = null) {
  const read = (found) => get(path, { limit: LISTED, after: found.at(-1)?.id }, context.signal);
  const { parts, load } = growing(read, shown, context);
  await load();
  return title ? panel(title, parts) : h("div", { class: "panel" }, parts);
}

/** A panel that fills itself: `read(found)` answers the page after what was found, as {data, has_more}. */
export function growingPanel(title, read, shown, context) {
  const { parts, load } = growing(read, shown, context);
  const [place] = parts;
  const begin = () => load().catch((error) => context.failed(error, place, begin));
  fill(place, loading());
  begin();
  return panel(title, parts);
}

function growing(read, shown, context) {
  const place = h("div"), failed = h("div"), found = [];
  const more = moreButton(() => load().catch((error) => context.failed(error, failed, () => more.click())));
  more.hidden = true;
  async function load() {
    fill(failed);
    const page = await read(found);
    found.push(...page.data);
    more.hidden = !page.has_more;
    fill(place, shown(found));
  }
  return { parts: [place, failed, h("div", { class: "pager" }, more)], load };
}
