"""How near rows are to a task's shots (ROCKET, arXiv 2408.15915, algorithm 2): cosines in, one number a row out.

Nearness of a unit row u to the unit shots uᵢ:

    max_cosine   the largest ⟨u, uᵢ⟩, the paper's rule
    centroid     ⟨u, ū⟩ with the mean of the shots, the published code's: it orders unit rows as their distance to the
                 mean does, and prefers rows between the shots to rows like one of them
    kde          the log-density of Gaussians of bandwidth γ around the shots; rows are drawn in proportion to it
    hull         minus the distance to the shots' convex hull; rows that lie in it are drawn first, in any order

The first two are aggregates that influence has, too (`max`, `avg`); the others are here. Unit rows of many numbers
hardly ever lie in a hull, which no unit row but the shots themselves does exactly: what is then taken are those nearest
to it. Rows are known by their cosines with the shots, (n, K), and the hull by those of the shots with each other,
K × K: unit rows of several checkpoints, weighted, are unit rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

INSIDE = 2e-3
"""A distance to the hull up to which a row lies in it: cosines are off by some 1e-6, and distances by its root."""
PRECISE = 1e-4
"""How near to the smallest distance a row's is found, where its cosines are exact."""
HULL_STEPS = 20_000
"""The most steps that are taken for a block of rows; they end as soon as the bound of the error is small enough."""
HULL_BLOCK = 4096  # rows


@dataclass(frozen=True)
class Around:
    """A rule that looks at all shots at once."""

    by: Literal["kde", "hull"]
    bandwidth: float | None = None
    """γ of `kde`: unit rows are at most 2 apart, so that 10, the paper's best, draws nearly at random."""

    def score(self, cosines: NDArray[np.floating], gram: Doubles) -> Doubles:
        """The nearness (n,) of rows with these cosines (n, K) to shots with these (K, K), the higher the nearer."""
        exact = np.asarray(cosines, np.float64)
        if self.by == "hull":
            return -hull_distance(exact, gram)
        return density(exact, self.bandwidth or 1.0)

    def said(self) -> dict[str, Any]:
        """What a plan, and a name of scores, says of it."""
        return {"by": self.by, "bandwidth": self.bandwidth}


def density(cosines: Doubles, bandwidth: float) -> Doubles:
    """The log-density (n,) of Gaussians around K unit shots, less the constant that makes it integrate to 1."""
    exponents = (cosines - 1) / bandwidth**2  # −‖u − uᵢ‖² / 2γ², of unit rows
    largest = exponents.max(axis=1, keepdims=True)
    return np.asarray(largest[:, 0] + np.log(np.exp(exponents - largest).mean(axis=1)))


def hull_distance(products: Doubles, gram: Doubles, *, squares: Doubles | float = 1.0) -> Doubles:
    """Euclidean distances (n,) of rows to the convex hull of K corners.

    Known are their products with the corners (n, K), those of the corners with each other (K, K), and the rows'
    `squares` (n,), which are 1 for unit rows. ½‖u − Σ λᵢuᵢ‖² is made small over weights λ that are not negative and sum
    up to 1, by accelerated projected gradients (Beck and Teboulle, FISTA, 2009) that begin anew where they lead uphill
    (O'Donoghue and Candès, 2015). A row is done with when its value is within `PRECISE`² / 8 of the bound that its
    gradient gives on the smallest one.
    """
    found = np.empty(len(products))
    for start in range(0, len(products), HULL_BLOCK):
        block = products[start : start + HULL_BLOCK]
        weights = _hull_weights(block, gram)
        found[start : start + HULL_BLOCK] = (weights * (weights @ gram - 2 * block)).sum(axis=1)
    return np.sqrt(np.maximum(found + squares, 0))


def _hull_weights(products: Doubles, gram: Doubles) -> Doubles:
    """The weights (n, K) of the nearest point of a hull, from products of rows with corners and of corners."""
    step = 1 / max(float(np.linalg.eigvalsh(gram)[-1]), np.finfo(np.float64).tiny)
    found = np.full(products.shape, 1 / products.shape[1])
    left = np.arange(len(products))
    weights, ahead, pace = found.copy(), found.copy(), np.ones((len(products), 1))
    for _ in range(HULL_STEPS):
        moved = _onto_simplex(ahead - step * (ahead @ gram - products[left]))
        uphill = ((ahead - moved) * (moved - weights)).sum(1, keepdims=True) > 0
        faster = np.where(uphill, 1.0, (1 + np.sqrt(1 + 4 * pace**2)) / 2)
        ahead = moved + np.where(uphill, 0.0, (pace - 1) / faster) * (moved - weights)
        weights, pace = moved, faster
        gradient = weights @ gram - products[left]
        going = (gradient * weights).sum(1) - gradient.min(1) > PRECISE**2 / 8
        found[left[~going]] = weights[~going]
        if not going.any():
            return found
        left, weights, ahead, pace = left[going], weights[going], ahead[going], pace[going]
    found[left] = weights
    return found


def _onto_simplex(rows: Doubles) -> Doubles:
    """The nearest weights (n, K) that are not negative and sum up to 1 (Duchi et al., 2008, figure 1)."""
    falling = -np.sort(-rows, axis=1)
    excess = (np.cumsum(falling, axis=1) - 1) / np.arange(1, rows.shape[1] + 1)
    last = (falling > excess).sum(1) - 1
    found: Doubles = np.maximum(rows - excess[np.arange(len(rows)), last][:, None], 0)
    return found
