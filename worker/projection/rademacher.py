"""The dense random matrix: the reference for the other maps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from worker.projection.interface import Projection
from worker.projection.words import MAX_DIM, bits, random_words, stream_key

BLOCK_ELEMENTS = 1 << 23  # of R at a time: 32 MiB as float32

_WORDS_PER_ROW = MAX_DIM // 64


class Rademacher(Projection):
    """The dense random ±1 matrix of LESS, made anew in blocks of rows; the reference for the others."""

    name = "rademacher"

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        widest = max(self.dims)
        rows = max(1, BLOCK_ELEMENTS // widest)
        image = torch.zeros(gradients.shape[0], widest, device=gradients.device)
        for start in range(0, gradients.shape[1], rows):
            part = gradients[:, start : start + rows]
            image.addmm_(part, self.matrix(name, start, start + part.shape[1], widest))
        for dim in self.dims:
            sums[dim].add_(image[:, :dim], alpha=dim**-0.5)

    def matrix(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        """Return rows `start` to `stop` of the parameter's part of R: (stop − start, dim) float32 of ±1."""
        key = stream_key(self.seed, "matrix", name)
        rows = torch.arange(start, stop, device=self.device).unsqueeze(1) * _WORDS_PER_ROW
        words = random_words(key, rows + torch.arange(math.ceil(dim / 64), device=self.device))
        return _signs_of_bytes(words).flatten(1)[:, :dim]


def _signs_of_bytes(words: Tensor) -> Tensor:
    """Return the bits of 64-bit words as float32 ±1, lowest first: (rows, words, 64).

    By a table of the 256 bytes: eight times less memory than shifting words. It reads the words byte by byte, lowest
    first, as every processor that torch runs on keeps them.
    """
    table = bits(torch.arange(256, device=words.device))[:, :8].to(torch.float32).mul_(2).sub_(1)
    octets = words.contiguous().view(torch.uint8)
    return table[octets.to(torch.int32)].view(*words.shape, 64)
