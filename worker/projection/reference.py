"""GradEx's matrix of signs, bit for bit: NumPy's legacy generator, row after row of the whole gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from worker.projection.interface import Projection

LARGEST = 1 << 32
"""Signs that are drawn at most, of all dims together: half a gigabyte as bits."""
DRAWN = 1 << 22
"""Signs drawn at a time: 32 MiB as the int64 that the generator gives."""
BLOCK_ELEMENTS = 1 << 18  # of the matrix at a time: 1 MiB as float32, which a cache holds


class Reference(Projection):
    """The dense ±1/√dim matrix (p, dim) whose signs are 2b − 1, b = RandomState(seed).randint(2, size=(p, dim)).

    The generator cannot be asked for a part of its stream, so all signs are drawn once, in blocks of rows that follow
    one another in the same stream, and kept as bits: p · dim / 8 bytes for each dim. Unlike the other maps it depends
    on the order of the parameters, and a smaller dim has other signs than a larger one.
    """

    name = "reference"

    def _prepare(self) -> None:
        super()._prepare()
        signs = sum(self.sizes.values()) * sum(self.dims)
        if signs > LARGEST:
            raise ValueError(
                f"projection=reference would draw {signs:,} signs, one after another, and takes {LARGEST:,}: ask for "
                "fewer dims, or for projection=rademacher, which has no such bound"
            )
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._signs = torch.from_numpy(2 * bits.astype(np.float32) - 1).to(self.device)  # of each byte, (256, 8)
        self._bits = {(name, dim): bits for dim in self.dims for name, bits in self._draw(dim).items()}

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        for dim in self.dims:
            rows = max(1, BLOCK_ELEMENTS // dim)
            image = torch.zeros(gradients.shape[0], dim, device=gradients.device)
            for start in range(0, gradients.shape[1], rows):
                part = gradients[:, start : start + rows]
                image.addmm_(part, self.matrix(name, start, start + part.shape[1], dim))
            sums[dim].add_(image, alpha=dim**-0.5)

    def matrix(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        """Return rows `start` to `stop` of the parameter's part: (stop − start, dim) float32 of ±1."""
        packed = self._bits[name, dim][start:stop]
        signs = self._signs.index_select(0, packed.flatten().int())
        return signs.view(len(packed), -1)[:, :dim]

    def _draw(self, dim: int) -> dict[str, Tensor]:
        """Draw the bits of all parameters, in order, by name: (size, ⌈dim / 8⌉) uint8, the first in the lowest bit."""
        generator = np.random.RandomState(self.seed)
        rows = max(1, DRAWN // dim)
        found = {}
        for name, size in self.sizes.items():
            bits = np.empty((size, -(-dim // 8)), np.uint8)
            for start in range(0, size, rows):
                part = bits[start : start + rows]
                drawn = generator.randint(2, size=(len(part), dim), dtype=np.int64)
                part[:] = np.packbits(drawn.astype(np.uint8), axis=1, bitorder="little")
            found[name] = torch.from_numpy(bits).to(self.device)
        return found
