"""Estimates: what training on subsets of a pool would give, from its log-odds features and without training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gradstore.types.base import (
    Basis,
    Body,
    FeatureDtype,
    Fraction,
    LogoddsForm,
    Metric,
    Name,
    Named,
    Precision,
    ProjectionName,
    Quantisation,
    Request,
    Split,
    TemplateName,
)
from gradstore.types.finetunes import TrainingRecipe
from gradstore.types.jobs import Job
from gradstore.types.selection import OwnId

GroupBy = Literal["origin", "label", "annotation", "cluster"]
"""What rows of the pool are taken or left together: those of an origin, of a label, of the same labels of an
annotation, or of a cluster of the features."""
SubsetSearch = Literal["ensemble", "surrogate", "forward-scan", "stepwise", "backward"]
"""How groups are compared: by the subsets that have them, or by a search for the best subset."""
EstimateMetric = Literal["loss", "accuracy"]
EstimateMode = Literal["first-order", "exact"]
"""What tells how a step changes a target's answers: their gradients at θ*, or a pass of the model at θ* + Δ."""
GroupLabel = Annotated[str, Field(min_length=1, max_length=1000)]

COUNT, EXACT_COUNT = 1000, 20
"""Subsets that are drawn where nothing else is asked for."""
MAX_SUBSETS = 100_000
MAX_GROUPS = 10_000
MAX_SCALE = 1e6
"""Of a step: the longest, in adapters or by itself."""
MAX_EXACT = 200
"""Subsets of a request with `mode=exact`, each of which costs passes of the model over all targets."""


class EstimatesRequest(Request):
    """Estimate what training on each of many subsets of a pool would do for tasks (GradEx, arXiv 2409.19458).

    The features are those of kind `logodds` at one checkpoint; what is left out of their names must be the only one
    there is.
    """

    dataset: Named
    """The pool."""
    tasks: list[Named] = Field(min_length=1, max_length=100)
    """What the estimates are for: the validation rows of these tasks."""
    checkpoint: Named | None = None
    """The checkpoint θ* that training would begin with."""
    logodds_form: LogoddsForm | None = None
    dim: int | None = Field(None, ge=1, le=1 << 20)
    dtype: FeatureDtype | None = None
    projection: ProjectionName | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 32)
    """Of the projection."""
    template: TemplateName | None = None
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    precision: Precision | None = None
    quantisation: Quantisation | Literal["none"] | None = None
    group_by: GroupBy = "origin"
    labels: dict[OwnId, GroupLabel] | None = Field(None, min_length=1, max_length=1_000_000)
    """`group_by=label`: the label of each example, by its own id. Examples without one are in no group."""
    annotations: Named | None = None
    """`group_by=annotation`: the annotation of the pool whose labels make the groups, which must cover all rows. Rows
    with the same labels are one group, called by these, joined by ` + `."""
    clusters: int | None = Field(None, ge=2, le=MAX_GROUPS)
    """`group_by=cluster`: how many; agglomerative, by cosine and average linkage."""
    search: SubsetSearch = "ensemble"
    """How groups are compared. `ensemble` and `surrogate` look at given or drawn subsets: the mean of those that have a
    group, or a ridge regression on which groups they have. `forward-scan` takes each group once, in order, and keeps
    it where the estimate is no worse; `stepwise` adds the best one in each round, `backward` removes the one that is
    missed least."""
    subsets: list[Annotated[list[GroupLabel], Field(max_length=MAX_GROUPS)]] | None = Field(
        None, min_length=1, max_length=MAX_SUBSETS
    )
    """The subsets, each by the labels of its groups (of clusters their numbers); by default they are drawn."""
    count: int | None = Field(None, ge=1, le=MAX_SUBSETS)
    """How many subsets to draw; by default 1,000, with `mode=exact` 20."""
    fraction: Fraction = 0.5
    """Part of the groups in a subset that is drawn."""
    draw_seed: int = Field(0, ge=0, lt=1 << 32)
    metric: EstimateMetric = "loss"
    """What groups are compared by, as the mean over the tasks: losses are to fall, accuracies to rise."""
    c: float = Field(1e-4, ge=1e-12, le=1e6)
    """C of the logistic regression: how much the rows weigh beside a small step."""
    scale: float = Field(0.02, gt=0, le=MAX_SCALE)
    """Length of the step as a part of that of the checkpoint's adapter: ‖Δ‖ = scale·‖θ*‖."""
    abs_scale: float | None = Field(None, gt=0, le=MAX_SCALE)
    """Length of the step itself, in place of `scale`."""
    rescale: bool = True
    """Whether the step is given a length; else it is as long as the regression makes it, and `c` decides."""
    mode: EstimateMode = "first-order"
    """`exact` takes each step Δ = Pŵ itself, on a worker: θ* + Δ is written as an adapter and measured by passes of the
    model over the targets' rows, and groups are compared by what these give (token losses; or the tasks' own metrics
    with `metric=accuracy`). The answer has the first-order estimates beside it. At most 200 subsets."""
    keep_adapters: bool = False
    """`mode=exact`: whether each θ* + Δ becomes a checkpoint, to be downloaded, evaluated or gone on from."""
    max_new_tokens: int = Field(256, ge=1, le=8192)
    """`mode=exact`: tokens of an answer that a task's metric has the model write."""
    name: Name | None = None
    dry_run: bool = False

    @property
    def drawn(self) -> int:
        """How many subsets are drawn where none are given."""
        return self.count or (EXACT_COUNT if self.mode == "exact" else COUNT)

    @model_validator(mode="after")
    def _measurable(self) -> EstimatesRequest:
        if self.mode != "exact":
            if self.keep_adapters:
                raise ValueError("keep_adapters goes with mode=exact: estimates of the first order make no adapter")
            return self
        if self.search not in ("ensemble", "surrogate"):
            raise ValueError(f"search={self.search} tries too many subsets to measure each: leave mode=exact out")
        if (len(self.subsets) if self.subsets is not None else self.drawn) > MAX_EXACT:
            raise ValueError(f"mode=exact measures each subset with the model: at most {MAX_EXACT} of them")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> EstimatesRequest:
        if (self.group_by == "label") != (self.labels is not None):
            raise ValueError("labels, and nothing else, go with group_by=label: an example's own id and its label")
        if (self.group_by == "annotation") != (self.annotations is not None):
            raise ValueError("annotations, an id or name of POST /annotations, goes with group_by=annotation alone")
        if (self.group_by == "cluster") != (self.clusters is not None):
            raise ValueError("clusters, how many, goes with group_by=cluster and nothing else")
        searches = self.search not in ("ensemble", "surrogate")
        if searches and (self.subsets is not None or self.count is not None):
            raise ValueError(f"search={self.search} tries subsets of its own: leave subsets and count out")
        if self.fraction >= 1:
            raise ValueError("fraction=1 draws all groups every time: subsets must differ")
        if self.subsets is not None and self.count is not None:
            raise ValueError("name either the subsets or how many to draw (count)")
        if self.abs_scale is not None and self.scale != type(self).model_fields["scale"].default:
            raise ValueError("name either scale, a part of the adapter's length, or abs_scale, the length itself")
        if self.abs_scale is not None and not self.rescale:
            raise ValueError("rescale=false leaves the step as long as it is: leave abs_scale out")
        return self


