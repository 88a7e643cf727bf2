"""What scores predict for each target row or subtask of a task, beside one number a row of the pool as /scores has it.

For validations of a few hundred or thousand rows: a chunk of features is made float32, divided by its lengths and
multiplied, without the cache and the fast kernels of datastore/scores.py, and with a linear map before it where
TrackStar's preconditioning is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from datastore.correlation import Numbers
from datastore.errors import Conflict
from datastore.influence import Floats, Mask, everywhere, normalise
from datastore.preconditioning import inverse_root, mixed, second_moment
from datastore.segments import Rows

Places = NDArray[np.int64]
Members = NDArray[np.uint8]
"""Which rows of a pool are in each of some subsets, a bit for each row as `numpy.packbits` has them."""
SUMMED_ROWS = 1024
"""Rows of the pool that are added at once."""
Fold = Callable[[Floats], Floats]
"""From the unit rows of a task (m, dim) to what the pool's rows are multiplied with (q, dim)."""


@dataclass(frozen=True)
class Target:
    """What a prediction is for: a row, or the rows of a subtask."""

    row: int | None
    subtask: str
    measured: Places
    """Rows of the split whose mean loss is predicted."""
    asked: Places
    """Validation rows whose mean score predicts it."""


def targets_of(
    measured: Mask, asked: Mask, *, subtasks: Sequence[str], asked_subtasks: Sequence[str], by_subtask: bool
) -> list[Target]:
    """The targets that have a row with a loss (`measured`, rows of the split) and a validation row with a feature.

    `by_subtask` False takes each row by itself, where both are the same rows. Raises `Conflict` where there is none.
    """
    if by_subtask:
        found = [
            Target(
                row=None,
                subtask=name,
                measured=np.flatnonzero(measured & (np.array(subtasks) == name)),
                asked=np.flatnonzero(asked & (np.array(asked_subtasks) == name)),
            )
            for name in dict.fromkeys(subtasks)
        ]
    else:
        rows = np.flatnonzero(measured & asked).tolist()
        found = [Target(row, subtasks[row], np.array([row]), np.array([row])) for row in rows]
    found = [target for target in found if len(target.measured) and len(target.asked)]
    if not found:
        raise Conflict(
            "no target has both a loss and a feature, so nothing can be compared: GET /gradients shows why rows have "
            "no feature, and a larger max_length may leave something of their answers"
        )
    return found


def losses_of(targets: Sequence[Target], losses: Numbers) -> Numbers:
    """Each target's mean loss (trainings, targets) from those of the rows (trainings, rows)."""
    return np.stack([losses[:, target.measured].mean(axis=1) for target in targets], axis=1)


def fold_of(targets: Sequence[Target]) -> Fold:
    """The mean unit row of each target (targets, dim)."""
    return lambda rows: np.stack([rows[target.asked].mean(axis=0) for target in targets])


def predictions(
    pool: Sequence[Rows], task: Sequence[Rows], *, weights: Sequence[float], fold: Fold, trackstar: bool = False
) -> tuple[Floats, list[float]]:
    """The influence of every row of the pool on what `fold` makes of the task's rows (n, q).

    One view per checkpoint of each, and its weight. A row without a feature at some checkpoint has 0. `trackstar`
    whitens both sides first; then the share of the task's second moment is given back, too, for each checkpoint.
    """
    usable = everywhere([view.valid for view in pool])
    total: Floats | None = None
    shares = []
    for mine, theirs, weight in zip(pool, task, weights, strict=True):
        root = None
        if trackstar:
            moments = [second_moment(_features(view)) for view in (mine, theirs)]
            moment, share = mixed(*moments, target_rows=int(theirs.valid.sum()))
            root = inverse_root(moment)
            shares.append(share)
        asked = fold(np.concatenate(list(_unit_rows(theirs, root)))) * np.float32(weight)
        if total is None:
            total = np.zeros((len(usable), len(asked)), np.float32)
        for (start, stop), rows in zip(pairwise(mine.edges), _unit_rows(mine, root), strict=True):
            total[start:stop] += rows @ asked.T
    if total is None:
        raise ValueError("predictions need a checkpoint")
    total[~usable] = 0
    return total, shares


def members(subsets: Iterable[Sequence[int]], rows: int) -> Members:
    """Subsets of the rows of a pool, a bit for each row: (subsets, rows / 8)."""
    found = []
    for subset in subsets:
        inside = np.zeros(rows, bool)
        inside[subset] = True
        found.append(np.packbits(inside))
    return np.stack(found)


def sums(values: Floats, subsets: Members) -> Numbers:
    """The sum of each column of `values` (n, q) over the rows of each subset (`members`): (subsets, q)."""
    found = np.zeros((len(subsets), values.shape[1]))
    for start in range(0, len(values), SUMMED_ROWS):
        rows = values[start : start + SUMMED_ROWS].astype(np.float64)
        inside = np.unpackbits(subsets[:, start // 8 : start // 8 + SUMMED_ROWS // 8], axis=1, count=len(rows))
        found += inside.astype(np.float64) @ rows
    return found


def _features(view: Rows) -> Iterator[Floats]:
    """The features of a view, a chunk at a time; zeros where there is none."""
    valid = view.valid
    for start, stop in pairwise(view.edges):
        rows = view.features(start, stop)
        rows[~valid[start:stop]] = 0
        yield rows


def _unit_rows(view: Rows, root: Floats | None) -> Iterator[Floats]:
    for rows in _features(view):
        yield normalise(rows if root is None else rows @ root)
