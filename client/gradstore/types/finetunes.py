"""Fine-tunes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gradstore.types.base import (
    Body,
    Fraction,
    Method,
    ModelName,
    Name,
    Named,
    Precision,
    Quantisation,
    Request,
    Revision,
    TemplateName,
)
from gradstore.types.checkpoints import LoraSettings
from gradstore.types.jobs import Job


class TrainingSettings(Body):
    """How a model, whichever it is, is trained; the defaults are LESS's recipe."""

    revision: Revision | None = None
    """Of the model."""
    method: Method = "lora"
    lora: LoraSettings = LoraSettings()
    learning_rate: float = Field(2e-5, gt=0)
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(4, ge=1, le=1000)
    batch_size: int = Field(128, ge=1, le=1 << 20)
    """Examples per optimizer step."""
    device_batch_size: int = Field(8, ge=1, le=1 << 20)
    """Examples per forward pass; the rest is accumulated."""
    max_length: int = Field(2048, ge=2, le=1 << 20)
    template: TemplateName = "tulu"
    precision: Precision | Literal["auto"] = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU; what was used is recorded with the run."""
    quantisation: Quantisation | None = None
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.method == "full" and self.quantisation:
            raise ValueError("a quantised model cannot be trained in full; use method=lora")
        if self.batch_size % min(self.device_batch_size, self.batch_size):
            raise ValueError("batch_size must be a multiple of device_batch_size")
        return self


class TrainingRecipe(TrainingSettings):
    """How a model is trained; the defaults are LESS's recipe."""

    model: ModelName
    """Hub id, or a folder of the server inside an allowed root."""


class FinetuneRequest(TrainingRecipe, Request):
    """Fine-tune a model on a selection, a dataset or a random fraction of it; the defaults are LESS's recipe."""

    dataset: Named | None = None
    selection: Named | None = None
    fraction: Fraction | None = None
    """Random fraction of the dataset's rows, drawn with `seed`."""
    rows: int | None = Field(None, ge=1)
    """Random number of the dataset's rows, drawn with `seed`."""
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.dataset is None) == (self.selection is None):
            raise ValueError("name either a dataset or a selection")
        if self.fraction is not None and self.rows is not None:
            raise ValueError("name either a fraction or a number of rows")
        if self.selection is not None and (self.fraction or self.rows):
            raise ValueError("fraction and rows draw from a dataset; a selection is taken whole")
        return self


class LossPoint(Body):
    """A point of the loss curve."""

    step: int
    epoch: float
    loss: float
    learning_rate: float


class FinetuneResult(Body):
    """What a fine-tune left behind."""

    run: str
    checkpoints: list[str]
    rows: int
    """Rows trained on."""
    skipped_rows: int
    """Rows that left no supervised token after truncation."""
    steps: int
    tokens: int
    """Tokens of one epoch."""
    precision: Precision
    loss_curve: list[LossPoint]
    seconds: float
    """Working time of all its attempts: interruptions do not count, what was done twice does."""


FinetuneJob = Job[FinetuneRequest, FinetuneResult]
