"""The sums of one batch: gradients come in parameter by parameter, and directions, their lengths and images add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from worker.directions import Direction, Kind
from worker.projection import Projection
from worker.projection.blocks import Blocks

TOGETHER = 1 << 15
"""Coordinates of small parameters that are taken in together: one by one they cost more in calls than in work."""


@dataclass(frozen=True)
class KindSums:
    """What the directions of one kind have come to so far."""

    by_dim: dict[int, Tensor]
    """Their images, (examples, dim) float32 for each dim."""
    squares: Tensor
    """Their squared lengths, (examples,) float64."""


@dataclass(frozen=True)
class Totals:
    """What the gradients of a batch have come to."""

    by_kind: Mapping[Kind, KindSums]
    """The directions' sums."""
    raw_squares: Tensor
    """Squared lengths of the gradients themselves, (examples,) float64."""
    peaks: Tensor
    """Largest magnitudes in the gradients, (examples,) float32; not finite where one of them is not."""


class Sums(Protocol):
    """What the gradients of a batch have come to so far."""

    def take(self, name: str, gradients: Tensor, examples: slice) -> None:
        """Take in one parameter's flat gradients (examples, size), of any floating type; they are given away."""

    def totals(self) -> Totals:
        """Return what has come of all that was taken in."""


def make_sums(
    examples: int, *, directions: Mapping[Kind, Direction], projection: Projection, unscale: float = 1.0
) -> Sums:
    """Make the sums of a batch whose gradients are to be multiplied by `unscale` first.

    For `blocks` on a GPU, where Triton is installed (it comes with torch for CUDA), one kernel does all of it.
    """
    if isinstance(projection, Blocks) and projection.device.type == "cuda" and find_spec("triton"):
        from worker.kernels import FusedSums  # noqa: PLC0415 - there is no Triton for most CPUs

        return FusedSums(examples, directions, projection, unscale)
    return PlainSums(examples, directions, projection, unscale)


class PlainSums:
    """The sums by torch's operations, on any device and with any projection."""

    def __init__(
        self, examples: int, directions: Mapping[Kind, Direction], projection: Projection, unscale: float
    ) -> None:
        device = projection.device
        self._directions = directions
        self._projection = projection
        self._unscale = unscale
        self._by_kind = {
            kind: KindSums(projection.zeros(examples), torch.zeros(examples, dtype=torch.float64, device=device))
            for kind in directions
        }
        self._raw_squares = torch.zeros(examples, dtype=torch.float64, device=device)
        self._peaks = torch.zeros(examples, device=device)
        self._waiting: dict[str, Tensor] = {}
        self._waiting_examples = slice(0)

    def take(self, name: str, gradients: Tensor, examples: slice) -> None:
        """Take in one parameter's flat gradients (examples, size), of any floating type; they are given away."""
        if examples != self._waiting_examples:
            self._add_waiting()
            self._waiting_examples = examples
        self._waiting[name] = gradients.to(self._peaks.device)
        if sum(waiting.shape[1] for waiting in self._waiting.values()) >= TOGETHER:
            self._add_waiting()

    def totals(self) -> Totals:
        """Return what has come of all that was taken in."""
        self._add_waiting()
        return Totals(self._by_kind, self._raw_squares, self._peaks)

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        waiting, examples = self._waiting, self._waiting_examples
        self._waiting = {}
        gradients = torch.cat(list(waiting.values()), 1) if len(waiting) > 1 else next(iter(waiting.values()))
        gradients = gradients.to(torch.float32)
        if self._unscale != 1:
            gradients = gradients * self._unscale
        # amax keeps a NaN; the peak of the raw gradient tells zero from small, which squares would not
        self._peaks[examples] = torch.maximum(self._peaks[examples], gradients.abs().amax(1))
        self._raw_squares[examples] += _squares(gradients)
        for left, (kind, sums) in zip(reversed(range(len(self._by_kind))), self._by_kind.items(), strict=True):
            directions = self._directions[kind](list(waiting), gradients.clone() if left else gradients)
            sums.squares[examples] += _squares(directions)
            by_dim = {dim: part[examples] for dim, part in sums.by_dim.items()}
            parts = torch.split(directions, [part.shape[1] for part in waiting.values()], dim=1)
            for name, part in zip(waiting, parts, strict=True):
                self._projection.add(name, part, by_dim)


def _squares(vectors: Tensor) -> Tensor:
    """Return the squared length of each row: (rows,) float64."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return lengths.double().square()
