"""Selecting by what a predictor has predicted or a cascade has computed: their kept scores, as methods of /select.

Nothing is computed for an answer. What is not there yet is answered with the POST that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gradstore.types import AnyJob, CascadeResult, PredictorResult, SelectionRecipe
from sqlalchemy import select

from datastore import advice
from datastore.catalog import PART, Catalog
from datastore.datasets import Datasets
from datastore.errors import Conflict
from datastore.identity import content_id
from datastore.influence import Mask, TaskScores
from datastore.leases import Jobs, collection
from datastore.parameters import Query
from datastore.schema import JobRow
from datastore.scores import ScoreCache
from datastore.selection.rules import named, refused
from datastore.tasks import Tasks

LEARNED_VERSION = 1
"""Counted up when the same predictor or cascade would give other scores, so that old ones are not found again."""
NO_INPUT = "no feature to predict from"
NOT_COMPUTED = "no gradient was computed: others were predicted to be better"
NO_GRADIENT = "the gradient could not be computed: GET /gradients/{id}/rows of the cascade's stages says why"


def key_of(id: str) -> str:
    """The name under which the scores of a predictor or cascade are kept."""
    return content_id("score", {"learned_by": id, "version": LEARNED_VERSION})


def keep(cache: ScoreCache, id: str, plan: dict[str, Any], scores: TaskScores) -> None:
    """Keep a score of every row of a plan's pool: as long as its pool, its task and its job are there."""
    cache.put(key_of(id), scores, made_from={"texts": [plan["dataset"], plan["task"], id]})


