// Which page is shown: the part of the address behind `#`, such as #/datasets/tulu?origin=flan. What lies `within` another
// page is listed there, and not beside it.

import { get, isAborted, key } from "./api.js";
import { fill, fresh, h } from "./dom.js";
import { failure, heading, loading } from "./parts.js";
import * as adapters from "./pages/adapters.js";
import * as annotations from "./pages/annotations.js";
import * as attributions from "./pages/attributions.js";
import * as comparisons from "./pages/comparisons.js";
import * as datasets from "./pages/datasets.js";
import * as estimates from "./pages/estimates.js";
import * as generations from "./pages/generations.js";
import * as jobs from "./pages/jobs.js";
import * as overlaps from "./pages/overlaps.js";
import * as overview from "./pages/overview.js";
import * as predictors from "./pages/predictors.js";
import * as projectors from "./pages/projectors.js";
import * as scores from "./pages/scores.js";
import * as selections from "./pages/selections.js";
import * as streams from "./pages/streams.js";
import * as training from "./pages/training.js";

const PAGES = [
  { path: "", title: "Overview", page: overview },
  { path: "jobs", title: "Jobs", page: jobs },
  { path: "datasets", title: "Datasets", page: datasets },
  { path: "scores", title: "Scores", page: scores },
  { path: "selections", title: "Selections", page: selections },
  { path: "overlaps", title: "Overlap", page: overlaps },
  { path: "comparisons", title: "Comparison", page: comparisons },
  { path: "attributions", title: "Attribution", page: attributions },
  { path: "training", title: "Training", page: training },
  { path: "generations", title: "Generations", page: generations },
  { path: "adapters", title: "Adapters", page: adapters },
  { path: "adapter-choices", title: "Choice of adapters", page: adapters, within: "adapters" },
  { path: "predictors", title: "Predictors", page: predictors },
  { path: "cascades", title: "Cascade", page: predictors, within: "predictors" },
  { path: "estimates", title: "Estimates", page: estimates },
  { path: "estimate-validations", title: "Validation of estimates", page: estimates, within: "estimates" },
  { path: "projectors", title: "Projectors", page: projectors },
  { path: "streams", title: "Streams", page: streams },
  { path: "annotations", title: "Annotations", page: annotations },
  { path: "taxonomies", title: "Taxonomy", page: annotations, within: "annotations" },
];
const UNAUTHENTICATED = 401;

const main = document.getElementById("main");
const announcements = document.getElementById("announcements");
const logOut = document.getElementById("log-out");
let leaving = new AbortController();

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decoded);
  return { parts, params: new URLSearchParams(query ?? "") };
}

/** A part of an address; what is no escape of anything stays as it is. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** What a page is given beside the element it fills. */
function contextOf({ parts, params }, signal) {
  return {
    parts,
    params,
    signal,
    /** Say something to who cannot see that it happened. */
    announce: (text) => (announcements.textContent = text),
    /** Keep what was chosen in the address, so that it can be shared and gone back to. */
    remember(changes) {
      for (const [name, value] of Object.entries(changes)) value === null || value === "" ? params.delete(name) : params.set(name, value);
      history.replaceState(null, "", `#/${parts.map(encodeURIComponent).join("/")}${params.size ? `?${params}` : ""}`);
    },
    failed,
  };

  /** Show an error in its place, or ask for the key; where trying `again` fails, that error stands there. */
  function failed(error, element, again = null) {
    if (isAborted(error) || signal.aborted) return;
    if (error.body?.status === UNAUTHENTICATED) logIn();
    else fill(element, failure(error, again && retry));

    async function retry() {
      fill(element);
      try {
        await again();
      } catch (newer) {
        failed(newer, element, again);
      }
    }
  }
}

async function show({ moved = true } = {}) {
  leaving.abort();
  leaving = new AbortController();
  const here = place();
  const context = contextOf(here, leaving.signal);
  const chosen = PAGES.find(({ path }) => path === (here.parts[0] ?? ""));
  mark(chosen);
  if (!chosen) {
    fill(main, heading("There is no such page", "Choose one of the pages beside."));
    return;
  }
  fill(main, loading());
  try {
    await chosen.page.show(main, context);
  } catch (error) {
    if (context.signal.aborted) return;
    const place = h("div");
    fill(main, heading(chosen.title), place);
    context.failed(error, place, () => show());
  }
  if (moved && !context.signal.aborted) (main.querySelector("h1") ?? main).focus({ preventScroll: true });
}

function mark(chosen) {
  document.title = chosen ? `${chosen.title} · gradstore` : "gradstore";
  const current = chosen && (chosen.within ?? chosen.path);
  const links = PAGES.filter(({ within }) => !within).map(({ path, title }) => h("li", {}, h("a", { href: `#/${path}`, "aria-current": path === current && "page" }, title)));
  fill(document.getElementById("pages"), h("ul", {}, links));
  logOut.hidden = !key.get();
  window.scrollTo(0, 0);
}

function logIn(reason = null) {
  leaving.abort();
  key.forget();
  logOut.hidden = true;
  const id = fresh("key");
  const input = h("input", { id, type: "password", autocomplete: "current-password", required: true, "aria-describedby": reason && `${id}-reason` });
  const form = h(
    "form",
    { class: "log-in" },
    h("label", { for: id }, "API key"),
    input,
    reason && h("p", { id: `${id}-reason`, class: "wrong", role: "alert" }, reason),
    h("button", { type: "submit" }, "Log in"),
    h("p", { class: "note" }, "It is kept until this tab is closed."),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    try {
      await get("health");
      show();
    } catch (error) {
      logIn(error.body?.status === UNAUTHENTICATED ? "This is not the server's key." : error.message);
    }
  });
  fill(main, heading("Log in", "This server asks for its key (GRADSTORE_API_KEY)."), form);
  input.focus();
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address keeps the page
  main.focus();
});
logOut.addEventListener("click", () => logIn());
window.addEventListener("hashchange", () => show());
show({ moved: false });
