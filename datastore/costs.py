"""What selections cost: seconds as the jobs recorded them that scored, computed features and trained checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gradstore.types import CostSource, JobKind, SelectionRecipe
from sqlalchemy import select

from datastore.catalog import Catalog
from datastore.errors import GradstoreError, NotFound
from datastore.leases import Jobs
from datastore.recipes import Recipes
from datastore.schema import FeatureSetRow, JobFeatureRow, JobRow, RunCheckpointRow, UseRow
from datastore.scoring import Scoring


@dataclass(frozen=True)
class Costs:
    """Looks up what a recipe's scores took."""

    catalog: Catalog
    jobs: Jobs
    recipes: Recipes
    scoring: Scoring

    def scoring_seconds(self, recipe: SelectionRecipe) -> float | None:
        """Seconds of work in the job that computed a recipe's scores; 0 where numbers are drawn, None where its record
        is gone."""
        if recipe.method == "random":
            return 0.0
        return self._seconds(self.scoring.job_id(recipe))

    def sources(self, recipe: SelectionRecipe) -> list[CostSource] | None:
        """The jobs that a recipe's scores rest on: those that made its features, trained its checkpoints, or learned.

        None where the features are not there any more, nor who made them.
        """
        try:
            sources = self.recipes.sources(recipe)
        except GradstoreError:
            return None
        sets = [each.id for found in (sources.datasets, sources.tasks) for own in found.values() for each in own]
        learnt = [] if recipe.by is None else list(self._behind(recipe.by))
        jobs = [*self._trainings(recipe), *self._makers(sets), *learnt]
        return [CostSource(job=job, kind=kind, seconds=self._seconds(job)) for job, kind in dict.fromkeys(jobs)]

    def _trainings(self, recipe: SelectionRecipe) -> Iterator[tuple[str, JobKind]]:
        """The fine-tune that left a recipe's run."""
        if recipe.run is not None:
            yield from self._trained(recipe.run)

    def _trained(self, run: str) -> Iterator[tuple[str, JobKind]]:
        finetune = self.catalog.run(run).finetune
        if finetune is not None:
            yield finetune, "finetune"

    def _makers(self, feature_sets: Sequence[str]) -> Iterator[tuple[str, JobKind]]:
        """The jobs that computed rows of feature sets, the oldest first; one that found all of them there is none."""
        query = (
            select(JobRow)
            .join(JobFeatureRow, JobFeatureRow.job_id == JobRow.id)
            .where(JobFeatureRow.feature_set_id.in_(feature_sets), JobRow.status == "succeeded")
            .order_by(JobRow.created_at, JobRow.id)
        )
        with self.catalog.reading() as session:
            for job in session.scalars(query):
                if (job.result or {}).get("computed_rows") != 0:
                    yield job.id, cast("JobKind", job.kind)

    def _behind(self, id: str) -> Iterator[tuple[str, JobKind]]:
        """A job that scores were learned in, those that made the features it reads, and those that it uses."""
        with self.catalog.reading() as session:
            job = session.get(JobRow, id)
            sets = [] if job is None else sorted(_feature_sets(job.plan))
            used = list(session.scalars(select(UseRow.used).where(UseRow.user == id).order_by(UseRow.used)))
            at = select(FeatureSetRow.checkpoint).where(FeatureSetRow.id.in_(sets))
            taken_at = RunCheckpointRow.checkpoint_id.in_(at) | RunCheckpointRow.checkpoint_id.in_(used)
            runs = sorted(session.scalars(select(RunCheckpointRow.run_id).where(taken_at).distinct()))
        if job is None:
            return
        yield id, cast("JobKind", job.kind)
        for run in runs:
            yield from self._trained(run)
        yield from self._makers(sets)
        for other in used:
            yield from self._behind(other)

    def _seconds(self, job: str) -> float | None:
        try:
            found = self.jobs.get(job)
        except NotFound:
            return None
        if found.result is None or found.started_at is None or found.finished_at is None:
            return None
        recorded: dict[str, Any] = found.result.model_dump()
        whole = (found.finished_at - found.started_at).total_seconds()
        return float(recorded.get("seconds", whole))


def _feature_sets(plan: Any) -> set[str]:
    """The ids of feature sets that a plan has anywhere in it."""
    if isinstance(plan, str):
        return {plan} if plan.startswith("feat_") else set()
    inner = plan.values() if isinstance(plan, dict) else plan if isinstance(plan, list) else ()
    return {id for each in inner for id in _feature_sets(each)}
