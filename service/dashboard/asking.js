// Questions about scores: which task, and what else an address says (run, dataset, kind …), as the API takes it.

import { get } from "./api.js";

const NAMES = ["task", "dataset", "run", "checkpoint", "weights", "kind", "adam", "reduction", "dim", "dtype", "converted_from", "projection", "projection_id", "seed", "template", "max_length", "precision", "quantisation", "method", "aggregate", "combine", "selection_seed"];

/** What the address says about the scores wanted. */
export function question(params) {
  return Object.fromEntries(NAMES.map((name) => [name, params.getAll(name)]).filter(([, values]) => values.length));
}

/** All tasks, the newest first, at most a thousand. */
export async function allTasks(signal) {
  return (await get("tasks", { limit: 1000 }, signal)).data;
}

/** What tasks are called, by their ids. */
export const taskNames = (tasks) => Object.fromEntries(tasks.map(({ id, name }) => [id, name]));
