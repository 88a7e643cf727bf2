"""The features of a pool's rows for comparing rows with each other, as the scores compare them with the task's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from datastore.influence import Floats, everywhere, normalise
from datastore.segments import Rows
from datastore.selection.diversity import Reader
from datastore.selection.make_up import locate

BLOCK_ROWS = 1024
"""Rows whose nearest shots are looked for together."""


class PoolFeatures:
    """Rows of one or several pools, one view a checkpoint each; every row must have a feature at each checkpoint."""

    def __init__(self, pools: Sequence[Sequence[Rows]], weights: Sequence[float]) -> None:
        self._pools = pools
        self._sizes = [views[0].rows for views in pools]
        self._roots = np.sqrt(np.array(weights, np.float32))
        self._ends = list(accumulate((view.dim for view in pools[0]), initial=0))

    @property
    def dim(self) -> int:
        """Numbers of a row, all checkpoints together."""
        return self._ends[-1]

    def unit(self, rows: Sequence[int]) -> Floats:
        """Unit rows of all checkpoints side by side, each times the root of its weight (m, dim).

        The product of two of them is their cosine, weighted over the checkpoints: Σ_i w_i cos_i.
        """
        found = np.empty((len(rows), self.dim), np.float32)
        places = np.array(locate(rows, self._sizes), np.int64).reshape(-1, 2)
        for pool, views in enumerate(self._pools):
            mine = np.flatnonzero(places[:, 0] == pool)
            ascending = mine[np.argsort(places[mine, 1], kind="stable")]
            for number, view in enumerate(views):
                found[ascending, self._ends[number] : self._ends[number + 1]] = view.take(places[ascending, 1])
        for number, root in enumerate(self._roots):
            part = found[:, self._ends[number] : self._ends[number + 1]]
            part *= root / np.linalg.norm(part, axis=1, keepdims=True)
        return found


def influences(train: Floats, target: Sequence[Rows], weights: Sequence[float]) -> Floats:
    """Influence of each training row on each target row (n, m), the checkpoints' cosines weighted (LESS, eq. 3).

    `train` is as `PoolFeatures.unit` has it: the checkpoints side by side, each times the root of its weight. A target
    row without a feature has no influence. Raises `Damaged`.
    """
    total = np.zeros((len(train), target[0].rows), np.float32)
    first = 0
    for view, weight in zip(target, weights, strict=True):
        own = train[:, first : first + view.dim] * np.float32(np.sqrt(weight))
        for start, rows in view.decoded_blocks(check=True):
            total[:, start : start + len(rows)] += own @ normalise(rows).T
        first += view.dim
    return total


class NearestShots:
    """The rows of tasks that others are nearest to, of each task a view for each checkpoint."""

    def __init__(self, targets: Sequence[Sequence[Rows]], weights: Sequence[float]) -> None:
        self._targets = targets
        self._weights = weights
        self._usable = [everywhere([view.valid for view in views]) for views in targets]
        self.count = sum(int(usable.sum()) for usable in self._usable)
        """Rows of all tasks that have a feature at every checkpoint."""

    def of(self, features: Reader, rows: NDArray[np.int64], task: NDArray[np.int16]) -> NDArray[np.int64]:
        """For each row the one with the largest cosine of the task with its number (n,), a block of rows at a time."""
        found = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            unit = features(rows[block].tolist())
            for number in np.unique(task[block]).tolist():
                mine = np.flatnonzero(task[block] == number)
                cosines = influences(unit[mine], self._targets[number], self._weights)
                cosines[:, ~self._usable[number]] = -np.inf
                found[start + mine] = cosines.argmax(axis=1)
        return found
