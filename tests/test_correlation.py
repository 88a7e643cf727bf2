"""Rank correlation against pandas, and what a validation concludes from it against models whose influence is known."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from datastore import predictions
from datastore.correlation import Numbers, interval, ranks, resampled, resampled_change, spearman

SHAPES = st.tuples(st.integers(2, 12), st.integers(1, 4))
FEW_VALUES = st.integers(-3, 3).map(float)  # ties are common


def reference(first: Numbers, second: Numbers) -> NDArray[np.float64]:
    """Spearman's correlation of each pair of columns by pandas; 0 where it is not defined."""
    columns = zip(first.T, second.T, strict=True)
    found = [pd.DataFrame({"a": a, "b": b}).corr(method="spearman").loc["a", "b"] for a, b in columns]
    return np.nan_to_num(np.array(found, np.float64))


@given(SHAPES.flatmap(lambda shape: arrays(np.float64, shape, elements=FEW_VALUES)))
def test_ranks_are_those_of_pandas(values: Numbers) -> None:
    np.testing.assert_array_equal(ranks(values), pd.DataFrame(values).rank().to_numpy() - 1)


@given(
    SHAPES.flatmap(
        lambda shape: st.tuples(
            arrays(np.float64, shape, elements=FEW_VALUES), arrays(np.float64, shape, elements=FEW_VALUES)
        )
    )
)
def test_the_correlation_is_that_of_pandas(pair: tuple[Numbers, Numbers]) -> None:
    np.testing.assert_allclose(spearman(*pair), reference(*pair), atol=1e-12)


def test_what_grows_with_the_other_correlates_fully_and_a_constant_with_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(20, 3))
    np.testing.assert_allclose(spearman(values, np.exp(values)), 1)
    np.testing.assert_allclose(spearman(values, -values), -1)
    np.testing.assert_array_equal(spearman(values, np.ones_like(values)), 0)


def test_a_sample_of_the_bootstrap_is_the_correlation_of_drawn_trainings() -> None:
    generator = np.random.default_rng(1)
    predicted, effects = generator.normal(size=(2, 30, 4))
    samples = resampled(predicted, effects, samples=5, seed=3)
    draws = np.random.default_rng(3).integers(30, size=(5, 30))
    expected = [reference(predicted[draw], effects[draw]).mean() for draw in draws]
    np.testing.assert_allclose(samples, expected, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_interval_of_a_correlation_holds_what_more_trainings_find(noise: float) -> None:
    generator = np.random.default_rng(2)
    effects = generator.normal(size=(4000, 3))
    predicted = effects + noise * generator.normal(size=effects.shape)
    low, high = interval(resampled(predicted[:100], effects[:100], samples=300, seed=0))
    assert low - 1e-12 <= spearman(predicted, effects).mean() <= high + 1e-12
    assert high - low < 0.25


def test_the_interval_of_a_change_knows_that_trainings_and_targets_vary() -> None:
    generator = np.random.default_rng(4)
    of_training, of_target = generator.normal(0, 0.5, size=(50, 1)), generator.normal(0, 0.8, size=(1, 40))
    changes = 1 + of_training + of_target
    low, high = interval(resampled_change(changes, samples=4000, seed=0))
    error = np.sqrt(of_training.var() / 50 + of_target.var() / 40)
    np.testing.assert_allclose([low, high], changes.mean() + np.array([-1.96, 1.96]) * error, atol=0.02)


def test_a_bootstrap_holds_one_sample_at_a_time() -> None:
    changes = np.random.default_rng(5).normal(size=(200, 100))
    effects, predicted = changes[:, :1], changes[:, 1:2]
    peaks = []
    for samples in (10, 10, 1000):  # the first one imports and compiles
        tracemalloc.start()
        try:
            resampled(predicted, effects, samples=samples, seed=0)
            resampled_change(changes, samples=samples, seed=0)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[2] - peaks[1] < 0.2 * 8 * 990 * 200  # the draws of all samples would be a number for each training


@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 3)), elements=st.integers(-99, 99)),
    data=st.data(),
)
def test_sums_over_subsets_are_those_of_their_rows(values: NDArray[np.float32], data: st.DataObject) -> None:
    rows = st.sets(st.integers(0, len(values) - 1)).map(sorted)
    subsets = data.draw(st.lists(rows, min_size=1, max_size=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "SUMMED_ROWS", data.draw(st.sampled_from([8, 16, 64, 1024])))
        found = predictions.sums(values, predictions.members(subsets, len(values)))
    np.testing.assert_array_equal(found, [values[subset].sum(axis=0, dtype=np.float64) for subset in subsets])
