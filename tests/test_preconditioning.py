"""TrackStar's preconditioning against numpy's own inverse, and what it must do to a direction that all rows share."""

from __future__ import annotations

import numpy as np
import pytest

from datastore.influence import Floats, influence, normalise
from datastore.preconditioning import DAMPING, inverse_root, mixed, second_moment

DIM = 24


def rows(count: int, *, seed: int = 0, shared: float = 0.0) -> Floats:
    """Rows with a part that all of them share."""
    generator = np.random.default_rng(seed)
    common = np.zeros(DIM)
    common[0] = shared
    return (generator.normal(size=(count, DIM)) + common).astype(np.float32)


def test_the_second_moment_is_that_of_all_rows_whatever_the_blocks() -> None:
    found = second_moment([rows(5), rows(3, seed=1), np.zeros((2, DIM), np.float32)])
    unit = normalise(np.concatenate([rows(5), rows(3, seed=1)])).astype(np.float64)
    np.testing.assert_allclose(found, unit.T @ unit / 8, atol=1e-6)
    with pytest.raises(ValueError, match="a row that is not zero"):
        second_moment([np.zeros((2, DIM), np.float32)])


def test_the_inverse_root_squared_is_the_inverse() -> None:
    moment = second_moment([rows(100)])
    root = inverse_root(moment).astype(np.float64)
    damped = moment + DAMPING * np.trace(moment) / DIM * np.eye(DIM)
    np.testing.assert_allclose(root @ root @ damped, np.eye(DIM), atol=1e-4)


def test_a_moment_of_few_rows_can_be_inverted_too() -> None:
    root = inverse_root(second_moment([rows(3)]))
    assert np.isfinite(root).all()


def test_the_spectra_of_pool_and_target_cross_where_they_are_mixed() -> None:
    pool, target = second_moment([rows(200)]), second_moment([rows(50, seed=1, shared=5)])
    moment, share = mixed(pool, target, target_rows=50)
    first = [np.linalg.eigvalsh(one)[-1] for one in (pool, target)]
    assert (1 - share) * first[0] == pytest.approx(share * first[1], rel=1e-4)
    np.testing.assert_allclose(moment, share * target + (1 - share) * pool, atol=1e-6)


def test_what_all_rows_share_counts_less() -> None:
    pool, target = rows(400, shared=20), rows(4, seed=1, shared=20)
    twins = target + 0.1 * rows(4, seed=2)
    moment, _ = mixed(second_moment([pool]), second_moment([target]), target_rows=4)
    root = inverse_root(moment)
    plain = influence(np.concatenate([twins, pool]), target)
    whitened = influence(np.concatenate([twins, pool]) @ root, target @ root)
    assert plain[4:].mean() > 0.9
    assert abs(whitened[4:].mean()) < 0.3
    np.testing.assert_array_equal(whitened.argmax(axis=0), np.arange(4))
