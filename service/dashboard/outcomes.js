// The page of one job of a noun: what it is about, how far it is, and what came of it as soon as that is there.

import { follow, get } from "./api.js";
import { fill, h } from "./dom.js";
import { called, whole } from "./format.js";
import { empty, failure, heading } from "./parts.js";

/**
 * Fill the page of the job that the address names, among those of `path`. `back` is [words, address] of the list;
 * `shown(job)` is what stands there once it has succeeded, and `doing` says what is done until then; `meanwhile(job)`
 * promises what else stands there while it is at work.
 */
export async function showJob(main, path, { back: [words, list], doing, shown, meanwhile }, context) {
  const address = `${path}/${encodeURIComponent(context.parts[1])}`;
  const first = await get(address, {}, context.signal);
  const place = h("div"), going = h("p", { class: "note", role: "status" }), more = h("div");
  fill(main, h("p", {}, h("a", { href: list }, `← ${words}`)), heading(called(first), first.id), place);
  await update(first);
  if (first.result || first.error) return;
  for await (const job of follow(first.id, context.signal)) await update(job);
  await update(await get(address, {}, context.signal));

  async function update(job) {
    if (job.result) fill(place, shown(job));
    else if (job.error) fill(place, failure({ body: job.error, message: job.error.detail }));
    else if (job.status === "cancelled") fill(place, empty("It was cancelled.", `gradstore jobs retry ${job.id}`));
    else {
      fill(going, `${doing}: ${whole(job.progress.done)} of ${whole(job.progress.total)} ${job.progress.unit} …`);
      if (!going.isConnected) fill(place, going, more);
      if (meanwhile && job.status === "running") fill(more, await meanwhile(job));
    }
  }
}
