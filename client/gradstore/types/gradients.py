"""Gradients: requests, feature sets and what is known of their rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gradstore.types.base import (
    AdamForm,
    Attention,
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
    StoredProjection,
    TemplateName,
    Weights,
)
from gradstore.types.jobs import Job


class FeatureChoice(Body):
    """Whose features are meant: what is left out must be the only one there is."""

    weights: Weights | None = None
    kind: FeatureKind | None = None
    """Of the pool's features."""
    adam: AdamForm | None = None
    logodds_form: LogoddsForm | None = None
    reduction: Reduction | None = None
    dim: int | None = Field(None, ge=1, le=1 << 20)
    dtype: FeatureDtype | None = None
    converted_from: FeatureDtype | Literal["none"] | None = None
    """`none`: features that were computed with this dtype, or made of float32."""
    seed: int | None = Field(None, ge=0, lt=1 << 32)
    """Of the projection."""
    template: TemplateName | None = None
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    precision: Precision | None = None
    quantisation: Quantisation | Literal["none"] | None = None
    """`none`: features of a base model that was not quantised."""


class GradientsRequest(Request):
    """Compute the projected gradient of every example of a dataset or of a task's validation rows.

    At a LoRA checkpoint it is the gradient of the adapter's parameters, at any other that of the `weights` named.

    Every checkpoint, kind (`adam` in each form) and dim is a feature set of its own; all of them come from one pass.
    """

    dataset: Named | None = None
    task: Named | None = None
    run: Named | None = None
    checkpoints: list[Named] | None = None
    weights: Weights | None = None
    """Whose gradient it is, at checkpoints without an adapter; the kinds of a forward pass have none."""
    kinds: list[FeatureKind] | None = Field(None, min_length=1)
    """`adam` for a dataset and `sgd` for a task, unless said otherwise. `output` is the gradient of the output layer as
    the layers before it would see it, projected, from a forward pass alone. `hidden` is the mean of the hidden states
    that the output layer gets, `rds` (RDS+) the one in which the t-th token weighs as much as t: no gradients, and as
    wide as the model. `embedding` is the row that a sentence encoder makes of an example's text, at a checkpoint that
    is the encoder as it is; no other kind goes with it. `logodds` (GradEx) is the gradient of the mean log-odds of the
    supervised tokens, which takes a pass for itself: no other kind of gradient goes with it."""
    adam: AdamForm | Literal["both"] = "less"
    logodds_form: LogoddsForm = "exact"
    """Of kind `logodds`: `exact` is log(p / (1 - p)) of a token, made of logits; in `reference` p is moved away from 0
    and 1 before, as in GradEx's published code for instructions."""
    reduction: Reduction = "mean"
    """Whose gradient it is: of the mean of the supervised tokens' losses, or of their sum."""
    dims: list[Annotated[int, Field(ge=1, le=1 << 20)]] = Field(default=[8192], min_length=1, max_length=8)
    projection: ProjectionName = "blocks"
    seed: int = Field(0, ge=0, lt=1 << 32)
    dtype: FeatureDtype = "int8"
    """How features are stored: int8 selects what float32 does, at a quarter of its bytes."""
    template: TemplateName | None = None
    """Chat format; by default the one the run was trained with, else `tulu`."""
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    """Tokens kept of an example; by default the run's, else 2048."""
    precision: Precision | None = None
    """Precision of the base model; by default the one the run was trained in."""
    quantisation: Quantisation | None = None
    attention: Attention | None = None
    """How the base model computes attention; by default as transformers chooses, `sdpa` where the model has it. With
    `flash_attention_2` rows share a batch without padding."""
    gradient_checkpointing: bool = False
    token_budget: int | None = Field(None, ge=1, le=1 << 30)
    """Tokens per batch, padding included. Left out, the job's first worker finds what its device does best; either way
    it is recorded, since it fixes the batch plan."""
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _one_of_each(self) -> GradientsRequest:
        if (self.dataset is None) == (self.task is None):
            raise ValueError("name either a dataset or a task")
        if (self.run is None) == (not self.checkpoints):
            raise ValueError("name either a run or a list of checkpoints")
        if len(set(self.dims)) != len(self.dims):
            raise ValueError("dims holds a number twice")
        if len(set(self.kinds or [])) != len(self.kinds or []):
            raise ValueError("kinds holds a kind twice")
        if self.kinds and "embedding" in self.kinds and (len(self.kinds) > 1 or self.quantisation):
            raise ValueError("embedding is of an encoder that is not quantised: ask for other kinds in another request")
        if self.kinds and "logodds" in self.kinds:
            if not {"adam", "sgd", "sign", "output"}.isdisjoint(self.kinds):
                raise ValueError(
                    "logodds is the gradient of another number than the loss, in a pass of its own: ask for the other "
                    "kinds of gradients in another request"
                )
            if self.reduction == "sum":
                raise ValueError("log-odds are the mean of a row's tokens: leave reduction out")
        if self.kinds and "output" in self.kinds and self.projection in ("none", "reference"):
            raise ValueError(
                f"projection={self.projection} is of the gradients of trained weights: ask for output with blocks, "
                "sjlt, fft or rademacher"
            )
        if self.weights and self.quantisation:
            raise ValueError("the weights of a quantised model have no gradients: leave quantisation out")
        return self


