"""Influence predictors: which sample, truth and inputs a request means, what is learnt of them, and what it predicts.

The published filter pipeline (docs/predictors.md) computes gradients for a sample only and predicts the influence of
the rest from features of the texts. Everything is one shard: the sample's scores are read or computed, models are
fitted and tested, and the whole pool is predicted. What is kept is the prediction of every row, among the scores
(datastore/scores.py), and the report in the job's result; no fitted model is, since fitting the same again gives the
same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
from gradstore.types import (
    AnyJob,
    ControlReport,
    Dataset,
    FeatureSet,
    PredictionReport,
    PredictorEstimate,
    PredictorModel,
    PredictorRequest,
    PredictorResult,
    PredictorSettings,
    SelectionRecipe,
    Task,
    TriedModel,
)
from numpy.typing import NDArray

from datastore.catalog import Catalog
from datastore.correlation import Numbers
from datastore.datasets import Datasets
from datastore.durations import duration
from datastore.errors import Ambiguous, Conflict, GradientsMissing, InvalidInput, refusal, several
from datastore.features import Features
from datastore.identity import content_id
from datastore.influence import NO_SUBTASK, Floats, Mask, TaskScores, masked
from datastore.learned_scores import keep, key_of
from datastore.leases import Claim, Jobs, NewShard
from datastore.parameters import Query
from datastore.prediction_inputs import STORED, Gathering, Inputs
from datastore.prediction_models import GRIDS, Choice, choose, fit, one_thread
from datastore.prediction_reports import (
    Classes,
    calibration,
    confusion,
    edges,
    levels_of,
    r2,
    rank_correlation,
    recalls,
)
from datastore.recipes import Recipes, Sources
from datastore.schema import JobRow
from datastore.scores import ScoreCache, Target, score
from datastore.selection.top import count
from datastore.tasks import Tasks

PREDICTOR_VERSION = 2
"""Counted up when the same request would predict otherwise, so that old predictions are not found again."""
FRACTION = 0.1
"""Part of a pool that is drawn where nothing is said."""
LEAST = 10
"""Rows of a sample."""
KERNEL_ROWS = 20_000
"""Rows that ridge regression with a kernel learns from: their matrix takes 3.2 GB."""
SPLIT_COLUMNS = 2048
"""Columns of a row that boosting is tried with: it looks for splits of each, for every tree."""
_PASS = ("template", "max_length", "precision", "quantisation")
"""What inputs made by a model have as the gradients have it."""
_OUTPUT = ("reduction", "dim", "projection", "seed")
"""What the output layer's gradients of pool and task share beside it."""
BLOCK_ROWS = 4096
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prediction:
    """What was learnt from a sample, and what it says of all rows."""

    choices: list[Choice]
    """The models tried, the best first."""
    score: Floats
    """Of every row (n,): the predicted score, or the expected level; of the sample's rows out of fold."""
    level: Classes
    """Of every row where there are levels."""
    borders: Numbers
    doubt: Numbers | None = None
    """Standard deviation of every row's score (n,), where the model has one."""


