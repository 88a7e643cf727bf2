"""Hidden states and routing weights of text models, pooled to one row per example.

`hidden` follows COINCIDE's recipe (arXiv 2406.10995), which CODS takes over: what the attention of each chosen layer
puts out (its output projection) is averaged over two groups of tokens; each mean m becomes tanh(m), divided by its L2
norm and by √(2·layers), so that a row has the length 1. There the groups are a picture's tokens and a text's. A text
model has no picture: here they are the tokens of the prompt, which nothing is learnt from, and those of the completion,
which are learnt from. A row is [prompt, completion] of the first layer, then of the next: 2·layers·width numbers.

`routing` is the mean over an example's tokens of each router's probabilities, softmax over the experts: layers·experts
numbers, a row's own distribution over the experts of each layer.

A causal model's tokens never look at the padding on their right, and the means leave it out: neither the batch nor its
order changes a row beyond rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.batches import IGNORED, Encoded, collate, plan
from worker.losses import Inputs, Model
from worker.models import ModelError

LAYERS = 5
"""Layers that are read by default."""
_ATTENTION_OUTPUT = re.compile(r"(?:.*\.)?\w*(?:attn|attention)\.(?:o_proj|out_proj|c_proj|dense|wo)")
"""Names of the last projection of an attention, in the architectures of transformers."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class States:
    """Pooled rows, and the layers that they are of."""

    rows: Floats
    """(n, layers · numbers of a layer)."""
    layers: Sequence[int]


def evenly(layers: int) -> list[int]:
    """The layers that are read by default: five evenly spaced ones, or all where there are no more.

    >>> evenly(24), evenly(3)
    ([3, 7, 11, 15, 19], [0, 1, 2])
    """
    if layers <= LAYERS:
        return list(range(layers))
    return [number * layers // (LAYERS + 1) - 1 for number in range(1, LAYERS + 1)]


def hidden(
    model: Model,
    rows: Sequence[Encoded],
    *,
    layers: Sequence[int] | None,
    pad_id: int,
    token_budget: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> States:
    """The pooled outputs of the attention of `layers`, by default `evenly` chosen ones: (n, 2 · layers · width).

    `on_batch` gets the number of rows done so far. Raises `ModelError` where the model has no such layers.
    """
    outputs = _attention_outputs(model)
    chosen = list(layers) if layers is not None else evenly(len(outputs))
    if chosen[-1] >= len(outputs):
        raise ModelError(f"the model has {len(outputs)} layers with attention, from 0: there is no layer {chosen[-1]}")

    def pooled(batch: Sequence[Encoded]) -> Tensor:
        inputs = Inputs.of(batch, pad_id=pad_id, device=_device(model))
        own, completion = _own(batch), _completion(batch)
        with _outputs([outputs[layer] for layer in chosen]) as seen:
            _forward(model, inputs)
        parts = [
            _mean(states.reshape(*inputs.input_ids.shape, -1), group)
            for states in seen
            for group in (own & ~completion, completion)
        ]
        scale = len(parts) ** -0.5
        return torch.cat([nn.functional.normalize(part.tanh(), dim=1) * scale for part in parts], dim=1)

    return States(_in_batches(rows, pooled, token_budget=token_budget, on_batch=on_batch), chosen)


def routing(
    model: Model,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    token_budget: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> States:
    """The mean probabilities of the experts of each layer with a router: (n, layers · experts).

    `layers` of the answer are counted among those with a router. Raises `ModelError` where the model has none.
    """
    counts: list[int] = []

    def pooled(batch: Sequence[Encoded]) -> Tensor:
        inputs = Inputs.of(batch, pad_id=pad_id, device=_device(model))
        logits = getattr(_forward(model, inputs, output_router_logits=True), "router_logits", None) or ()
        if not logits:
            name = type(_base(model)).__name__
            raise ModelError(f"{name} has no routers, being no mixture of experts: its rows have kind=hidden alone")
        counts[:] = [len(logits)]
        own = _own(batch)
        chances = (layer.float().softmax(-1).reshape(*inputs.input_ids.shape, -1) for layer in logits)
        return torch.cat([_mean(layer, own) for layer in chances], dim=1)

    found = _in_batches(rows, pooled, token_budget=token_budget, on_batch=on_batch)
    return States(found, list(range(counts[0])))


def _in_batches(
    rows: Sequence[Encoded],
    pooled: Callable[[Sequence[Encoded]], Tensor],
    *,
    token_budget: int,
    on_batch: Callable[[int], None],
) -> Floats:
    found: Floats | None = None
    done = 0
    for batch in plan([len(row.input_ids) for row in rows], token_budget=token_budget):
        with torch.no_grad():
            numbers = pooled([rows[index] for index in batch]).cpu().numpy()
        if found is None:
            found = np.zeros((len(rows), numbers.shape[1]), np.float32)
        found[batch] = numbers
        done += len(batch)
        on_batch(done)
    if found is None:
        raise ValueError("no rows")
    return found


def _own(rows: Sequence[Encoded]) -> Tensor:
    """Which tokens of a padded batch are no padding: (examples, width) bool."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(1)


def _completion(rows: Sequence[Encoded]) -> Tensor:
    """Which tokens of a padded batch are learnt from: (examples, width) bool."""
    return collate(rows, pad_id=0).labels != IGNORED


def _mean(states: Tensor, group: Tensor) -> Tensor:
    """Means of (examples, width, size) over the tokens of a group (examples, width): (examples, size) float32, on the
    CPU.
    """
    chosen = group.to(states.device).unsqueeze(2)
    return (torch.where(chosen, states.float(), 0).sum(1) / chosen.sum(1)).cpu()


def _base(model: Model) -> PreTrainedModel:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast("PreTrainedModel", base)


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device


def _forward(model: Model, inputs: Inputs, **asked: Any) -> Any:
    """Run the layers of a model, without its output layer."""
    return _base(model).base_model(input_ids=inputs.input_ids, use_cache=False, **asked)


def _attention_outputs(model: Model) -> list[nn.Module]:
    """The output projection of each layer's attention, in the order of the layers."""
    found = [module for name, module in _base(model).named_modules() if _ATTENTION_OUTPUT.fullmatch(name)]
    if not found:
        raise ModelError(
            f"no layer of {type(_base(model)).__name__} has an attention with an output projection by a name that is "
            "known here (o_proj, out_proj, c_proj, dense): this architecture has no features of kind hidden"
        )
    return found


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What these modules put out during the block, in their order."""
    seen: list[Any] = [None] * len(modules)

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            seen[number] = output.detach()

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
