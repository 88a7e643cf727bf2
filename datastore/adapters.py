"""The bank of adapters: plain LoRA adapters of checkpoints, which can be chosen for a task and mixed with each other.

An adapter's files are its checkpoint's: what the bank adds is what mixing and choosing need to know of them (rank,
alpha, targets, what it was trained on) and that all of it is true. It is read from the tensors and held against the
adapter's configuration and its base model, by the headers of the files alone
(docs/decisions/an-adapter-is-a-checkpoint.md).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gradstore.types import Adapter, Checkpoint, CheckpointMethod

from datastore import models
from datastore.adapter_similarity import A, B
from datastore.catalog import Catalog, utc_now
from datastore.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoints
from datastore.errors import GradstoreError, InUse, InvalidCheckpoint, InvalidInput, NotFound
from datastore.finetunes import Finetunes
from datastore.identity import content_id, sha256_of
from datastore.schema import AdapterRow, CheckpointRow
from datastore.tensors import Header, TensorInfo, read_header

PREFIX = "base_model.model."
"""What PEFT's files put before the name of a module of the base model."""
DEFAULT_RANK = DEFAULT_ALPHA = 8
"""PEFT's, where a configuration leaves them out."""
_NO_ADAPTER: Mapping[CheckpointMethod, str] = {
    "none": "a base model as it is",
    "full": "a model that was trained in full",
    "mixture": "a mixture of LoRA experts",
}


@dataclass(frozen=True)
class Shape:
    """What an adapter consists of."""

    rank: int
    alpha: float
    scaling: float
    sides: Mapping[str, tuple[int, int]]
    """The modules of the base model that it is on, and how many numbers go in and out of each."""

    @property
    def targets(self) -> list[str]:
        """The last names of the modules, each once, in order."""
        return sorted({module.rpartition(".")[2] for module in self.sides})


@dataclass(frozen=True)
class Training:
    """What an adapter was trained on, as far as it is known."""

    finetune: str | None = None
    dataset: str | None = None
    selection: str | None = None
    trained_on: str | None = None


@dataclass(frozen=True)
class Adapters:
    """The adapters of a catalog."""

    catalog: Catalog
    checkpoints: Checkpoints
    finetunes: Finetunes

    def add(
        self,
        checkpoint: str,
        *,
        brought: bool = False,
        name: str | None = None,
        dataset: str | None = None,
        trained_on: str | None = None,
    ) -> tuple[Adapter, bool]:
        """Put the adapter of a checkpoint into the bank, or return the one of the same content; says whether it is new.

        `brought`: the checkpoint was stored for this. It is deleted again where the adapter is refused or is known by
        another checkpoint, and later with the adapter. Raises `NotFound`, `InvalidCheckpoint` saying what does not fit,
        `InvalidInput` and `NameTaken`.
        """
        found = self.catalog.checkpoint(checkpoint)
        try:
            adapter, new = self._add(found, brought=brought, name=name, dataset=dataset, trained_on=trained_on)
        except GradstoreError:
            if brought:
                self._forget(found.id)
            raise
        if brought and adapter.checkpoint != found.id:
            self._forget(found.id)
        return adapter, new

    def last_of(self, finetune: str) -> str:
        """The checkpoint that a fine-tune ended with. Raises `NotFound`, and `Conflict` before it has ended."""
        return self.finetunes.last_checkpoint(finetune)

    def remove(self, reference: str) -> str:
        """Take an adapter out of the bank and return its id; a checkpoint that was stored for it goes, too.

        Raises `NotFound`, and `InUse` naming who still needs it.
        """
        adapter = self.catalog.adapter(reference)
        with self.catalog.reading() as session:
            brought = session.get_one(AdapterRow, adapter.id).brought
        self.catalog.remove(AdapterRow, adapter.id)
        if brought:
            self._forget(adapter.checkpoint)
        return adapter.id

    def _add(
        self, checkpoint: Checkpoint, *, brought: bool, name: str | None, dataset: str | None, trained_on: str | None
    ) -> tuple[Adapter, bool]:
        if checkpoint.method != "lora":
            raise InvalidInput(
                f"{checkpoint.id} is no adapter ("
                + _NO_ADAPTER[checkpoint.method]
                + "): name a checkpoint whose method is lora"
            )
        training = self._training(checkpoint, dataset=dataset, trained_on=trained_on)
        folder = self.checkpoints.weights(checkpoint.id)
        shape = shape_of(json.loads((folder / ADAPTER_CONFIG).read_bytes()), read_header(folder / ADAPTER_WEIGHTS))
        size = models.described(checkpoint.model, checkpoint.revision)[1]
        if size is not None:
            refuse_unlike_base(shape, size.tensors, model=checkpoint.model)
        content = {
            "base_model": checkpoint.model,
            "revision": checkpoint.revision,
            "rank": shape.rank,
            "scaling": shape.scaling,
            "sha256": sha256_of(folder / ADAPTER_WEIGHTS),
        }
        row = AdapterRow(
            id=content_id("ad", content),
            name=None,
            created_at=utc_now(),
            checkpoint_id=checkpoint.id,
            brought=brought,
            rank=shape.rank,
            alpha=shape.alpha,
            scaling=shape.scaling,
            modules=len(shape.sides),
            sha256=content["sha256"],
            **vars(training),
        )
        return self.catalog.add_adapter(row, targets=shape.targets, name=name)

    def _training(self, checkpoint: Checkpoint, *, dataset: str | None, trained_on: str | None) -> Training:
        """What is said of the training, or what is known of it where it was this service's."""
        finetune = None if checkpoint.run is None else self.catalog.run(checkpoint.run).finetune
        if finetune is None:
            named = None if dataset is None else self.catalog.dataset(dataset).id
            return Training(dataset=named, trained_on=trained_on)
        if dataset is not None:
            raise InvalidInput(f"dataset: {finetune} says what {checkpoint.id} was trained on: leave it out")
        plan = self.finetunes.jobs.plan(finetune)
        return Training(finetune, plan["dataset"], plan["selection"], trained_on)

    def _forget(self, checkpoint: str) -> None:
        """Delete a checkpoint unless something needs it."""
        with suppress(NotFound, InUse):
            self.catalog.remove(CheckpointRow, checkpoint, delete_files=self.checkpoints.delete)


