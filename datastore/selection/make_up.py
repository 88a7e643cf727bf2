"""What was chosen and what was left out, counted; and where rows of several pools lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from datastore.influence import Mask


def locate(rows: Iterable[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The pool, and the row within it, of rows of several pools one after the other.

    >>> locate([0, 4, 3], [3, 2])
    [(0, 0), (1, 1), (1, 0)]
    """
    starts = np.array([0, *accumulate(sizes)])
    numbers = np.asarray(list(rows), np.int64)
    pools = np.searchsorted(starts, numbers, side="right") - 1
    return list(zip(pools.tolist(), (numbers - starts[pools]).tolist(), strict=True))


def left_out(reasons: dict[int, str], excluded: Mask | None = None) -> dict[str, int]:
    """How many rows cannot be chosen, by reason: those without a feature, and the others that are excluded."""
    found = Counter(reasons.values())
    if excluded is not None:
        others = excluded.copy()
        others[list(reasons)] = False
        found["excluded"] += int(others.sum())
    return {reason: number for reason, number in found.most_common() if number}


@dataclass(frozen=True)
class Labelled:
    """A label for every row: names, and the number of each row's (n,)."""

    names: Sequence[str]
    codes: NDArray[np.int32]

    def counts(self, rows: NDArray[np.integer] | None = None) -> dict[str, int]:
        """How many of the rows (by default all) have each label, the most frequent first."""
        found = np.bincount(self.codes if rows is None else self.codes[rows], minlength=len(self.names))
        order = np.argsort(-found, kind="stable")
        return {self.names[place]: int(found[place]) for place in order.tolist() if found[place]}
