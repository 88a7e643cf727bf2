"""Comparisons: several ways to select from one pool, for the same tasks and with the same budget, in one table."""

from __future__ import annotations

from pydantic import Field, model_validator

from gradstore.types.base import (
    Aggregate,
    Body,
    Fraction,
    JobKind,
    ModelName,
    Name,
    Named,
    Request,
    RowCount,
    Split,
    StoredProjection,
)
from gradstore.types.evaluations import Interval
from gradstore.types.finetunes import TrainingSettings
from gradstore.types.gradients import FeatureChoice
from gradstore.types.jobs import Job, TrainingsEstimate
from gradstore.types.selection import (
    CapabilityName,
    DedupeBy,
    OwnId,
    SelectionMethod,
    SelectionRecipe,
    Share,
    ShotNearness,
    Strategy,
)

MAX_CONTESTANTS = 100
MAX_COMPARED_TASKS = 100


class Contestant(FeatureChoice, Request):
    """A way to select, in the parameters of /select; what is left out must be the only one there is."""

    label: str | None = Field(None, min_length=1, max_length=200)
    """What to call it in the result; by default the parameters that were named."""
    run: Named | None = None
    checkpoints: list[Named] = Field([], max_length=1000)
    projection: StoredProjection | None = None
    projection_id: str | None = Field(None, min_length=1, max_length=200)
    method: SelectionMethod | None = None
    """What a row's score is; by default its influence."""
    by: Named | None = None
    """Whose scores are meant, of a method that has them from something that was learned."""
    budget: Fraction | None = None
    """Of a cascade: the part of the pool that has gradients."""
    neighbours: int | None = Field(None, ge=1, le=1000)
    beta: float | None = Field(None, ge=0, le=100)
    capabilities: list[CapabilityName] = Field([], max_length=1000)
    aggregate: Aggregate | None = None
    selection_seed: int | None = Field(None, ge=0, lt=1 << 32)
    """Seed of what is drawn; with `train`, of the first draw, and of the others the next ones."""
    exclude: list[Named] = Field([], max_length=100)
    exclude_ids: list[OwnId] = Field([], max_length=100_000)
    strategy: Strategy | None = None
    among: RowCount | None = None
    clusters: int | None = Field(None, ge=1, le=100_000)
    nearness: ShotNearness | None = None
    bandwidth: float | None = Field(None, ge=0.01, le=1000)
    tau: float | None = Field(None, gt=0, le=1)
    quota: list[Share] = Field([], max_length=1000)
    dedupe: float | None = Field(None, gt=0, le=1)
    dedupe_by: DedupeBy | None = None
    ngram: int | None = Field(None, ge=5, le=100)
    decontaminate: list[Named] = Field([], max_length=100)
    exclude_contaminated: bool | None = None

    @model_validator(mode="after")
    def _one_training(self) -> Contestant:
        if self.run is not None and self.checkpoints:
            raise ValueError("name either a run or checkpoints")
        return self


class ComparisonRequest(TrainingSettings, Request):
    """Select from the same pool, for the same tasks and with the same budget, in several ways, and compare them."""

    dataset: Named
    """The pool."""
    tasks: list[Named] = Field(min_length=1, max_length=MAX_COMPARED_TASKS)
    """Each is selected for by itself."""
    pct: Fraction | None = None
    """Part of the pool that each contestant selects."""
    k: RowCount | None = None
    """Rows that each contestant selects, instead of a part."""
    contestants: list[Contestant] | None = Field(None, min_length=1, max_length=MAX_CONTESTANTS)
    """What is compared; by default every method for which all that it needs is in the store, influence with every
    aggregate. Differences of losses are from the first whose method is `random`."""
    train: bool = False
    """Also train a model on every selection and measure the task's loss; the other parameters of a training go with
    it."""
    model: ModelName | None = None
    """`train`: hub id, or a folder of the server inside an allowed root."""
    split: Split = "validation"
    """`train`: the rows whose losses are measured."""
    repeats: int = Field(5, ge=2, le=100)
    """`train`: trainings on each selection, which differ in their seed (`seed` and the following ones); what is drawn
    is drawn anew for each."""
    bootstrap_samples: int = Field(1000, ge=1, le=100_000)
    """`train`: of the intervals."""
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _one_amount(self) -> ComparisonRequest:
        if (self.pct is None) == (self.k is None):
            raise ValueError("say how much to select: either pct, a fraction (0.05 is 5 %), or k, a number of rows")
        return self

    @model_validator(mode="after")
    def _training_is_asked_for(self) -> ComparisonRequest:
        if self.train and self.model is None:
            raise ValueError("train=true trains a model: name it (model)")
        if not self.train:
            fields = ("model", "split", "repeats", "bootstrap_samples", *TrainingSettings.model_fields)
            idle = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
            if idle:
                raise ValueError(f"{' and '.join(idle)} belong to a training: send train=true, or leave them out")
        return self


