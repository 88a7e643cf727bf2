"""Mixtures of LoRA experts as fine-tunes: what of a request fits neither model nor bank, and how much is trained.

The worker says the rest (worker/mixtures/model.py), and all of it where the model is not on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradstore.types import Adapter, MixtureLayer, MixtureSettings, ProblemItem

from datastore.allocations import expand, router_parameters
from datastore.errors import InvalidInput, refusal
from datastore.models import Size
from datastore.tensors import TensorInfo

_LINEAR = re.compile(r"\.(\d+)\.(?:.*\.)?([^.]+)\.weight$")


def refuse_unfit(settings: MixtureSettings, size: Size) -> None:
    """Raise `InvalidInput` where lists or schemes do not fit the model's layers, or no layer has a module."""
    names = {name for _, name, _ in _linears(size)}
    missing = [name for name in settings.modules if name not in names]
    if missing:
        raise refusal(
            f"no linear layer of this model is called {missing[0]!r}: it has {', '.join(sorted(names))}",
            "/mixture/modules",
        )
    try:
        expand(settings, layers=size.layers)
    except InvalidInput as error:
        raise refusal(str(error), "/mixture") from error


def refuse_experts(
    settings: MixtureSettings, adapters: Sequence[Adapter], *, model: str, revision: str | None, layers: int
) -> None:
    """Raise `InvalidInput` naming each adapter that cannot be an expert of this mixture, and why."""
    problems = [
        ProblemItem(pointer=f"/experts_from/{number}", detail=reason)
        for number, adapter in enumerate(adapters)
        for reason in _reasons(settings, adapter, model=model, revision=revision)
    ]
    if len({adapter.id for adapter in adapters}) < len(adapters):
        problems.append(ProblemItem(pointer="/experts_from", detail="an adapter is named twice: experts that are the "
                        "same begin as one"))  # fmt: skip
    for number, layer in enumerate(expand(settings, layers=layers) if layers else []):
        if (wrong := _unlike(layer, adapters)) is not None:
            problems.append(ProblemItem(pointer="/mixture", detail=f"layer {number} {wrong}"))
            break
    if problems:
        raise InvalidInput(f"{problems[0].pointer}: {problems[0].detail}", errors=problems)


def parameters(settings: MixtureSettings, size: Size) -> int:
    """Numbers of the experts and routers of a mixture in a model that it fits."""
    layers = expand(settings, layers=size.layers)
    total = 0
    for number, name, tensor in _linears(size):
        if name in settings.modules and number < len(layers):
            layer, inputs = layers[number], tensor.shape[1]
            total += layer.experts * layer.rank * sum(tensor.shape)
            total += router_parameters(settings.router, experts=layer.experts, inputs=inputs, modules=1)
    return total


def _linears(size: Size) -> list[tuple[int, str, TensorInfo]]:
    """(layer, name, tensor) of the weights of linear layers inside the model's numbered layers."""
    found = ((_LINEAR.search(name), tensor) for name, tensor in size.tensors.items() if len(tensor.shape) == 2)
    return [(int(match[1]), match[2], tensor) for match, tensor in found if match is not None]


def _reasons(settings: MixtureSettings, adapter: Adapter, *, model: str, revision: str | None) -> list[str]:
    called = adapter.name or adapter.id
    if (adapter.base_model, adapter.revision) != (model, revision):
        other = f"{adapter.base_model} ({adapter.revision or 'no revision'})"
        return [f"the adapter {called} is of {other}, and the mixture of {model} ({revision or 'no revision'})"]
    if sorted(settings.modules) != adapter.targets:
        return [
            f"the adapter {called} is on {', '.join(adapter.targets)}, and the mixture on "
            f"{', '.join(sorted(settings.modules))}: say the adapters' as mixture.modules"
        ]
    return []


def _unlike(layer: MixtureLayer, adapters: Sequence[Adapter]) -> str | None:
    if layer.experts != len(adapters):
        return (
            f"has {layer.experts} experts, and {len(adapters)} adapters are named: each layer has one for each "
            f"adapter, so ask for experts={len(adapters)}"
        )
    other = next((adapter for adapter in adapters if adapter.rank != layer.rank), None)
    if other is None:
        return None
    return (
        f"has experts of the rank {layer.rank}, and {other.name or other.id} is of the rank {other.rank}: "
        f"ask for rank={other.rank}, or name adapters of one rank"
    )