@dataclass(frozen=True)
class Predictors:
    """The predictors of a catalog."""

    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    features: Features
    tasks: Tasks
    recipes: Recipes
    cache: ScoreCache

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: PredictorRequest) -> tuple[AnyJob, bool]:
        """Start a predictor's job, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `GradientsMissing` and `Ambiguous`.
        """
        plan = self.plan(request)
        id = content_id("pred", plan)
        job, new = self.jobs.create(
            id=id,
            kind="predictor",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard({}, units=fits(plan["models"], plan["folds"]))],
            name=request.name,
            uses={plan["dataset"], plan["task"], plan["labelled"]},
        )
        if job.status == "succeeded" and self.predicted(id) is None:  # the folder of scores was emptied
            return self.jobs.redo(id), True
        return job, new

    def estimate(self, request: PredictorRequest) -> PredictorEstimate:
        """What a request would cost. Raises what `start` does."""
        plan = self.plan(request)
        id = content_id("pred", plan)
        fitted = fits(plan["models"], plan["folds"])
        sample = plan["sample_rows"] or self.catalog.dataset(plan["labelled"]).rows
        time = duration(
            self.jobs,
            kind="predictor",
            units=fitted * sample,
            done=lambda job: _fitted_rows(job, plan["models"]),
            operations=None,
            precision=None,
            alone=True,
        )
        read = _feature_sets(plan)
        return PredictorEstimate(
            done=self.jobs.is_done(id) and self.predicted(id) is not None,
            rows=plan["pool_rows"],
            sample_rows=sample,
            feature_sets=read,
            read_bytes=sum(self.features.get(each).bytes for each in read),
            fits=fitted,
            seconds=time.seconds,
            basis=time.basis,
        )

    def plan(self, request: PredictorRequest) -> dict[str, Any]:
        """Resolve a request to ids. Raises what `start` does."""
        pool, task = self.catalog.dataset(request.dataset), self.catalog.task(request.task)
        sample = None if request.sample is None else self.catalog.dataset(request.sample)
        recipe, sources = self.recipes.resolve(query_of(request, sample or pool, task), path="/scores")
        wanted = _sample_rows(request, pool) if sample is None else None
        check_usable([each for sets in (*sources.datasets.values(), *sources.tasks.values()) for each in sets])
        at = input_checkpoint(self.catalog, request, recipe.checkpoints)
        return {
            "version": PREDICTOR_VERSION,
            "dataset": pool.id,
            "pool_rows": pool.rows,
            "task": task.id,
            "labelled": (sample or pool).id,
            "sample_rows": wanted,
            "aggregate": request.aggregate,
            "truth": truth_of(recipe, sources),
            "outside": None if sample is None else self._outside(request, pool, task, recipe),
            "levels": request.levels or 0,
            "models": models_of(request, rows=wanted or (sample or pool).rows),
            "folds": request.folds,
            "seed": request.predictor_seed,
            "controls": request.controls,
            **self.inputs(request, pool, task, next(iter(sources.tasks.values()))[0], at=at),
        }

    def inputs(
        self, request: PredictorSettings, pool: Dataset, task: Task, gradients: FeatureSet, *, at: str
    ) -> dict[str, Any]:
        """The feature sets that a request's inputs are made of, at a checkpoint and computed as its `gradients` were.

        Raises `GradientsMissing`, `Ambiguous` and `NotFound`.
        """
        kinds = stored_kinds(request)
        found: dict[str, dict[str, str]] = {"pool_inputs": {}, "task_inputs": {}}
        for kind in kinds:
            checkpoint = self._encoder(request, pool) if kind == "embedding" else at
            mine = self._input(kind, checkpoint, gradients, _PASS, dataset=pool.id)
            found["pool_inputs"][kind] = mine.id
            if "similarity" in request.features:
                like = (*_PASS, *_OUTPUT) if kind == "output" else _PASS
                theirs = mine if kind == "output" else gradients
                found["task_inputs"][kind] = self._input(kind, mine.checkpoint, theirs, like, task=task.id).id
        return {"inputs": sorted(request.features), **found}

    def _input(
        self, kind: str, checkpoint: str, gradients: FeatureSet, like: Sequence[str], **owner: str
    ) -> FeatureSet:
        """The widest stored features of a kind at a checkpoint, computed as others were. Raises `GradientsMissing`."""
        known = self.features.complete(**{f"{noun}s": [id] for noun, id in owner.items()})
        like = () if kind == "embedding" else like
        fitting = [
            each
            for each in known
            if each.kind == kind
            and each.checkpoint == checkpoint
            and all(getattr(each, name) == getattr(gradients, name) for name in like)
        ]
        if not fitting:
            asked = {name: value for name in like if (value := getattr(gradients, name)) is not None}
            if kind == "output":
                asked |= {"dim": gradients.dim, "reduction": gradients.reduction, "seed": gradients.seed}
            if "dim" in asked:
                asked["dims"] = [asked.pop("dim")]
            body: dict[str, Any] = {**owner, "checkpoints": [checkpoint], "kinds": [kind], **asked}
            ((noun, id),) = owner.items()
            detail = f"the {noun} {id} has no features of kind={kind} at {checkpoint}, from which influence would be "
            raise GradientsMissing(f"{detail}predicted: {post('/gradients', body)}", body=body)
        return max(fitting, key=lambda each: (each.dtype == gradients.dtype, each.dim))

    def _encoder(self, request: PredictorSettings, pool: Dataset) -> str:
        """The checkpoint of the pool's embeddings. Raises `GradientsMissing` and `Ambiguous`."""
        if request.encoder is not None:
            return self.catalog.checkpoint(request.encoder).id
        known = self.features.complete(datasets=[pool.id])
        found = sorted({each.checkpoint for each in known if each.kind == "embedding"})
        if not found:
            body: dict[str, Any] = {"dataset": pool.id, "checkpoints": ["<checkpoint>"], "kinds": ["embedding"]}
            raise GradientsMissing(
                f"the dataset {pool.id} has no embeddings: {post('/gradients', body)}, where <checkpoint> is the "
                'sentence encoder that POST /checkpoints {"model": "…"} registers',
                body=body,
            )
        if len(found) > 1:
            several_encoders = f"{pool.id} has embeddings of {len(found)} encoders"
            raise several(several_encoders, found, parameter="encoder", path="/predictors")
        return found[0]

    def _outside(
        self, request: PredictorRequest, pool: Dataset, task: Task, recipe: SelectionRecipe
    ) -> dict[str, Any] | None:
        """Where the truth of the pool's other rows lies, if it is stored."""
        with suppress(GradientsMissing, Ambiguous):
            found, sources = self.recipes.resolve(query_of(request, pool, task), path="/scores")
            if found.checkpoints == recipe.checkpoints:
                return truth_of(found, sources)
        return None

    def remove(self, reference: str) -> str:
        """Delete a predictor with its predictions; returns its id. Raises `NotFound` and `Conflict` while at work."""
        id = self.jobs.remove(reference, kind="predictor")
        self.cache.delete(id)
        return id

    def predicted(self, id: str) -> TaskScores | None:
        """The prediction of every row of the pool, if it is kept."""
        return self.cache.get(key_of(id))

    # Workers' side ----------------------------------------------------------------------------------------------------

    def work(self, claim: Claim, on_fit: Progress) -> PredictorResult:
        """Learn, test and predict; the predictions are kept when this returns. `on_fit` hears of how many fits.

        Raises `Conflict` where the sample is too small, or its scores are all the same.
        """
        began = time.monotonic()
        with one_thread():
            return self._learn(claim, on_fit, began)

    def _learn(self, claim: Claim, on_fit: Progress, began: float) -> PredictorResult:
        plan = claim.plan
        gathering = Gathering(self.features, self.datasets, self.tasks)
        inputs = gathering.gather(plan)
        truth = self.truth(plan["truth"], plan["labelled"], plan["dataset"])
        sample = self._sample(plan, truth.valid & inputs.valid)
        learnt = truth.score[sample].astype(np.float64)
        check_sample(learnt)
        found = predict(inputs, learnt, sample, plan, on_fit=on_fit)
        outside = self._tested(plan, truth, inputs.valid, sample)
        tested = sample if outside is None else outside[1]
        answers = (truth if outside is None else outside[0]).score.astype(np.float64)
        unknown = np.full(len(found.score), NO_SUBTASK, np.int16)
        keep(self.cache, claim.job, plan, masked(found.score, unknown, inputs.valid))
        best = found.choices[0]
        return PredictorResult(
            rows=plan["pool_rows"],
            predicted_rows=int(inputs.valid.sum()),
            sample_rows=len(sample),
            columns=inputs.columns,
            model=best.model,
            settings=dict(best.settings),
            models=[TriedModel(model=one.model, settings=dict(one.settings), score=one.score) for one in found.choices],
            tested_on="folds" if outside is None else "outside",
            tested_rows=len(tested),
            report=reported(answers[tested], found, tested, levels=plan["levels"]),
            calibration=calibration(answers[tested], found.score[tested]),
            borders=found.borders.tolist(),
            controls=list(self._controls(plan, gathering, inputs, learnt, answers, sample, tested)),
            seconds=time.monotonic() - began,
        )

    def truth(self, where: dict[str, Any], dataset: str, pool: str) -> TaskScores:
        """The true scores of a dataset's rows at their places in the pool; rows of the same text have the same.

        Raises `InvalidInput` where a row of the dataset is none of the pool.
        """
        views = self.features.views(where["pool"])
        subtasks = [row.subtask for row in self.tasks.validation(where["task"])]
        target = Target(self.features.views(where["targets"]), subtasks)
        weights, aggregate = where["weights"], where["aggregate"]
        [found] = score(views, [target], weights=weights, aggregate=aggregate, cache=self.cache)
        if dataset == pool:
            return found
        mine, theirs = self.datasets.text_keys(pool), self.datasets.text_keys(dataset)
        strangers = int((~np.isin(theirs, mine)).sum())
        if strangers:
            raise InvalidInput(
                f"{strangers:,} rows of the sample {dataset} are none of the pool {pool}: a sample is some of its rows"
            )
        return placed(mine, theirs, found)

    def _sample(self, plan: dict[str, Any], usable: Mask) -> NDArray[np.int64]:
        """The sample's places in the pool, in order."""
        places = np.flatnonzero(usable)
        if plan["sample_rows"] is None:
            return places
        return draw(places, plan["sample_rows"], seed=plan["seed"])

    def _tested(
        self, plan: dict[str, Any], truth: TaskScores, valid: Mask, sample: NDArray[np.int64]
    ) -> tuple[TaskScores, NDArray[np.int64]] | None:
        """The truth of rows outside the sample, and which they are; None where it is not known."""
        if plan["outside"] is not None:
            truth = self.truth(plan["outside"], plan["dataset"], plan["dataset"])
        elif plan["sample_rows"] is None:
            return None
        outside = truth.valid & valid
        outside[sample] = False
        if plan["labelled"] != plan["dataset"]:  # twins of the sample's rows are no test
            keys = self.datasets.text_keys(plan["dataset"])
            outside &= ~np.isin(keys, keys[sample])
        return (truth, np.flatnonzero(outside)) if outside.any() else None

    def _controls(
        self, plan: dict[str, Any], gathering: Gathering, inputs: Inputs, learnt: Numbers, answers: Numbers,
        sample: NDArray[np.int64], tested: NDArray[np.int64],
    ) -> Iterator[ControlReport]:  # fmt: skip
        """What predictors without a merit reach on the same rows, chosen and fitted in the same way."""
        if not plan["controls"]:
            return
        rows = plan["pool_rows"]
        generator = np.random.default_rng([plan["seed"], rows])
        noise = generator.standard_normal((rows, min(inputs.columns, 512)), np.float32)
        for name, features, scores in (
            ("random-features", Inputs([], noise, inputs.valid), learnt),
            ("label-shuffle", inputs, generator.permutation(learnt)),
            ("length-only", Inputs([], gathering.lengths(plan["dataset"]), inputs.valid), learnt),
        ):
            quick = ["ridge", *(["boosting"] if features.columns <= SPLIT_COLUMNS else [])]
            found = predict(features, scores, sample, {**plan, "models": quick}, on_fit=lambda _: None)
            report = reported(answers[tested], found, tested, levels=plan["levels"])
            yield ControlReport.model_validate({"control": name, "report": report.model_dump()})


