"""The best rows first, equal scores in the order of the pool.

`pct` is a fraction of the pool's N rows, less those that are excluded: ⌊pct·N⌋ as LESS counts. A row without a feature
counts in N and is never chosen. The answer's `pool` is N, so that anybody can check the count.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from datastore.errors import Conflict
from datastore.influence import Mask

Selected = NDArray[np.int64]


def count(pool: int, *, pct: float | None = None, k: int | None = None) -> int:
    """How many of `pool` rows to choose: ⌊pct·pool⌋ but at least one, or `k` but at most all.

    The fraction is taken as it is written: 0.29 of 100 is 29, although the nearest float is a little less.

    >>> count(100, pct=0.29), count(10, pct=0.05), count(10, k=20)
    (29, 1, 10)
    """
    if (pct is None) == (k is None):
        raise ValueError("give either a fraction or a number of rows")
    if pct is not None:
        return max(1, int(Fraction(repr(float(pct))) * pool))
    return min(k or 0, pool)


def candidates(valid: Mask, excluded: Mask | None) -> Mask:
    """The rows that can be chosen (n,): those with a score that are not excluded. Raises `Conflict` where none is."""
    found = valid if excluded is None else valid & ~excluded
    if not found.any():
        raise Conflict(
            f"none of the pool's {len(valid):,} rows can be chosen: "
            f"{int((~valid).sum()):,} have no score and the others are excluded"
        )
    return found


def wanted(valid: Mask, excluded: Mask | None, *, pct: float | None = None, k: int | None = None) -> int:
    """How many rows are asked for, of the pool's that are not excluded; no more than have a score."""
    pool = len(valid) if excluded is None else int((~excluded).sum())
    return min(count(pool, pct=pct, k=k), int(candidates(valid, excluded).sum()))


def fewer(asked: int | None, found: int) -> list[str]:
    """What to say where fewer rows than the number asked for can be chosen."""
    return [f"{found:,} rows instead of {asked:,}: no others can be chosen"] if asked and found < asked else []


def ranking(score: NDArray[np.floating], among: Mask) -> Selected:
    """The rows of a mask (n,), best first (m,)."""
    rows = np.flatnonzero(among)
    best_first: Selected = rows[np.argsort(-score[rows], kind="stable")]
    return best_first


def top(score: NDArray[np.floating], among: Mask, k: int) -> Selected:
    """The `k` rows of a mask with the highest scores, best first: `ranking(score, among)[:k]` without sorting all."""
    rows = np.flatnonzero(among)
    values = score[rows]
    if k >= len(rows):
        return ranking(score, among)
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: k - len(above)]
    chosen = np.sort(np.concatenate([above, equal]))
    best_first: Selected = rows[chosen[np.argsort(-values[chosen], kind="stable")]]
    return best_first
