"""The subsampled Fourier transform: random signs, a fast transform, and a random choice of its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from worker.projection.interface import Projection
from worker.projection.words import random_signs, random_words, stream_key

SIGN_BIT = -1 << 63


class Fft(Projection):
    """Random signs, a real Fourier transform of every parameter, and `dim` of its outputs.

    Keeps one byte per coordinate and 8 bytes per parameter and sum; holds two copies of a gradient while it adds one.
    """

    name = "fft"

    def _prepare(self) -> None:
        super()._prepare()
        self._signs = {name: random_signs(self.seed, name, size, self.device) for name, size in self.sizes.items()}
        self._rows = {
            (name, length): self._draw_rows(name, length, max(dims))
            for name, size in self.sizes.items()
            for length, dims in self._by_length(size).items()
        }

    def _by_length(self, size: int) -> dict[int, list[int]]:
        """Group the dimensions by the length of the transform that they take: the next power of two."""
        groups: dict[int, list[int]] = {}
        for dim in self.dims:
            groups.setdefault(1 << (max(size, dim, 2) - 1).bit_length(), []).append(dim)
        return groups

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        signed = gradients * self._signs[name]
        for length, dims in self._by_length(gradients.shape[1]).items():
            spectrum = torch.view_as_real(torch.fft.rfft(signed, n=length, norm="ortho")).flatten(1)
            places, weights = self._rows[name, length]
            chosen = spectrum.index_select(1, places)
            for dim in dims:
                sums[dim].addcmul_(chosen[:, :dim], weights[:dim], value=math.sqrt(length / dim))

    def _draw_rows(self, name: str, length: int, count: int) -> tuple[Tensor, Tensor]:
        """Choose rows of the transform: their places in the spectrum as real numbers, and their weights, (count,)."""
        words = random_words(stream_key(self.seed, f"rows/{length}", name), torch.arange(length, device=self.device))
        rows = (words ^ SIGN_BIT).topk(count, largest=False).indices  # as unsigned words
        ends = (rows == 0) | (rows == length - 1)
        places = torch.where(rows == 0, 0, rows + 1)  # what follows Re F₀ is Im F₀, which is none of the rows
        return places, torch.where(ends, 1.0, math.sqrt(2))
