"""Rows like K shots of a task, and unlike each other (ROCKET, arXiv 2408.15915, algorithm 2): unit rows in, rows out.

Nearness of a row u to the shots uᵢ:

    max_cosine   the largest ⟨u, uᵢ⟩, the paper's rule
    centroid     ⟨u, ū⟩ with the mean of the shots, the published code's: it orders unit rows as their distance to the
                 mean does, and prefers rows between the shots to rows like one of them
    kde          the log-density of Gaussians of bandwidth γ around the shots; rows are drawn in proportion to it
    hull         minus the distance to the shots' convex hull; rows that lie in it are drawn first, in any order

Unit rows of many numbers hardly ever lie in a hull, which no unit row but the shots themselves does exactly: what is
then taken are those nearest to it. Of the K shots only the products with each other are needed, K × K.

The C nearest rows are met best first, and one whose cosine with a row taken before exceeds τ is passed over. Nothing is
put in its place: fewer than C rows may come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datastore.influence import Floats
from datastore.selection.diversity import Reader
from datastore.selection.duplicates import FeatureDuplicates
from datastore.selection.top import Selected, top

ShotNearness = Literal["max_cosine", "centroid", "kde", "hull"]
Doubles = NDArray[np.float64]

INSIDE = 1e-4
"""A distance to the hull up to which a row lies in it: distances are found to within as much."""
HULL_STEPS = 20_000
"""The most steps that are taken for a block of rows; they end as soon as the bound of the error is small enough."""
HULL_BLOCK = 4096  # rows
TWIN_BLOCK = 1024  # rows, of those passed over and of those taken


@dataclass(frozen=True)
class Nearness:
    """How near rows are to the shots."""

    score: Doubles
    """(n,), the higher the nearer."""
    shot: NDArray[np.int64]
    """Number of the shot with the largest cosine (n,)."""


@dataclass(frozen=True)
class RowsOfShots:
    """The rows that were taken, and those that were passed over."""

    rows: list[int]
    """Best first."""
    twins: dict[int, int]
    """Row that was passed over → the row taken before with which it has the largest cosine."""


def nearness(rows: Floats, shots: Floats, *, by: ShotNearness, bandwidth: float = 10.0) -> Nearness:
    """How near unit rows (n, d) are to unit shots (K, d); a row's numbers do not depend on the other rows.

    `bandwidth` is γ of `kde`: unit rows are at most 2 apart, so that 10, the paper's best, draws nearly at random.
    """
    cosines = rows.astype(np.float64) @ shots.astype(np.float64).T
    return Nearness(_score(rows, shots, cosines, by=by, bandwidth=bandwidth), cosines.argmax(axis=1))


def nearest(score: Doubles, budget: int, *, by: ShotNearness, seed: int) -> Selected:
    """At most `budget` rows, best first: those with the highest scores, or drawn by the seed for `kde` and `hull`.

    Of equal scores the first row comes first. A draw without replacement in proportion to the density is the highest
    log-densities after a Gumbel number was added to each (Vieira, Gumbel-max trick and weighted reservoir sampling,
    2014).
    """
    everything = np.ones(len(score), bool)
    if by in {"max_cosine", "centroid"}:
        return top(score, everything, budget)
    generator = np.random.default_rng(seed)
    if by == "kde":
        drawn = top(score + generator.gumbel(size=len(score)), everything, budget)
        return drawn[np.argsort(-score[drawn], kind="stable")]
    inside = score >= -INSIDE
    return top(np.where(inside, generator.random(len(score)), score), everything, budget)


def unlike_each_other(features: Reader, rows: Sequence[int], tau: float) -> RowsOfShots:
    """Of rows met in this order those whose cosine with no row taken before exceeds τ.

    Raises `InvalidInput` where these are too many to be compared, see `FeatureDuplicates`.
    """
    seen = FeatureDuplicates(features, tau, iter(rows), len(rows))
    kept = [row for row in rows if seen.keep(row)]
    return RowsOfShots(kept, _twins(features, rows, kept))


def _twins(features: Reader, rows: Sequence[int], kept: Sequence[int]) -> dict[int, int]:
    """For each of the other rows the kept one before it with the largest cosine, two blocks in memory at once."""
    place = {row: number for number, row in enumerate(rows)}
    taken = set(kept)
    passed = [row for row in rows if row not in taken]
    twins: dict[int, int] = {}
    for start in range(0, len(passed), TWIN_BLOCK):
        block = passed[start : start + TWIN_BLOCK]
        mine, largest = features(block), np.full(len(block), -np.inf)
        for first in range(0, len(kept), TWIN_BLOCK):
            others = kept[first : first + TWIN_BLOCK]
            later = np.array([[place[other] > place[row] for other in others] for row in block])
            cosines = np.where(later, -np.inf, mine @ features(others).T)
            nearer = cosines.max(axis=1) > largest
            largest = np.maximum(largest, cosines.max(axis=1))
            twins |= {block[at]: others[cosines[at].argmax()] for at in np.flatnonzero(nearer)}
    return twins


def _score(rows: Floats, shots: Floats, cosines: Doubles, *, by: ShotNearness, bandwidth: float) -> Doubles:
    if by == "max_cosine":
        return np.asarray(cosines.max(axis=1))
    if by == "centroid":
        return np.asarray(cosines.mean(axis=1))
    if by == "kde":
        exponents = (cosines - 1) / bandwidth**2  # −‖u − uᵢ‖² / 2γ², of unit rows
        largest = exponents.max(axis=1, keepdims=True)
        return np.asarray(largest[:, 0] + np.log(np.exp(exponents - largest).mean(axis=1)))
    return -hull_distance(rows, shots)


def hull_distance(rows: NDArray[np.floating], corners: NDArray[np.floating]) -> Doubles:
    """Euclidean distances (n,) of rows (n, d) to the convex hull of corners (K, d), of any length.

    ½‖u − Σ λᵢuᵢ‖² is made small over weights λ that are not negative and sum up to 1, by accelerated projected
    gradients (Beck and Teboulle, FISTA, 2009) that begin anew where they lead uphill (O'Donoghue and Candès, 2015). A
    row is done with when its value is within `INSIDE`² / 8 of the bound that its gradient gives on the smallest one.
    """
    points, exact = np.asarray(rows, np.float64), np.asarray(corners, np.float64)
    found = np.empty(len(points))
    for start in range(0, len(points), HULL_BLOCK):
        block = points[start : start + HULL_BLOCK]
        weights = _hull_weights(block @ exact.T, exact @ exact.T)
        found[start : start + HULL_BLOCK] = np.linalg.norm(block - weights @ exact, axis=1)
    return found


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
        going = (gradient * weights).sum(1) - gradient.min(1) > INSIDE**2 / 8
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
