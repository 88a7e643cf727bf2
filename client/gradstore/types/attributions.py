"""Attributions: the training examples that an answer comes from, and those that speak against it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gradstore.types.base import (
    AdamForm,
    Body,
    FeatureDtype,
    FeatureKind,
    LogoddsForm,
    Name,
    Named,
    Precision,
    ProjectionName,
    Quantisation,
    Reduction,
    Request,
    TemplateName,
    Weights,
)
from gradstore.types.gradients import FeatureChoice
from gradstore.types.jobs import Job

Search = Literal["auto", "exact"]
MAX_LISTED = 5000
"""Rows of an attribution times its k, at most."""


class AttributionRequest(FeatureChoice, Request):
    """Find the training examples that help a model most to say this, and those that oppose it most.

    Which features are searched is resolved as /select does: what is left out must be the only one there is.
    """

    rows: list[dict[str, Any]] = Field(min_length=1, max_length=100)
    """What the model said: rows in any shape that a dataset takes, `{"prompt", "completion"}` or `{"messages"}`."""
    datasets: list[Named] = Field(default=[], max_length=100)
    """Pools to search; by default the only one with features."""
    origins: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default=[], max_length=1000)
    """Only examples of these origins."""
    k: int = Field(10, ge=1, le=1000)
    """How many examples to find at either end."""
    search: Search = "auto"
    """`exact` reads every feature; `auto` asks an index where the pool is large enough for one."""
    text: bool = True
    """Whether the answer holds the beginning of each example's text."""
    run: Named | None = None
    checkpoints: list[Named] | None = Field(None, min_length=1)
    query_kind: Literal["sgd", "adam", "sign"] = "sgd"
    """Of the question's feature, where the pool's are gradients of losses; beside others it is of the pool's kind."""
    projection: ProjectionName | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _bounded(self) -> AttributionRequest:
        if self.run is not None and self.checkpoints:
            raise ValueError("name either a run or checkpoints")
        if len(self.rows) * self.k > MAX_LISTED:
            raise ValueError(f"rows × k is at most {MAX_LISTED:,}: ask for a smaller k, or for fewer rows at a time")
        return self


class AttributionRecipe(Body):
    """Everything an attribution depends on, resolved to ids."""

    datasets: list[str]
    checkpoints: list[str]
    checkpoint_weights: list[float]
    """Weight of each checkpoint: its mean learning rate over the sum."""
    run: str | None
    weights: Weights | None
    kind: FeatureKind
    query_kind: FeatureKind
    adam: AdamForm | None
    logodds_form: LogoddsForm | None = None
    reduction: Reduction | None
    projection: ProjectionName | None
    seed: int | None
    dim: int
    dtype: FeatureDtype
    converted_from: FeatureDtype | None = None
    template: TemplateName
    max_length: int
    precision: Precision
    quantisation: Quantisation | None
    projection_version: int | None
    origins: list[str]
    k: int


class InfluentialRow(Body):
    """A training example, and its influence on what was said."""

    rank: int
    dataset: str
    row: int
    """Position in the dataset, from 0."""
    id: str | None
    """The example's own id, as uploaded."""
    origin: str
    score: float
    """Σ w·cosine over the checkpoints: training on the example makes the answer likelier where it is positive."""
    per_checkpoint: list[float]
    """The parts of the score, w·cosine of each checkpoint in the recipe's order."""
    text: str | None
    """The beginning of the example's text, its turns one after the other; null where it was not asked for."""


class Attribution(Body):
    """What was found for one row of the request."""

    reason: str | None
    """Why the row has no feature and nothing was found."""
    loss: float | None
    """Mean cross-entropy per supervised token at the last checkpoint: how surprising the answer is to the model."""
    tokens: int
    """Supervised tokens."""
    most: list[InfluentialRow]
    """The examples with the highest scores, best first."""
    least: list[InfluentialRow]
    """The examples with the lowest scores, lowest first: negative ones make the answer less likely."""


class SearchReport(Body):
    """How the examples of one dataset were found. Scores are exact either way; an index may miss a row."""

    dataset: str
    method: Literal["exact", "index"]
    rows: int
    """Rows that could be found: those with a feature at every checkpoint that the filters let through."""
    index: str | None
    recall: float | None
    """Share of the true first 100 (both ends) that the index found, of vectors that are not in it."""
    candidates: int | None
    """Rows per end that the index proposes and that are scored exactly."""
    seconds: float


class AttributionResult(Body):
    """What speaks for and against each row of the request."""

    recipe: AttributionRecipe
    data: list[Attribution]
    """One for each row, in their order."""
    searches: list[SearchReport]
    computed_rows: int
    """Gradients computed for this, summed over checkpoints; the others were there."""
    gradient_seconds: float
    seconds: float


AttributionJob = Job[AttributionRequest, AttributionResult]
