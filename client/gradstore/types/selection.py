"""Selections, scores and the recipe that gives them."""

from __future__ import annotations

from datetime import datetime
from math import isclose
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from gradstore.types.base import (
    AdamForm,
    Aggregate,
    Body,
    FeatureDtype,
    FeatureKind,
    Fraction,
    LogoddsForm,
    Named,
    Precision,
    Quantisation,
    Reduction,
    Request,
    RowCount,
    Split,
    StoredProjection,
    TemplateName,
    Weights,
)
from gradstore.types.jobs import Job

SelectionMethod = Literal["influence", "rds", "bm25", "embedding", "random", "predicted", "cascade", "gradex", "cods"]
"""What a row's score is: its influence on a task; how like the task's rows it is to a model's hidden states, in its
words, or to a sentence encoder; a number drawn; its influence as a predictor predicts it, or as a cascade has computed
it for the rows predicted best; what its group is estimated to give; or its place in an ability space."""
Combine = Literal["max", "mean", "round-robin", "balanced"]
"""How several tasks choose: by the largest or the mean of a row's scores, each in turn, or the least served first."""


AbilityStrategy = Literal["nearest", "prototype", "capability"]
"""How rows of an ability space are scored (`method=cods`): by their nearest references, by the mean of these, or by
capabilities that are named."""
Strategy = Literal["top", "k-center", "clusters", "shots", AbilityStrategy]
"""How rows are chosen by their scores: the best, those farthest from each other, the best of each cluster, or those
like a task's shots and unlike each other."""
ShotNearness = Literal["max_cosine", "centroid", "kde", "hull"]
"""How near a row is to a task's shots: its largest cosine with one, that with their mean, their density around it, or
its distance to their convex hull."""
DedupeBy = Literal["features", "text"]
OwnId = Annotated[str, Field(max_length=1 << 20)]
"""An example's id, as it was uploaded."""
CapabilityName = Annotated[str, Field(max_length=4096)]
Share = Annotated[str, Field(max_length=1 << 20)]
"""A quota as it is asked for: `equal`, `proportional`, or `origin:fraction`."""
Quota = Literal["equal", "proportional"] | dict[str, float]
"""Shares of the chosen rows by origin: as many of each, as in the pool, or fractions."""


class SelectionRecipe(Body):
    """Everything an answer depends on, resolved to ids: the same recipe gives the same selection.

    What the method does without is null: the features' parameters where it reads none.
    """

    method: SelectionMethod = "influence"
    datasets: list[str]
    tasks: list[str]
    checkpoints: list[str]
    checkpoint_weights: list[float]
    """Weight of each checkpoint: its mean learning rate over the sum."""
    run: str | None
    weights: Weights | None
    """The patterns of the weights whose gradients are compared; null for those of an adapter."""
    kind: FeatureKind | None
    task_kind: FeatureKind | None
    adam: AdamForm | None
    task_adam: AdamForm | None = None
    logodds_form: LogoddsForm | None = None
    reduction: Reduction | None
    projection: StoredProjection | None
    projection_id: str | None = None
    """What imported features' projection is called."""
    seed: int | None
    dim: int | None
    dtype: FeatureDtype | None
    converted_from: FeatureDtype | None = None
    template: TemplateName | None
    max_length: int | None
    precision: Precision | None
    quantisation: Quantisation | None
    projection_version: int | None
    aggregate: Aggregate | None
    combine: Combine | None
    """How several tasks choose."""
    by: str | None = None
    """Whose scores they are, where a method has them from something that was learned."""
    neighbours: int | None = None
    """`cods`: how many of the nearest references give a row's score."""
    beta: float | None = None
    """`cods`: weight of the likeness of capabilities beside that of places."""
    capabilities: list[str] = Field([])
    """`cods`: those that `strategy=capability` asks for."""
    selection_seed: int | None = None
    """Seed of what is drawn."""
    bm25_version: int | None = None
    """Version of BM25's words and weights."""
    pct: float | None
    k: int | None
    exclude: list[str]
    """Datasets and selections whose examples are left out."""
    exclude_ids: list[str] = Field([])
    """Examples that are left out, by their own ids."""
    strategy: Strategy = "top"
    among: int | None = None
    """Of how many of the best rows `k-center` and `clusters` choose; null: four times as many as are chosen."""
    clusters: int | None = None
    """Into how many clusters these are parted; null: the square root of the number of rows that are chosen."""
    nearness: ShotNearness | None = None
    """`shots`: how near a row is to the task's."""
    bandwidth: float | None = None
    """`nearness=kde`: γ of the Gaussians around the shots."""
    tau: float | None = None
    """`shots`: rows whose cosine with one taken before exceeds it are passed over."""
    quota: Quota | None = None
    dedupe: float | None = None
    """Rows that are more alike than this to one chosen before are passed over."""
    dedupe_by: DedupeBy | None = None
    match: str | None = None
    """The selection whose lengths the rows drawn have."""
    ngram: int | None = None
    """Words of a run that a row and a task's row must share to overlap; null where no task is named."""
    decontaminate: list[str] = Field([])
    """Tasks beside `tasks` that the rows are compared with."""
    exclude_contaminated: bool = False
    """Whether rows that overlap with a task's are left out."""