class ExcludedRow(Body):
    """A row without a feature, kept out of every answer."""

    row: int
    checkpoint: str
    kinds: list[FeatureKind]
    """Which kinds of features it lacks for this reason."""
    reason: str


class FeatureSet(Body):
    """The features of one dataset or task at one checkpoint: rows × dim.

    What hidden states and embeddings do without is null: `weights`, `reduction`, `projection`, `seed` and
    `projection_version`.
    """

    id: str
    dataset: str | None
    task: str | None
    checkpoint: str
    weights: Weights | None
    """The patterns of the weights whose gradient it is; null at a LoRA checkpoint."""
    kind: FeatureKind
    adam: AdamForm | None
    logodds_form: LogoddsForm | None = None
    reduction: Reduction | None
    projection: StoredProjection | None
    projection_id: str | None = None
    """What imported features' projection is called; null for those computed here."""
    seed: int | None
    dim: int
    dtype: FeatureDtype
    converted_from: FeatureDtype | None = None
    """What the features were rounded to before, where they were converted and could differ by a step from those
    computed with this dtype."""
    template: TemplateName | None
    """Null of embeddings, which are of the text itself."""
    max_length: int
    precision: Precision
    """Precision of the base model while it computed."""
    quantisation: Quantisation | None
    projection_version: int | None
    """Version of the projection's random numbers."""
    rows: int
    excluded: int
    """Rows without a feature."""
    bytes: int


class FeatureRow(Body):
    """What is known of one row beside its feature."""

    row: int
    """Position in the dataset, or among the task's validation rows, from 0."""
    norm: float | None
    """Length of what was projected: Adam's step, the gradient, its sign; null for a row without a feature."""
    raw_norm: float | None
    """Length of the gradient itself; of hidden states the same as `norm`."""
    loss: float | None
    """Mean cross-entropy per supervised token."""
    logodds: float | None = None
    """Mean log-odds of the supervised tokens, log(p / (1 - p)), in the form of the feature set; null where its kind is
    another than `logodds`."""
    tokens: int
    """Supervised tokens."""
    reason: str | None
    """Why the row has no feature."""


class FeatureRows(Body):
    """A page of the rows of a feature set, in their order."""

    feature_set: FeatureSet
    data: list[FeatureRow]
    has_more: bool


class GradientsResult(Body):
    """What a gradients job left in the store."""

    feature_sets: list[FeatureSet]
    rows: int
    computed_rows: int
    """Rows that this job went through the model with, summed over checkpoints; of the others all existed."""
    excluded: list[ExcludedRow]
    """The first rows without a feature, with reasons; before all others those that took their workers down."""
    total_excluded: int
    tokens: int
    token_budget: int | None
    """Tokens per batch, padding included, asked for or found; null where nothing had to be computed."""
    seconds: float


GradientsJob = Job[GradientsRequest, GradientsResult]
