"""How well influence was predicted: from true and predicted scores of rows to the figures of a report.

All are of rows whose truth the predictor has not seen. A `budget` is the part of those rows whose gradients would be
computed, the highest predicted first; the recall at a budget is the part of the truly best rows that are among them:
what a cascade would have found.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from gradstore.types import CalibrationBin, Recall
from numpy.typing import NDArray

from datastore.correlation import Numbers, ranks

Classes = NDArray[np.int64]

BEST = 0.05
"""The part of the rows that a selection is after: LESS's 5 %."""
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
BINS = 10


def r2(truth: NDArray[np.floating], predicted: NDArray[np.floating]) -> float:
    """The coefficient of determination: 1 − Σ(y − ŷ)² / Σ(y − ȳ)², at most 1, below 0 where the mean predicts better.

    0 where all true scores are equal: there is nothing to determine.
    """
    y, guess = truth.astype(np.float64), predicted.astype(np.float64)
    spread = np.square(y - y.mean()).sum()
    return float(1 - np.square(y - guess).sum() / spread) if spread > 0 else 0.0


def rank_correlation(truth: NDArray[np.floating], predicted: NDArray[np.floating]) -> float:
    """Spearman's rank correlation; 0 where one of the two does not differ between rows."""
    a, b = (ranks(np.asarray(values)[:, None])[:, 0] for values in (truth, predicted))
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def best(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The places of the `count` largest values, the largest first; of equal ones the first."""
    return np.argsort(-np.asarray(values, np.float64), kind="stable")[:count]


def recall(truth: NDArray[np.floating], predicted: NDArray[np.floating], *, budget: float, part: float = BEST) -> float:
    """Which part of the truly best rows (`part` of all, at least one) is among the first `budget` by prediction."""
    wanted = best(truth, max(1, ceil(part * len(truth))))
    looked_at = best(predicted, ceil(budget * len(predicted)))
    return float(np.isin(wanted, looked_at).mean())


def recalls(truth: NDArray[np.floating], predicted: NDArray[np.floating]) -> list[Recall]:
    """The recall of the truly best 5 % at each budget, beside what chance gives, which is the budget itself."""
    return [Recall(budget=budget, recall=recall(truth, predicted, budget=budget)) for budget in BUDGETS]


def calibration(truth: NDArray[np.floating], predicted: NDArray[np.floating]) -> list[CalibrationBin]:
    """Rows parted by their prediction into tenths, the lowest first: what was predicted of each, and what was true."""
    order = np.argsort(predicted, kind="stable")
    return [
        CalibrationBin(
            rows=len(part),
            predicted=float(predicted[part].mean()),
            true=float(truth[part].mean()),
            low=float(np.percentile(truth[part], 10)),
            high=float(np.percentile(truth[part], 90)),
        )
        for part in np.array_split(order, min(BINS, len(order)))
        if len(part)
    ]


def edges(values: NDArray[np.floating], levels: int) -> Numbers:
    """The quantiles that part values into so many levels of equal size (levels − 1,)."""
    return np.quantile(values.astype(np.float64), np.arange(1, levels) / levels)


def levels_of(values: NDArray[np.floating], borders: Sequence[float] | Numbers) -> Classes:
    """The level of each value, 0 the lowest: how many of the borders it reaches."""
    return np.searchsorted(np.asarray(borders), values, side="right").astype(np.int64)


def confusion(truth: Classes, predicted: Classes, levels: int) -> list[list[int]]:
    """How many rows of each true level (a row of the matrix) were predicted to be of each level."""
    found = np.zeros((levels, levels), np.int64)
    np.add.at(found, (truth, predicted), 1)
    counts: list[list[int]] = found.tolist()
    return counts
