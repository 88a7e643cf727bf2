"""The sparse Johnson–Lindenstrauss map: every coordinate is added to one random sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worker.projection.interface import Projection
from worker.projection.words import below, random_signs, random_words, stream_key

GATHERED_ELEMENTS = 1 << 26  # at a time on a GPU: 256 MiB as float32


class Sjlt(Projection):
    """Coordinate after coordinate gets a random sign and is added to a random sum.

    On a CPU by scatter, which adds in the order of the coordinates; on a GPU, where a scatter has no order, by a gather
    through a table of each sum's coordinates. Keeps one byte per coordinate, and for each dimension 8 more on a CPU or
    4 on a GPU, there up to three times as much since some sums get more coordinates than others.
    """

    name = "sjlt"

    def _prepare(self) -> None:
        super()._prepare()
        self._signs = {name: random_signs(self.seed, name, size, self.device) for name, size in self.sizes.items()}
        places = {(name, dim): self._draw(name, dim) for name in self.sizes for dim in self.dims}
        self._gathers = self.device.type != "cpu"
        self._lists = {key: _lists(place, key[1]) if self._gathers else place for key, place in places.items()}

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        signed = gradients * self._signs[name]
        for dim in self.dims:
            (_gather if self._gathers else _scatter)(signed, self._lists[name, dim], sums[dim])

    def _draw(self, name: str, dim: int) -> Tensor:
        """Return the sum that each coordinate is added to, (size,) int64."""
        counters = torch.arange(self.sizes[name], device=self.device)
        return below(random_words(stream_key(self.seed, "places", name), counters), dim)


def _scatter(signed: Tensor, places: Tensor, sums: Tensor) -> None:
    """Add each coordinate of `signed` (examples, size) at its place."""
    sums.scatter_add_(1, places.expand_as(signed), signed)


def _lists(places: Tensor, dim: int) -> Tensor:
    """List each sum's coordinates in their order: (longest list, dim) int32, and where none is left, their number."""
    size = len(places)
    ordered, coordinates = places.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(dim, device=places.device))
    ranks = torch.arange(size, device=places.device) - starts[ordered]
    lists = torch.full((int(ranks.max()) + 1, dim), size, dtype=torch.int32, device=places.device)
    lists[ranks, ordered] = coordinates.to(torch.int32)
    return lists


def _gather(signed: Tensor, lists: Tensor, sums: Tensor) -> None:
    """Add to each sum the coordinates of `signed` (examples, size) that its list names."""
    padded = torch.nn.functional.pad(signed, (0, 1))
    examples, dim = sums.shape
    ranks = max(1, GATHERED_ELEMENTS // (examples * dim))
    for start in range(0, len(lists), ranks):
        sums += padded.index_select(1, lists[start : start + ranks].flatten()).view(examples, -1, dim).sum(1)
