"""First-order errors against the formula row by row, and what they must be where a function is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from datastore.first_order import changes, first_order_errors


def test_errors_are_the_formula_row_by_row() -> None:
    rng = np.random.default_rng(0)
    before, after, change = rng.standard_normal((3, 50))
    found = first_order_errors(before, after, change)
    for row in range(50):
        size = max(abs(before[row]), abs(after[row]))
        assert found.with_gradient[row] == pytest.approx(abs(before[row] + change[row] - after[row]) / size)
        assert found.without_gradient[row] == pytest.approx(abs(before[row] - after[row]) / size)
    squares = np.mean(found.with_gradient**2), np.mean(found.without_gradient**2)
    assert found.mean_squares == pytest.approx(squares)
    medians = np.median(found.with_gradient**2), np.median(found.without_gradient**2)
    assert found.median_squares == pytest.approx(medians)
    assert found.rows == 50


def test_the_error_of_a_quadratic_grows_with_the_square_of_the_step_and_without_the_gradient_with_the_step() -> None:
    """f(θ) = 3 + aθ + bθ²: what the first order leaves out is bΔ²."""
    a, b = 0.5, 0.25
    for step in (0.1, 0.2, 0.4):
        after = 3 + a * step + b * step**2
        found = first_order_errors(np.array([3.0]), np.array([after]), np.array([a * step]))
        assert found.with_gradient[0] == pytest.approx(b * step**2 / after)
        assert found.without_gradient[0] == pytest.approx((a * step + b * step**2) / after)


def test_rows_that_say_nothing_have_no_error_and_count_in_no_mean() -> None:
    before = np.array([1.0, np.nan, 0.0, 2.0, 1.0], np.float32)
    after = np.array([2.0, 1.0, 0.0, np.inf, 1.0], np.float32)
    change = np.array([0.5, 0.0, 0.1, 0.0, np.nan], np.float32)
    found = first_order_errors(before, after, change)
    assert found.rows == 1
    assert found.with_gradient[0] == 0.25
    assert np.isnan(found.with_gradient[1:]).all()
    assert np.isnan(found.without_gradient[1:]).all()
    assert found.mean_squares == found.median_squares == (0.0625, 0.25)
    assert all(math.isnan(mean) for mean in first_order_errors(*np.zeros((3, 4))).mean_squares)


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not \(3,\), \(3,\) and \(2,\)"):
        first_order_errors(np.ones(3), np.ones(3), np.ones(2))


def test_changes_are_those_of_the_step_itself_though_the_projection_is_not_needed() -> None:
    rng = np.random.default_rng(1)
    projection = rng.choice([-1.0, 1.0], (500, 20)) / math.sqrt(20)
    gradients, weights = rng.standard_normal((7, 500)), rng.standard_normal(20)
    step = projection @ weights
    length = float(np.linalg.norm(step))
    found = changes(gradients @ projection, weights, length=length, distance=0.3)
    np.testing.assert_allclose(found, gradients @ (step * 0.3 / length), rtol=1e-12)
