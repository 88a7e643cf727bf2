"""Validations: which trainings a request means, and how well scores have predicted what came of them.

A shard is one training, so that workers share a validation and a kill loses one. What they come to is put together by
the worker that finishes the last one: that reads features and takes seconds, which no transaction should wait for.
Scores are those of /scores, computed here for each target row or subtask instead of the whole task.

Memory of the result, with n rows in the pool, m in the task, s trainings, t targets and d dims: 4·n·t bytes of
predictions, n·s/8 for which rows each training had, 8·s·t of losses, 8·m·d of unit rows, and a chunk of features while
it is divided by its lengths, 28·1,024·d; with TrackStar's preconditioning 12·d² more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from gradstore.types import (
    AnyJob,
    Estimate,
    FinetuneRequest,
    Interval,
    ScatterPoint,
    SelectionRecipe,
    Task,
    TrainingRecipe,
    ValidatedRecipe,
    ValidatedScores,
    ValidatedTarget,
    ValidationEstimate,
    ValidationRequest,
    ValidationResult,
)
from numpy.typing import NDArray

from datastore import assembly
from datastore.catalog import Catalog
from datastore.correlation import Numbers, interval, resampled, resampled_change, spearman
from datastore.errors import Ambiguous, Conflict, GradientsMissing, refusal
from datastore.features import Features
from datastore.finetunes import Finetunes
from datastore.identity import content_id
from datastore.influence import Floats, Mask, Subtasks, everywhere, queries, reduce, usable_rows
from datastore.leases import Claim, Jobs, NewShard
from datastore.parameters import Query
from datastore.preconditioning import MAX_DIM
from datastore.predictions import Target, fold_of, losses_of, members, predictions, sums, targets_of
from datastore.recipes import Recipes, Sources
from datastore.segments import Rows
from datastore.selection.top import candidates, count, top
from datastore.tasks import Tasks
from datastore.training_costs import cost_of
from datastore.trainings import Training, Trainings

KEPT = 16
"""Score vectors whose best rows a process remembers, 4 bytes a row."""
REPEATS = 5
"""Trainings without the best rows, and random draws, of a leave-top-k-out validation."""

_Views = tuple[Sequence[Rows], Sequence[Rows]]
"""Features of a pool and of a task, a view for each checkpoint."""


_Losses = Sequence[tuple[dict[str, Any], Numbers]]
"""What each training was made from, and the losses of its targets."""


@dataclass(frozen=True)
class _Finding:
    """What is found of scores."""

    values: Numbers
    """Of each target."""
    samples: Numbers
    """Of their mean, in each bootstrap sample."""
    mixing: list[float]
    points: list[ScatterPoint]


@dataclass(frozen=True)
class ValidationPlan:
    """A request resolved to ids."""

    id: str
    settings: dict[str, Any]
    """What workers need."""
    shards: list[dict[str, Any]]
    """What each training is made from."""
    uses: list[str]
    finetune: FinetuneRequest
    """A fine-tune that costs what one training does."""


@dataclass(frozen=True)
class Validations:
    """The validations of a catalog."""

    catalog: Catalog
    jobs: Jobs
    features: Features
    tasks: Tasks
    recipes: Recipes
    finetunes: Finetunes
    trainings: Trainings
    _best: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    """The best rows by some scores, which several trainings leave out."""

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: ValidationRequest) -> tuple[AnyJob, bool]:
        """Start a validation, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `GradientsMissing` and `Ambiguous`.
        """
        plan = self.plan(request)
        return self.jobs.create(
            id=plan.id,
            kind="validation",
            request=request.model_dump(mode="json"),
            plan=plan.settings,
            shards=[NewShard(payload=payload, units=1) for payload in plan.shards],
            name=request.name,
            uses=plan.uses,
        )

    def plan(self, request: ValidationRequest) -> ValidationPlan:
        """Resolve a request. Raises what `start` does."""
        pool, task = self.catalog.dataset(request.dataset), self.catalog.task(request.task)
        _check_split(request, task)
        rows = _rows_of_a_training(request, pool.rows)
        wanted = {name: getattr(request, name) for name in FinetuneRequest.model_fields if hasattr(request, name)}
        wanted |= {"dataset": pool.id, "rows": rows, "fraction": None, "name": None}
        finetune = FinetuneRequest.model_validate(wanted)
        found = self.finetunes.plan(finetune)
        recipe = TrainingRecipe.model_validate({**wanted, "model": found.model, "revision": found.revision})
        repeats = request.repeats or (1 if request.kind == "lds" else REPEATS)
        settings = {
            "kind": request.kind,
            "dataset": pool.id,
            "task": task.id,
            "split": request.split,
            "targets": request.targets,
            "pool_rows": pool.rows,
            "rows": rows,
            "recipe": recipe.model_dump(mode="json"),
            "repeats": repeats,
            "scores": self._scores(request, pool.id, task),
            "bootstrap_samples": request.bootstrap_samples,
        }
        shards = _trainings(settings, subsets=request.subsets)
        return ValidationPlan(
            id=content_id("val", {**settings, "trainings": shards}),
            settings=settings,
            shards=shards,
            uses=[pool.id, task.id],
            finetune=finetune.model_copy(update={"model": found.model, "revision": found.revision}),
        )

    def estimate(self, plan: ValidationPlan, of_one: Estimate) -> ValidationEstimate:
        """What a plan would cost, from what a fine-tune like one of its trainings would."""
        settings = plan.settings
        reused = 0
        if settings["kind"] == "lds":  # which rows are best is known once there are scores
            keys = [self.training(settings, payload).key for payload in plan.shards]
            reused = sum(self.trainings.get(key) is not None for key in keys)
        missing = len(plan.shards) - reused
        cost = cost_of(self.jobs, of_one, recipe=settings["recipe"], missing=missing)
        return ValidationEstimate(
            trainings=len(plan.shards),
            reused_trainings=reused,
            rows=settings["rows"],
            tokens=cost.tokens,
            seconds=cost.seconds,
            basis=cost.basis,
            memory_bytes=of_one.memory_bytes,
        )

    def remove(self, reference: str) -> str:
        """Delete a validation and the trainings that no other job has, and return its id."""
        return self.jobs.remove(reference, kind="validation", before=self.trainings.forget_job)

    def _scores(self, request: ValidationRequest, pool: str, task: Task) -> list[dict[str, Any]]:
        """The scores that are judged, resolved to feature sets."""
        found: list[dict[str, Any]] = []
        for number, wanted in enumerate(request.scores):
            label = wanted.label or _label(wanted)
            if label in {scores["label"] for scores in found}:
                raise refusal(f"two scores are called {label!r}: give them labels", f"/scores/{number}/label")
            scores: dict[str, Any] = {"label": label, "control": wanted.control, "recipe": None, "pool": [], "task": []}
            scores |= {"precondition": wanted.precondition, "aggregate": wanted.aggregate}
            if wanted.control is None:
                recipe, sources = self._resolved(wanted, pool, task, label=label)
                if wanted.precondition == "trackstar" and (recipe.dim or 0) > MAX_DIM:
                    detail = f"a second moment of {recipe.dim:,} dims takes too long to invert: at most {MAX_DIM:,}"
                    raise refusal(detail, f"/scores/{number}/precondition")
                scores["recipe"] = recipe.model_dump(mode="json")
                scores["pool"] = [features.id for features in sources.datasets[pool]]
                scores["task"] = [features.id for features in sources.tasks[task.id]]
            found.append(scores)
        return found

    def _resolved(
        self, wanted: ValidatedRecipe, pool: str, task: Task, *, label: str
    ) -> tuple[SelectionRecipe, Sources]:
        """The recipe of scores, and the features they read; errors say which of the scores is meant."""
        try:
            return self.recipes.resolve(_query(wanted, pool, task.id), path="/scores")
        except GradientsMissing as error:
            raise GradientsMissing(f"{label}: {error}", body=error.body) from error
        except Ambiguous as error:
            raise Ambiguous(f"{label}: {error}", choices=error.choices) from error

    # Workers' side ----------------------------------------------------------------------------------------------------

    def training(self, plan: dict[str, Any], payload: dict[str, Any]) -> Training:
        """What a shard trains on and measures."""
        recipe = TrainingRecipe.model_validate(plan["recipe"])
        return Training(
            dataset=plan["dataset"],
            rows=self._rows(plan, payload),
            recipe=recipe.model_copy(update={"seed": (recipe.seed + payload["repeat"]) % (1 << 32)}),
            task=plan["task"],
            split=plan["split"],
        )

    def finish(self, claim: Claim, key: str) -> bool:
        """Commit a training that is done, and with the last one the job's result; False where it is not wanted."""
        return assembly.commit(
            self.jobs, claim, record=partial(self.trainings.record, key), result=lambda: self.result(claim, key)
        )

    def result(self, claim: Claim, key: str) -> ValidationResult:
        """What a validation comes to whose trainings are all done; `key` is the claim's own.

        Raises `Damaged` where a training is missing, and `Conflict` where no target has both loss and feature, or no
        loss differs between trainings.
        """
        plan = claim.plan
        payloads = assembly.payloads(self.catalog, claim, training=key)
        measured = {payload["training"]: self.trainings.kept(payload["training"]) for payload in payloads}
        losses = np.stack([measured[payload["training"]].values for payload in payloads])
        views = [self._views(scores) for scores in plan["scores"]]
        targets = self._targets(plan, everywhere(list(np.isfinite(losses))), views)
        trainings = list(zip(payloads, losses_of(targets, losses), strict=True))
        judge = self._correlated if plan["kind"] == "lds" else self._changed
        found = list(judge(plan, trainings, targets, views))
        return ValidationResult(
            kind=plan["kind"],
            scores=[
                _described(scores, one, found[0], targets=targets, pool=pool)
                for scores, one, (pool, _) in zip(plan["scores"], found, views, strict=True)
            ],
            rows=measured[payloads[0]["training"]].rows,
            left_out_targets=losses.shape[1] - sum(len(target.measured) for target in targets),
            trainings=len(measured),
            tokens=sum(one.tokens for one in measured.values()),
            seconds=sum(one.seconds for one in measured.values()),
        )

    def _rows(self, plan: dict[str, Any], payload: dict[str, Any]) -> list[int]:
        """The rows of the pool that a shard trains on, in order."""
        pool, kept, seed = plan["pool_rows"], plan["rows"], plan["recipe"]["seed"]
        if "subset" in payload:
            return sorted(_draw(f"subset {seed} {payload['subset']}", pool, kept))
        if "draw" in payload:
            left_out = np.array(_draw(f"draw {seed} {payload['draw']}", pool, pool - kept), np.int32)
        else:
            left_out = self._best_rows(plan, payload["best"])
        rows: list[int] = np.delete(np.arange(pool), left_out).tolist()
        return rows

    def _best_rows(self, plan: dict[str, Any], number: int) -> NDArray[np.int32]:
        """The rows that a training without the best ones leaves out."""
        key = content_id("best", [plan["scores"][number], plan["pool_rows"], plan["rows"], plan["recipe"]["seed"]])
        if key not in self._best:
            if len(self._best) >= KEPT:
                self._best.clear()
            pool, task = self._views(plan["scores"][number])
            score, valid = self._vector(plan, number, pool, task)
            chosen = top(score, candidates(valid, None), plan["pool_rows"] - plan["rows"])
            if len(chosen) < plan["pool_rows"] - plan["rows"]:
                raise Conflict(f"only {len(chosen):,} rows of the pool have a score: leave out at most as many")
            self._best[key] = chosen.astype(np.int32)
        return self._best[key]

    def _vector(
        self, plan: dict[str, Any], number: int, pool: Sequence[Rows], task: Sequence[Rows]
    ) -> tuple[Floats, Mask]:
        """One score for each row of the pool, as /scores has it, and which rows have one."""
        scores = plan["scores"][number]
        if scores["control"] is not None:
            return self._random(plan, number, 1)[:, 0], np.ones(plan["pool_rows"], bool)
        names = [row.subtask for row in self.tasks.validation(plan["task"])]
        numbers = {name: position for position, name in enumerate(dict.fromkeys(names))}
        labels: Subtasks = np.array([numbers[name] for name in names], np.int16)
        usable, _ = usable_rows([view.valid for view in task], labels, list(numbers))
        how = scores["aggregate"]
        _, asked = queries(np.zeros((int(usable.sum()), 1), np.float32), labels[usable], how)
        influences, _ = predictions(
            pool,
            task,
            weights=scores["recipe"]["checkpoint_weights"],
            fold=lambda rows: queries(rows[usable], labels[usable], how)[0],
            trackstar=scores["precondition"] == "trackstar",
        )
        return reduce(influences, asked, how)[0], everywhere([view.valid for view in pool])

    def _targets(self, plan: dict[str, Any], measured: Mask, views: Sequence[_Views]) -> list[Target]:
        validation = [row.subtask for row in self.tasks.validation(plan["task"])]
        asked = everywhere([np.ones(len(validation), bool), *(view.valid for _, task in views for view in task)])
        tests = plan["split"] == "test"
        if plan["kind"] == "leave-top-k-out":  # scores choose rows, and predict nothing of a single target
            asked = np.ones_like(measured) if plan["targets"] == "rows" else np.ones_like(asked)
        return targets_of(
            measured,
            asked,
            subtasks=[row.subtask for row in self.tasks.test(plan["task"])] if tests else validation,
            asked_subtasks=validation,
            by_subtask=plan["targets"] == "subtasks",
        )

    def _correlated(
        self, plan: dict[str, Any], trainings: _Losses, targets: Sequence[Target], views: Sequence[_Views]
    ) -> Iterator[_Finding]:
        """The linear datamodeling score of each of the scores."""
        losses = np.stack([loss for _, loss in trainings])
        losses = losses.reshape(-1, plan["repeats"], len(targets)).mean(axis=1)
        if not np.ptp(losses, axis=0).any():
            raise Conflict(
                "every training ended with the same losses, so nothing can be correlated with them: train for more "
                "steps (epochs, fraction), or at a higher learning_rate"
            )
        subsets = members((self._rows(plan, {"subset": number}) for number in range(len(losses))), plan["pool_rows"])
        for number, (scores, (pool, task)) in enumerate(zip(plan["scores"], views, strict=True)):
            if scores["control"] is not None:
                values, mixing = self._random(plan, number, len(targets)), list[float]()
            else:
                values, mixing = predictions(
                    pool,
                    task,
                    weights=scores["recipe"]["checkpoint_weights"],
                    fold=fold_of(targets),
                    trackstar=scores["precondition"] == "trackstar",
                )
            predicted = sums(values, subsets)
            del values  # before the next are made
            yield _Finding(
                values=spearman(predicted, -losses),
                samples=resampled(predicted, -losses, samples=plan["bootstrap_samples"], seed=plan["recipe"]["seed"]),
                mixing=mixing,
                points=[
                    ScatterPoint(seed=subset, predicted=float(row.mean()), loss=float(loss.mean()), random_loss=None)
                    for subset, (row, loss) in enumerate(zip(predicted, losses, strict=True))
                ],
            )

    def _changed(
        self, plan: dict[str, Any], trainings: _Losses, _targets: Sequence[Target], _views: Sequence[_Views]
    ) -> Iterator[_Finding]:
        """How much higher the losses are without the best rows by each of the scores than without random ones."""
        others = np.stack([loss for payload, loss in trainings if "draw" in payload])
        for number in range(len(plan["scores"])):
            losses = np.stack([loss for payload, loss in trainings if payload.get("best") == number])
            changes = losses - others
            yield _Finding(
                values=changes.mean(axis=0),
                samples=resampled_change(changes, samples=plan["bootstrap_samples"], seed=plan["recipe"]["seed"]),
                mixing=[],
                points=[
                    ScatterPoint(seed=seed, predicted=None, loss=float(loss.mean()), random_loss=float(other.mean()))
                    for seed, (loss, other) in enumerate(zip(losses, others, strict=True))
                ],
            )

    def _random(self, plan: dict[str, Any], number: int, columns: int) -> Floats:
        """Scores without meaning (n, columns)."""
        generator = np.random.default_rng([plan["recipe"]["seed"], number])
        return generator.standard_normal((plan["pool_rows"], columns), np.float32)

    def _views(self, scores: dict[str, Any]) -> _Views:
        """The features of pool and task that scores are made from, one view a checkpoint; none of a control."""
        pool, task = (self.features.views(scores[side]) for side in ("pool", "task"))
        return pool, task


