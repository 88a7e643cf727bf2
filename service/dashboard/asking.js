// Questions about scores: which task, and what else an address says (run, dataset, kind …), as the API takes it.

import { get } from "./api.js";

const NAMES = ["task", "dataset", "run", "checkpoint", "weights", "kind", "adam", "logodds_form", "reduction", "dim", "dtype", "converted_from", "projection", "projection_id", "seed", "template", "max_length", "precision", "quantisation", "method", "by", "budget", "neighbours", "beta", "capabilities", "strategy", "nearness", "bandwidth", "aggregate", "combine", "selection_seed"];

/** What the address says about the scores wanted. */
export function question(params) {
  return Object.fromEntries(NAMES.map((name) => [name, params.getAll(name)]).filter(([, values]) => values.length));
}

/** Parameters that say what is scored and chosen, whatever the method: the rest names features, or a way to take them together. */
const OF_ANY_METHOD = ["task", "dataset", "selection_seed"];

/** What an address is to forget when another method is chosen: it may have no use for it. */
export const forgotten = () => Object.fromEntries(NAMES.filter((name) => !OF_ANY_METHOD.includes(name)).map((name) => [name, null]));

/** The method that an address asks for, as the API takes it: a kind that one method has to itself names it. */
export const methodOf = (params) => params.get("method") ?? (["rds", "embedding"].includes(params.get("kind")) ? params.get("kind") : "influence");

/** All datasets, the newest first, at most a thousand. */
export async function allDatasets(signal) {
  return (await get("datasets", { limit: 1000 }, signal)).data;
}

/** Datasets as a choice; which is meant may be left to the server. */
export const pools = (datasets) => [["", "the one there is features of"], ...datasets.map(({ id, name }) => [name ?? id, name ?? id])];

/** All tasks, the newest first, at most a thousand. */
export async function allTasks(signal) {
  return (await get("tasks", { limit: 1000 }, signal)).data;
}

/** What tasks or datasets are called, by their ids. */
export const namesOf = (things) => Object.fromEntries(things.map(({ id, name }) => [id, name ?? id]));

/** Names of all tasks and datasets, by their ids. */
export async function ownerNames(signal) {
  const [tasks, datasets] = await Promise.all([allTasks(signal), allDatasets(signal)]);
  return namesOf([...tasks, ...datasets]);
}
