"""Rows like K shots of a task, and unlike each other (ROCKET, arXiv 2408.15915, algorithm 2): scores in, rows out.

The C nearest rows (datastore/nearness.py) are met best first, and one whose cosine with a row taken before exceeds τ is
passed over. Nothing is put in its place: fewer than C rows may come out. Rows nearest by `kde` and `hull` are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from gradstore.types import ShotNearness
from numpy.typing import NDArray

from datastore.influence import Mask
from datastore.nearness import INSIDE
from datastore.selection.diversity import Reader
from datastore.selection.duplicates import FeatureDuplicates
from datastore.selection.top import Selected, top

TWIN_BLOCK = 1024  # rows, of those passed over and of those taken


@dataclass(frozen=True)
class RowsOfShots:
    """The rows that were taken, and those that were passed over."""

    rows: list[int]
    """Best first."""
    twins: dict[int, int] = field(default_factory=dict)
    """Row that was passed over → the row taken before with which it has the largest cosine."""


def nearest(score: NDArray[np.floating], among: Mask, budget: int, *, by: ShotNearness, seed: int) -> Selected:
    """At most `budget` rows of a mask (n,), best first: the highest scores, or drawn by the seed for `kde` and `hull`.

    A row's draw does not depend on the mask. Of equal scores the first row comes first. A draw without replacement in
    proportion to the density is the highest log-densities after a Gumbel number was added to each (Vieira, Gumbel-max
    trick and weighted reservoir sampling, 2014).
    """
    if by in {"max_cosine", "centroid"}:
        return top(score, among, budget)
    generator = np.random.default_rng(seed)
    if by == "kde":
        drawn = top(score + generator.gumbel(size=len(score)), among, budget)
        return drawn[np.argsort(-score[drawn], kind="stable")]
    inside = score >= -INSIDE
    return top(np.where(inside, generator.random(len(score)), score), among, budget)


def unlike_each_other(features: Reader, rows: Sequence[int], tau: float) -> RowsOfShots:
    """Of rows met in this order those whose cosine with no row taken before exceeds τ.

    τ = 1 passes over none. Raises `InvalidInput` where these are too many to be compared, see `FeatureDuplicates`.
    """
    if tau >= 1:
        return RowsOfShots(list(rows))
    seen = FeatureDuplicates(features, tau, iter(rows), len(rows), parameter="tau")
    kept = [row for row in rows if seen.keep(row)]
    return RowsOfShots(kept, _twins(features, rows, kept))


def _twins(features: Reader, rows: Sequence[int], kept: Sequence[int]) -> dict[int, int]:
    """For each of the other rows the kept one before it with the largest cosine, two blocks in memory at once."""
    taken = set(kept)
    passed = [row for row in rows if row not in taken]
    number = {row: place for place, row in enumerate(rows)}
    after, before = (np.array([number[row] for row in some], np.int64) for some in (passed, kept))
    twins: dict[int, int] = {}
    for start in range(0, len(passed), TWIN_BLOCK):
        block = passed[start : start + TWIN_BLOCK]
        mine, largest = features(block), np.full(len(block), -np.inf)
        for first in range(0, len(kept), TWIN_BLOCK):
            others = kept[first : first + TWIN_BLOCK]
            later = before[None, first : first + TWIN_BLOCK] > after[start : start + TWIN_BLOCK, None]
            cosines = np.where(later, -np.inf, mine @ features(others).T)
            nearer = cosines.max(axis=1) > largest
            largest = np.maximum(largest, cosines.max(axis=1))
            twins |= {block[at]: others[cosines[at].argmax()] for at in np.flatnonzero(nearer)}
    return twins
