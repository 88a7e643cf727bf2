"""Scores as a whole: how they are distributed, what a cut through them takes, and how far tasks agree on them.

All of it follows from score vectors that are cached already: one sort for a distribution, and one for each task that is
compared with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from gradstore.types import Cuts, Overlaps, ScoreDistribution, SelectionRecipe, TaskOverlap
from numpy.typing import NDArray

from datastore.answers import vector
from datastore.correlation import ranks
from datastore.datasets import Origins
from datastore.influence import Mask, TaskScores
from datastore.selection.top import Selected, candidates, count, ranking, top, wanted


def distribution(
    recipe: SelectionRecipe, scores: Sequence[TaskScores], origins: Origins, *, bins: int, steps: int
) -> ScoreDistribution:
    """The histogram of a pool's scores by origin, and what the fractions 1/steps, 2/steps, … of the pool take of it.

    Raises `Conflict` where no row has a score.
    """
    combined = vector(scores, recipe)
    ordered = ranking(combined.score, candidates(combined.valid, None))
    values = combined.score[ordered]
    edges = _edges(float(values[-1]), float(values[0]), bins)
    codes = origins.codes[ordered]
    return ScoreDistribution(
        recipe=recipe,
        rows=len(combined.valid),
        scored=len(ordered),
        edges=edges.tolist(),
        counts=_counts(values, codes, origins.names, edges),
        cuts=_cuts(values, codes, origins.names, pool=len(combined.valid), steps=steps),
    )


def overlaps(
    recipe: SelectionRecipe, scores: Sequence[TaskScores], *, pct: float | None = None, k: int | None = None
) -> Overlaps:
    """What the best rows of each pair of the recipe's tasks share, and how far the tasks agree on all rows.

    Raises `Conflict` where a task has no row that can be chosen.
    """
    chosen = [top(task.score, task.valid, wanted(task.valid, None, pct=pct, k=k)) for task in scores]
    everywhere_alike = all(np.array_equal(task.valid, scores[0].valid) for task in scores)
    standings = [_standing(task.score[task.valid]) for task in scores] if everywhere_alike else None
    pairs = []
    for one, other in combinations(range(len(scores)), 2):
        if standings is not None:
            correlation = _product(standings[one], standings[other])
        else:
            both: Mask = scores[one].valid & scores[other].valid
            correlation = rank_correlation(scores[one].score[both], scores[other].score[both])
        tasks = (recipe.tasks[one], recipe.tasks[other])
        pairs.append(_overlap(tasks, chosen[one], chosen[other], correlation))
    return Overlaps(recipe=recipe, count=len(chosen[0]), pairs=pairs)


def rank_correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float | None:
    """Spearman's rank correlation (n,), (n,); equal values share their mean rank. None where all of one are equal."""
    return _product(_standing(one), _standing(other))


def _standing(values: NDArray[np.floating]) -> NDArray[np.float32] | None:
    """The ranks of values (n,) less their mean, as a unit vector: the product of two is their correlation. None where
    all are equal.
    """
    centred = ranks(values[:, None])[:, 0] - (len(values) - 1) / 2
    length = np.linalg.norm(centred)
    return None if length == 0 else (centred / length).astype(np.float32)


def _product(one: NDArray[np.float32] | None, other: NDArray[np.float32] | None) -> float | None:
    return None if one is None or other is None else float(np.clip(one @ other, -1, 1))


def _counts(
    values: NDArray[np.floating], codes: NDArray[np.int32], names: Sequence[str], edges: NDArray[np.float64]
) -> dict[str, list[int]]:
    """How many values of each origin lie in each bin; the last bin has its upper edge, too."""
    bins = len(edges) - 1
    places = np.minimum(np.searchsorted(edges, values, side="right") - 1, bins - 1)
    table = np.bincount(codes * np.int64(bins) + places, minlength=len(names) * bins).reshape(len(names), bins)
    return dict(zip(names, table.tolist(), strict=True))


def _edges(low: float, high: float, bins: int) -> NDArray[np.float64]:
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def _cuts(
    values: NDArray[np.floating], codes: NDArray[np.int32], names: Sequence[str], *, pool: int, steps: int
) -> Cuts:
    """What each step takes of the rows that have a score: their `values` and `codes` of origins, best first."""
    fractions = [step / steps for step in range(1, steps + 1)]
    rows = [min(count(pool, pct=fraction), len(values)) for fraction in fractions]
    first = np.searchsorted(rows, np.arange(len(values)), side="right")  # the first step that takes each row
    added = np.bincount(codes * np.int64(steps + 1) + first, minlength=len(names) * (steps + 1))
    taken = added.reshape(len(names), steps + 1)[:, :steps].cumsum(axis=1)
    origins = dict(zip(names, taken.tolist(), strict=True))
    return Cuts(pct=fractions, rows=rows, scores=values[np.array(rows) - 1].tolist(), origins=origins)


def _overlap(tasks: tuple[str, str], first: Selected, second: Selected, correlation: float | None) -> TaskOverlap:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return TaskOverlap(
        tasks=tasks,
        shared=shared,
        jaccard=shared / (len(first) + len(second) - shared),
        rank_correlation=correlation,
    )
