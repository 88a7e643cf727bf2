"""Evaluations."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gradstore.types.base import (
    Body,
    Metric,
    ModelName,
    Name,
    Named,
    Precision,
    Quantisation,
    Request,
    Revision,
    TemplateName,
)
from gradstore.types.jobs import Job

Combination = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd", "arrow",
]  # fmt: skip
"""How adapters become one model: the static merges of PEFT's `add_weighted_adapter`, and Arrow's routing by token."""
MOST_COMBINED = 64  # adapters


class EvaluationRequest(Request):
    """Measure a model on the test rows of tasks."""

    finetune: Named | None = None
    checkpoint: Named | None = None
    adapter: Named | None = None
    """One of the bank."""
    adapters: list[Named] | None = Field(None, min_length=2, max_length=MOST_COMBINED)
    """Several of the bank, as the one model that `combine` makes of them."""
    model: ModelName | None = None
    revision: Revision | None = None
    combine: Combination | None = None
    """`cat` is the weighted sum of the adapters as it is, `svd` its best approximation of a rank, `linear` the sum of
    A times the sum of B; `ties`, `dare_*` and `magnitude_prune` drop values first, of A and B or, ending in `svd`, of
    their product. `arrow` weighs by each token."""
    merge_weights: list[float] | None = Field(None, max_length=MOST_COMBINED)
    """Of a merge, one for each adapter; by default equal, so that the result is a mean."""
    merge_rank: int | None = Field(None, ge=1, le=1 << 14)
    """Of a merge by `svd`; by default the highest of the adapters."""
    merge_density: float | None = Field(None, gt=0, le=1)
    """Of a merge that drops values: the fraction that is kept."""
    arrow_top_k: int | None = Field(None, ge=1, le=MOST_COMBINED)
    """Adapters that a token gets; by default 3, of two adapters both."""
    arrow_temperature: float | None = Field(None, gt=0)
    """Of the softmax over their likeness; by default 1."""
    tasks: list[Named] = Field(min_length=1)
    baseline: bool = True
    """Measure the base model beside it."""
    max_rows: int | None = Field(None, ge=1)
    """At most so many test rows per subtask, the first ones."""
    max_new_tokens: int = Field(256, ge=1, le=8192)
    template: TemplateName | None = None
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    precision: Precision | None = None
    quantisation: Quantisation | None = None
    bootstrap_samples: int = Field(1000, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=1 << 32)
    name: Name | None = None

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        subjects = (self.finetune, self.checkpoint, self.adapter, self.adapters, self.model)
        if sum(part is not None for part in subjects) != 1:
            raise ValueError("name one of finetune, checkpoint, adapter, adapters and model")
        if (self.adapters is None) != (self.combine is None):
            raise ValueError("adapters and combine go together: combine says how several become one model")
        return self

    @model_validator(mode="after")
    def _combined(self) -> Self:
        how, count = self.combine or "", len(self.adapters or ())
        merge, arrow, drops = how not in ("", "arrow"), how == "arrow", how.startswith(("ties", "dare", "magnitude"))
        fits = {
            "merge_weights": merge,
            "merge_rank": how.endswith("svd"),
            "merge_density": drops,
            "arrow_top_k": arrow,
            "arrow_temperature": arrow,
        }
        stray = next((name for name, fit in fits.items() if not fit and getattr(self, name) is not None), None)
        if stray is not None:
            raise ValueError(f"combine={how or None} has no {stray}: leave it out")
        if drops and self.merge_density is None:
            raise ValueError(f"combine={how} needs merge_density, the fraction of values that is kept (TIES: 0.2)")
        if self.merge_weights is not None and len(self.merge_weights) != count:
            raise ValueError(f"merge_weights has {len(self.merge_weights)} values for {count} adapters: one for each")
        if (self.arrow_top_k or 0) > count:
            raise ValueError(f"arrow_top_k is {self.arrow_top_k}, and there are {count} adapters")
        return self


class Interval(Body):
    """A percentile bootstrap confidence interval of 95 %."""

    low: float
    high: float


class EvaluationRow(Body):
    """One model on one subtask, or on a whole task where `subtask` is null (mean over its subtasks)."""

    model: Literal["base", "tuned"]
    task: str
    task_name: str
    """What the task was called when it was measured."""
    subtask: str | None
    examples: int
    loss: float | None
    """Mean cross-entropy per supervised token, averaged over examples."""
    loss_interval: Interval | None
    metric: Metric
    value: float | None
    interval: Interval | None
    unparsed: int
    """Answers in which no answer was found (exact match)."""


class EvaluationResult(Body):
    """The measured rows."""

    rows: list[EvaluationRow]
    seconds: float
    """Working time of all its attempts."""


EvaluationJob = Job[EvaluationRequest, EvaluationResult]
