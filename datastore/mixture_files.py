"""What tells a mixture of LoRA experts from an adapter: `mixture.json` beside PEFT's files, and what must be in these.

The manifest says what PEFT's configuration cannot: which mixture it is, for how many layers, and each expert's alpha.
Weights are held against it by the header of their file alone: of each module the experts' A (N·r, d) and B (o, N·r),
one expert's block after another, and all tensors of its router.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from gradstore.types import MixtureLayer, MixtureSettings, Request, RouterSettings
from pydantic import Field, ValidationError

from datastore.allocations import expand
from datastore.errors import InvalidCheckpoint, InvalidInput
from datastore.tensors import Header

MANIFEST = "mixture.json"
_A, _B, _ROUTER = ".lora_A.weight", ".lora_B.weight", ".lora_router."
_LAYER = re.compile(r"\.(\d+)\.")


class Manifest(Request):
    """What `mixture.json` says."""

    format: Literal["gradstore-mixture-1"] = "gradstore-mixture-1"
    settings: MixtureSettings
    layers: int
    """Of the base model."""
    alphas: Annotated[list[float], Field(min_length=1)]
    """Of each expert: its output is multiplied by alpha / rank."""


def read_manifest(folder: Path) -> Manifest:
    """What the folder says of its mixture. Raises `InvalidCheckpoint` where it says nothing, or not enough."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InvalidCheckpoint(
            f"{MANIFEST} is missing: without it nobody knows which mixture the weights are of. Copy the whole folder; "
            "plain adapters have none, and are loaded as adapters"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidCheckpoint(f"{MANIFEST} is not what it should be: {where}: {first['msg']}") from error


def layers_of(manifest: Manifest) -> list[MixtureLayer]:
    """What each layer has. Raises `InvalidCheckpoint` where the manifest contradicts itself."""
    try:
        layers = expand(manifest.settings, layers=manifest.layers)
    except InvalidInput as error:
        raise InvalidCheckpoint(f"{MANIFEST} contradicts itself: {error}") from error
    if len(manifest.alphas) < max(layer.experts for layer in layers):
        raise InvalidCheckpoint(f"{MANIFEST} has {len(manifest.alphas)} alphas, fewer than there are experts")
    return layers


def layer_number(path: str) -> int | None:
    """The layer of the base model that a dotted path lies in, which is the first number in it; None outside of layers.

    >>> layer_number("model.layers.3.self_attn.q_proj")
    3
    """
    found = _LAYER.search(f".{path}")
    return None if found is None else int(found[1])


def is_router(key: str) -> bool:
    """Whether a tensor of the weights' file is of a router."""
    return _ROUTER in key


def check_mixture(manifest: Manifest, header: Header) -> None:
    """Hold the weights' header against the manifest. Raises `InvalidCheckpoint` naming what is missing, left over or of
    another shape.
    """
    settings, layers = manifest.settings, layers_of(manifest)
    left = set(header.tensors)
    of_name: dict[str, set[int]] = {name: set() for name in settings.modules}
    for module in sorted(key.removesuffix(_A) for key in header.tensors if key.endswith(_A)):
        number, name = _layer(module, manifest.layers), module.rpartition(".")[2]
        if name not in of_name:
            raise InvalidCheckpoint(f"{module!r} has experts, and {MANIFEST} does not name {name!r} among its modules")
        of_name[name].add(number)
        for key, shape in _expected(module, header, layers[number], settings.router):
            found = header.tensors.get(key)
            if found is None:
                raise InvalidCheckpoint(f"the weights lack {key!r}, which {MANIFEST} promises: send the whole folder")
            if found.shape != shape:
                raise InvalidCheckpoint(f"{key!r} is {list(found.shape)}, and {MANIFEST} makes it {list(shape)}")
            left.discard(key)
    for name, numbers in of_name.items():
        if missing := set(range(manifest.layers)) - numbers:
            raise InvalidCheckpoint(f"the weights have no experts of {name!r} in layer {min(missing)}")
    if left:
        raise InvalidCheckpoint(f"{min(left)!r} is no part of the mixture that {MANIFEST} describes")


def _layer(module: str, layers: int) -> int:
    number = layer_number(module)
    if number is None or number >= layers:
        raise InvalidCheckpoint(f"{module!r} has experts, and is in none of the {layers} layers of {MANIFEST}")
    return number


def _expected(
    module: str, header: Header, layer: MixtureLayer, router: RouterSettings
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of a module's tensors; what goes in and out of it is what its A and B say."""
    rows = layer.experts * layer.rank
    b = header.tensors.get(module + _B)
    width = header.tensors[module + _A].shape[-1]
    yield module + _A, (rows, width)
    yield module + _B, (b.shape[0] if b is not None and b.shape else 0, rows)
    if router.kind == "single":
        yield f"{module}{_ROUTER}weight", (layer.experts, width)
        return
    # PEFT leaves the name of the adapter in keys of more than one part
    yield f"{module}{_ROUTER}default.sub.weight", (router.sub_routers * layer.experts, width)
    if router.gate_scope != "fixed":
        yield f"{module}{_ROUTER}default.main.weight", (router.sub_routers, width)
        yield f"{module}{_ROUTER}default.main.bias", (router.sub_routers,)
