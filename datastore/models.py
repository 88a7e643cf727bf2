"""Base models, as far as they can be known without torch: which may be named, how large they are, how long rows are.

Sizes come from the headers of the safetensors files, lengths from `tokenizer.json` through the `tokenizers` library
where it is installed; of a model of the hub that is not on this machine, the hub is asked for these. Estimates are
made from this: they are meant to be right within tens of per cent.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.types import LoraSettings, Precision, ProblemItem, Quantisation

from datastore import hub
from datastore.archives import allowed_folder, allowed_path
from datastore.errors import InvalidCheckpoint, InvalidInput, PathNotAllowed, refusal
from datastore.identity import DIGITS
from datastore.rows import Example
from datastore.tensors import TensorInfo, read_header
from datastore.weights import matching

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,199}", re.ASCII)
BYTES_PER_TOKEN = 4  # of English text under the usual vocabularies; taken where there is no tokenizer to ask
TOKENS_PER_TURN = 5  # that a chat template puts around a message
SAMPLED_BLOCK, SAMPLED_BLOCKS = 1 << 14, 64  # bytes, and blocks of a file, that a fingerprint reads
ITEM_BYTES: dict[Precision | Quantisation, float] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 0.55,
}  # fmt: skip

_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS, _EMBEDDINGS = {"lm_head", "embed_out"}, {"embed_tokens", "embed_in", "wte", "wpe", "shared"}


def resolve(model: str, *, roots: Sequence[Path]) -> str:
    """The model as workers are told: a hub id as it is, a folder as its absolute path inside one of `roots`.

    Raises `InvalidInput` where it is neither, and `PathNotAllowed`.
    """
    # transformers takes a relative name for a folder where there is one, so what looks like a hub id may be none
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return model
    try:
        folder = allowed_path(model, roots)
    except PathNotAllowed as error:
        detail = f"{error}, and it is no hub id such as Qwen/Qwen3-0.6B"
        raise PathNotAllowed(detail, errors=[ProblemItem(pointer="/model", detail=detail)]) from error
    if not (folder / "config.json").is_file():
        detail = f"{model!r} is no model: the folder has no config.json"
        raise refusal(detail, "/model")
    try:
        allowed_folder(folder, roots)
        refuse_weights_elsewhere(folder)
    except InvalidInput as error:
        raise type(error)(str(error), errors=[ProblemItem(pointer="/model", detail=str(error))]) from error
    return str(folder)


def refuse_weights_elsewhere(folder: Path) -> None:
    """Raise `InvalidCheckpoint` where an index names weights outside its folder: whoever loads the model opens them."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            elsewhere = sorted(name for name in names if Path(name).name != name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidCheckpoint(
                f"{index.name} does not say which files the weights are in: save the model again"
            ) from error
        if elsewhere:
            raise InvalidCheckpoint(
                f"{index.name} names weights outside its folder ({elsewhere[0]!r}): put them beside it"
            )


def folder_of(model: str, revision: str | None) -> Path | None:
    """The folder of a model on this machine, where it has one."""
    if Path(model).is_absolute():
        return Path(model) if Path(model).is_dir() else None
    return hub.downloaded(model, revision)


def revision_of(model: str, revision: str | None) -> str:
    """Which version of a model is meant: of a hub model the commit, of a folder the fingerprint of its content.

    Raises `InvalidInput` where there is no such model, or a folder's content is not the revision asked for, and
    `HubUnreachable`.
    """
    folder = Path(model)
    if not folder.is_absolute():
        if revision is not None and not REVISION.fullmatch(revision):
            detail = f"{revision[:100]!r} is no branch, tag or commit of a model of the hub"
            raise refusal(detail, "/revision")
        return hub.commit(model, revision)
    if not folder.is_dir():
        detail = f"the base model {model} is not on this machine: put the folder back"
        raise refusal(detail, "/model")
    try:
        found = fingerprint(folder)
    except PermissionError as error:
        detail = f"{error.filename} may not be read here: let the user that the service runs as read the model's files"
        raise refusal(detail, "/model") from error
    if revision is not None and revision != found:
        detail = f"{model} holds the revision {found} and not {revision}: its files have changed"
        raise refusal(detail, "/revision")
    return found