# What is asked --------------------------------------------------------------------------------------------------------


def query_of(request: PredictorSettings, pool: Dataset, task: Task) -> Query:
    """The scores that are to be predicted, as /scores asks for them."""
    shared = {each.name for each in fields(Query)} & set(PredictorSettings.model_fields) - {"checkpoints"}
    asked = {name: getattr(request, name) for name in shared}
    return Query(tasks=[task.id], datasets=[pool.id], checkpoints=request.checkpoints or (), **asked)


def truth_of(recipe: SelectionRecipe, sources: Sources) -> dict[str, Any]:
    """Where true scores come from, in ids."""
    ((_, sets),) = sources.datasets.items()
    ((task, targets),) = sources.tasks.items()
    return {
        "pool": [each.id for each in sets],
        "task": task,
        "targets": [each.id for each in targets],
        "weights": recipe.checkpoint_weights,
        "aggregate": recipe.aggregate or "less",
    }


def input_checkpoint(catalog: Catalog, request: PredictorSettings, checkpoints: Sequence[str]) -> str:
    """Where hidden states are taken: at the last checkpoint, unless another is named."""
    return checkpoints[-1] if request.input_checkpoint is None else catalog.checkpoint(request.input_checkpoint).id


def stored_kinds(request: PredictorSettings) -> list[str]:
    """The kinds of feature sets that a request's inputs are made of."""
    kinds: list[str] = [kind for kind in STORED if kind in request.features]
    if "loss" in request.features and not {"output", "hidden", "rds"} & set(kinds):
        kinds.insert(0, "hidden")
    if "similarity" in request.features and not kinds:
        kinds.append("hidden")
    return kinds