class MeasuredEstimate(Body):
    """What the model itself does on the rows of a target that have a feature."""

    loss: float | None
    """Mean log(1 + exp(−z)), z the log-odds that the model has: what an estimate of the first order is an estimate of.
    """
    accuracy: float | None
    """Share of the rows with z > 0."""
    token_loss: float | None
    """Mean over the rows of their tokens' mean cross-entropy, which trainings and evaluations report."""
    value: float | None
    """Mean of the task's own metric; null where it has none, or several."""


class EstimateTarget(Body):
    """What an estimate is for: a subtask's validation rows, or all of a task's."""

    task: str
    subtask: str | None
    """Null: all rows of the task."""
    rows: int
    """Rows with a feature."""
    loss: float | None
    """Mean log(1 + exp(−z)) at the checkpoint, z the mean log-odds of a row's answer; null where no row has a feature.
    """
    accuracy: float | None
    """Share of the rows with z > 0, which stands for accuracy."""
    metric: Metric
    """How the task judges an answer: what `value` of a measurement is."""
    measured: MeasuredEstimate | None = None
    """What the model does at the checkpoint itself; null unless `mode=exact`."""


class EstimatedGroup(Body):
    """Rows of the pool that are taken or left together."""

    group: int
    label: str
    rows: int
    """Rows with a feature."""
    subsets: int
    """Subsets that have it; of a search those that were tried."""
    mean: float | None
    """Mean estimate of these subsets (T_i); null where there are none."""
    standard_error: float | None
    coefficient: float | None
    """Of the ridge regression on 0/1 membership; null of a search."""
    score: float | None
    """What method=gradex of /select goes by: more is better whatever the metric; null for a group without a score."""


class Surrogate(Body):
    """How well a ridge regression on membership (alpha 1, no intercept) tells the estimates of subsets new to it."""

    held_out: int
    """The last subsets, which it was not fitted on."""
    relative_rss: float
    """Σ(f̂ − f)² / Σf² over these."""
    spearman: float


class SearchStep(Body):
    """A step of a search: a group that was added to the subset (`backward`: removed), and what the estimate then is."""

    group: int
    value: float
    kept: bool
    """Whether the subset that was chosen has this change."""


