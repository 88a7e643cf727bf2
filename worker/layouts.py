"""How the examples of a batch lie in its tensors, and how what belongs to each of them is found there.

`Padded`: (examples, width, …), each example at the beginning of its row. `Packed`: (1, total tokens, …), one example
after another and no padding between them.

An outer product per example, Σ_t δ_t ⊗ x_t over its own tokens, is one batched product where they are padded. Where
they are packed it is a product for each, straight from where the tokens lie, and nothing is copied
(docs/decisions/packed-rows-are-multiplied-one-by-one.md has the times).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "position"]
"""How an example's tokens become one row: each weighs the same, or the t-th, counted from 1, as much as t."""


@dataclass(frozen=True)
class Padded:
    """Examples in rows of one width, padded on the right."""

    shape: torch.Size
    """(examples, width)."""
    lengths: Tensor
    """(examples,) tokens without the padding."""

    @property
    def examples(self) -> int:
        """How many they are."""
        return self.shape[0]

    def cut(self, tensor: Tensor, example: int) -> Tensor:
        """Return one example's part of a tensor (examples, width, …), padding included: (1, width, …)."""
        return tensor[example : example + 1]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the examples' parts together again."""
        return torch.cat(list(parts))

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each example's row: (examples · width, …) to (examples, …)."""
        return values.view(*self.shape, *values.shape[1:]).sum(1)

    def means(self, states: Tensor, pooling: Pooling = "mean") -> Tensor:
        """Return the means of (examples, width, size) over each example's own tokens: (examples, size) float32."""
        lengths = self.lengths.to(states.device)
        own = torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)
        kept = torch.where(own.unsqueeze(2), states.float(), 0)
        if pooling == "mean":
            return kept.sum(1) / lengths.unsqueeze(1)
        weights = own * _places(states)
        return (kept * weights.unsqueeze(2)).sum(1) / weights.sum(1, keepdim=True)

    def outer(self, deltas: Tensor, inputs: Tensor, part: slice) -> Tensor:
        """Return Σ_t δ_bt ⊗ x_bt of the examples b of `part`: (examples, out, in).

        Both tensors hold all tokens of the batch, (…, out) and (…, in).
        """
        deltas, inputs = (tensor.reshape(*self.shape, -1) for tensor in (deltas, inputs))
        return torch.bmm(deltas[part].transpose(1, 2), inputs[part])


@dataclass(frozen=True)
class Packed:
    """Examples one after another in a single row."""

    lengths: tuple[int, ...]
    """Tokens of each example."""

    @property
    def shape(self) -> torch.Size:
        """(1, total tokens)."""
        return torch.Size((1, sum(self.lengths)))

    @property
    def examples(self) -> int:
        """How many they are."""
        return len(self.lengths)

    @property
    def bounds(self) -> list[int]:
        """Where each example begins, and at last where all end: examples + 1 numbers."""
        return list(accumulate(self.lengths, initial=0))

    def cut(self, tensor: Tensor, example: int) -> Tensor:
        """Return one example's part of a tensor (1, total tokens, …): (1, its tokens, …)."""
        return tensor[:, slice(*self.bounds[example : example + 2])]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the examples' parts together again."""
        return torch.cat(list(parts), 1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each example's tokens: (total tokens, …) to (examples, …)."""
        return torch.stack([own.sum(0) for own in torch.split(values, list(self.lengths))])

    def means(self, states: Tensor, pooling: Pooling = "mean") -> Tensor:
        """Return the means of (1, total tokens, size) over each example's tokens: (examples, size) float32."""
        parts = torch.split(states, list(self.lengths), dim=1)
        if pooling == "mean":
            return torch.stack([own[0].float().mean(0) for own in parts])
        weights = [_places(own) for own in parts]
        return torch.stack(
            [(own[0].float() * each.unsqueeze(1)).sum(0) / each.sum() for own, each in zip(parts, weights, strict=True)]
        )

    def outer(self, deltas: Tensor, inputs: Tensor, part: slice) -> Tensor:
        """Return Σ_t δ_t ⊗ x_t over the tokens of each example of `part`: (examples, out, in).

        Both tensors hold all tokens of the batch, (…, out) and (…, in).
        """
        deltas, inputs = deltas.flatten(0, -2), inputs.flatten(0, -2)
        bounds = self.bounds[part.start : part.stop + 1]
        made = inputs.new_empty(len(bounds) - 1, deltas.shape[1], inputs.shape[1])
        for one, (start, stop) in zip(made, pairwise(bounds), strict=True):
            torch.mm(deltas[start:stop].T, inputs[start:stop], out=one)
        return made


Layout = Padded | Packed


def _places(states: Tensor) -> Tensor:
    """Return the places 1, 2, … of the tokens of (…, tokens, size), float32."""
    return torch.arange(1, states.shape[1] + 1, device=states.device, dtype=torch.float32)
