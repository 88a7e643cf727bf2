"""Cascades: gradients for a part of a pool only, the rows of a random sample and those predicted best.

A cascade goes on from stage to stage, each resting on the one before: gradients of a random sample, a predictor learnt
from them, gradients of the rows that it predicts best, a predictor learnt from all of these, and so on until the budget
is spent. The rows of a stage become a dataset of their own, named by its content as every dataset is, and an ordinary
gradients job computes their features, shared by all workers. So a killed cascade finds what it had computed, and which
rows a stage has is recorded in its plan by the worker that chose them: another one, whose arithmetic rounds otherwise,
takes the same.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from gradstore.types import (
    AnyJob,
    CascadeEstimate,
    CascadeRequest,
    CascadeResult,
    CascadeStage,
    Estimate,
    FeatureChoice,
    FeatureSet,
    GradientsRequest,
    Task,
)
from numpy.typing import NDArray

from datastore import advice
from datastore.catalog import PART, Catalog
from datastore.datasets import Datasets
from datastore.errors import Ambiguous, Conflict, GradientsMissing, InvalidInput, NotFound, refusal
from datastore.features import LIKE_WITH_LIKE, Features
from datastore.identity import content_id
from datastore.influence import NO_SUBTASK, Mask, TaskScores, checkpoint_weights
from datastore.learned_scores import keep
from datastore.leases import Claim, Jobs, NewShard
from datastore.parameters import SHARED, said
from datastore.prediction_inputs import Gathering, Inputs
from datastore.prediction_models import one_thread
from datastore.prediction_reports import BEST, best
from datastore.predictors import (
    LEAST,
    PREDICTOR_VERSION,
    Prediction,
    Predictors,
    check_sample,
    check_usable,
    draw,
    input_checkpoint,
    models_of,
    placed,
    post,
    predict,
    stored_kinds,
)
from datastore.schema import DatasetRow
from datastore.selection.top import count
from datastore.tasks import Tasks

Compute = Callable[[GradientsRequest], str]
"""Does a gradients job, or waits for others who do, and returns its id once it has succeeded."""
_AS_THE_TASK = (
    "weights", "reduction", "projection", "seed", "dtype", "template", "max_length", "precision", "quantisation",
)  # fmt: skip
"""Parameters of the pool's gradients that are the task's."""
_OF_A_PASS = ("dtype", "template", "max_length", "precision", "quantisation")
"""Those of them that hidden states have."""
_OF_THE_TRUTH = ("task", "targets", "weights", "aggregate")
"""What of a plan says where true scores come from, beside the pool's gradients."""
_OF_ENCODERS = ("embedding", "similarity")