class CostSource(Body):
    """A job that a selection's scores rest on."""

    job: str
    kind: JobKind
    seconds: float | None
    """As its result tells; null where it does not, or where the job was deleted."""


class ComparedCost(Body):
    """What a selection took."""

    scoring_seconds: float | None
    """Work of the scoring job, summed over the workers that shared it; 0 where numbers are drawn, null where the scores
    were kept and their job's record is gone."""
    choosing_seconds: float | None
    """From scores to rows; null where the selection existed before."""
    rests_on: list[CostSource]
    """Jobs that made the features and the checkpoints behind the scores; each may have made more than that."""
    rests_on_seconds: float | None
    """The sum; null where one of them is not known."""


class ComparedLoss(Body):
    """The task's loss after training on a selection."""

    value: float
    """Mean over the trainings and the task's rows that have a loss; a row's is that per supervised token."""
    interval: Interval
    """Of the mean, for other seeds (and draws) and other rows of the task: both are drawn anew in each bootstrap
    sample."""
    by_seed: list[float]
    """The mean over rows of each training."""
    difference: float | None
    """How much higher the loss is than that of the random selection, in pairs of the same seed: below 0 is better.
    Null for that one itself, and where there is none."""
    difference_interval: Interval | None
    """Of the difference, from the same bootstrap samples."""


class ComparedRow(Body):
    """One contestant's selection for one task."""

    contestant: str
    task: str
    task_name: str
    """What the task was called when the comparison began."""
    method: SelectionMethod
    selection: str
    draws: list[str]
    """Selections of the following seeds, where rows are drawn and there are trainings."""
    recipe: SelectionRecipe
    rows: int
    origins: dict[str, int]
    """Chosen rows per origin."""
    cost: ComparedCost
    loss: ComparedLoss | None
    """Null without `train`."""


class ComparedPair(Body):
    """What two contestants' selections for one task have in common."""

    task: str
    contestants: tuple[str, str]
    shared: int
    """Rows that both hold."""
    jaccard: float
    """`shared` over the rows that one of them holds, or both."""
    share: float
    """`shared` over the rows of the smaller one: 1 where one holds the other."""


class ComparedTask(Body):
    """What is measured of a task."""

    task: str
    task_name: str
    base_loss: float | None
    """Of the model before any training, over the same rows; null without `train`."""
    base_interval: Interval | None
    """For other rows of the task."""
    measured_rows: int
    """Rows of the task that have a loss in every training."""
    left_out_rows: int
    """Rows without one: truncation leaves nothing of their answers."""


class LeftOut(Body):
    """A method that is not compared, because something that it needs is not in the store."""

    method: SelectionMethod
    task: str | None
    """The task that it cannot select for; null where it can for none."""
    detail: str
    """Why, and the request that makes it possible."""


class ComparisonResult(Body):
    """Several selections side by side."""

    pool: int
    """Rows of the pool."""
    pool_origins: dict[str, int]
    tasks: list[ComparedTask]
    rows: list[ComparedRow]
    """Of each task the contestants, in the order of the request."""
    pairs: list[ComparedPair]
    """Of each task all pairs of contestants; of what is drawn the first draw."""
    left_out: list[LeftOut]
    """Where no contestants were named."""
    against: str | None
    """The contestant that differences of losses are from."""
    trainings: int
    """Different trainings, those that existed before included."""
    tokens: int
    """Tokens that they were trained on, all epochs."""
    seconds: float
    """Seconds that these trainings took, one after the other, whenever they were done."""


class ComparisonEstimate(TrainingsEstimate):
    """What a comparison would cost (`dry_run=true`), scoring apart; the base model's losses count as a training."""

    contestants: list[str]
    left_out: list[LeftOut]


ComparisonJob = Job[ComparisonRequest, ComparisonResult]
