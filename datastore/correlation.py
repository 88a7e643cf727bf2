"""Rank correlation of what scores predict with what trainings gave, and how sure it is: arrays in, numbers out.

The linear datamodeling score (LDS) of Park et al. 2023 (TRAK, arXiv 2303.14186, section 2): models are trained on
random subsets of a pool, each subset's effect on a target is predicted as the sum of its rows' scores, and the
predictions are compared with the effects by Spearman's rank correlation. Here an effect is the negative loss: a score
is higher the more its row helps.

Intervals are percentile bootstrap intervals of 95 % (Efron 1979). Those of a correlation draw the trainings anew, since
these are the sample, and hold the targets fixed: they say what other subsets would have given for the same targets. All
scores of a validation are drawn with the same draws: the difference of two is known better than either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

LEVEL = (2.5, 97.5)
"""Percentiles between which an interval lies."""


def ranks(values: NDArray[np.floating]) -> Numbers:
    """Ranks from 0 of each column's values (m, t); equal values share the mean of their ranks.

    >>> ranks(np.array([[3.0], [1.0], [3.0]]))[:, 0].tolist()
    [1.5, 0.0, 1.5]
    """
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    place = np.arange(len(values))[:, None]
    begins = np.ones(values.shape, bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    ends = np.ones(values.shape, bool)
    ends[:-1] = begins[1:]
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, place, len(values))[::-1], axis=0)[::-1]
    found = np.empty(values.shape)
    np.put_along_axis(found, order, (first + last) / 2, axis=0)
    return found


def spearman(first: NDArray[np.floating], second: NDArray[np.floating]) -> Numbers:
    """Spearman's rank correlation of each column of `first` (m, t) with the same column of `second`: (t,).

    A column without two different values predicts nothing: its correlation is 0.
    """
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    spread = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    found: Numbers = np.divide((a * b).sum(axis=0), spread, out=np.zeros(a.shape[1]), where=spread > 0)
    return found


def resampled(predicted: NDArray[np.floating], effects: NDArray[np.floating], *, samples: int, seed: int) -> Numbers:
    """The mean correlation over targets of each of `samples` bootstrap samples of the m trainings: (samples,)."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(effects), size=len(effects)) for _ in range(samples))
    return np.array([spearman(predicted[draw], effects[draw]).mean() for draw in draws])


def resampled_change(changes: NDArray[np.floating], *, samples: int, seed: int) -> Numbers:
    """The mean of `changes` (trainings, targets) in each of `samples` bootstrap samples: (samples,).

    Trainings and targets are both drawn anew: a few trainings with other seeds alone would make it look too sure.
    """
    generator = np.random.default_rng(seed)
    draws = ([generator.integers(count, size=count) for count in changes.shape] for _ in range(samples))
    return np.array([changes[np.ix_(rows, columns)].mean() for rows, columns in draws])


def interval(samples: NDArray[np.floating]) -> tuple[float, float]:
    """Between which values 95 % of the samples lie."""
    low, high = np.percentile(samples, LEVEL)
    return float(low), float(high)