@dataclass(frozen=True)
class LearnedScores:
    """The scores of a catalog's predictors, or of its cascades."""

    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    tasks: Tasks
    cache: ScoreCache
    kind: Literal["predictor", "cascade"]

    def pool(self, query: Query, *, path: str) -> Sequence[str]:  # noqa: ARG002 - the interface
        """The pool of whatever the query means, where all that fit share theirs. Raises `NotFound`."""
        if query.by is not None:
            return [str(self.jobs.plan(self.jobs.get(query.by, kind=self.kind).id)["dataset"])]
        tasks = [self.catalog.task(reference).id for reference in query.tasks]
        pools = {plan["dataset"] for _, plan in self._all() if plan["task"] in tasks}
        return list(pools) if len(pools) == 1 else ()

    def resolved(self, query: Query, *, datasets: Sequence[str], tasks: Sequence[str], path: str) -> dict[str, Any]:
        """Which predictor or cascade is meant, and what it takes for a row's score."""
        if len(tasks) > 1 or len(datasets) > 1:
            many = "task" if len(tasks) > 1 else "dataset"
            raise refused(many, f"a {self.kind} is of one pool and one task: name one {many}")
        wanted: dict[str, Any] = {"dataset": datasets[0], "task": tasks[0]}
        wanted |= {name: value for name in ("aggregate", "budget") if (value := getattr(query, name)) is not None}
        if query.by is not None:
            job = self.jobs.get(query.by, kind=self.kind)
            plan = self.jobs.plan(job.id)
            self._check_fit(job.id, plan, wanted)
        else:
            job, plan = self._only(wanted, query, path)
        self._check_done(job)
        return {"by": job.id, "aggregate": _aggregate(plan)}

    def check(self, recipe: SelectionRecipe) -> None:
        """Raise where a recipe names no finished job of this kind, or one of another pool or task."""
        if recipe.by is None:
            raise refused("by", f"method={recipe.method} has scores that something learned: a recipe says by what")
        job = self.jobs.get(recipe.by, kind=self.kind)
        if job.id != recipe.by:
            raise named("by", recipe.by, id=job.id)
        if len(recipe.tasks) != 1 or len(recipe.datasets) != 1:
            raise refused("by", f"{job.id} is of one pool and one task, and so is a recipe by it")
        self._check_fit(job.id, self.jobs.plan(job.id), {"dataset": recipe.datasets[0], "task": recipe.tasks[0]})
        self._check_done(job)

    def known(self, recipe: SelectionRecipe) -> list[TaskScores] | None:
        """The scores, if they are kept."""
        found = self.cache.get(key_of(recipe.by or ""))
        return None if found is None else [found]

    def work(self, recipe: SelectionRecipe, on_rows: Callable[[int], None]) -> None:  # noqa: ARG002 - the interface
        """Raise `Conflict` where the scores are not kept any more: they are made by a worker with models."""
        if self.known(recipe) is None:
            job = self.jobs.get(recipe.by or "", kind=self.kind)
            raise Conflict(f"the scores of {job.id} are not kept any more: {self._post(job)} makes them again")

    def rows(self, recipe: SelectionRecipe) -> int:
        """Rows of the pool."""
        return self.catalog.dataset_sizes()[recipe.datasets[0]]

    def units(self, recipe: SelectionRecipe) -> int:
        """What the work would count."""
        return self.rows(recipe)

    def subtasks(self, recipe: SelectionRecipe) -> dict[str, tuple[str, ...]]:
        """Names of the task's subtasks, as true scores number them."""
        return {task: self.tasks.subtasks(task) for task in recipe.tasks}

    def reasons(self, recipe: SelectionRecipe) -> dict[int, str]:
        """The pool's rows without a score."""
        known = self.known(recipe)
        if known is None:
            return {}
        without = np.flatnonzero(~known[0].valid)
        if self.kind == "predictor":
            return dict.fromkeys(without.tolist(), NO_INPUT)
        asked = self._asked(recipe)[without]
        return {row: NO_GRADIENT if own else NOT_COMPUTED for row, own in zip(without.tolist(), asked, strict=True)}

    def notes(self, recipe: SelectionRecipe) -> list[str]:
        """What the scores are worth: how well rows are predicted, or what was computed and what that saved."""
        job = self.jobs.get(recipe.by or "", kind=self.kind)
        if job.result is None:
            return []
        return [_predicted(job) if self.kind == "predictor" else _computed(job)]

    def _asked(self, recipe: SelectionRecipe) -> Mask:
        """Which rows of the pool a cascade has asked gradients of (n,)."""
        plan, there = self.jobs.plan(recipe.by or ""), self.catalog.dataset_sizes()
        parts = [value for name, value in plan.items() if name.startswith(PART) and value in there]
        keys = self.datasets.text_keys(plan["dataset"])
        found: Mask = np.isin(keys, np.concatenate([keys[:0], *map(self.datasets.text_keys, parts)]))
        return found

    def _all(self) -> list[tuple[str, dict[str, Any]]]:
        """Id and plan of every job of this kind, the oldest first."""
        query = select(JobRow.id, JobRow.plan).where(JobRow.kind == self.kind).order_by(JobRow.created_at, JobRow.id)
        with self.catalog.reading() as session:
            return [(id, plan) for id, plan in session.execute(query)]

    def _only(self, wanted: dict[str, Any], query: Query, path: str) -> tuple[AnyJob, dict[str, Any]]:
        """The one job that fits: of those that have succeeded, or else of all. Raises `Conflict` and `Ambiguous`."""
        fitting = [(self.jobs.get(id), plan) for id, plan in self._all() if _fits(plan, wanted)]
        done = [(job, plan) for job, plan in fitting if job.status == "succeeded"]
        found = done or fitting
        if not found:
            raise Conflict(
                f"there is no {self.kind} for this yet: POST {collection(self.kind)} "
                f"{json.dumps(wanted | self._rest(wanted))}, and ask again when it is done"
            )
        if len(found) > 1:
            raise advice.several_sources(query, [job.id for job, _ in found], path, noun=f"{self.kind}s")
        return found[0]

    def _rest(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What else a request for one needs."""
        return {} if self.kind == "predictor" or "budget" in wanted else {"budget": 0.2}

    def _check_fit(self, id: str, plan: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name, value in wanted.items():
            if (own := _of(plan, name)) != value:
                raise refused(name, f"{id} has the {name} {own}: leave {name} out, or name another {self.kind} (by)")

    def _check_done(self, job: AnyJob) -> None:
        if job.status in ("queued", "running"):
            raise Conflict(f"{job.id} is {job.status}: ask again when GET /jobs/{job.id} says that it has succeeded")
        if job.status != "succeeded":
            raise Conflict(f"{job.id} has {job.status}: POST /jobs/{job.id}/retry, and ask again when it is done")

    def _post(self, job: AnyJob) -> str:
        asked = {name: value for name, value in job.request.model_dump().items() if value is not None}
        return f"POST {collection(self.kind)} {json.dumps(asked)}"


def _of(plan: dict[str, Any], name: str) -> Any:
    return _aggregate(plan) if name == "aggregate" else plan.get(name)


def _aggregate(plan: dict[str, Any]) -> str:
    return str(plan["aggregate"])


def _fits(plan: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(_of(plan, name) == value for name, value in wanted.items())


def _predicted(job: AnyJob) -> str:
    found = PredictorResult.model_validate(job.result.model_dump() if job.result else {})
    where = "rows outside its sample" if found.tested_on == "outside" else "its sample, out of fold"
    worth = f"R² {found.report.r2:.2f}" if found.report.r2 is not None else f"accuracy {found.report.accuracy:.2f}"
    return (
        f"scores are predicted by {job.id} from {found.sample_rows:,} rows, and not computed: {worth}, rank "
        f"correlation {found.report.spearman:.2f} on {found.tested_rows:,} {where}"
    )


def _computed(job: AnyJob) -> str:
    found = CascadeResult.model_validate(job.result.model_dump() if job.result else {})
    return (
        f"gradients were computed for {found.computed_rows:,} of {found.rows:,} rows by {job.id}, which saved those of "
        f"{found.saved_rows:,}; rows without a gradient are not chosen"
    )
