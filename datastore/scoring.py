"""Scores as a job: asked for by /select and /scores, computed once under leases, found again under their hash.

A job has a shard for each piece of its pools (datastore/scores.py) whose scores are not known yet, so that many workers
share a large pool and a grown one is scored where it has grown. A shard leaves its scores in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gradstore.types import AnyJob, FeatureSet, ScoringResult, SelectionRecipe
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from datastore import scores
from datastore.catalog import Catalog
from datastore.catalog_states import Remembered
from datastore.errors import NotFound
from datastore.features import Features
from datastore.identity import content_id
from datastore.influence import TaskScores
from datastore.leases import Claim, Jobs, NewShard
from datastore.nearness import Around
from datastore.own_scores import Methods, Placing
from datastore.products import NUMPY, Kernel
from datastore.recipes import Sources
from datastore.schema import JobRow, ShardRow
from datastore.scores import How, ScoreCache, Target
from datastore.segments import FeatureView
from datastore.selection.abilities import References
from datastore.selection.draws import draw
from datastore.selection.rules import OF_THE_CHOICE
from datastore.tasks import Tasks

TASKS = 256  # whose subtasks a process remembers


@dataclass(frozen=True)
class Scoring:
    """Scores of the recipes' pools for the recipes' tasks."""

    catalog: Catalog
    jobs: Jobs
    features: Features
    tasks: Tasks
    cache: ScoreCache
    methods: Methods
    _subtasks: Remembered[list[str]] = field(default_factory=lambda: Remembered(TASKS), compare=False, repr=False)

    def known(self, recipe: SelectionRecipe, sources: Sources) -> list[TaskScores] | None:
        """The scores of each task over all pools, one after the other, if all of them are cached.

        A random recipe has the numbers drawn for its rows instead, as of one task.
        """
        if recipe.method == "random":
            sizes = self.catalog.dataset_sizes()
            return [draw(sum(sizes[dataset] for dataset in recipe.datasets), recipe.selection_seed or 0)]
        if recipe.method in self.methods:
            return self.methods[recipe.method].known(recipe)
        targets = self._targets(sources)
        found = []
        for sets in sources.datasets.values():
            pool = scores.cached(
                self._views(sets),
                targets,
                weights=recipe.checkpoint_weights,
                aggregate=_how(recipe),
                cache=self.cache,
            )
            if pool is None:
                return None
            found.append(pool)
        return _over_all_pools(found)

    def start(self, recipe: SelectionRecipe, sources: Sources) -> AnyJob:
        """Start the job that computes the scores, or return the one that is at it: a shard for each piece of a pool.

        One that was cancelled is returned as it is: who asks for scores does not overrule who cancelled them.
        """
        scored = _scored(recipe)
        if (own := self.methods.get(recipe.method)) is not None:
            plan: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "rows": own.rows(recipe)}
            return self._started(scored, plan, [NewShard({}, units=own.units(recipe))])
        plan = {
            "datasets": {id: [feature.id for feature in found] for id, found in sources.datasets.items()},
            "tasks": {id: [feature.id for feature in found] for id, found in sources.tasks.items()},
            "weights": recipe.checkpoint_weights,
            "aggregate": how.said() if isinstance(how := _how(recipe), Around) else how,
            "rows": sum(sets[0].rows for sets in sources.datasets.values()),
        }
        return self._started(scored, plan, list(self._shards(recipe, sources)))

    def job_id(self, recipe: SelectionRecipe) -> str:
        """The id of the job that computes a recipe's scores, whether there is one or not."""
        return content_id("scores", _scored(recipe))

    def _started(self, scored: dict[str, Any], plan: dict[str, Any], shards: Sequence[NewShard]) -> AnyJob:
        id = content_id("scores", scored)
        if (cancelled := self._cancelled(id)) is not None:
            return cancelled
        job, _ = self.jobs.create(id=id, kind="scoring", request={"recipe": scored}, plan=plan, shards=shards)
        if job.status == "succeeded":  # and yet not cached: the folder was emptied, or its bytes were damaged
            self.jobs.remove(id, kind="scoring")
            job, _ = self.jobs.create(id=id, kind="scoring", request={"recipe": scored}, plan=plan, shards=shards)
        return job

    def _cancelled(self, id: str) -> AnyJob | None:
        try:
            job = self.jobs.get(id)
        except NotFound:
            return None
        return job if job.status == "cancelled" else None

    def _shards(self, recipe: SelectionRecipe, sources: Sources) -> Iterator[NewShard]:
        targets = self._targets(sources)
        for id, sets in sources.datasets.items():
            missing = scores.missing_pieces(
                self._views(sets),
                targets,
                weights=recipe.checkpoint_weights,
                aggregate=_how(recipe),
                cache=self.cache,
            )
            for start, stop in missing:
                yield NewShard({"dataset": id, "start": start, "stop": stop}, units=(stop - start) * len(sets))

    def work(self, claim: Claim, on_rows: Callable[[int], None], *, kernel: Kernel = NUMPY) -> None:
        """Compute a shard of a scoring job, a piece of a pool; its scores are in the cache when this returns.

        `on_rows` hears how many rows are done, summed over checkpoints.
        """
        plan, payload = claim.plan, claim.payload
        if "recipe" in plan:
            recipe = SelectionRecipe.model_validate(plan["recipe"])
            self.methods[recipe.method].work(recipe, on_rows)
            return
        start = payload["start"]
        views = self._views(self._sets(plan["datasets"][payload["dataset"]]))
        scores.score_piece(
            views,
            self._targets(self._sources(plan)),
            (start, payload["stop"]),
            weights=plan["weights"],
            aggregate=Around(**plan["aggregate"]) if isinstance(plan["aggregate"], dict) else plan["aggregate"],
            cache=self.cache,
            kernel=kernel,
            on_rows=lambda reached: on_rows((reached - start) * len(views)),
        )

    def result(self, session: Session, job: JobRow) -> dict[str, Any]:
        """The result of a scoring job whose shards are all done."""
        seconds = session.scalar(select(func.sum(ShardRow.worked)).where(ShardRow.job_id == job.id)) or 0.0
        return ScoringResult(scores=job.id, rows=job.plan["rows"], seconds=seconds).model_dump(mode="json")

    def subtasks(self, recipe: SelectionRecipe, sources: Sources) -> dict[str, tuple[str, ...]]:
        """Names of each task's subtasks, as the scores number them."""
        if recipe.method in self.methods:
            return self.methods[recipe.method].subtasks(recipe)
        return {task: target.subtasks for task, target in zip(sources.tasks, self._targets(sources), strict=True)}

    def notes(self, recipe: SelectionRecipe, sources: Sources) -> list[str]:
        """What the scores leave out of the tasks, and why."""
        if recipe.method in self.methods:
            return self.methods[recipe.method].notes(recipe)
        return [note for target in self._targets(sources) for note in target.notes]

    def reasons(self, recipe: SelectionRecipe, sources: Sources) -> dict[int, str]:
        """The pool's rows without a score, and why: they have no feature at some checkpoint, or no words."""
        if recipe.method in self.methods:
            return self.methods[recipe.method].reasons(recipe)
        found: dict[int, str] = {}
        first = 0
        for sets in sources.datasets.values():
            for view in self._views(sets):
                found |= {first + row: reason for row, reason in view.reasons.items()}
            first += sets[0].rows
        return found

    def references(self, recipe: SelectionRecipe) -> References | None:
        """Where rows are, of a method that has places for them."""
        own = self.methods.get(recipe.method)
        return own.references(recipe) if isinstance(own, Placing) else None

    def rows(self, sources: Sources) -> list[list[FeatureView]]:
        """The rows that are scored: of each pool a view for each checkpoint."""
        return [self._views(sets) for sets in sources.datasets.values()]

    def shots(self, sources: Sources) -> list[list[FeatureView]]:
        """The tasks' rows that these are compared with: of each task a view for each checkpoint."""
        return [self._views(sets) for sets in sources.tasks.values()]

    def _sources(self, plan: dict[str, Any]) -> Sources:
        """The feature sets of a job's plan."""
        return Sources(
            datasets={id: self._sets(sets) for id, sets in plan["datasets"].items()},
            tasks={id: self._sets(sets) for id, sets in plan["tasks"].items()},
        )

    def _sets(self, ids: Sequence[str]) -> list[FeatureSet]:
        return [self.features.get(id) for id in ids]

    def _views(self, sets: Sequence[FeatureSet]) -> list[FeatureView]:
        return self.features.views([each.id for each in sets])

    def _targets(self, sources: Sources) -> list[Target]:
        return [
            Target(self._views(sets), self._subtasks.get(task, None, partial(self._read_subtasks, task)))
            for task, sets in sources.tasks.items()
        ]

    def _read_subtasks(self, task: str) -> list[str]:
        """The subtask of each validation row, which an id names for ever."""
        return [row.subtask for row in self.tasks.validation(task)]


def _how(recipe: SelectionRecipe) -> How:
    """How a recipe's scores come from cosines."""
    if recipe.nearness == "kde" or recipe.nearness == "hull":  # noqa: PLR1714  # mypy narrows the type by ==
        return Around(recipe.nearness, recipe.bandwidth)
    return recipe.aggregate or "less"


def _scored(recipe: SelectionRecipe) -> dict[str, Any]:
    """What of a recipe its scores depend on."""
    return recipe.model_dump(mode="json", exclude={*OF_THE_CHOICE, "combine"})


def _over_all_pools(pools: Sequence[Sequence[TaskScores]]) -> list[TaskScores]:
    return [scores.concatenated(parts) for parts in zip(*pools, strict=True)]
