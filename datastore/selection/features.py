"""The features of a pool's rows for comparing rows with each other, as the scores compare them with the task's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from datastore.influence import Floats
from datastore.segments import Rows
from datastore.selection.make_up import locate


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
