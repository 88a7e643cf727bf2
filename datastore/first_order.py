"""How far log-odds after a step in parameters are from what their gradients say: GradEx's first-order error.

At a checkpoint θ* an example has the log-odds z⁰ (its tokens' mean) with the gradient g, and z¹ at θ* + Δ. Estimates
take z⁰ + gᵀΔ for z¹, and their error is

    e = |z⁰ + gᵀΔ − z¹| / max(|z⁰|, |z¹|)

of which the mean of e² over examples is reported ("relative residual sum of squares"), beside the same without gᵀΔ: a
gradient that says nothing has the two alike. Source: GradEx (arXiv 2409.19458).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class FirstOrderErrors:
    """The errors e of n examples; NaN where one of its numbers is not finite, or both log-odds are zero."""

    with_gradient: Numbers
    """(n,)"""
    without_gradient: Numbers
    """(n,) as if the gradient were zero."""

    @property
    def rows(self) -> int:
        """Examples with an error."""
        return int(np.isfinite(self.with_gradient).sum())

    @property
    def mean_squares(self) -> tuple[float, float]:
        """Mean e² with and without the gradient term, over the examples with an error; NaN where there is none."""
        return _of_squares(np.mean, self.with_gradient), _of_squares(np.mean, self.without_gradient)

    @property
    def median_squares(self) -> tuple[float, float]:
        """Median e² likewise: what `mean_squares` owes to a few rows with log-odds near zero is not in it."""
        return _of_squares(np.median, self.with_gradient), _of_squares(np.median, self.without_gradient)


def first_order_errors(before: NDArray[Any], after: NDArray[Any], change: NDArray[Any]) -> FirstOrderErrors:
    """The errors of examples with log-odds `before` a step and `after` it, and the `change` gᵀΔ: three times (n,).

    Raises ValueError where these are not of one length.
    """
    zero, one, step = (np.asarray(values, np.float64) for values in (before, after, change))
    if not zero.shape == one.shape == step.shape or zero.ndim != 1:
        raise ValueError(f"before, after and change are (n,) alike, not {zero.shape}, {one.shape} and {step.shape}")
    size = np.maximum(np.abs(zero), np.abs(one))
    known = np.isfinite(zero) & np.isfinite(one) & np.isfinite(step) & (size > 0)
    with_gradient, without = (
        np.divide(np.abs(predicted - one), size, out=np.full(len(zero), np.nan), where=known)
        for predicted in (zero + step, zero)
    )
    return FirstOrderErrors(with_gradient, without)


def changes(features: NDArray[Any], weights: NDArray[Any], *, length: float, distance: float) -> Numbers:
    """Return gᵀΔ of rows with projected gradients g̃ (n, d) for the step Δ = Pŵ made `distance` long: (n,).

    `weights` is ŵ (d,) and `length` ‖Pŵ‖, about √(p / d)·‖ŵ‖ for p parameters. P itself is not needed: gᵀPŵ = g̃ᵀŵ.
    """
    found: Numbers = np.asarray(features, np.float64) @ np.asarray(weights, np.float64)
    return found * (distance / length)


def _of_squares(measure: Callable[[Numbers], Any], errors: Numbers) -> float:
    known = errors[np.isfinite(errors)]
    return float(measure(known**2)) if len(known) else float("nan")
