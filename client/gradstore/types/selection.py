"""Selections, scores and the recipe that gives them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from gradstore.types.base import (
    AdamForm,
    Aggregate,
    Body,
    FeatureDtype,
    FeatureKind,
    Precision,
    Quantisation,
    Reduction,
    Request,
    StoredProjection,
    TemplateName,
    Weights,
)
from gradstore.types.jobs import Job


class SelectionRecipe(Body):
    """Everything an answer depends on, resolved to ids: the same recipe gives the same selection."""

    datasets: list[str]
    tasks: list[str]
    checkpoints: list[str]
    checkpoint_weights: list[float]
    """Weight of each checkpoint: its mean learning rate over the sum."""
    run: str | None
    weights: Weights | None
    """The patterns of the weights whose gradients are compared; null for those of an adapter."""
    kind: FeatureKind
    task_kind: FeatureKind
    adam: AdamForm | None
    reduction: Reduction | None
    projection: StoredProjection | None
    projection_id: str | None = None
    """What imported features' projection is called."""
    seed: int | None
    dim: int
    dtype: FeatureDtype
    converted_from: FeatureDtype | None = None
    template: TemplateName
    max_length: int
    precision: Precision
    quantisation: Quantisation | None
    projection_version: int | None
    aggregate: Aggregate
    combine: Literal["max", "mean"]
    """How the scores of several tasks become one."""
    pct: float | None
    k: int | None
    exclude: list[str]
    """Datasets and selections whose examples are left out."""


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
    task: str
    """The task that gave the score."""
    subtask: str | None
    """The subtask that gave the score (`aggregate=less`)."""


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