class SentRecipe(SelectionRecipe):
    """A recipe that is sent: held to the bounds of the parameters of /select."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    datasets: list[Named] = Field(min_length=1, max_length=100)
    tasks: list[Named] = Field(max_length=100)
    checkpoints: list[Named] = Field(max_length=1000)
    checkpoint_weights: list[Annotated[float, Field(ge=0, le=1)]] = Field(max_length=1000)
    run: Named | None
    by: Named | None = None
    pct: Fraction | None
    k: RowCount | None
    exclude: list[Named] = Field(max_length=100)
    exclude_ids: list[OwnId] = Field([], max_length=100_000)
    match: Named | None = None
    decontaminate: list[Named] = Field([], max_length=100)
    among: RowCount | None = None
    clusters: int | None = Field(None, ge=1, le=100_000)
    bandwidth: float | None = Field(None, ge=0.01, le=1000)
    tau: float | None = Field(None, gt=0, le=1)
    dedupe: float | None = Field(None, gt=0, le=1)
    neighbours: int | None = Field(None, ge=1, le=1000)
    beta: float | None = Field(None, ge=0, le=100)
    capabilities: list[Annotated[str, Field(max_length=4096)]] = Field([], max_length=1000)
    ngram: int | None = Field(None, ge=5, le=100)
    selection_seed: int | None = Field(None, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _one_amount(self) -> SentRecipe:
        if self.match is None and (self.pct is None) == (self.k is None):
            raise ValueError("a recipe has either a pct or a k")
        return self

    @model_validator(mode="after")
    def _compared_in_one_way(self) -> SentRecipe:
        if (self.dedupe is None) != (self.dedupe_by is None):
            raise ValueError("a recipe with a dedupe says how rows are compared: dedupe_by is features or text")
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> SentRecipe:
        weights = self.checkpoint_weights
        if len(weights) != len(self.checkpoints) or (weights and not isclose(sum(weights), 1, rel_tol=1e-6)):
            raise ValueError(
                "a recipe has a weight for each of its checkpoints (checkpoint_weights), which add up to 1"
            )
        return self

    @model_validator(mode="after")
    def _named_once(self) -> SentRecipe:
        for name in ("datasets", "tasks", "checkpoints", "exclude", "decontaminate"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names something twice")
        return self


class SelectionCreate(Request):
    """Choose by a whole recipe, as an answer carries it: what it named must be there, and the same rows are chosen."""

    recipe: SentRecipe


class SelectedRow(Body):
    """A chosen example."""

    rank: int
    dataset: str
    row: int
    """Position in the dataset, from 0."""
    id: str | None
    """The example's own id, as uploaded."""
    origin: str
    score: float
    task: str | None
    """The task that gave the score, or that took the row; null for a row that was drawn."""
    subtask: str | None
    """The subtask that gave the score; null where all rows gave it together (`aggregate=avg`)."""
    shot: int | None = None
    """`strategy=shots`: the nearest of the task's validation rows, by its position among these, from 0."""


class PassedOver(Body):
    """A row near the shots that was passed over, since it is too much like one that was chosen."""

    dataset: str
    row: int
    """Position in the dataset, from 0."""
    id: str | None
    score: float
    task: str
    shot: int
    """The nearest of the task's validation rows, by its position among these, from 0."""
    like: int
    """Rank of the chosen row with which it has the largest cosine."""


class ShotsReport(Body):
    """What `strategy=shots` looked at."""

    shots: int
    """Validation rows of the tasks that have a feature."""
    budget: int
    """Rows that were asked for."""
    near: int
    """The nearest rows, which were met best first."""
    passed_over: int
    """Those of them that were too much like one taken before: nothing is put in their place."""
    rows: list[PassedOver]
    """The first of these, best first."""


class Overlap(Body):
    """A chosen example, or one that was left out, which shares a run of words with a task's row."""

    dataset: str
    row: int
    """Position in the dataset, from 0."""
    id: str | None
    task: str
    split: Split
    task_row: int
    """Position among the rows of the task's split, from 0."""
    text: str
    """The words that both have."""


class Contamination(Body):
    """What the chosen examples share with the validation and test rows of tasks."""

    tasks: list[str]
    ngram: int
    """Words of a run."""
    chosen: int
    """Chosen rows that overlap."""
    dropped: int
    """Rows that were met and left out for it: they would have been chosen, or been among the candidates of `k-center`
    and `clusters`."""
    unchecked: int
    """Rows of the tasks with too few words to be found."""
    overlaps: list[Overlap]
    """The first of them, best row first."""


class Selection(Body):
    """The answer of /select: the examples that help the task most, best first."""

    id: str
    name: str | None
    recipe: SelectionRecipe
    count: int
    pool: int
    """Rows of the pool, less those that are excluded: `pct` is a fraction of these."""
    left_out: dict[str, int]
    """Rows that could not: by reason."""
    origins: dict[str, int]
    """Chosen rows per origin."""
    pool_origins: dict[str, int]
    contamination: Contamination | None = None
    """Null where no task was named."""
    shots: ShotsReport | None = None
    """Of `strategy=shots`."""
    notes: list[str] = Field([])
    """What did not go as asked: quotas that could not be filled, fewer rows than wanted, rows of tasks left out."""
    data: list[SelectedRow]
    """The first rows (`limit`, `after`)."""
    has_more: bool
    created_at: datetime


class ScoredRow(Body):
    """The score of one example of the pool."""

    dataset: str
    row: int
    id: str | None
    origin: str
    score: float | None
    """Null for a row without a feature."""
    task: str | None
    subtask: str | None


class Scores(Body):
    """A page of the score vector, in the order of the pool."""

    recipe: SelectionRecipe
    rows: int
    data: list[ScoredRow]
    has_more: bool


class ScoringRequest(Request):
    """The scores a /select or /scores is waiting for."""

    recipe: dict[str, Any]


class ScoringResult(Body):
    """Where the scores are: ask again for what was asked."""

    scores: str
    rows: int
    seconds: float


ScoringJob = Job[ScoringRequest, ScoringResult]
