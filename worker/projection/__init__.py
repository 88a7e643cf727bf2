"""Seeded Johnson–Lindenstrauss maps that are never stored: every worker draws the same one from a few integers.

Random numbers come in streams (`words.py`), one for each parameter and purpose.

Maps (x: the flat gradient of one example, k: the dimension):

* `blocks`: every parameter is cut into runs of k coordinates (the last one takes what is left). Coordinate c has the
  sign of bit c mod 64 of word ⌊c / 64⌋ of its stream (set: +1), whatever k is; run j is added to the k sums at the
  cyclic offset ⌊word_j · k / 2⁶⁴⌋ of the stream `offsets/<k>`. It reads the gradient once per dimension and multiplies
  by no matrix. Two coordinates of one run never meet and two of different runs meet with probability 1/k (to k/2⁶⁴),
  which is all that Count-Sketch's variance needs (Charikar, Chen and Farach-Colton, 2002): E⟨φx, φy⟩ = ⟨x, y⟩ and
  Var ≤ (‖x‖²‖y‖² + ⟨x, y⟩²) / k, no scale needed.
* `sjlt`: coordinate c, with the same sign, is added to the sum ⌊word_c · k / 2⁶⁴⌋ of the stream `places` (one sum: four
  per coordinate, with half the weight, cost four times as much and measured no better). Mean and bound are those of
  `blocks`; its price is a random access per coordinate, where `blocks` adds runs.
* `fft`: the same signs, a real Fourier transform of each parameter over the next power of two n ≥ max(size, k), and of
  its n outputs the k whose words in the stream `rows/<n>` are the smallest, times √(n/k). The real orthonormal basis
  has the rows 1/√n; √(2/n)·cos and −√(2/n)·sin of 2πfc/n for f = 1 … n/2 − 1; (−1)^c/√n. The same mean and bound; a
  smaller dimension of the same n takes the first outputs of a larger one.
* `rademacher`: φx = xR / √k with R of independent ±1: row c has its column j from bit j mod 64 of word
  c · 2¹⁴ + ⌊j / 64⌋. The same mean, and the variance (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ x²y²) / k; its price is 2·p·k operations
  per example and the making of R, block by block, for every batch. A smaller dimension takes the first columns of a
  larger one.
* `reference`: φx = xP with P of independent ±1/√k as GradEx's code draws it (arXiv 2409.19458): 2b − 1 with b from
  NumPy's legacy generator, `RandomState(seed).randint(2, size=(p, k))` row by row over the parameters in the model's
  order. The same mean and variance as `rademacher`'s, for numbers that are to be those of that code.
* `none`: the flat gradient itself, the parameters one after another; its only dimension is their number p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.projection.blocks import Blocks
from worker.projection.fft import Fft
from worker.projection.identity import Identity
from worker.projection.interface import Projection, ProjectionName
from worker.projection.rademacher import Rademacher
from worker.projection.reference import Reference
from worker.projection.sjlt import Sjlt
from worker.projection.words import MAX_DIM, PROJECTION_VERSION

__all__ = ["MAX_DIM", "PROJECTION_VERSION", "Projection", "ProjectionName", "make_projection"]

_PROJECTIONS: dict[ProjectionName, type[Projection]] = {
    "blocks": Blocks,
    "sjlt": Sjlt,
    "fft": Fft,
    "rademacher": Rademacher,
    "reference": Reference,
    "none": Identity,
}


def make_projection(
    name: ProjectionName,
    *,
    dims: Sequence[int],
    parameters: Sequence[tuple[str, torch.Size]],
    seed: int,
    device: torch.device | str = "cpu",
) -> Projection:
    """Make the map called `name` onto each of `dims`; the same arguments give the same map anywhere.

    Raises ValueError where a dimension is out of range, or is not the number of parameters for `none`, or where
    `reference` would draw more signs than it takes.
    """
    return _PROJECTIONS[name](dims=dims, parameters=parameters, seed=seed, device=torch.device(device))
