"""Estimates as a method of /select: the score of a row is that of its group (datastore/estimates.py).

All of it lies in the store once the estimates are done, so nothing is left to compute when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gradstore.types import AnyJob, SelectionRecipe

from datastore import advice
from datastore.errors import Conflict
from datastore.estimates import Estimates
from datastore.gradex import UNGROUPED
from datastore.influence import NO_SUBTASK, TaskScores, masked
from datastore.parameters import Query
from datastore.selection.rules import named, refused

LOOKED_AT = 1000
"""Estimates among which the only ones that fit are looked for."""


@dataclass(frozen=True)
class EstimateScores:
    """The scores of method=gradex."""

    estimates: Estimates

    def pool(self, query: Query, *, path: str) -> Sequence[str]:
        """The dataset that the estimates are of."""
        return [self._plan(self._meant(query, [], [], path))["dataset"]]

    def resolved(self, query: Query, *, datasets: Sequence[str], tasks: Sequence[str], path: str) -> dict[str, Any]:
        """The estimates that are meant. Raises `NotFound`, `Ambiguous`, `InvalidInput` and `Conflict`."""
        job = self._meant(query, datasets, tasks, path)
        self._check(job, datasets, tasks)
        return {"by": job}

    def check(self, recipe: SelectionRecipe) -> None:
        """Raise what `resolved` does where a recipe that is sent cannot be answered."""
        if recipe.by is None:
            raise refused("by", "method=gradex has its scores from estimates: a recipe of it names them by their id")
        job, _ = self.estimates.finished(recipe.by)
        if job.id != recipe.by:
            raise named("by", recipe.by, id=job.id)
        self._check(job.id, recipe.datasets, recipe.tasks)

    def known(self, recipe: SelectionRecipe) -> list[TaskScores] | None:
        """The scores of each task."""
        scores, valid = self.estimates.row_scores(recipe.by or "", recipe.tasks)
        nothing = np.full(len(valid), NO_SUBTASK, np.int16)
        return [masked(one.astype(np.float32), nothing, valid) for one in scores]

    def work(self, recipe: SelectionRecipe, on_rows: Callable[[int], None]) -> None:
        """Do nothing: what estimates left is all that there is."""

    def rows(self, recipe: SelectionRecipe) -> int:
        """Rows of the pool."""
        return self.estimates.catalog.dataset(recipe.datasets[0]).rows

    def units(self, recipe: SelectionRecipe) -> int:
        """Rows of the pool."""
        return self.rows(recipe)

    def subtasks(self, recipe: SelectionRecipe) -> dict[str, tuple[str, ...]]:
        """Names of each task's subtasks, none of which gives a score by itself."""
        return {task: self.estimates.worlds.tasks.subtasks(task) for task in recipe.tasks}

    def reasons(self, recipe: SelectionRecipe) -> dict[int, str]:
        """The pool's rows without a score, and why."""
        rows = self.estimates.scored_rows(recipe.by or "")
        feature_set = self._plan(recipe.by or "")["feature_set"]
        without = self.estimates.worlds.features.views([feature_set])[0].reasons
        found = {}
        for row in np.flatnonzero(~rows.valid).tolist():
            in_group = rows.groups[row] != UNGROUPED
            found[row] = without.get(row, "its group is in no subset") if in_group else "it is in no group"
        return found

    def notes(self, recipe: SelectionRecipe) -> list[str]:
        """How many rows a search has chosen."""
        job, result = self.estimates.finished(recipe.by or "")
        if result.chosen is None:
            return []
        rows = sum(result.groups[group].rows for group in result.chosen)
        return [f"{job.id} chose {len(result.chosen)} of {len(result.groups)} groups, which have {rows:,} rows"]

    def _meant(self, query: Query, datasets: Sequence[str], tasks: Sequence[str], path: str) -> str:
        """The estimates that are named, or the only ones that fit."""
        if query.by is not None:
            return self.estimates.finished(query.by)[0].id
        named = tasks or [self.estimates.catalog.task(reference).id for reference in query.tasks]
        jobs = self.estimates.jobs.page(kind="estimates", status="succeeded", limit=LOOKED_AT, after=None).data
        found = [job for job in jobs if self._fits(job, datasets, named)]
        if not found:
            body = {"dataset": (*datasets, "…")[0], "tasks": list(named) or ["…"]}
            raise Conflict(
                "there are no finished estimates for these tasks to select by: POST /estimates "
                f"{json.dumps(body, ensure_ascii=False)} makes them"
            )
        if len(found) > 1:
            raise advice.several_sources(query, [job.id for job in found], path, noun="estimates")
        return found[0].id

    def _fits(self, job: AnyJob, datasets: Sequence[str], tasks: Sequence[str]) -> bool:
        plan = self._plan(job.id)
        return list(datasets) in ([], [plan["dataset"]]) and set(tasks) <= set(plan["tasks"])

    def _check(self, job: str, datasets: Sequence[str], tasks: Sequence[str]) -> None:
        plan = self._plan(job)
        if list(datasets) != [plan["dataset"]]:
            raise refused("dataset", f"{job} is of {plan['dataset']}, and no other pool has scores by it")
        other = next((task for task in tasks if task not in plan["tasks"]), None)
        if other is not None:
            raise refused("task", f"{job} has no estimates for {other}: it is for {', '.join(plan['tasks'])}")

    def _plan(self, job: str) -> dict[str, Any]:
        return self.estimates.jobs.plan(job)
