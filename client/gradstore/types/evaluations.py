"""Evaluations."""

from __future__ import annotations

from typing import Literal

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


class EvaluationRequest(Request):
    """Measure a model on the test rows of tasks."""

    finetune: Named | None = None
    checkpoint: Named | None = None
    model: ModelName | None = None
    revision: Revision | None = None
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
    def _one_model(self) -> EvaluationRequest:
        if sum(part is not None for part in (self.finetune, self.checkpoint, self.model)) != 1:
            raise ValueError("name one of finetune, checkpoint and model")
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