def models_of(request: PredictorSettings, *, rows: int) -> list[PredictorModel]:
    """The models that are tried on so many rows: of levels or too many rows no kernel, and with thousands of columns no
    boosting. Raises `InvalidInput` where a kernel is asked for with too many.
    """
    if request.model == "kernel" and rows > KERNEL_ROWS:
        detail = f"a kernel of {rows:,} rows takes {8 * rows**2:,} bytes: it learns from at most {KERNEL_ROWS:,}"
        raise refusal(detail, "/model")
    if request.model != "auto":
        return [request.model]
    left_out = {"kernel"} if getattr(request, "levels", None) is not None or rows > KERNEL_ROWS else set()
    if "output" in request.features:
        left_out.add("boosting")
    return [model for model in get_args(PredictorModel) if model not in left_out]


def fits(models: Sequence[PredictorModel], folds: int) -> int:
    """How many models are fitted to choose one and to fit it to the whole sample."""
    return sum(len(GRIDS[model]) for model in models) * folds + 1


def _fitted_rows(job: JobRow, models: Sequence[PredictorModel]) -> float:
    """Rows that a finished job's models were fitted to, each model's counted; 0 where it tried others."""
    if job.plan["models"] != models or job.result is None:
        return 0.0
    return float(fits(models, job.plan["folds"]) * job.result["sample_rows"])


