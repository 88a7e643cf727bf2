"""Influence predictors, and cascades: true gradients for the part of a pool that is predicted best."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gradstore.types.base import Aggregate, Basis, Body, Fraction, Name, Named, ProjectionName, Request
from gradstore.types.gradients import FeatureChoice
from gradstore.types.jobs import Estimate, Job

PredictorModel = Literal["ridge", "kernel", "boosting", "mlp"]
PredictorInput = Literal["output", "hidden", "rds", "embedding", "similarity", "loss", "text", "words", "origin"]
Tested = Literal["outside", "folds"]


class PredictorSettings(FeatureChoice):
    """Whose influence is predicted, from what and how; of the gradients, what is left out must be the only one."""

    dataset: Named
    """The pool."""
    task: Named
    run: Named | None = None
    checkpoints: list[Named] | None = Field(None, max_length=1000)
    projection: ProjectionName | None = None
    aggregate: Aggregate = "less"
    """How a row's influence on the task's rows becomes the one score that is predicted."""
    features: list[PredictorInput] = Field(["hidden", "rds", "similarity", "loss", "text", "words"], min_length=1)
    """What it is predicted from. `output`: the direction of the output layer's gradient, which predicts far better
    than all else. The stored hidden states (`hidden`, `rds`) and sentence embeddings (`embedding`), as they are.
    `similarity`: the cosines of these with the task's. `loss`: loss and tokens from the same forward pass. `text`:
    lengths, kinds of characters, digits, code. `words`: weighted words and pairs of words (tf-idf), in 32 principal
    directions. `origin`: where the row is from."""
    input_checkpoint: Named | None = None
    """Where hidden states and the output layer's gradient are taken; by default at the last checkpoint."""
    encoder: Named | None = None
    """The sentence encoder of `embedding`; by default the only one."""
    model: PredictorModel | Literal["auto"] = "auto"
    """`ridge` regression (of levels logistic regression), ridge regression with a radial `kernel`, gradient `boosting`
    of histograms, or a neural network (`mlp`); `auto`: whichever predicts best out of fold."""
    folds: int = Field(5, ge=2, le=50)
    """Of the cross-validation that chooses the settings."""
    predictor_seed: int = Field(0, ge=0, lt=1 << 32)
    """Of the sample, the folds and the models; `seed` is the projection's."""
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> PredictorSettings:
        if self.run is not None and self.checkpoints:
            raise ValueError("name either a run or checkpoints")
        if len(set(self.features)) < len(self.features):
            raise ValueError("features holds one twice")
        if self.encoder is not None and "embedding" not in self.features:
            raise ValueError("an encoder is for embedding: add it to features, or leave encoder out")
        return self


class PredictorRequest(PredictorSettings, Request):
    """Learn to predict the influence of a pool's rows from a sample whose influence is known, and predict all."""

    sample: Named | None = None
    """A dataset of rows of the pool whose gradients are stored; left out, rows of the pool itself are drawn."""
    fraction: Fraction | None = None
    """Part of the pool that is drawn as the sample; by default a tenth."""
    rows: int | None = Field(None, ge=10, le=10**9)
    """Or how many rows are."""
    levels: int | None = Field(None, ge=2, le=20)
    """Predict in which of so many levels of equal size (quantiles) a score is, instead of the score."""
    controls: bool = True
    """Whether three predictors that should fail are fitted beside it: from random numbers, with the scores shuffled,
    and from lengths alone."""

    @model_validator(mode="after")
    def _one_sample(self) -> PredictorRequest:
        if sum(value is not None for value in (self.sample, self.fraction, self.rows)) > 1:
            raise ValueError("say what the sample is in one way: sample, fraction or rows")
        if self.levels is not None and self.model == "kernel":
            raise ValueError("levels are predicted by ridge, boosting or mlp: leave model out, or name one of them")
        return self


class CascadeRequest(PredictorSettings, Request):
    """Compute gradients for a part of the pool only: a random sample, and the rows predicted best from it.

    What it needs of the pool's hidden states is computed, too: a forward pass each. The task's gradients must be there.
    """

    budget: Fraction
    """Part of the pool whose gradients are computed, the sample included."""
    sample_share: Fraction = 0.5
    """Part of the budget that is the random sample."""
    rounds: int = Field(2, ge=1, le=20)
    """In how many steps the rest of the budget is spent: before each the predictor learns from all that is known."""