class EstimatesResult(Body):
    """What training on the subsets is estimated to give. The subsets themselves: GET /estimates/{id}/subsets."""

    checkpoint: str
    targets: list[EstimateTarget]
    """In the order of the estimates of a subset."""
    groups: list[EstimatedGroup]
    subsets: int
    """Subsets that were estimated."""
    surrogate: Surrogate | None
    """Null of a search, and of fewer than ten subsets."""
    chosen: list[int] | None
    """The groups of the best subset that a search has found."""
    chosen_value: float | None
    """Its estimate, in the units of the metric."""
    trace: list[SearchStep]
    rows: int
    """Rows of the pool that are in a group and have a feature."""
    missing_rows: int
    """Rows of the pool that are in a group and have none."""
    ungrouped_rows: int
    adapter_length: float | None
    """‖θ*‖; null where the step is not measured by it."""
    seconds: float
    """Seconds of work, whenever and by however many workers it was done."""


class EstimatesCost(Body):
    """What estimates would cost (`dry_run=true`): features are read, and with `mode=exact` the model is asked."""

    rows: int
    """Rows of the pool."""
    groups: int
    subsets: int
    """Subsets to estimate; of a search at most."""
    reused_subsets: int
    """Those that are estimated already."""
    targets: int
    """Tasks that each is estimated for."""
    feature_sets: list[str]
    """Those that are read: the pool's, and the tasks'."""
    read_bytes: int
    """Bytes of these, read for every 250 subsets, or once for a search."""
    seconds: float | None
    """Seconds of work for the others; null while none from the same features, and in the same mode, have finished."""
    basis: Basis | None


class SubsetEstimate(Body):
    """An estimate for one target."""

    loss: float | None
    accuracy: float | None
    measured: MeasuredEstimate | None = None
    """What the model does at θ* + Δ; null unless `mode=exact`."""


class EstimatedSubset(Body):
    """A subset, and what training on it is estimated to give."""

    subset: int
    """Its number, from 0."""
    groups: list[int]
    rows: int
    """Rows with a feature."""
    missing_rows: int
    fit_loss: float
    """Mean log(1 + exp(−wᵀg̃)) over its rows after the regression; log 2 before."""
    length: float
    """‖Δ‖, the length of the step."""
    checkpoint: str | None = None
    """The checkpoint that θ* + Δ was kept as; null unless `keep_adapters`."""
    estimates: list[SubsetEstimate]
    """One for each of the targets, in their order."""


class EstimatedSubsets(Body):
    """A page of the subsets of estimates, in their order."""

    targets: list[EstimateTarget]
    data: list[EstimatedSubset]
    has_more: bool


EstimatesJob = Job[EstimatesRequest, EstimatesResult]


class EstimateValidationRequest(TrainingRecipe, Request):
    """Train on some of the subsets of estimates, and compare the losses that come of it with those estimated."""

    estimates: Named
    task: Named | None = None
    """Whose losses are measured; by default the only task of the estimates."""
    split: Split = "validation"
    subsets: int = Field(20, ge=3, le=1000)
    """How many of the estimates' subsets to train on: the first."""
    scales: list[Annotated[float, Field(gt=0, le=MAX_SCALE)]] = Field(default=[], max_length=100)
    """Lengths of the step to try, as the estimates' own is given: the best is the one with the least relative
    residual sum of squares. By default the estimates' own times 1/8, 1/4, … 8."""
    bootstrap_samples: int = Field(1000, ge=1, le=100_000)
    name: Name | None = None
    dry_run: bool = False


class ValidatedSubset(Body):
    """A subset that was trained on."""

    subset: int
    estimate: float
    """The estimated loss."""
    calibrated: float
    """The same with the best of the scales."""
    loss: float
    """Mean loss of the task's rows after training."""
    rows: int
    """Rows trained on."""
    seconds: float


class ScaleFit(Body):
    """How estimates with a length of the step agree with the trainings."""

    scale: float
    relative_rss: float
    """Σ(f̂ − f)² / Σf²."""
    mean_ratio: float
    """Mean of (f̂ − f)² / f² of the subsets."""
    spearman: float


class EstimateValidationResult(Body):
    """How well estimates tell what training gives."""

    own: ScaleFit
    """With the estimates' own scale."""
    best: ScaleFit
    """With the best scale of the grid: chosen on these very trainings."""
    scales: list[ScaleFit]
    spearman_low: float
    """Bootstrap interval of 95 % of the rank correlation with the own scale."""
    spearman_high: float
    line_rss: float
    """The relative residual sum of squares of a line through the other subsets' estimates and losses, for each subset:
    what estimates tell once trainings have given them an offset and a slope."""
    constant_rss: float
    """The relative residual sum of squares of saying the mean of the measured losses for every subset: what an estimate
    must beat that is to tell subsets apart."""
    subsets: list[ValidatedSubset]
    left_out_targets: int
    """Rows of the task without a loss or a feature."""
    estimate_seconds: float
    """Seconds of work for one estimate."""
    training_seconds: float
    """Seconds of one training and its measurement, on average."""
    speedup: float
    """How many times as long a training takes; the features, which all estimates share, are not counted."""


EstimateValidationJob = Job[EstimateValidationRequest, EstimateValidationResult]
