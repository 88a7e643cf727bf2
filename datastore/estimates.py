"""Estimates: what training on subsets of a pool is estimated to give, kept and read.

What a request means is in estimate_plans.py, what estimates are made from in estimate_worlds.py, what they say of the
groups in estimate_results.py, and how their arrays are named in estimate_parts.py.

A shard is a range of subsets, or a whole search. It leaves what it found as arrays (datastore/array_files.py), which
the result and the pages are read from; the groups of the pool's rows are kept the same way. It is arithmetic over
features of kind `logodds` (datastore/gradex.py); with `mode=exact` a worker measures each subset's step with the model
beside that (datastore/exact_estimates.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gradstore.types import (
    AnyJob,
    Checkpoint,
    EstimatedSubset,
    EstimatedSubsets,
    EstimatesCost,
    EstimatesRequest,
    EstimatesResult,
    EstimateTarget,
    MeasuredEstimate,
    SubsetEstimate,
)
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from datastore import assembly, exact_estimates, gradex
from datastore.array_files import ArrayFiles, Arrays
from datastore.catalog import Catalog, record_checkpoint
from datastore.checkpoints import Checkpoints
from datastore.durations import duration
from datastore.errors import Conflict, Damaged
from datastore.estimate_parts import (
    KEPT,
    PART,
    content,
    grouping_key,
    members_of,
    part_key,
    recorded_arrays,
    recorded_parts,
    unpacked,
)
from datastore.estimate_plans import EstimatePlans
from datastore.estimate_results import OnSubsets, array_of, number_of, overall, preferences, result_of, search
from datastore.estimate_worlds import EstimateWorlds, World
from datastore.gradex import UNGROUPED, Groups, Members, Numbers
from datastore.identity import content_id
from datastore.influence import Mask
from datastore.leases import Claim, Jobs
from datastore.schema import JobFeatureRow, JobRow, ShardRow
from datastore.selection.rules import refused
from datastore.subset_searches import SEARCHES


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a pool, by whether they have a score of estimates."""

    groups: Groups
    """(n,)"""
    valid: Mask
    """Rows with a score (n,): those with a feature, in a group that a subset has."""


