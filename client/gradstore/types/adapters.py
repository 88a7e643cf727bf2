"""The bank of adapters."""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gradstore.types.base import Body, ModelName, Name, Named, Request, Revision, ServerPath, TemplateName


def _printable(value: str) -> str:
    if any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in value):
        raise ValueError("words have no line breaks and other control characters")
    return value


TrainedOn = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]
"""What an adapter was trained on, in words."""


class Adapter(Body):
    """A LoRA adapter that can be chosen and mixed with others of its base model."""

    id: str
    name: str | None
    checkpoint: str
    """Where its files are: the checkpoint's."""
    base_model: str
    revision: str | None
    rank: int
    alpha: float
    scaling: float
    """What B·A is multiplied with: alpha / rank, or alpha / √rank of a rank-stabilised one."""
    targets: list[str]
    """The kinds of modules it is on: `q_proj`, `v_proj` and so on."""
    modules: int
    """How many matrices of its base model it is on."""
    parameters: int
    finetune: str | None
    """The fine-tune of this service that it comes from."""
    dataset: str | None
    """Dataset of this store that it was trained on."""
    selection: str | None
    """Selection of this store that it was trained on."""
    trained_on: str | None
    """What else is known of its training data, in words."""
    template: TemplateName | None
    sha256: str
    """Of its safetensors file."""
    bytes: int
    """Of its checkpoint."""
    created_at: datetime


class AdaptersWanted(BaseModel):
    """Which adapters are asked for."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    base_model: ModelName | None = None
    """Only of this base model, as adapters show it."""
    revision: Revision | None = None
    """Only of this revision of it."""
    rank: int | None = Field(None, ge=1, le=1 << 31)
    """Only of this rank."""
    target: list[Named] = Field([], max_length=100)
    """Only those on this kind of module (`q_proj`); repeated, those on all of them."""
    dataset: Named | None = None
    """Only those trained on this dataset, by id or name."""


class AdapterRegister(Request):
    """Put an adapter into the bank: a fine-tune's, a checkpoint's, or a PEFT folder of the server."""

    finetune: Named | None = None
    """Its last checkpoint is meant; name another one as `checkpoint`."""
    checkpoint: Named | None = None
    path: ServerPath | None = None
    name: Name | None = None
    base_model: ModelName | None = None
    """Of a path; by default the one named in the adapter's own configuration."""
    revision: Revision | None = None
    dataset: Named | None = None
    """Dataset of this store that it was trained on; of a fine-tune it is known."""
    trained_on: TrainedOn | None = None

    @model_validator(mode="after")
    def _one_source(self) -> AdapterRegister:
        if sum(source is not None for source in (self.finetune, self.checkpoint, self.path)) != 1:
            raise ValueError("say where the adapter is by one of finetune, checkpoint and path, or send its files")
        if self.path is None and not self.base_model is self.revision is None:
            raise ValueError("the checkpoint says its base model: leave base_model and revision out")
        return self
