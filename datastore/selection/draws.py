"""Rows at random: the control that every selection is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datastore.influence import NO_SUBTASK, Floats, Mask, TaskScores
from datastore.selection.top import Selected, ranking


def draw(rows: int, seed: int) -> TaskScores:
    """A number from (0, 1] for every row: the k rows with the highest are a uniform draw without replacement.

    The numbers are the ranks of a permutation (numpy's PCG64 of this seed) over the number of rows: no two are equal,
    up to the 2^24 rows that float32 can count.
    """
    return TaskScores(
        score=((np.random.default_rng(seed).permutation(rows) + 1) / max(rows, 1)).astype(np.float32),
        subtask=np.full(rows, NO_SUBTASK, np.int16),
        valid=np.ones(rows, bool),
    )


def matched(
    lengths: NDArray[np.integer], drawn: Floats, among: Mask, wanted: Sequence[int] | NDArray[np.integer]
) -> Selected:
    """Rows of the lengths that are wanted, at random: of each length those with the highest numbers drawn.

    Where the candidates include the rows whose lengths are wanted, no length is ever missing, and the draw is uniform
    among all sets of rows with these lengths: a random selection, given its lengths. A length of which there are too
    few rows is made up for by the nearest one left. `lengths` and `drawn` are those of all rows of the pool (n,); the
    answer is in the order of the numbers drawn.
    """
    rows = ranking(drawn, among)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    known = lengths[rows].astype(np.int64)
    free = np.ones(len(rows), bool)
    unmet: list[int] = []
    for length, count in zip(*np.unique(np.asarray(wanted, np.int64), return_counts=True), strict=True):
        first, last = np.searchsorted(known, [length, length + 1])
        free[first : min(last, first + count)] = False
        unmet += [int(length)] * max(0, count - (last - first))
    for length in unmet[: int(free.sum())]:
        left = np.flatnonzero(free)
        free[left[np.argmin(np.abs(known[left] - length))]] = False
    taken = np.zeros(len(among), bool)
    taken[rows[~free]] = True
    return ranking(drawn, taken)