class Recall(Body):
    """What is found of the truly best 5 % of the rows when gradients are computed for those predicted best."""

    budget: float
    """Part of the rows, the highest predicted first; by chance the recall would be the same."""
    recall: float


class CalibrationBin(Body):
    """A tenth of the rows, by their prediction."""

    rows: int
    predicted: float
    """Mean prediction; of levels the mean expected level."""
    true: float
    """Mean truth."""
    low: float
    """The 10th percentile of the truth."""
    high: float
    """The 90th."""


class PredictionReport(Body):
    """How well rows are predicted that the predictor has not seen."""

    r2: float | None
    """Coefficient of determination; null of levels."""
    spearman: float
    recalls: list[Recall]
    accuracy: float | None
    """Of levels: the part of the rows whose level is right."""
    confusion: list[list[int]] | None
    """Of levels: rows of each true level (a line), by predicted level."""


class ControlReport(Body):
    """A predictor that should fail: what it reaches is no merit of the features."""

    control: Literal["random-features", "label-shuffle", "length-only"]
    report: PredictionReport


class TriedModel(Body):
    """A kind of model with the settings that predicted best out of fold."""

    model: PredictorModel
    settings: dict[str, float]
    score: float
    """R² over the sample's folds; of levels the accuracy."""


class PredictorResult(Body):
    """What was learnt, and how good it is."""

    rows: int
    """Rows of the pool."""
    predicted_rows: int
    """Those that have all features."""
    sample_rows: int
    columns: int
    """Numbers that a row is predicted from."""
    model: PredictorModel
    settings: dict[str, float]
    models: list[TriedModel]
    """Of `auto` all that were tried, the best first."""
    tested_on: Tested
    """`outside`: on all rows outside the sample, whose truth is stored; `folds`: on the sample's own rows, each by a
    model that has not seen its fold, as no others' truth is known."""
    tested_rows: int
    report: PredictionReport
    calibration: list[CalibrationBin]
    borders: list[float]
    """Of levels: the scores between them."""
    controls: list[ControlReport]
    seconds: float


class PredictorEstimate(Body):
    """What a predictor would cost (`dry_run=true`): it reads stored features, and computes none."""

    done: bool
    """Whether the same has been done before: its result is answered, and nothing else happens."""
    rows: int
    """Rows of the pool, which are all predicted."""
    sample_rows: int
    """Rows that are learnt from; fewer where some have no score or lack a feature."""
    feature_sets: list[str]
    """Those that are read: the sample's gradients, the task's, and what influence is predicted from."""
    read_bytes: int
    """Bytes of these."""
    fits: int
    """Models that are fitted, those of the controls apart."""
    seconds: float | None
    """How long it takes; null while no predictor that tried the same models has finished."""
    basis: Basis | None


class CascadeEstimate(Body):
    """What a cascade would cost (`dry_run=true`), the fits of its predictors apart."""

    done: bool
    """Whether the same has been done before: its result is answered, and nothing else happens."""
    rows: int
    """Rows of the pool."""
    stages: list[int]
    """Rows of the random sample, and of each round after it."""
    saved_rows: int
    """Rows without gradients."""
    gradients: Estimate
    """The gradients of the rows of all stages; which rows these are is not known before, nor whether some exist."""
    inputs: list[Estimate]
    """The passes that give what is predicted from, as far as it is not stored: of the pool, and of the task."""
    seconds: float | None
    """All of these together; null where one of them is not known."""


class CascadeStage(Body):
    """A part of the pool whose gradients were computed together."""

    part: str
    """The dataset that it is."""
    gradients: str
    """The job that computed them."""
    rows: int
    r2: float | None
    """Of the prediction that chose these rows: on the rows known before, out of fold; null of the random sample."""
    model: PredictorModel | None
    threshold: float | None
    """The lowest prediction among them."""
    predicted: float | None
    """Mean prediction of them."""
    true: float | None
    """Mean true score of them."""


class CascadeResult(Body):
    """What was computed, and what was not."""

    rows: int
    """Rows of the pool."""
    computed_rows: int
    """Rows whose gradients were asked for; rows of the same text share theirs."""
    scored_rows: int
    """Rows with a true score: the others are in no selection."""
    saved_rows: int
    """Rows without gradients."""
    saved_tokens: int | None
    """Supervised tokens of these, whose backward passes were saved, summed over checkpoints; null where no forward pass
    has counted them."""
    stages: list[CascadeStage]
    seconds: float


PredictorJob = Job[PredictorRequest, PredictorResult]
CascadeJob = Job[CascadeRequest, CascadeResult]
