"""What a worker keeps in memory between shards: one base model, the adapter on it, and the engine over both.

The checkpoints of a run share their base model, which is loaded once: their adapters take turns on it. Nothing else is
kept, so a worker needs the memory of one job at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from gradstore.types import Attention, Precision, Quantisation
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.mixture_files import MANIFEST
from datastore.models import revision_of
from worker.combinations import Combined, combine
from worker.encoders import EncoderEngine, load_encoder
from worker.gradients import GradientEngine
from worker.mixtures.folders import load_mixture
from worker.models import load_adapter, load_model, load_tokenizer, unload_adapter, use_gradient_checkpointing

Engine = GradientEngine | EncoderEngine


@dataclass(frozen=True)
class Base:
    """A base model and how it is loaded."""

    model: str
    revision: str | None = None
    precision: Precision = "float32"
    quantisation: Quantisation | None = None
    attention: Attention | None = None
    gradient_checkpointing: bool = False
    encoder: bool = False
    """Whether it is a sentence encoder and no causal language model."""


class Loaded:
    """The models in a worker's memory."""

    def __init__(self, device: torch.device, *, spread: bool = False) -> None:
        self.device = device
        self._spread = spread
        self._base: PreTrainedModel | None = None
        self._base_key: Hashable = None
        self._adapted: PeftModel | None = None
        self._adapter_key: Hashable = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_key: Hashable = None
        self._engine: Engine | None = None
        self._engine_key: Hashable = None

    def tokenizer(self, model: str, revision: str | None) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises `ModelError`, and `InvalidInput` where the folder has changed."""
        key = (model, revision, _files(model))
        if self._tokenizer is None or self._tokenizer_key != key:
            revision_of(model, revision)  # raises where the folder is not any more what it was
            self._tokenizer, self._tokenizer_key = load_tokenizer(model, revision), key
        return self._tokenizer

    def base(self, base: Base) -> PreTrainedModel:
        """The base model, frozen, with no adapter. Raises `ModelError`, or `InvalidInput` where the folder changed."""
        key = (base, _files(base.model))
        if self._base is None or self._base_key != key:
            self.clear()
            revision_of(base.model, base.revision)
            model = self._load(base)
            if base.gradient_checkpointing:
                use_gradient_checkpointing(model)
            self._base, self._base_key = model, key
        else:
            self._engine, self._engine_key = None, None  # it works with what is taken off, or frozen again
            self._base = unload_adapter(self._adapted) if self._adapted else self._base.requires_grad_(False)
        self._adapted, self._adapter_key = None, None
        return self._base

    def adapted(self, base: Base, adapter: Path) -> PeftModel:
        """The base model with the adapter, or the mixture, of this folder. Raises `ModelError`."""
        key = (base, _files(base.model), adapter)
        if self._adapted is None or self._adapter_key != key:
            put_on = load_mixture if (adapter / MANIFEST).exists() else load_adapter
            self._adapted, self._adapter_key = put_on(self.base(base), adapter), key
        return self._adapted

    def combined(self, base: Base, combined: Combined) -> PeftModel:
        """The base model with several adapters on it as one. Raises `ModelError`."""
        key = (base, _files(base.model), combined)
        if self._adapted is None or self._adapter_key != key:
            self._adapted, self._adapter_key = combine(self.base(base), combined), key
        return self._adapted

    def engine(self, key: Hashable, make: Callable[[], Engine]) -> Engine:
        """The engine called `key`, made anew unless it was the last one."""
        if self._engine is None or self._engine_key != key:
            self._engine, self._engine_key = None, None  # its moments go before the next one's come
            self._engine, self._engine_key = make(), key
        return self._engine

    def make_room(self) -> None:
        """Forget everything, before something else takes the memory; costs nothing where nothing is kept."""
        if self._base is not None or self.device.type == "cuda":
            self.clear()

    def _load(self, base: Base) -> PreTrainedModel:
        if base.encoder:
            return load_encoder(base.model, revision=base.revision, precision=base.precision, device=self.device)
        return load_model(
            base.model,
            revision=base.revision,
            precision=base.precision,
            quantisation=base.quantisation,
            device=self.device,
            attention=base.attention,
            spread=self._spread,
        )

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        self._engine, self._engine_key = None, None
        self._adapted, self._adapter_key = None, None
        self._base, self._base_key = None, None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _files(model: str) -> Hashable:
    """Sizes and times of a local model's files: one that was trained or copied anew is loaded anew."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