@dataclass(frozen=True)
class Estimates:
    """The estimates of a catalog."""

    catalog: Catalog
    jobs: Jobs
    plans: EstimatePlans
    worlds: EstimateWorlds
    checkpoints: Checkpoints
    files: ArrayFiles

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: EstimatesRequest) -> tuple[AnyJob, bool]:
        """Start estimates, or return those of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `GradientsMissing` and `Ambiguous`.
        """
        plan, shards = self.plans.plan(request)
        annotations = [plan["annotation"]] if "annotation" in plan else []
        return self.jobs.create(
            id=content_id("est", {**plan, "shards": [shard.payload for shard in shards]}),
            kind="estimates",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=shards,
            name=request.name,
            uses=[plan["dataset"], *plan["tasks"], plan["checkpoint"], *annotations, *self._makers(plan)],
        )

    def estimate(self, request: EstimatesRequest) -> EstimatesCost:
        """What a request would cost. Raises what `start` does."""
        plan, shards = self.plans.plan(request)
        reused = sum(shard.units for shard in shards if self.files.exists(part_key(plan, shard.payload)))
        subsets = sum(shard.units for shard in shards)
        time = duration(
            self.jobs,
            kind="estimates",
            units=subsets - reused,
            done=lambda job: job.result["subsets"] if job.result and _read_alike(job.plan, plan) else 0.0,
            operations=None,
            precision=None,
            alone=True,
        )
        read = [plan["feature_set"], *plan["tasks"].values()]
        return EstimatesCost(
            rows=self.catalog.dataset(plan["dataset"]).rows,
            groups=len(plan["names"]),
            subsets=subsets,
            reused_subsets=reused,
            targets=len(plan["tasks"]),
            feature_sets=read,
            read_bytes=sum(self.plans.features.get(each).bytes for each in read),
            seconds=time.seconds,
            basis=time.basis,
        )

    def _makers(self, plan: dict[str, Any]) -> set[str]:
        """For each feature set of a plan a job that has it: with the last of these it would be deleted."""
        with self.catalog.reading() as session:
            jobs = [
                session.scalar(select(func.min(JobFeatureRow.job_id)).where(JobFeatureRow.feature_set_id == features))
                for features in (plan["feature_set"], *plan["tasks"].values())
            ]
        return {job for job in jobs if job is not None}

    def remove(self, reference: str) -> str:
        """Delete estimates and the arrays that no others have; returns their id."""

        def forget(session: Session, job: JobRow) -> None:
            others = select(JobRow.plan).where(JobRow.kind == "estimates", JobRow.id != job.id)
            kept = {grouping_key(plan) for plan in session.scalars(others)}
            kept |= recorded_parts(session, ShardRow.job_id != job.id)
            mine = recorded_parts(session, ShardRow.job_id == job.id) | {grouping_key(job.plan)}
            self.files.delete(mine - kept)

        return self.jobs.remove(reference, kind="estimates", before=forget)

    def sweep(self, *, older_than: float) -> None:
        """Remove the arrays of `older_than` seconds ago that no estimates have."""
        self.files.sweep(older_than=older_than)
        if old := self.files.keys(older_than=older_than):
            with self.catalog.transaction() as session:
                self.files.delete(old - recorded_arrays(session))

    def subsets(self, reference: str, *, after: int, limit: int) -> EstimatedSubsets:
        """A page of the subsets of finished estimates, after so many. Raises `NotFound`, `Conflict` and `Damaged`."""
        job, result = self.finished(reference)
        parts = self.arrays(job.id)
        members, sizes = self.members(job.id, parts), np.array([group.rows for group in result.groups])
        missing = self.worlds.missing(self.jobs.plan(job.id))
        kept = self._kept(job.id)
        found = [
            EstimatedSubset(
                subset=number,
                groups=np.flatnonzero(members[number]).tolist(),
                rows=int(members[number] @ sizes),
                missing_rows=int(members[number] @ missing),
                fit_loss=float(parts["fit_losses"][number]),
                length=float(parts["lengths"][number]),
                estimates=[
                    SubsetEstimate(loss=number_of(loss), accuracy=number_of(accuracy), measured=measured)
                    for loss, accuracy, measured in zip(
                        parts["losses"][number],
                        parts["accuracies"][number],
                        exact_estimates.measurements(parts, number),
                        strict=False,
                    )
                ],
                checkpoint=kept.get(number),
            )
            for number in range(after, min(after + limit, len(members)))
        ]
        return EstimatedSubsets(targets=result.targets, data=found, has_more=after + len(found) < len(members))

    def finished(self, reference: str) -> tuple[AnyJob, EstimatesResult]:
        """Estimates that are done, and their result. Raises `NotFound` and `Conflict`."""
        job = self.jobs.get(reference, kind="estimates")
        if job.status != "succeeded" or job.result is None:
            raise Conflict(f"{job.id} is {job.status}: its subsets can be read once it has succeeded")
        return job, EstimatesResult.model_validate(job.result.model_dump())

    def arrays(self, id: str) -> Arrays:
        """What was found of all subsets of finished estimates, in order. Raises `Damaged`."""
        return self._joined([payload[PART] for payload in self.jobs.payloads(id)])

    def _kept(self, id: str) -> dict[int, str]:
        """The checkpoints that steps were kept as, by the numbers of their subsets."""
        return {number: payload[KEPT] for number, payload in enumerate(self.jobs.payloads(id)) if KEPT in payload}

    def members(self, id: str, arrays: Arrays) -> Members:
        """Which groups each of the subsets has (subsets, groups)."""
        return unpacked(arrays, len(self.jobs.plan(id)["names"]))

    def scored_rows(self, id: str) -> ScoredRows:
        """Which rows of the pool have a score, which the result alone tells. Raises `NotFound` and `Conflict`."""
        job, result = self.finished(id)
        return self._scored_rows(self.jobs.plan(job.id), result)

    def row_scores(self, id: str, tasks: Sequence[str]) -> tuple[list[Numbers], Mask]:
        """The score of each row of the pool for each of the tasks: its group's; and which rows have one (n,) each.

        More is better. Of `ensemble` and `surrogate` they differ by task. Raises `NotFound`, `Conflict`, `Damaged` and
        `InvalidInput` for a task that the estimates are not for.
        """
        job, result = self.finished(id)
        plan = self.jobs.plan(job.id)
        for task in tasks:
            if task not in plan["tasks"]:
                known = ", ".join(plan["tasks"])
                raise refused("task", f"{job.id} has no estimates for {task}: it is for {known}")
        if plan["search"] in SEARCHES:
            of_groups = [np.array([group.score for group in result.groups], np.float64)] * len(tasks)
        else:
            arrays = self.arrays(job.id)
            members, values = self.members(job.id, arrays), arrays[array_of(plan)]
            of_groups = [preferences(values[:, overall(result.targets, task)], members, plan) for task in tasks]
        rows = self._scored_rows(plan, result)
        return [np.where(rows.valid, scores[rows.groups], 0.0) for scores in of_groups], rows.valid

    def _scored_rows(self, plan: dict[str, Any], result: EstimatesResult) -> ScoredRows:
        groups = self.worlds.grouping(plan)
        scored = np.array([group.score is not None for group in result.groups])
        featured = self.worlds.features.views([plan["feature_set"]])[0].valid
        return ScoredRows(groups, (groups != UNGROUPED) & featured & scored[groups])

    # Workers' side ----------------------------------------------------------------------------------------------------

    def work(self, claim: Claim, on_subsets: OnSubsets = lambda _: None) -> str:
        """Estimate a shard's subsets unless they are known, and return the name of what was found."""
        plan, payload = claim.plan, claim.payload
        key = part_key(plan, payload)
        if self.files.get(key) is None:
            began = time.monotonic()
            world = self.worlds.world(plan)
            if plan["search"] in SEARCHES:
                found = search(world, plan, on_subsets)
            else:
                found = world.estimate(members_of(payload, len(plan["names"])), plan)
            found |= {"adapter_length": np.array(world.length), "seconds": np.array(time.monotonic() - began)}
            self.keep(claim, found)
        return key

    def keep(self, claim: Claim, found: Arrays) -> None:
        """Keep what was found of a shard's subsets under `part_key`."""
        plan, payload = claim.plan, claim.payload
        self.files.put(part_key(plan, payload), found, made_from={"plan": content(plan), "shard": payload})

    def finish(self, claim: Claim, key: str, kept: Checkpoint | None = None) -> bool:
        """Commit a shard that is done, and with the last one the job's result; False where it is not wanted.

        `kept` is the checkpoint that the shard's step was kept as.
        """
        return assembly.commit(
            self.jobs, claim, record=partial(self._record, key, kept), result=partial(self._result, claim, key)
        )

    def _result(self, claim: Claim, key: str) -> EstimatesResult:
        """What estimates come to whose shards are all done; `key` is the claim's own. Raises `Damaged`."""
        plan = claim.plan
        arrays = self._joined([payload[PART] for payload in assembly.payloads(self.catalog, claim, **{PART: key})])
        world = self.worlds.world(plan)
        targets = list(self._targets(plan, world, exact_estimates.measurements(arrays, 0, at_checkpoint=True)))
        return result_of(plan, arrays, world, self.worlds.grouping(plan), targets)

    def _targets(
        self, plan: dict[str, Any], world: World, measured: Iterator[MeasuredEstimate | None]
    ) -> Iterator[EstimateTarget]:
        """What there is an estimate for, each subtask and all rows of each task, and how it is at the checkpoint."""
        for task, rows in zip(plan["tasks"], world.targets, strict=True):
            [losses], [accuracies] = gradex.estimated(rows, np.zeros((1, rows.features.shape[1])), np.zeros(1))
            names = [*self.worlds.tasks.subtasks(task), None]
            counts = [*np.bincount(rows.labels, minlength=rows.subtasks).tolist(), len(rows.labels)]
            for name, count, loss, accuracy in zip(names, counts, losses, accuracies, strict=True):
                yield EstimateTarget(
                    task=task,
                    subtask=name,
                    rows=count,
                    loss=number_of(loss),
                    accuracy=number_of(accuracy),
                    metric=self.worlds.metric(task, name),
                    measured=next(measured),
                )

    def _joined(self, keys: Sequence[str]) -> Arrays:
        found = [self.files.get(key) for key in keys]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            raise Damaged("what was estimated is damaged or was removed: delete the estimates and send them again")
        return {
            name: np.concatenate([np.atleast_1d(part[name]) for part in parts if name in part]) for name in parts[0]
        }

    def _record(self, key: str, kept: Checkpoint | None, session: Session, shard: ShardRow) -> None:
        """Write on a shard what its arrays are called, and the checkpoint. Raises `Damaged` where these are gone."""
        if self.files.get(key) is None:
            raise Damaged(f"{key} was deleted before it was recorded; the next attempt does it again")
        if kept is not None:
            if not self.checkpoints.exists(kept.id):
                raise Damaged(f"{kept.id} was deleted before it was recorded; the next attempt makes it again")
            record_checkpoint(session, kept)
        shard.payload = {**shard.payload, PART: key, **({KEPT: kept.id} if kept else {})}


def _read_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two plans read the same features, and measure in the same way."""
    return all(one.get(name) == other.get(name) for name in ("feature_set", "tasks", "exact"))