@dataclass(frozen=True)
class Cascades:
    """The cascades of a catalog."""

    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    features: Features
    tasks: Tasks
    predictors: Predictors

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: CascadeRequest) -> tuple[AnyJob, bool]:
        """Start a cascade, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `GradientsMissing` and `Ambiguous`.
        """
        plan = self.plan(request)
        id = content_id("casc", plan)
        job, new = self.jobs.create(
            id=id,
            kind="cascade",
            request=request.model_dump(mode="json"),
            plan={**plan, **{_part(stage): None for stage in range(len(plan["stages"]))}},
            shards=[NewShard({}, units=sum(plan["stages"]))],
            name=request.name,
            uses={plan["dataset"], plan["task"], *plan["checkpoints"]},
        )
        if job.status == "succeeded" and self.predictors.predicted(id) is None:  # the folder of scores was emptied
            return self.jobs.redo(id), True
        return job, new

    def plan(self, request: CascadeRequest) -> dict[str, Any]:
        """Resolve a request to ids. Raises what `start` does."""
        pool, task = self.catalog.dataset(request.dataset), self.catalog.task(request.task)
        targets = self._targets(request, task)
        checkpoints = [each.checkpoint for each in targets]
        check_usable(targets)
        like = targets[0]
        stages = stage_rows(request, pool.rows)
        at = input_checkpoint(self.catalog, request, checkpoints)
        kind = request.kind or "adam"
        if kind in LIKE_WITH_LIKE:
            detail = f"kind={kind} does not go with a task's gradients, which a cascade saves: name adam, sgd or sign"
            raise refusal(detail, "/kind")
        gradients = {
            "kinds": [kind], "adam": (request.adam or "less"), "dims": [like.dim], "checkpoints": checkpoints,
            **{name: getattr(like, name) for name in _AS_THE_TASK},
        }  # fmt: skip
        plan = {
            "version": PREDICTOR_VERSION,
            "dataset": pool.id,
            "pool_rows": pool.rows,
            "task": task.id,
            "checkpoints": checkpoints,
            "targets": [each.id for each in targets],
            "weights": self._weights(checkpoints),
            "aggregate": request.aggregate,
            "gradients": gradients,
            "stages": stages,
            "budget": request.budget,
            "inputs": sorted(request.features),
            "input_kinds": stored_kinds(request),
            "input_checkpoint": at,
            "levels": 0,
            "models": models_of(request, rows=sum(stages)),
            "folds": request.folds,
            "seed": request.predictor_seed,
        }
        if "embedding" in request.features:  # of an encoder, whose passes are no by-product: they have to be there
            alone = request.model_copy(update={"features": [name for name in request.features if name in _OF_ENCODERS]})
            plan |= {"embeddings": self.predictors.inputs(alone, pool, task, like, at=at)}
        for each in (self.gradients_of(plan, pool.id), *self.passes(plan)):
            self.features.plan(each)  # refuses now what its jobs would be refused for
        return plan

    def estimate(self, plan: dict[str, Any], *, gradients: Estimate, inputs: Sequence[Estimate]) -> CascadeEstimate:
        """What a plan would cost, from what its gradients and forward passes would."""
        id = content_id("casc", plan)
        seconds = [each.seconds for each in (gradients, *inputs)]
        known = [each for each in seconds if each is not None]
        return CascadeEstimate(
            done=self.jobs.is_done(id) and self.predictors.predicted(id) is not None,
            rows=plan["pool_rows"],
            stages=plan["stages"],
            saved_rows=plan["pool_rows"] - sum(plan["stages"]),
            gradients=gradients,
            inputs=list(inputs),
            seconds=sum(known) if len(known) == len(seconds) else None,
        )

    def passes(self, plan: dict[str, Any]) -> Iterator[GradientsRequest]:
        """The forward passes that a plan's inputs come from, of the pool and of the task."""
        for _, _, request in self._passes(plan):
            yield request

    def gradients_of(self, plan: dict[str, Any], dataset: str) -> GradientsRequest:
        """The gradients of a part of the pool, such as can be compared with the task's."""
        return GradientsRequest.model_validate({"dataset": dataset, **plan["gradients"]})

    def _targets(self, request: CascadeRequest, task: Task) -> list[FeatureSet]:
        """The task's gradients, one feature set a checkpoint. Raises `GradientsMissing`, `Ambiguous`, `NotFound`."""
        chosen = {
            name: getattr(request, name) for name in (*FeatureChoice.model_fields, "projection") if name != "kind"
        }
        wanted = {name: value for name, value in chosen.items() if value is not None and name != "adam"}
        known = [
            each
            for each in self.features.complete(tasks=[task.id])
            if each.kind == "sgd"
            and each.converted_from is None
            and all(said(name, getattr(each, name)) == value for name, value in wanted.items())
        ]
        trainings = self._trainings(request)
        alike: dict[tuple[Any, ...], dict[str, FeatureSet]] = {}
        for each in known:
            alike.setdefault(tuple(getattr(each, name) for name in SHARED), {})[each.checkpoint] = each
        found = [
            [sets[checkpoint] for checkpoint in checkpoints]
            for checkpoints in trainings
            for sets in alike.values()
            if all(checkpoint in sets for checkpoint in checkpoints)
        ]
        if not found:
            at: dict[str, Any] = {"checkpoints": trainings[0]} if len(trainings) == 1 else {"run": "<run>"}
            body = {"task": task.id, **at, "kinds": ["sgd"], **advice.computed(wanted)}
            raise GradientsMissing(
                f"the task {task.name} has no gradients that a pool's could be compared with: "
                f"{post('/gradients', body)}, and then send the same again",
                body=body,
            )
        if len(found) > 1:
            raise Ambiguous(
                f"the task {task.name} has {len(found)} sets of gradients that fit; say which by run, dim or dtype",
                choices=advice.told_apart(found, "/cascades"),
            )
        return found[0]

    def _trainings(self, request: CascadeRequest) -> list[list[str]]:
        """The checkpoints of what is asked for, or else of every run."""
        if request.checkpoints:
            return [[self.catalog.checkpoint(reference).id for reference in request.checkpoints]]
        runs = [self.catalog.run(request.run)] if request.run else self.catalog.all_runs()
        return [[checkpoint.id for checkpoint in run.checkpoints] for run in runs]

    def _weights(self, checkpoints: Sequence[str]) -> list[float]:
        """The checkpoints' mean learning rates over their sum. Raises `InvalidInput` where one is not known."""
        rates = [self.catalog.checkpoint(id).learning_rate for id in checkpoints]
        known = [rate for rate in rates if rate is not None]
        if len(known) < len(rates) and len(rates) > 1:
            raise InvalidInput(
                "a checkpoint has no learning rate, so the checkpoints cannot be weighted: register it again with "
                "learning_rate, or name a single checkpoint"
            )
        return checkpoint_weights(known) if sum(known) > 0 else [1 / len(rates)] * len(rates)

    def remove(self, reference: str) -> str:
        """Delete a cascade with its scores, its parts and their gradients, unless others use these; returns its id.

        Raises `NotFound`, and `Conflict` while it is at work.
        """
        found = self.jobs.get(reference, kind="cascade").id  # other kinds may have one of this name
        plan = self.jobs.plan(found)
        id = self.jobs.remove(found, kind="cascade")
        self.predictors.cache.delete(id)
        shared = self.catalog.parts()
        for part in parts_of(plan):
            if part not in shared:
                with suppress(NotFound, Conflict):
                    self.features.remove(self.features.plan(self.gradients_of(plan, part)).id)
                    keep = self.catalog.sources_of_others(part)
                    self.catalog.remove(DatasetRow, part, delete_files=partial(self.datasets.delete, keep_sources=keep))
        return id

    # Workers' side ----------------------------------------------------------------------------------------------------

    def work(self, claim: Claim, compute: Compute, on_rows: Callable[[int], None]) -> CascadeResult:
        """Go through all stages; the scores are kept when this returns. `on_rows` hears of how many rows are computed.

        Raises `Conflict` where the sample has too few scores, or a job that it needs has failed.
        """
        began = time.monotonic()
        plan = claim.plan
        inputs = self._inputs(plan, compute)
        keys = self.datasets.text_keys(plan["dataset"])
        truth = nothing_known(plan["pool_rows"])
        computed: Mask = np.zeros(plan["pool_rows"], bool)
        stages: list[CascadeStage] = []
        for number, wanted in enumerate(plan["stages"]):
            found = None if number == 0 else learn(inputs, truth, {**plan, "seed": plan["seed"] + number})
            part = plan[_part(number)]
            if part is None:
                rows = first_rows(plan, inputs) if found is None else next_rows(found, truth, computed, inputs, wanted)
                part = self._part(claim, number, rows)
            gradients = compute(self.gradients_of(plan, part))
            own = self.predictors.truth(self._true(plan, part), part, part)
            truth = both(truth, placed(keys, self.datasets.text_keys(part), own))
            computed |= np.isin(keys, self.datasets.text_keys(part))
            if not truth.valid.any():
                raise Conflict(
                    f"no row of the sample has a gradient: GET /gradients/{gradients}/rows says why; with a larger "
                    "max_length of the task's gradients something may be left of the answers"
                )
            stages.append(self._stage(part, gradients, found, truth, keys))
            on_rows(sum(plan["stages"][: number + 1]))
        keep(self.predictors.cache, claim.job, plan, truth)
        return self._result(plan, stages, truth, inputs, seconds=time.monotonic() - began)

    def _inputs(self, plan: dict[str, Any], compute: Compute) -> Inputs:
        """The inputs of all rows of the pool; hidden states that are not stored are computed first."""
        found: dict[str, dict[str, str]] = plan.get("embeddings", {"pool_inputs": {}, "task_inputs": {}})
        for side, kind, request in self._passes(plan):
            compute(request)
            found = {**found, side: {**found[side], kind: self.features.plan(request).feature_sets[0].id}}
        return Gathering(self.features, self.datasets, self.tasks).gather({**plan, **found})

    def _passes(self, plan: dict[str, Any]) -> Iterator[tuple[str, str, GradientsRequest]]:
        """For each kind of inputs that may have to be computed, of pool and task, how a plan names it."""
        for side, owner in (("pool_inputs", "dataset"), ("task_inputs", "task")):
            for kind in plan["input_kinds"]:
                if kind != "embedding" and (side == "pool_inputs" or "similarity" in plan["inputs"]):
                    yield side, kind, self._pass(plan, kind, **{owner: plan[owner]})

    def _pass(self, plan: dict[str, Any], kind: str, **owner: str) -> GradientsRequest:
        """The hidden states of a pool or task, at the checkpoint where inputs are taken."""
        like = {name: plan["gradients"][name] for name in _OF_A_PASS}
        asked = {**owner, **like, "kinds": [kind], "checkpoints": [plan["input_checkpoint"]]}
        if kind == "output":
            asked |= {name: plan["gradients"][name] for name in ("dims", "reduction", "seed")}
        return GradientsRequest.model_validate(asked)

    def _true(self, plan: dict[str, Any], part: str) -> dict[str, Any]:
        """Where the true scores of a part come from."""
        sets = self.features.plan(self.gradients_of(plan, part)).feature_sets
        return {"pool": [each.id for each in sets], **{name: plan[name] for name in _OF_THE_TRUTH}}

    def _part(self, claim: Claim, number: int, rows: NDArray[np.int64]) -> str:
        """Make a stage's rows a dataset, and record which it is; the first worker's is taken."""
        dataset = claim.plan["dataset"]
        text = b"".join(line + b"\n" for line in self.datasets.lines(dataset, rows.tolist()))
        known = self.catalog.dataset_sizes()
        stored = self.datasets.ingest(io.BytesIO(text), filename=f"{claim.job}-{number}.jsonl", known=known)
        self.catalog.add_dataset(
            id=stored.id, rows=stored.rows, bytes=stored.bytes, origins=stored.origins, prefix=stored.prefix,
            sources=stored.sources, name=None, replace=False,
        )  # fmt: skip
        return str(self.jobs.settle(claim, _part(number), stored.id))

    def _stage(
        self, part: str, gradients: str, found: Prediction | None, truth: TaskScores, keys: NDArray[np.uint64]
    ) -> CascadeStage:
        mine = np.isin(keys, self.datasets.text_keys(part)) & truth.valid
        predicted = None if found is None or not mine.any() else found.score[mine]
        return CascadeStage(
            part=part,
            gradients=gradients,
            rows=self.catalog.dataset(part).rows,
            model=None if found is None else found.choices[0].model,
            r2=None if found is None else found.choices[0].score,
            threshold=None if predicted is None else float(predicted.min()),
            predicted=None if predicted is None else float(predicted.mean()),
            true=float(truth.score[mine].mean()) if mine.any() else None,
        )

    def _result(
        self, plan: dict[str, Any], stages: list[CascadeStage], truth: TaskScores, inputs: Inputs, *, seconds: float
    ) -> CascadeResult:
        computed = sum(plan["stages"])
        tokens = inputs.tokens
        return CascadeResult(
            rows=plan["pool_rows"],
            computed_rows=computed,
            scored_rows=int(truth.valid.sum()),
            saved_rows=plan["pool_rows"] - computed,
            saved_tokens=None if tokens is None else int(tokens[~truth.valid].sum()) * len(plan["checkpoints"]),
            stages=stages,
            seconds=seconds,
        )