def _feature_sets(plan: dict[str, Any]) -> list[str]:
    """The feature sets that a plan reads, each once."""
    truths = [plan["truth"], *([plan["outside"]] if plan["outside"] else [])]
    read = [id for truth in truths for side in ("pool", "targets") for id in truth[side]]
    return list(dict.fromkeys([*read, *plan["pool_inputs"].values(), *plan["task_inputs"].values()]))


def post(path: str, body: dict[str, Any]) -> str:
    """A request to send, as the details of errors say it."""
    return f"POST {path} {json.dumps(body)}"


def draw(places: NDArray[np.int64], count: int, *, seed: int) -> NDArray[np.int64]:
    """Some of the places, drawn with the seed, in order; all of them where there are no more."""
    if count >= len(places):
        return places
    return np.sort(np.random.default_rng([seed, 1]).choice(places, count, replace=False))


def placed(pool: NDArray[np.uint64], part: NDArray[np.uint64], found: TaskScores) -> TaskScores:
    """Scores of a part of a pool at the pool's rows of the same text, by the keys of both (n,), (m,)."""
    order = np.argsort(part, kind="stable")
    at = np.minimum(np.searchsorted(part[order], pool), len(part) - 1)
    there = part[order][at] == pool
    place = order[at]
    known = there & found.valid[place]
    return masked(found.score[place], found.subtask[place], known)