def _check_split(request: ValidationRequest, task: Task) -> None:
    if not task.validation:
        raise refusal(f"the task {task.name} has no validation rows: upload it again with some", "/task")
    if request.split == "test" and not task.test:
        raise refusal(f"the task {task.name} has no test rows: upload it again with some", "/split")


def _rows_of_a_training(request: ValidationRequest, pool: int) -> int:
    """How many of the pool's rows a model is trained on. Raises `InvalidInput` where that leaves none in or out."""
    if request.kind == "lds":
        rows, name = count(pool, pct=request.fraction), "fraction"
    else:
        rows, name = pool - count(pool, pct=request.pct, k=request.k), "pct" if request.k is None else "k"
    if not 0 < rows < pool:
        raise refusal(f"of {pool:,} rows that trains on {rows:,}: some must be trained on, and some not", f"/{name}")
    return rows


def _trainings(settings: dict[str, Any], *, subsets: int) -> list[dict[str, Any]]:
    """What each shard's training is made from; the repeats of a subset one after the other."""
    repeats = range(settings["repeats"])
    if settings["kind"] == "lds":
        return [{"subset": subset, "repeat": repeat} for subset in range(subsets) for repeat in repeats]
    best = [{"best": number, "repeat": repeat} for number in range(len(settings["scores"])) for repeat in repeats]
    return [*({"draw": repeat, "repeat": repeat} for repeat in repeats), *best]


