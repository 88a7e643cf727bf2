"""Choosing rows by their scores: the best first, equal scores in the order of the pool.

`pct` is a fraction of the pool's N rows, less those that are excluded: ⌊pct·N⌋ as LESS counts. A row without a feature
counts in N and is never chosen. The answer's `pool` is N, so that anybody can check the count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datastore.errors import Conflict
from datastore.influence import Floats, Mask, Subtasks, TaskScores

Selected = NDArray[np.int64]


@dataclass(frozen=True)
class CombinedScores:
    """The scores of several tasks as one."""

    score: Floats
    """(n,)"""
    task: NDArray[np.int16]
    """Number of the task that gave the score, or most of it (n,)."""
    subtask: Subtasks
    """Number of that task's subtask (n,)."""
    valid: Mask
    """Which rows have a score for every task (n,)."""


def combine(scores: Sequence[TaskScores], how: Literal["max", "mean"]) -> CombinedScores:
    """One score per row from those of several tasks; of equal tasks the first counts."""
    table = np.stack([task.score for task in scores])
    subtasks = np.stack([task.subtask for task in scores])
    best = table.argmax(axis=0)
    rows = np.arange(table.shape[1])
    return CombinedScores(
        score=table[best, rows] if how == "max" else table.mean(axis=0, dtype=np.float64).astype(np.float32),
        task=best.astype(np.int16),
        subtask=subtasks[best, rows],
        valid=np.logical_and.reduce([task.valid for task in scores]),
    )


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


def top(
    score: NDArray[np.floating],
    valid: Mask,
    *,
    pct: float | None = None,
    k: int | None = None,
    excluded: Mask | None = None,
) -> Selected:
    """The rows with the highest scores, best first; rows that are not valid, or excluded, are never among them.

    Raises `Conflict` where no row can be chosen.
    """
    candidates = np.flatnonzero(valid if excluded is None else valid & ~excluded)
    if not len(candidates):
        raise Conflict(
            f"none of the pool's {len(valid):,} rows can be chosen: "
            f"{int((~valid).sum()):,} have no score and the others are excluded"
        )
    pool = len(valid) if excluded is None else int((~excluded).sum())
    wanted = min(count(pool, pct=pct, k=k), len(candidates))
    values = score[candidates]
    threshold = np.partition(values, len(values) - wanted)[len(values) - wanted]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: wanted - len(above)]
    chosen = np.sort(np.concatenate([above, equal]))
    best_first: Selected = candidates[chosen[np.argsort(-values[chosen], kind="stable")]]
    return best_first


def locate(rows: Iterable[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The pool, and the row within it, of rows of several pools one after the other.

    >>> locate([0, 4, 3], [3, 2])
    [(0, 0), (1, 1), (1, 0)]
    """
    starts = np.array([0, *accumulate(sizes)])
    numbers = np.asarray(list(rows), np.int64)
    pools = np.searchsorted(starts, numbers, side="right") - 1
    return list(zip(pools.tolist(), (numbers - starts[pools]).tolist(), strict=True))


def make_up(labels: Sequence[str], rows: Iterable[int] | None = None) -> dict[str, int]:
    """How many of the rows (by default all) have each label, the most frequent first."""
    return dict(Counter(labels if rows is None else (labels[row] for row in rows)).most_common())


def left_out(reasons: dict[int, str], excluded: Mask | None = None) -> dict[str, int]:
    """How many rows cannot be chosen, by reason: those without a feature, and the others that are excluded."""
    found = Counter(reasons.values())
    if excluded is not None:
        others = excluded.copy()
        others[list(reasons)] = False
        found["excluded"] += int(others.sum())
    return {reason: number for reason, number in found.most_common() if number}
