"""Estimates held against trainings: models are trained on some of the subsets, and their losses compared with those
that were estimated.

A shard is a training, kept by its content and shared with all other jobs that train (datastore/trainings.py). Training
begins with the base model, as GradEx's last step does, while an estimate is of a step from the checkpoint; and a
measured loss is the mean over an answer's tokens, an estimated one of the answer's mean log-odds. So the two agree in
their order before they agree in their size: the result has both, and how well a constant does beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gradstore.types import (
    AnyJob,
    Estimate,
    EstimateValidationRequest,
    EstimateValidationResult,
    FinetuneRequest,
    ScaleFit,
    TrainingRecipe,
    ValidatedSubset,
    ValidationEstimate,
)

from datastore import assembly
from datastore.array_files import Arrays
from datastore.correlation import interval, resampled, spearman
from datastore.errors import Conflict, refusal, several
from datastore.estimate_worlds import World
from datastore.estimates import Estimates
from datastore.finetunes import Finetunes
from datastore.gradex import Members, Numbers, relative_rss
from datastore.identity import content_id
from datastore.influence import everywhere
from datastore.leases import Claim, NewShard
from datastore.training_costs import cost_of
from datastore.trainings import Measured, Training, Trainings

GRID = tuple(2.0**power for power in range(-3, 4))
"""What the estimates' own scale is multiplied with where no scales are named."""


@dataclass(frozen=True)
class EstimateValidations:
    """The validations of a catalog's estimates."""

    estimates: Estimates
    finetunes: Finetunes
    trainings: Trainings

    def start(self, request: EstimateValidationRequest) -> tuple[AnyJob, bool]:
        """Start a validation, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, and `Conflict` before the estimates are done.
        """
        plan = self.plan(request)
        return self.estimates.jobs.create(
            id=content_id("estv", plan),
            kind="estimate-validation",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard({"subset": number}, units=1) for number in plan["subsets"]],
            name=request.name,
            uses=[plan["estimates"], plan["dataset"], plan["task"]],
        )

    def plan(self, request: EstimateValidationRequest) -> dict[str, Any]:
        """A request resolved to ids. Raises what `start` does."""
        job, result = self.estimates.finished(request.estimates)
        of = self.estimates.jobs.plan(job.id)
        different = _different(self.estimates.members(job.id, self.estimates.arrays(job.id)))
        if request.subsets > len(different):
            same = f", {len(different):,} of them different" if len(different) < result.subsets else ""
            raise refusal(f"{job.id} has {result.subsets:,} subsets{same}", "/subsets")
        task = self._task(request, list(of["tasks"]))
        wanted = {name: getattr(request, name) for name in TrainingRecipe.model_fields}
        found = self.finetunes.plan(FinetuneRequest.model_validate({**wanted, "dataset": of["dataset"]}))
        recipe = TrainingRecipe.model_validate({**wanted, "model": found.model, "revision": found.revision})
        return {
            "estimates": job.id,
            "dataset": of["dataset"],
            "task": task,
            "split": request.split,
            "subsets": different[: request.subsets],
            "scales": sorted(set(request.scales)),
            "recipe": recipe.model_dump(mode="json"),
            "bootstrap_samples": request.bootstrap_samples,
        }

    def finetune(self, plan: dict[str, Any]) -> FinetuneRequest:
        """A fine-tune that costs what one training does, of the mean number of rows."""
        rows = [len(training.rows) for training in self._trainings(plan, plan["subsets"])]
        mean = max(1, round(sum(rows) / len(rows)))
        return FinetuneRequest.model_validate({**plan["recipe"], "dataset": plan["dataset"], "rows": mean})

    def estimate(self, plan: dict[str, Any], of_one: Estimate) -> ValidationEstimate:
        """What a plan would cost, from what a fine-tune like one of its trainings would."""
        keys = [training.key for training in self._trainings(plan, plan["subsets"])]
        reused = sum(self.trainings.get(key) is not None for key in keys)
        cost = cost_of(self.estimates.jobs, of_one, recipe=plan["recipe"], missing=len(keys) - reused)
        return ValidationEstimate(
            trainings=len(keys),
            reused_trainings=reused,
            rows=of_one.rows,
            tokens=cost.tokens,
            seconds=cost.seconds,
            basis=cost.basis,
            memory_bytes=of_one.memory_bytes,
        )

    def remove(self, reference: str) -> str:
        """Delete a validation and the trainings that nothing else has, and return its id."""
        jobs = self.estimates.jobs
        return jobs.remove(reference, kind="estimate-validation", before=self.trainings.forget_job)

    def _task(self, request: EstimateValidationRequest, known: Sequence[str]) -> str:
        if request.task is None and len(known) > 1:
            found = f"{request.estimates} has estimates for {len(known)} tasks"
            raise several(found, known, parameter="task", path="/estimates/validations")
        task = self.estimates.catalog.task(request.task or known[0])
        if task.id not in known:
            raise refusal(f"the estimates are not for {task.name}, but for {', '.join(known)}", "/task")
        if request.split == "test" and not task.test:
            raise refusal(f"the task {task.name} has no test rows: upload it again with some", "/split")
        return task.id

    # Workers' side ----------------------------------------------------------------------------------------------------

    def training(self, plan: dict[str, Any], payload: dict[str, Any]) -> Training:
        """What a shard trains on and measures: all rows of its subset's groups."""
        return next(self._trainings(plan, [payload["subset"]]))

    def finish(self, claim: Claim, key: str) -> bool:
        """Commit a training that is done, and with the last one the job's result; False where it is not wanted."""
        return assembly.commit(
            self.estimates.jobs,
            claim,
            record=partial(self.trainings.record, key),
            result=partial(self.result, claim, key),
        )

    def result(self, claim: Claim, key: str) -> EstimateValidationResult:
        """What a validation comes to whose trainings are all done; `key` is the claim's own.

        Raises `Damaged`, and `Conflict` where no row has both a loss and a feature.
        """
        plan = claim.plan
        done = assembly.payloads(self.estimates.catalog, claim, training=key)
        measured = [self.trainings.kept(payload["training"]) for payload in done]
        arrays = self.estimates.arrays(plan["estimates"])
        world, losses, left_out = self._compared(plan, np.stack([each.values for each in measured]))
        return _result(plan, self.estimates.jobs.plan(plan["estimates"]), world, arrays, losses, measured, left_out)

    def _trainings(self, plan: dict[str, Any], subsets: Sequence[int]) -> Iterator[Training]:
        estimates = self.estimates
        members = estimates.members(plan["estimates"], estimates.arrays(plan["estimates"]))
        groups = estimates.worlds.grouping(estimates.jobs.plan(plan["estimates"]))
        for subset in subsets:
            yield Training(
                dataset=plan["dataset"],
                rows=np.flatnonzero(np.isin(groups, np.flatnonzero(members[subset]))).tolist(),
                recipe=TrainingRecipe.model_validate(plan["recipe"]),
                task=plan["task"],
                split=plan["split"],
            )

    def _compared(self, plan: dict[str, Any], losses: Numbers) -> tuple[World, Numbers, int]:
        """The estimates' world with the compared rows alone, their mean loss after each training, and how many rows of
        the split are left out. Test rows are held against the estimates of all validation rows.
        """
        of = self.estimates.jobs.plan(plan["estimates"])
        usable = everywhere(list(np.isfinite(losses)))
        among = usable if plan["split"] == "validation" else None
        target = self.estimates.worlds.target(plan["task"], of["tasks"][plan["task"]], among)
        if among is not None:
            usable = among & self.estimates.worlds.features.views([of["tasks"][plan["task"]]])[0].valid
        if not usable.any() or not len(target.labels):
            raise Conflict("no row of the task has both a loss and a feature, so nothing can be compared")
        world = replace(self.estimates.worlds.world(of), targets=[target])
        return world, losses[:, usable].mean(axis=1), int((~usable).sum())