def _sample_rows(request: PredictorRequest, pool: Dataset) -> int:
    """How many rows are drawn. Raises `InvalidInput` where too few are, or none are left."""
    pointer = "/rows" if request.rows is not None else "/fraction"
    rows = request.rows or count(pool.rows, pct=request.fraction or FRACTION)
    if rows < LEAST:
        raise refusal(f"a sample has at least {LEAST} rows, and this has {rows} of {pool.rows:,}", pointer)
    if rows > pool.rows:
        raise refusal(f"the pool has {pool.rows:,} rows: fewer can be drawn", pointer)
    return rows


# What is learnt -------------------------------------------------------------------------------------------------------


def check_usable(feature_sets: Sequence[FeatureSet]) -> None:
    """Raise `Conflict` where too few rows have a feature to learn anything: of a pool `LEAST`, of a task one."""
    for each in feature_sets:
        there, needed = each.rows - each.excluded, 1 if each.task is not None else LEAST
        if there < needed:
            raise Conflict(
                f"{there:,} of {each.rows:,} rows of {each.dataset or each.task} have a feature in {each.id}, and "
                f"{needed} are needed: GET /gradients/{{id}}/rows says why the others have none"
            )


def check_sample(scores: Numbers) -> None:
    """Raise `Conflict` where nothing can be learnt from these scores."""
    if len(scores) < LEAST:
        raise Conflict(
            f"only {len(scores)} rows of the sample have a score and all features: {LEAST} are needed; GET /gradients "
            "shows why rows have none"
        )
    if np.ptp(scores) == 0:
        raise Conflict("all rows of the sample have the same score, so nothing can be learnt from them")


def predict(
    inputs: Inputs, scores: Numbers, sample: NDArray[np.int64], plan: dict[str, Any], *, on_fit: Progress,
    in_doubt: bool = False,
) -> Prediction:  # fmt: skip
    """Choose and fit a model for the sample's `scores` (m,), and predict every row of the pool.

    `plan` has `models`, `folds`, `seed` and `levels` (0: the scores themselves). `in_doubt`: say how sure it is.
    """
    levels = plan["levels"]
    borders = edges(scores, levels) if levels else np.zeros(0)
    target: Numbers | Classes = levels_of(scores, borders) if levels else scores
    features = inputs.of(sample)
    folds = min(plan["folds"], len(sample))
    choices = choose(
        features, target, models=plan["models"], folds=folds, seed=plan["seed"], levels=levels, on_fit=on_fit
    )
    best = choices[0]
    fitted = fit(features, target, model=best.model, settings=best.settings, seed=plan["seed"], levels=levels)
    rows = np.flatnonzero(inputs.valid)
    guess, level = np.zeros(len(inputs.valid)), np.zeros(len(inputs.valid), np.int64)
    doubt = np.zeros(len(inputs.valid)) if in_doubt and best.model == "kernel" else None
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        found = inputs.of(block)
        guess[block], level[block] = fitted.predict(found)
        if doubt is not None:
            doubt[block] = fitted.doubt(found)
    guess[sample] = best.out_of_fold
    if best.out_of_fold_levels is not None:
        level[sample] = best.out_of_fold_levels
    return Prediction(choices, guess.astype(np.float32), level, borders, doubt)


def reported(truth: Numbers, found: Prediction, tested: NDArray[np.int64], *, levels: int) -> PredictionReport:
    """How well the rows `tested` are predicted, whose true scores are `truth` (len(tested),)."""
    guess = found.score[tested].astype(np.float64)
    truly = levels_of(truth, found.borders) if levels else None
    level = found.level[tested]
    return PredictionReport(
        r2=None if truly is not None else r2(truth, guess),
        spearman=rank_correlation(truth, guess),
        recalls=recalls(truth, guess),
        accuracy=None if truly is None else float((truly == level).mean()),
        confusion=None if truly is None else confusion(truly, level, levels),
    )
