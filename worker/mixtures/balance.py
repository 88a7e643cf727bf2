"""What the routers did in a forward pass, and the loss that asks them to use all experts alike.

Of a layer with N experts, over all tokens of all its adapted modules: P_n, the mean of softmax(z)_n, through which
gradients go; f_n, the part of all choices that fell on n. L = N Σ_n f_n P_n, which is 1 where both are even (MoLA; the
sum over layers, as its code has it).

A record is filled inside `with recording(model)` and by nobody else, so nothing of a pass is kept when it goes: read it
before the backward pass. Checkpointed layers run once more in the backward pass, outside of it. Of the checkpoints only
those that are not re-entrant leave the logits a graph; others are refused, since their loss would train nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from worker.mixtures.routers import softmax

if TYPE_CHECKING:
    from worker.mixtures.layer import MixtureLinear


@dataclass(frozen=True)
class Routed:
    """What a router gave the tokens of one call of its module."""

    logits: Tensor
    """(…, N), with the graph they were computed by."""
    chosen: Tensor
    """(…, k): indices of experts."""


@dataclass
class Record:
    """What the routers of a model did, by the path of their modules."""

    paths: dict[int, str]
    routed: dict[str, list[Routed]] = field(default_factory=dict)

    def add(self, module: MixtureLinear, logits: Tensor, chosen: Tensor) -> None:
        """Note what a module's router did."""
        self.routed.setdefault(self.paths[id(module)], []).append(Routed(logits, chosen))

    def balance(self, mask: Tensor | None = None) -> Tensor:
        """The load-balance loss, summed over layers; with a mask (batch, tokens), over the tokens where it is not zero.

        Raises ValueError where no forward pass, or more than one, was recorded.
        """
        layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for path, calls in self.routed.items():
            if len(calls) != 1:
                raise ValueError("the load-balance loss is one of a single forward pass: record each pass by itself")
            layers.setdefault(_layer(path), []).append(load(calls[0], mask))
        if not layers:
            raise ValueError("no router was at work: run the model inside `with recording(model)`")
        return torch.stack([_loss(modules) for modules in layers.values()]).sum()


@contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    """Let the routers of a model write down what they do."""
    from worker.mixtures.layer import MixtureLinear  # noqa: PLC0415 - which writes into a Record

    modules = {path: module for path, module in model.named_modules() if isinstance(module, MixtureLinear)}
    record = Record({id(module): path for path, module in modules.items()})
    for module in modules.values():
        module.record = record
    try:
        yield record
    finally:
        for module in modules.values():
            module.record = None


def load(routed: Routed, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choices f (N,) and probabilities P (N,) of a module, each 1 in sum, over the tokens where the mask is not zero.

    Raises ValueError for logits whose graph a re-entrant checkpoint has dropped, and for a mask of another shape.
    """
    logits, chosen = routed.logits, routed.chosen
    if torch.is_grad_enabled() and not logits.requires_grad:
        raise ValueError(
            "the routers' logits have no graph, so that a loss of them would train nothing: use gradient checkpoints "
            "that are not re-entrant (use_reentrant=False), or read the loss under torch.no_grad()"
        )
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"the mask is of {tuple(mask.shape)} tokens, and the routers saw {tuple(logits.shape[:-1])}")
    probabilities = softmax(logits)
    kept = probabilities.new_ones(logits.shape[:-1]) if mask is None else (mask != 0).to(probabilities.dtype)
    picked = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
    tokens = kept.sum()
    choices, mean = (torch.einsum("t,tn->n", kept.flatten(), part.flatten(0, -2)) for part in (picked, probabilities))
    return choices / (tokens * chosen.shape[-1]), mean / tokens


def _loss(modules: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of a layer, all of whose modules saw the same tokens."""
    choices, probabilities = (torch.stack(part).mean(dim=0) for part in zip(*modules, strict=True))
    return choices.numel() * (choices * probabilities).sum()


def _layer(path: str) -> str:
    """The path of a module up to the number of its layer."""
    found = re.match(r".*?\.\d+\.", f".{path}")
    return found[0] if found else path