def _result(
    plan: dict[str, Any],
    of: dict[str, Any],
    world: World,
    arrays: Arrays,
    losses: Numbers,
    measured: Sequence[Measured],
    left_out: int,
) -> EstimateValidationResult:
    weights = arrays["weights"][plan["subsets"]]
    unprojected = world.unprojected(arrays)[plan["subsets"]]
    told, _, lengths = world.read(weights, unprojected, of["scale"])
    own_scale = of["scale"] or float(np.median(lengths))
    own = _fit(own_scale, told[:, -1], losses)
    grid = plan["scales"] or [own_scale * factor for factor in GRID]
    found = [(scale, world.read(weights, unprojected, scale)[0][:, -1]) for scale in grid]
    fits = [_fit(scale, values, losses) for scale, values in found]
    best = int(np.argmin([fit.relative_rss for fit in fits]))
    low, high = interval(
        resampled(told[:, -1:], losses[:, None], samples=plan["bootstrap_samples"], seed=plan["recipe"]["seed"])
    )
    estimate_seconds = float(arrays["seconds"].sum()) / len(arrays["members"])
    training_seconds = float(np.mean([each.seconds for each in measured]))
    return EstimateValidationResult(
        own=own,
        best=fits[best],
        scales=fits,
        spearman_low=low,
        spearman_high=high,
        line_rss=relative_rss(_left_out_line(told[:, -1], losses), losses),
        constant_rss=relative_rss(np.full_like(losses, losses.mean()), losses),
        subsets=[
            ValidatedSubset(
                subset=number,
                estimate=float(told[place, -1]),
                calibrated=float(found[best][1][place]),
                loss=float(losses[place]),
                rows=each.rows,
                seconds=each.seconds,
            )
            for place, (number, each) in enumerate(zip(plan["subsets"], measured, strict=True))
        ],
        left_out_targets=left_out,
        estimate_seconds=estimate_seconds,
        training_seconds=training_seconds,
        speedup=training_seconds / estimate_seconds,
    )


def _different(members: Members) -> list[int]:
    """The first of each number of equal subsets: a training of the same rows would say nothing more."""
    return sorted(np.unique(members, axis=0, return_index=True)[1].tolist())


def _fit(scale: float, told: Numbers, losses: Numbers) -> ScaleFit:
    return ScaleFit(
        scale=scale,
        relative_rss=relative_rss(told, losses),
        mean_ratio=float((np.square(told - losses) / np.square(losses)).mean()),
        spearman=float(spearman(told[:, None], losses[:, None])[0]),
    )


def _left_out_line(told: Numbers, losses: Numbers) -> Numbers:
    """What the least-squares line through all other subsets says of each (subsets,)."""
    spread = told - told.mean()
    design = np.stack([np.ones_like(told), spread / (np.abs(spread).max() or 1)], axis=1)
    hat = design @ np.linalg.pinv(design)
    residuals = (losses - hat @ losses) / np.maximum(1 - np.diag(hat), 1e-12)
    return np.asarray(losses - residuals, np.float64)
