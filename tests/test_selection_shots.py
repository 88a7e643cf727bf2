"""Rows like the shots of a task: ROCKET's algorithm 2 on vectors worked out by hand, and against other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from scipy.stats import chisquare
from sklearn.neighbors import KernelDensity

from datastore.influence import Floats, normalise
from datastore.selection import shots as module
from datastore.selection.shots import ShotNearness, hull_distance, nearest, nearness, unlike_each_other
from tests.test_selection_diversity import reader

METHODS: list[ShotNearness] = ["max_cosine", "centroid", "kde", "hull"]


def on_circle(*degrees: float) -> Floats:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def random_rows(seed: int, rows: int, dim: int) -> Floats:
    return normalise(np.random.default_rng(seed).normal(size=(rows, dim)))


# The example worked out by hand ---------------------------------------------------------------------------------------

SHOTS = on_circle(0, 90)
POOL = [5, 10, 40, 88, 60, 170]


def test_the_worked_example_has_its_scores_its_order_and_its_choice() -> None:
    near = nearness(on_circle(*POOL), SHOTS, by="max_cosine")
    np.testing.assert_allclose(near.score, [0.9962, 0.9848, 0.7660, 0.9994, 0.8660, 0.1736], atol=5e-5)
    assert near.shot.tolist() == [0, 0, 0, 1, 1, 1]
    rows = nearest(near.score, 4, by="max_cosine", seed=0)
    assert [POOL[row] for row in rows] == [88, 5, 10, 60]
    found = unlike_each_other(reader(on_circle(*POOL)), rows.tolist(), 0.9)
    assert [POOL[row] for row in found.rows] == [88, 5, 60]
    assert {POOL[row]: POOL[twin] for row, twin in found.twins.items()} == {10: 5}


def test_the_centroid_prefers_what_lies_between_the_shots() -> None:
    near = nearness(on_circle(*POOL), SHOTS, by="centroid")
    assert [POOL[row] for row in nearest(near.score, 4, by="centroid", seed=0)] == [40, 60, 10, 5]


def test_a_chain_of_neighbours_does_not_collapse_to_one() -> None:
    found = unlike_each_other(reader(on_circle(0, 20, 40, 60)), [0, 1, 2, 3], 0.9)
    assert found.rows == [0, 2]
    assert found.twins == {1: 0, 3: 2}


# Every rule -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6))
def test_a_centroid_orders_rows_as_their_distance_to_the_mean_does(seed: int, rows: int, shots: int) -> None:
    pool, target = random_rows(seed, rows, 5), random_rows(seed + 1, shots, 5)
    distance = np.linalg.norm(pool.astype(np.float64) - target.astype(np.float64).mean(0), axis=1)
    order = nearest(nearness(pool, target, by="centroid").score, rows, by="centroid", seed=0)
    assert (np.diff(distance[order]) > -1e-6).all()


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.3, 2.0, 10.0]))
@settings(deadline=None)
def test_the_density_is_scikit_learns(seed: int, rows: int, shots: int, bandwidth: float) -> None:
    pool, target = random_rows(seed, rows, 4), random_rows(seed + 1, shots, 4)
    theirs = KernelDensity(bandwidth=bandwidth).fit(target).score_samples(pool)
    ours = nearness(pool, target, by="kde", bandwidth=bandwidth).score
    constant = 4 * np.log(bandwidth * np.sqrt(2 * np.pi))  # of a density that integrates to 1
    np.testing.assert_allclose(ours - constant, theirs, atol=1e-5)


def test_rows_are_drawn_in_proportion_to_their_density() -> None:
    density = np.array([0.4, 0.3, 0.2, 0.1])
    drawn = [int(nearest(np.log(density), 1, by="kde", seed=seed)[0]) for seed in range(4000)]
    assert chisquare(np.bincount(drawn, minlength=4), 4000 * density).pvalue > 1e-3


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 7), st.integers(1, 6))
@settings(deadline=None)
def test_the_distance_to_a_hull_is_that_of_non_negative_least_squares(
    seed: int, rows: int, corners: int, dim: int
) -> None:
    generator = np.random.default_rng(seed)
    points, shots = generator.normal(size=(rows, dim)), generator.normal(size=(corners, dim))
    weight = 1e4  # of the weights' sum being 1
    for point, found in zip(points, hull_distance(points, shots), strict=True):
        weights, _ = nnls(np.vstack([shots.T, np.full(corners, weight)]), np.append(point, weight))
        assert found == pytest.approx(np.linalg.norm(point - shots.T @ weights / weights.sum()), abs=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 6))
@settings(deadline=None)
def test_what_is_mixed_of_the_corners_lies_in_their_hull(seed: int, corners: int, dim: int) -> None:
    generator = np.random.default_rng(seed)
    shots = generator.normal(size=(corners, dim))
    mixed = generator.dirichlet(np.ones(corners), size=5) @ shots
    assert hull_distance(mixed, shots).max() <= module.INSIDE


def test_rows_in_the_hull_are_drawn_before_those_that_are_only_near() -> None:
    scores = np.array([-0.5, 0.0, -1e-5, -0.4, -2e-5])
    found = {tuple(nearest(scores, 4, by="hull", seed=seed).tolist()) for seed in range(60)}
    assert {order[:3] for order in found} == {(1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 4, 1), (4, 1, 2), (4, 2, 1)}
    assert {order[3] for order in found} == {3}


@pytest.mark.parametrize("by", METHODS)
def test_a_row_is_as_near_alone_as_among_others(by: ShotNearness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HULL_BLOCK", 3)
    pool, shots = random_rows(0, 8, 6), random_rows(1, 4, 6)
    together = nearness(pool, shots, by=by)
    alone = [nearness(pool[row : row + 1], shots, by=by) for row in range(8)]
    np.testing.assert_allclose(together.score, [each.score[0] for each in alone], atol=1e-6)
    assert together.shot.tolist() == [int(each.shot[0]) for each in alone]


@pytest.mark.parametrize("by", METHODS)
def test_the_budget_and_the_seed_decide_what_is_taken(by: ShotNearness) -> None:
    score = nearness(random_rows(0, 50, 6), random_rows(1, 4, 6), by=by).score
    for budget in (1, 10, 50, 60):
        found = nearest(score, budget, by=by, seed=3)
        assert len(set(found.tolist())) == min(budget, 50)
        assert found.tolist() == nearest(score, budget, by=by, seed=3).tolist()
        assert (np.diff(score[found]) <= 0).all()
    differs = nearest(score, 10, by=by, seed=3).tolist() != nearest(score, 10, by=by, seed=4).tolist()
    assert differs == (by == "kde")


@given(st.integers(0, 10_000), st.integers(1, 25), st.floats(-0.5, 0.95))
def test_twins_are_passed_over_as_plain_greedy_does(seed: int, rows: int, tau: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TWIN_BLOCK", 4)
        check_twins(seed, rows, tau)


def check_twins(seed: int, rows: int, tau: float) -> None:
    features = random_rows(seed, rows, 3)
    order = np.random.default_rng(seed).permutation(rows).tolist()
    cosines = features @ features.T
    kept: list[int] = []
    for row in order:
        if all(cosines[row, other] <= tau for other in kept):
            kept.append(row)
    found = unlike_each_other(reader(features), order, tau)
    assert found.rows == kept
    assert set(found.twins) == set(order) - set(kept)
    for row, twin in found.twins.items():
        assert order.index(twin) < order.index(row)
        before = [other for other in kept if order.index(other) < order.index(row)]
        assert cosines[row, twin] == pytest.approx(cosines[row, before].max(), abs=1e-6)
        assert cosines[row, twin] > tau