def fingerprint(folder: Path) -> str:
    """Hash of a model folder's files: of their names, sizes and content.

    Of a file larger than 1 MiB 64 blocks of 16 KiB, evenly spread: a training changes every weight, and a model of any
    size is read in milliseconds.
    """
    digest = hashlib.sha256()
    for path in [*sorted(folder.iterdir()), *sorted(folder.glob("[0-9]_*/config.json"))]:  # and an encoder's modules
        if path.suffix not in {".safetensors", ".json", ".model", ".txt", ".jinja"} or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in _sampled(size):
                file.seek(start)
                digest.update(file.read(SAMPLED_BLOCK))
    return f"folder-{digest.hexdigest()[:DIGITS]}"


def _sampled(size: int) -> Iterable[int]:
    """Where the blocks begin that a fingerprint reads."""
    if size <= SAMPLED_BLOCK * SAMPLED_BLOCKS:
        return range(0, size, SAMPLED_BLOCK)
    return ((size - SAMPLED_BLOCK) * number // (SAMPLED_BLOCKS - 1) for number in range(SAMPLED_BLOCKS))


# Sizes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The size of a base model."""

    tensors: dict[str, TensorInfo]
    hidden: int
    layers: int
    vocabulary: int
    active_experts: float = 1.0
    """Part of a mixture's experts that a token goes through."""

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(tensor.size for tensor in self.tensors.values())

    def stored_bytes(self, kind: Precision | Quantisation) -> int:
        """Bytes of the weights in memory."""
        return round(self.parameters * ITEM_BYTES[kind])

    def lora_parameters(self, lora: LoraSettings) -> int:
        """Numbers of an adapter: r·(in + out) for every matrix it is put on (LoRA, arXiv:2106.09685, §4.1)."""
        return sum(
            lora.r * sum(tensor.shape) for name, tensor in self.tensors.items() if _is_target(name, tensor, lora)
        )

    def operations(self, trained: int, *, full: bool = False, checkpointing: bool = False) -> float:
        """Floating-point operations of a token's forward and backward pass, `trained` parameters being trained.

        Two a parameter forwards, two for the gradient of what came in, and two for the parameter's own, which frozen
        ones do without: 4 · base + 6 · LoRA, or 6 · all. Gradient checkpointing does the forward pass twice. Those of
        attention's scores are left out: they are few up to some thousand tokens.
        """
        base = self._multiplied()
        again = 2 * (base if full else base + trained) if checkpointing else 0
        return 6 * base + again if full else 4 * base + 6 * trained + again

    def forward_operations(self, adapter: int) -> float:
        """Floating-point operations of a token's forward pass with an adapter of so many parameters."""
        return 2 * (self._multiplied() + adapter)

    def _multiplied(self) -> float:
        """Parameters that a token is multiplied with: no embeddings, unless these are the output's matrix, too."""
        sizes = {name: tensor.size for name, tensor in self.tensors.items()}
        tied = not any(_last(name) in _HEADS for name in sizes)
        return sum(
            size * (self.active_experts if ".experts." in name else 1)
            for name, size in sizes.items()
            if tied or _last(name) not in _EMBEDDINGS
        )

    def chosen_parameters(self, patterns: Sequence[str]) -> int:
        """Numbers of the weights that the patterns name, as far as the files call them as the model does."""
        return sum(self.tensors[name].size for name in matching(patterns, self.tensors))

    def activation_bytes(self, *, tokens: int, item_bytes: float, checkpointing: bool) -> int:
        """Bytes of what a training step of this many padded tokens keeps for its backward pass.

        34 bytes a token, layer and unit of width in 16 bits (Korthikanti et al. 2022, eq. 1, without the attention
        scores, which fused kernels do not keep); with gradient checkpointing only each layer's input, and one layer.
        Two float32 copies of the logits.
        """
        layer = tokens * self.hidden * 17 * item_bytes
        kept = layer + tokens * self.hidden * item_bytes * self.layers if checkpointing else layer * self.layers
        return round(kept + tokens * self.vocabulary * 8)


def size(model: str, revision: str | None) -> Size | None:
    """The size of a model, or None where it is not on this machine."""
    folder = folder_of(model, revision)
    return size_of(folder) if folder else None


def described(model: str, revision: str | None) -> tuple[Path | None, Size | None]:
    """The folder of a model's configuration and tokenizer, and its size, as far as this machine or the hub has them."""
    folder = folder_of(model, revision)
    size = size_of(folder) if folder else None
    if size is not None or revision is None or Path(model).is_absolute():
        return folder, size
    found = hub.described(model, revision)
    return (folder, None) if found is None else (found[0], _size(*found))


def size_of(folder: Path) -> Size | None:
    """The size of the model in a folder, or None where its weights are no safetensors or not there."""
    try:
        tensors = {name: tensor for path in _weight_files(folder) for name, tensor in read_header(path).tensors.items()}
    except (OSError, ValueError, KeyError, InvalidCheckpoint):
        return None
    return _size(folder, tensors)


def _size(folder: Path, tensors: dict[str, TensorInfo]) -> Size | None:
    try:
        text = _text_config(folder)
    except (OSError, ValueError):
        return None
    if not tensors:
        return None
    return Size(
        tensors,
        hidden=_number(text, *_WIDTH),
        layers=_number(text, "num_hidden_layers", "n_layer", "num_layers"),
        vocabulary=_number(text, "vocab_size"),
        active_experts=_active_experts(text),
    )


def hidden_size(model: str, revision: str | None) -> int | None:
    """The width of a model's hidden states, or None where its config.json is not to be had or does not say."""
    config = configuration(model, revision)
    return _number(config, *_WIDTH) or None if config else None


def configuration(model: str, revision: str | None) -> dict[str, Any] | None:
    """What the model's config.json says of its language model; None where it is not to be had, or is no JSON."""
    folder = folder_of(model, revision) or described(model, revision)[0]
    try:
        return _text_config(folder) if folder else None
    except (OSError, ValueError):
        return None


def _text_config(folder: Path) -> dict[str, Any]:
    """The configuration of the language model in a folder, which may be a part of a larger one."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config.get("text_config") or config


def _number(config: dict[str, Any], *names: str) -> int:
    """The number that stands under one of these names; 0 where there is none."""
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _active_experts(config: dict[str, Any]) -> float:
    chosen = _number(config, "num_experts_per_tok")
    experts = _number(config, "num_experts", "num_local_experts", "n_routed_experts")
    return chosen / experts if chosen and experts else 1.0


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _is_target(name: str, tensor: TensorInfo, lora: LoraSettings) -> bool:
    module, _, kind = name.rpartition(".")
    last = _last(name)
    if kind != "weight" or len(tensor.shape) != 2:
        return False
    if lora.targets == "all-linear":
        return last not in _HEADS | _EMBEDDINGS
    return last in lora.targets or any(module.endswith(f".{target}") for target in lora.targets)


def _last(name: str) -> str:
    """The module that a tensor belongs to, without those around it."""
    return name.rpartition(".")[0].rpartition(".")[2]


# Lengths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample of rows, after truncation."""

    mean: float
    longest: int


def lengths(examples: Iterable[Example], *, folder: Path | None, max_length: int) -> Lengths:
    """Lengths of examples under the tokenizer in `folder`, or at 4 bytes a token where there is none."""
    count = _counter(folder)
    found = [min(_tokens(example, count), max_length) for example in examples]
    return Lengths(sum(found) / len(found), max(found)) if found else Lengths(0.0, 0)


def sample(rows: int, *, size: int = 256, block: int = 32) -> list[range]:
    """Ranges of about `size` rows, spread evenly over all.

    >>> sample(10)
    [range(0, 10)]
    """
    if rows <= size:
        return [range(rows)]
    blocks = size // block
    starts = (number * (rows - block) // (blocks - 1) for number in range(blocks))
    return [range(start, start + block) for start in starts]


def _counter(folder: Path | None) -> Callable[[str], int]:
    path = folder / "tokenizer.json" if folder else None
    if path is None or not path.is_file():
        return _by_bytes
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - comes with the worker's packages only
    except ImportError:
        return _by_bytes
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def _by_bytes(text: str) -> int:
    return math.ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN)


def _tokens(example: Example, count: Callable[[str], int]) -> int:
    if example.messages:
        return sum(count(message.prefix + message.content) + TOKENS_PER_TURN for message in example.messages)
    return count((example.prompt or "") + (example.completion or ""))