def _draw(seed: str, pool: int, wanted: int) -> list[int]:
    return random.Random(seed).sample(range(pool), wanted)  # noqa: S311 - a draw of rows, no secret


def _query(wanted: ValidatedRecipe, pool: str, task: str) -> Query:
    """What scores are asked for, as of /scores."""
    shared = {each.name for each in fields(Query)} & set(ValidatedRecipe.model_fields) - {"checkpoints"}
    asked = {name: getattr(wanted, name) for name in shared}
    return Query(tasks=[task], datasets=[pool], checkpoints=wanted.checkpoints or (), **asked)


def _label(wanted: ValidatedRecipe) -> str:
    """What scores are called that have no label: by what was said of them."""
    said = wanted.model_dump(mode="json", exclude_defaults=True, exclude={"label", "control"})
    return wanted.control or called(said) or "scores"


def called(said: Mapping[str, Any]) -> str:
    """What is called by the parameters that were said of it."""
    return " ".join(f"{name}={_text(value)}" for name, value in said.items())


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _described(
    scores: dict[str, Any], found: _Finding, first: _Finding, *, targets: Sequence[Target], pool: Sequence[Rows]
) -> ValidatedScores:
    """What is found of scores, beside the first of them."""
    value = float(found.values.mean())
    differs = found is not first
    return ValidatedScores(
        label=scores["label"],
        recipe=None if scores["recipe"] is None else SelectionRecipe.model_validate(scores["recipe"]),
        precondition=scores["precondition"],
        mixing=found.mixing,
        value=value,
        interval=_interval(found.samples),
        difference=value - float(first.values.mean()) if differs else None,
        difference_interval=_interval(found.samples - first.samples) if differs else None,
        unscored_rows=int((~everywhere([view.valid for view in pool])).sum()) if pool else 0,
        targets=[
            ValidatedTarget(row=target.row, subtask=target.subtask, value=float(one))
            for target, one in zip(targets, found.values, strict=True)
        ],
        points=found.points,
    )


def _interval(samples: Numbers) -> Interval:
    low, high = interval(samples)
    return Interval(low=low, high=high)
