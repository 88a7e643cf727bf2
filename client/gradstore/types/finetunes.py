"""Fine-tunes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

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
from gradstore.types.mixtures import MOST_EXPERTS, MixtureSettings


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
    mixture: MixtureSettings | None = None
    """Train a mixture of LoRA experts in place of one adapter; what `lora` says is then said here."""
    experts_from: Annotated[list[Named], Field(min_length=1, max_length=MOST_EXPERTS)] | None = None
    """Adapters of the bank that the experts begin as, one for each expert, of the same base model; without them the
    experts are fresh.
    """
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

    @model_validator(mode="after")
    def _of_experts(self) -> Self:
        if self.mixture is None:
            if self.experts_from is not None:
                raise ValueError("experts_from are a mixture's: ask for a mixture, too")
            return self
        if self.method == "full" or self.quantisation is not None:
            raise ValueError(
                "a mixture is trained on a frozen model in its own precision: leave method and quantisation out"
            )
        if self.lora != LoraSettings():
            raise ValueError(
                "a mixture has its own rank, alpha, dropout and modules: say them there, and leave lora out"
            )
        if self.mixture.router_only and self.experts_from is None:
            raise ValueError("fresh experts add nothing before they are trained: router_only needs experts_from")
        return self


class LossPoint(Body):
    """A point of the loss curve."""

    step: int
    epoch: float
    loss: float
    """Mean cross-entropy per supervised token."""
    balance: float | None = None
    """Of a mixture: its load-balance loss, without the coefficient; 1 for each layer whose experts all get as much."""
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