def shape_of(config: Mapping[str, Any], header: Header) -> Shape:
    """What the files of a plain LoRA adapter consist of: one rank and scale, and nothing trained beside A and B.

    Raises `InvalidCheckpoint` for any other, and where configuration and tensors differ.
    """
    rank, alpha = config.get("r", DEFAULT_RANK), config.get("lora_alpha", DEFAULT_ALPHA)
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not 0 < alpha < math.inf:
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} has r={rank!r} and lora_alpha={alpha!r}: both are positive numbers")
    _refuse_special(config, rank=rank, alpha=alpha)
    sides = {
        name.removesuffix(A).removeprefix(PREFIX): _sides(name, header, rank)
        for name in header.tensors
        if name.endswith(A)
    }
    other = sorted(name for name in header.tensors if not name.endswith((A, B)) or _module(name) not in sides)
    if other or not sides:
        raise InvalidCheckpoint(
            f"{ADAPTER_WEIGHTS} holds {other[0]!r}: the bank takes plain LoRA, pairs of lora_A and lora_B on linear "
            "modules, since nothing else can be mixed per token; it can still be a checkpoint (POST /checkpoints)"
            if other
            else f"{ADAPTER_WEIGHTS} holds no lora_A"
        )
    _refuse_other_targets(config.get("target_modules"), list(sides))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Shape(rank, float(alpha), scaling, sides)


def refuse_unlike_base(shape: Shape, tensors: Mapping[str, TensorInfo], *, model: str) -> None:
    """Hold an adapter's modules against the weights of its base model. Raises `InvalidCheckpoint` naming the first that
    is not there, or has other sides.

    Files and models differ in what stands before the numbered layers, so modules are known by what follows. Weights
    that are packed, and so have no sides to compare, are taken on trust.
    """
    known: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, tensor in tensors.items():
        known[_within(name.removesuffix(".weight"))].append(tensor)
    for module, (into, out) in shape.sides.items():
        weights = known.get(_within(module), [])
        if not weights:
            raise InvalidCheckpoint(
                f"{model} has no module {module!r}, which the adapter is on: it was trained on another base model"
            )
        # transformers' Conv1D keeps its weights the other way round
        fit = (sorted(each.shape) == sorted((into, out)) or not each.dtype.startswith(("F", "BF")) for each in weights)
        if not any(fit):
            raise InvalidCheckpoint(
                f"{module!r} of {model} is {list(weights[0].shape)} and the adapter's is {[out, into]}: it was trained "
                "on another base model"
            )


def _within(module: str) -> str:
    """A module's name from its numbered layer on.

    >>> _within("model.language_model.layers.3.self_attn.q_proj"), _within("lm_head")
    ('layers.3.self_attn.q_proj', 'lm_head')
    """
    parts = module.split(".")
    numbered = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(numbered - 1, 0) :])


def _refuse_special(config: Mapping[str, Any], *, rank: int, alpha: float) -> None:
    """Refuse adapters whose modules differ in rank or scale, or whose forward pass is more than B·A·x."""
    for name, usual in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or any(value != usual for value in pattern.values()):
            raise InvalidCheckpoint(f"{ADAPTER_CONFIG} has a {name}: the bank takes adapters of one rank and one alpha")
    special = next((name for name in ("use_dora", "alora_invocation_tokens", "use_qalora") if config.get(name)), None)
    if special is not None:
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} has {special}: the bank takes plain LoRA, which can be mixed")


def _sides(name: str, header: Header, rank: int) -> tuple[int, int]:
    """How many numbers go into the module of a loraA, and out of it."""
    other = name.removesuffix(A) + B
    if other not in header.tensors:
        raise InvalidCheckpoint(f"{ADAPTER_WEIGHTS} has {name!r} without {other!r}")
    a, b = header.tensors[name].shape, header.tensors[other].shape
    if len(a) != 2 or len(b) != 2:
        raise InvalidCheckpoint(f"{name!r} is {list(a)}: the bank takes adapters of linear modules")
    if a[0] != rank or b[1] != rank:
        found = a[0] if a[0] != rank else b[1]
        raise InvalidCheckpoint(f"the rank of {_module(name)!r} is {found} and {ADAPTER_CONFIG} has r={rank}")
    return a[1], b[0]


def _module(name: str) -> str:
    return name.removesuffix(A).removesuffix(B).removeprefix(PREFIX)


def _refuse_other_targets(named: object, modules: list[str]) -> None:
    """Hold the modules that the configuration names against those of the tensors; an expression is not run."""
    if not isinstance(named, list):
        return

    def is_on(module: str, target: object) -> bool:
        return module == target or module.endswith(f".{target}")

    stray = next((module for module in modules if not any(is_on(module, target) for target in named)), None)
    if stray is not None:
        raise InvalidCheckpoint(f"{ADAPTER_WEIGHTS} has {stray!r}, which is none of target_modules {named}")
    without = next((target for target in named if not any(is_on(module, target) for module in modules)), None)
    if without is not None:
        raise InvalidCheckpoint(f"target_modules names {without!r}, and {ADAPTER_WEIGHTS} has no tensor of it")
