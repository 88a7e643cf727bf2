"""What a mixture of LoRA experts takes in a model, from the model's configuration alone: layers, parameters, bytes.

Models are known by their `config.json`: those whose layers are Llama's, with four linear maps in the attention and
three in the MLP. A map of d inputs and o outputs with N experts of rank r has N·r·(d + o) numbers of experts, and of
its router N·d (`single`), J·N·d (`mor` with the scope `fixed`), or J·N·d + J·d + J (`mor` with a main router).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradstore.types import (
    Allocation,
    MixtureLayer,
    MixtureMemory,
    MixtureParameters,
    MixtureSettings,
    Precision,
    RouterSettings,
)

from datastore.errors import InvalidInput

BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

FAMILIES = ("gemma", "llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers are counted here."""


@dataclass(frozen=True)
class Shape:
    """The shape of a model as far as parameters are counted."""

    layers: int
    linears: Mapping[str, tuple[int, int]]
    """(inputs, outputs) of each linear map of a layer, by name."""
    parameters: int
    """Of the whole model, tied embeddings once."""


def allocation(
    settings: MixtureSettings, config: Mapping[str, Any], *, precision: Precision = "bfloat16"
) -> Allocation:
    """What the mixture takes in the model of this `config.json`.

    Raises InvalidInput where the settings do not fit it, or its layers are none that are known here.
    """
    shape = shape_of(config)
    unknown = [name for name in settings.modules if name not in shape.linears]
    if unknown:
        raise InvalidInput(f"no linear layer of this model is called {unknown[0]!r}: it has {', '.join(shape.linears)}")
    layers = expand(settings, layers=shape.layers)
    linears = [shape.linears[name] for name in settings.modules]
    parameters = _parameters(settings, layers, linears, base=shape.parameters)
    base = shape.parameters * BYTES[precision]
    mixture = (parameters.experts + parameters.routers) * BYTES["float32"]
    training = parameters.trainable * 3 * BYTES["float32"]
    memory = MixtureMemory(base=base, mixture=mixture, training=training, total=base + mixture + training)
    return Allocation(layers=layers, parameters=parameters, memory=memory)


def expand(settings: MixtureSettings, *, layers: int) -> list[MixtureLayer]:
    """Experts, top-k and rank of each of the model's layers; raises InvalidInput where lists or schemes do not fit."""
    expanded = [
        MixtureLayer(experts=experts, top_k=top_k, rank=rank)
        for experts, top_k, rank in zip(
            _per_layer(settings.experts, "experts", layers),
            _per_layer(settings.top_k, "top_k", layers),
            _per_layer(settings.rank, "rank", layers),
            strict=True,
        )
    ]
    for number, layer in enumerate(expanded):
        if layer.top_k > layer.experts:
            raise InvalidInput(
                f"layer {number} has experts={layer.experts} and top_k={layer.top_k}: "
                "top_k is at most the number of experts"
            )
    return expanded


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` says. Raises InvalidInput where it says too little, or is of another family."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InvalidInput(
            f"the parameters of a model of the type {family!r} are not counted here: it must be one of "
            f"{', '.join(FAMILIES)}"
        )
    width, inner, heads, layers, words = (
        _number(config, name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    )
    groups = (
        heads if family == "llama" and not config.get("num_key_value_heads") else _number(config, "num_key_value_heads")
    )
    own = family in {"gemma", "qwen3"} or config.get("head_dim")  # theirs does not follow from the width
    head = _number(config, "head_dim") if own else width // heads
    queries, keys = heads * head, groups * head
    linears = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    layer = sum(inputs * outputs for inputs, outputs in linears.values()) + 2 * width  # and two norms
    if family == "qwen2":
        layer += queries + 2 * keys  # biases
    elif family != "mistral" and config.get("attention_bias"):
        layer += queries + 2 * keys + width
    if family == "llama" and config.get("mlp_bias"):
        layer += 2 * inner + width
    if family == "qwen3":
        layer += 2 * head  # norms of queries and keys
    tied = config.get("tie_word_embeddings", family == "gemma")
    return Shape(layers, linears, words * width * (1 if tied else 2) + layers * layer + width)


def _per_layer(value: int | Sequence[int] | str, name: str, layers: int) -> list[int]:
    if isinstance(value, int):
        return [value] * layers
    if isinstance(value, str):
        if layers % len(value):
            raise InvalidInput(
                f"{name}={value!r} has {len(value)} blocks, and {layers} layers cannot be cut into so many of equal "
                f"size: give a list of {layers} numbers"
            )
        return [int(digit) for digit in value for _ in range(layers // len(value))]
    if len(value) != layers:
        raise InvalidInput(
            f"{name} lists {len(value)} numbers, and the model has {layers} layers: give one for each layer"
        )
    return list(value)


def _parameters(
    settings: MixtureSettings, layers: Sequence[MixtureLayer], linears: Sequence[tuple[int, int]], *, base: int
) -> MixtureParameters:
    inputs, ends = sum(inputs for inputs, _ in linears), sum(map(sum, linears))
    routers = sum(
        router_parameters(settings.router, experts=layer.experts, inputs=inputs, modules=len(linears))
        for layer in layers
    )
    experts = sum(layer.experts * layer.rank * ends for layer in layers)
    return MixtureParameters(
        base=base,
        experts=experts,
        routers=routers,
        trainable=routers if settings.router_only else experts + routers,
        active=routers + sum(layer.top_k * layer.rank * ends for layer in layers),
    )


def router_parameters(router: RouterSettings, *, experts: int, inputs: int, modules: int) -> int:
    """Numbers of the routers of a layer: `inputs` of all its `modules` together."""
    if router.kind == "single":
        return experts * inputs
    main = 0 if router.gate_scope == "fixed" else router.sub_routers * (inputs + modules)
    return router.sub_routers * experts * inputs + main


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise InvalidInput(f"the model's config.json has no {name}: write it with save_pretrained")
    return value