def stage_rows(request: CascadeRequest, pool: int) -> list[int]:
    """Rows of the random sample and of each round after it; the rounds as equal as there can be.

    Raises `InvalidInput` where the budget is no sample.
    """
    total = count(pool, pct=request.budget)
    if total < LEAST:
        raise refusal(f"of {pool:,} rows that is {total}: a cascade learns from {LEAST} at least", "/budget")
    sample = min(total, max(LEAST, ceil(request.sample_share * total)))
    rounds = min(request.rounds, total - sample)
    rest = [(total - sample) // rounds + (number < (total - sample) % rounds) for number in range(rounds)]
    return [sample, *rest]


def first_rows(plan: dict[str, Any], inputs: Inputs) -> NDArray[np.int64]:
    """The random sample: of the rows that have all inputs, as far as these go."""
    wanted, places = plan["stages"][0], np.flatnonzero(inputs.valid)
    chosen = draw(places, wanted, seed=plan["seed"])
    return np.sort(np.concatenate([chosen, np.flatnonzero(~inputs.valid)[: wanted - len(chosen)]]))


def learn(inputs: Inputs, truth: TaskScores, plan: dict[str, Any]) -> Prediction:
    """Predict all rows from those whose truth is known. Raises `Conflict` where nothing can be learnt."""
    sample = np.flatnonzero(truth.valid & inputs.valid)
    scores = truth.score[sample].astype(np.float64)
    check_sample(scores)
    with one_thread():
        return predict(inputs, scores, sample, plan, on_fit=lambda _: None, in_doubt=True)


def next_rows(found: Prediction, truth: TaskScores, computed: Mask, inputs: Inputs, wanted: int) -> NDArray[np.int64]:
    """The rows that most probably are among the pool's best and are not `computed`, in order; those without inputs are
    the last to be taken.

    Of a model that says how much it doubts a row, that is by how many standard deviations its prediction is above what
    the best 5 % reach, of true scores and predictions together; of others the prediction itself.
    """
    guess = found.score.astype(np.float64)
    if found.doubt is not None:
        reached = np.where(truth.valid, truth.score, guess)[inputs.valid]
        guess = (guess - np.quantile(reached, 1 - BEST)) / np.maximum(found.doubt, np.finfo(np.float64).tiny)
    value = np.where(inputs.valid, guess, -np.inf)
    left = np.flatnonzero(~computed)
    return np.sort(left[best(value[left], wanted)])


def both(first: TaskScores, second: TaskScores) -> TaskScores:
    """The scores that either has; the first one's where both do."""
    return TaskScores(
        score=np.where(first.valid, first.score, second.score),
        subtask=np.where(first.valid, first.subtask, second.subtask),
        valid=first.valid | second.valid,
    )


def nothing_known(rows: int) -> TaskScores:
    """No score of any row."""
    return TaskScores(np.zeros(rows, np.float32), np.full(rows, NO_SUBTASK, np.int16), np.zeros(rows, bool))


def parts_of(plan: dict[str, Any]) -> set[str]:
    """The datasets that a cascade has made."""
    found = (plan[_part(stage)] for stage in range(len(plan["stages"])))
    return {part for part in found if part is not None}


def _part(stage: int) -> str:
    return f"{PART}{stage}"
