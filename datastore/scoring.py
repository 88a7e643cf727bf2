"""Scores as a job: asked for by /select and /scores, computed once under a lease, found again under their hash."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradstore.types import AnyJob, FeatureSet, ScoringResult, SelectionRecipe

from datastore import scores
from datastore.catalog import Catalog
from datastore.features import Features
from datastore.gradients import FeatureStore
from datastore.identity import content_id
from datastore.influence import TaskScores
from datastore.leases import Claim, Jobs, NewShard
from datastore.recipes import Sources
from datastore.scores import ScoreCache, Target
from datastore.segments import FeatureView
from datastore.tasks import Tasks


@dataclass(frozen=True)
class Scoring:
    """Scores of the recipes' pools for the recipes' tasks."""

    catalog: Catalog
    jobs: Jobs
    features: Features
    store: FeatureStore
    tasks: Tasks
    cache: ScoreCache

    def known(self, recipe: SelectionRecipe, sources: Sources) -> list[TaskScores] | None:
        """The scores of each task over all pools, one after the other, if all of them are cached."""
        targets = self._targets(sources)
        found = []
        for sets in sources.datasets.values():
            pool = scores.cached(
                self._views(sets),
                targets,
                weights=recipe.checkpoint_weights,
                aggregate=recipe.aggregate,
                cache=self.cache,
            )
            if pool is None:
                return None
            found.append(pool)
        return _over_all_pools(found)

    def start(self, recipe: SelectionRecipe, sources: Sources) -> AnyJob:
        """Start the job that computes the scores, or return the one that is at it."""
        scored = recipe.model_dump(mode="json", exclude={"pct", "k", "exclude", "combine"})
        rows = sum(sets[0].rows for sets in sources.datasets.values())
        sets = {
            "datasets": {id: [feature.id for feature in found] for id, found in sources.datasets.items()},
            "tasks": {id: [feature.id for feature in found] for id, found in sources.tasks.items()},
        }
        id = content_id("scores", scored)
        plan = {"feature_sets": sets, "weights": recipe.checkpoint_weights, "aggregate": recipe.aggregate}
        shard = NewShard(payload={}, units=rows * len(recipe.checkpoints))
        job, _ = self.jobs.create(id=id, kind="scoring", request={"recipe": scored}, plan=plan, shards=[shard])
        if job.status == "succeeded":  # and yet not cached: the folder was emptied, or its bytes were damaged
            self.jobs.remove(id, kind="scoring")
            job, _ = self.jobs.create(id=id, kind="scoring", request={"recipe": scored}, plan=plan, shards=[shard])
        return job

    def work(self, claim: Claim, on_rows: Callable[[int], None]) -> ScoringResult:
        """Compute what a scoring job asks for; the scores are in the cache when this returns."""
        began = time.monotonic()
        plan = claim.plan
        sources = Sources(
            datasets={id: self._sets(sets) for id, sets in plan["feature_sets"]["datasets"].items()},
            tasks={id: self._sets(sets) for id, sets in plan["feature_sets"]["tasks"].items()},
        )
        targets = self._targets(sources)
        rows = 0
        for sets in sources.datasets.values():
            views = self._views(sets)
            scores.score(
                views,
                targets,
                weights=plan["weights"],
                aggregate=plan["aggregate"],
                cache=self.cache,
                on_rows=_counted(on_rows, before=rows, times=len(views)),
            )
            rows += views[0].rows
        return ScoringResult(scores=claim.job, rows=rows, seconds=claim.worked + time.monotonic() - began)

    def subtasks(self, sources: Sources) -> dict[str, tuple[str, ...]]:
        """Names of each task's subtasks, as the scores number them."""
        return {task: target.subtasks for task, target in zip(sources.tasks, self._targets(sources), strict=True)}

    def notes(self, sources: Sources) -> list[str]:
        """What the scores leave out of the tasks, and why."""
        return [note for target in self._targets(sources) for note in target.notes]

    def reasons(self, sources: Sources) -> dict[int, str]:
        """The pool's rows without a feature at some checkpoint, and why."""
        found: dict[int, str] = {}
        first = 0
        for sets in sources.datasets.values():
            for view in self._views(sets):
                found |= {first + row: reason for row, reason in view.reasons.items()}
            first += sets[0].rows
        return found

    def _sets(self, ids: Sequence[str]) -> list[FeatureSet]:
        return [self.features.get(id) for id in ids]

    def _views(self, sets: Sequence[FeatureSet]) -> list[FeatureView]:
        return [self.store.view(self.features.segments(feature.id)) for feature in sets]

    def _targets(self, sources: Sources) -> list[Target]:
        return [
            Target(self._views(sets), [row.subtask for row in self.tasks.validation(task)])
            for task, sets in sources.tasks.items()
        ]


def _counted(on_rows: Callable[[int], None], *, before: int, times: int) -> Callable[[int], None]:
    """Count the rows of several pools and checkpoints on."""
    return lambda done: on_rows((before + done) * times)


def _over_all_pools(pools: Sequence[Sequence[TaskScores]]) -> list[TaskScores]:
    return [scores.concatenated(parts) for parts in zip(*pools, strict=True)]
