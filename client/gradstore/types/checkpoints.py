"""Checkpoints and runs."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from gradstore.types.base import (
    Body,
    CheckpointMethod,
    ModelName,
    Name,
    Named,
    Precision,
    Request,
    Revision,
    ServerPath,
    TemplateName,
)


class LoraSettings(Request):
    """The adapter's shape; the defaults are LESS's recipe."""

    r: int = Field(128, ge=1, le=4096)
    alpha: float = Field(512, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(["q_proj", "k_proj", "v_proj", "o_proj"])


class Checkpoint(Body):
    """An adapter or a whole model, its Adam moments and the mean learning rate of its epoch; or a base model alone."""

    id: str
    name: str | None
    run: str | None
    model: str
    revision: str | None
    method: CheckpointMethod
    """What was trained: an adapter (`lora`), a mixture of LoRA experts (`mixture`), the whole model (`full`) or nothing
    (`none`: the base model itself).
    """
    epoch: int | None
    step: int | None
    learning_rate: float | None
    """Mean learning rate of the epoch: the checkpoint's weight in the influence."""
    has_moments: bool
    """Without Adam's moments a checkpoint gives `sgd` and `sign` features only."""
    moments_note: str | None
    """Why there are no moments, where there are none."""
    parameters: int
    """Parameters that were trained."""
    precision: Precision
    template: TemplateName | None
    max_length: int | None
    bytes: int
    created_at: datetime


class CheckpointRegister(Request):
    """Register an adapter folder of the server (inside an allowed root): PEFT, HF Trainer or LESS layout; with a
    `mixture.json` in it, a mixture of LoRA experts.

    Without a path: the base model itself, as it is before any training.
    """

    path: ServerPath | None = None
    name: Name | None = None
    model: ModelName | None = None
    """Base model; by default the one named in the adapter's own configuration."""
    revision: Revision | None = None
    learning_rate: float | None = Field(None, gt=0)
    step: int | None = Field(None, ge=0, lt=1 << 53)
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _something(self) -> CheckpointRegister:
        if self.path is None and self.model is None:
            raise ValueError("name the path of an adapter, or a model to register as it is")
        if self.path is None and self.step is not None:
            raise ValueError("a base model itself has no step: leave it out, or name the path of what was trained")
        return self


class Run(Body):
    """The checkpoints of one training, in order."""

    id: str
    name: str | None
    model: str
    revision: str | None
    finetune: str | None
    checkpoints: list[Checkpoint]
    created_at: datetime


class RunCreate(Request):
    """Group registered checkpoints of one base model into a run."""

    checkpoints: list[Named] = Field(min_length=1)
    name: Name | None = None
