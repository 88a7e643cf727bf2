"""The streaming signed-block sketch: runs of coordinates, each added at a random place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worker.projection.interface import Projection
from worker.projection.words import below, random_signs, random_words, signed, stream_key


class Blocks(Projection):
    """Each run of `dim` coordinates gets random signs and is added at a random cyclic offset.

    It reads the gradient once per dimension and multiplies by no matrix. Keeps one byte per coordinate; nothing
    of the kind where the kernel (worker/kernels.py) does the work.
    """

    name = "blocks"

    def _prepare(self) -> None:
        super()._prepare()
        self._offsets = {(name, dim): self._draw_offsets(name, dim) for name in self.sizes for dim in self.dims}
        self._signs: dict[str, Tensor] = {}
        self._draws: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        if name not in self._signs:
            self._signs[name] = random_signs(self.seed, name, self.sizes[name], self.device)
        drawn = self._signs[name].to(torch.float32)
        for dim in self.dims:
            offsets = self._offsets[name, dim]
            if len(offsets) > self._most_runs_one_by_one(dim):
                _add_folded(gradients, drawn, offsets, sums[dim])
            else:
                _add_runs(gradients, drawn, offsets, sums[dim])

    def draws(self, name: str, dim: int) -> Tensor:
        """Return the key of a parameter's signs and then its runs' offsets, int64, for a kernel to draw from."""
        if (name, dim) not in self._draws:
            numbers = [signed(stream_key(self.seed, "signs", name)), *self._offsets[name, dim]]
            self._draws[name, dim] = torch.tensor(numbers, device=self.device)
        return self._draws[name, dim]

    def _most_runs_one_by_one(self, dim: int) -> int:
        """Above this number of runs their two operations each cost more than one gather of the whole gradient."""
        return 2 if self.device.type == "cuda" or dim < 512 else 1 << 30

    def _draw_offsets(self, name: str, dim: int) -> list[int]:
        runs = torch.arange(math.ceil(self.sizes[name] / dim))
        offsets: list[int] = below(random_words(stream_key(self.seed, f"offsets/{dim}", name), runs), dim).tolist()
        return offsets


def _add_runs(gradients: Tensor, signs: Tensor, offsets: Sequence[int], sums: Tensor) -> None:
    """Add run after run, each in the two pieces that the end of the sums cuts it into."""
    dim = sums.shape[1]
    size = gradients.shape[1]
    for run, offset in enumerate(offsets):
        start = run * dim
        stop = min(start + dim, size)
        cut = min(stop, start + dim - offset)
        sums[:, offset : offset + cut - start].addcmul_(gradients[:, start:cut], signs[start:cut])
        if cut < stop:
            sums[:, : stop - cut].addcmul_(gradients[:, cut:stop], signs[cut:stop])


def _add_folded(gradients: Tensor, signs: Tensor, offsets: Sequence[int], sums: Tensor) -> None:
    """Add all runs at once: turn each by its offset with one gather, and sum over the runs.

    A gather and not a scatter: every sum is then made in one order, and so the same on every run.
    """
    examples, size = gradients.shape
    dim = sums.shape[1]
    runs = len(offsets)
    flipped = torch.nn.functional.pad(gradients * signs, (0, runs * dim - size))
    device = gradients.device
    turned = torch.arange(dim, device=device) - torch.tensor(offsets, device=device).unsqueeze(1)
    source = turned.remainder_(dim) + dim * torch.arange(runs, device=device).unsqueeze(1)
    sums += flipped.index_select(1, source.flatten()).view(examples, runs, dim).sum(1)
