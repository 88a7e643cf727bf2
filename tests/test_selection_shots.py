"""Rows like the shots of a task: ROCKET's algorithm 2 on vectors worked out by hand, and against other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from gradstore.types import ShotNearness
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import chisquare
from sklearn.neighbors import KernelDensity

from datastore import nearness as rules
from datastore.influence import Floats, normalise
from datastore.nearness import Around, Doubles, hull_distance
from datastore.selection import shots as module
from datastore.selection.shots import nearest, unlike_each_other
from tests.test_selection_diversity import reader

METHODS: list[ShotNearness] = ["max_cosine", "centroid", "kde", "hull"]


def score(pool: Floats, target: Floats, *, by: ShotNearness, bandwidth: float = 10.0) -> Doubles:
    """The nearness of unit rows to unit shots, as a scoring job has it of their cosines."""
    rows, shots = pool.astype(np.float64), target.astype(np.float64)
    if by == "kde" or by == "hull":  # noqa: PLR1714  # mypy narrows the type by ==
        return Around(by, bandwidth).score(rows @ shots.T, shots @ shots.T)
    return np.asarray((rows @ shots.T).max(1) if by == "max_cosine" else (rows @ shots.T).mean(1))


def taken(score: NDArray[np.floating], budget: int, *, by: ShotNearness, seed: int = 0) -> list[int]:
    return nearest(score, np.ones(len(score), bool), budget, by=by, seed=seed).tolist()


def distances(points: NDArray[np.floating], corners: NDArray[np.floating]) -> Doubles:
    rows, shots = points.astype(np.float64), corners.astype(np.float64)
    return hull_distance(rows @ shots.T, shots @ shots.T, squares=np.square(rows).sum(1))


def on_circle(*degrees: float) -> Floats:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def random_rows(seed: int, rows: int, dim: int) -> Floats:
    return normalise(np.random.default_rng(seed).normal(size=(rows, dim)))


# The example worked out by hand ---------------------------------------------------------------------------------------

SHOTS = on_circle(0, 90)
POOL = [5, 10, 40, 88, 60, 170]


def test_the_worked_example_has_its_scores_its_order_and_its_choice() -> None:
    near = score(on_circle(*POOL), SHOTS, by="max_cosine")
    np.testing.assert_allclose(near, [0.9962, 0.9848, 0.7660, 0.9994, 0.8660, 0.1736], atol=5e-5)
    rows = taken(near, 4, by="max_cosine")
    assert [POOL[row] for row in rows] == [88, 5, 10, 60]
    found = unlike_each_other(reader(on_circle(*POOL)), rows, 0.9)
    assert [POOL[row] for row in found.rows] == [88, 5, 60]
    assert {POOL[row]: POOL[twin] for row, twin in found.twins.items()} == {10: 5}


def test_the_centroid_prefers_what_lies_between_the_shots() -> None:
    near = score(on_circle(*POOL), SHOTS, by="centroid")
    assert [POOL[row] for row in taken(near, 4, by="centroid")] == [40, 60, 10, 5]


def test_a_chain_of_neighbours_does_not_collapse_to_one() -> None:
    found = unlike_each_other(reader(on_circle(0, 20, 40, 60)), [0, 1, 2, 3], 0.9)
    assert found.rows == [0, 2]
    assert found.twins == {1: 0, 3: 2}


# Every rule -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6))
def test_a_centroid_orders_rows_as_their_distance_to_the_mean_does(seed: int, rows: int, shots: int) -> None:
    pool, target = random_rows(seed, rows, 5), random_rows(seed + 1, shots, 5)
    distance = np.linalg.norm(pool.astype(np.float64) - target.astype(np.float64).mean(0), axis=1)
    order = taken(score(pool, target, by="centroid"), rows, by="centroid")
    assert (np.diff(distance[order]) > -1e-6).all()


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.3, 2.0, 10.0]))
@settings(deadline=None)
def test_the_density_is_scikit_learns(seed: int, rows: int, shots: int, bandwidth: float) -> None:
    pool, target = random_rows(seed, rows, 4), random_rows(seed + 1, shots, 4)
    theirs = KernelDensity(bandwidth=bandwidth).fit(target).score_samples(pool)
    ours = score(pool, target, by="kde", bandwidth=bandwidth)
    constant = 4 * np.log(bandwidth * np.sqrt(2 * np.pi))  # of a density that integrates to 1
    np.testing.assert_allclose(ours - constant, theirs, atol=1e-5)


def test_rows_are_drawn_in_proportion_to_their_density() -> None:
    density = np.array([0.4, 0.3, 0.2, 0.1])
    drawn = [taken(np.log(density), 1, by="kde", seed=seed)[0] for seed in range(4000)]
    assert chisquare(np.bincount(drawn, minlength=4), 4000 * density).pvalue > 1e-3


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 7), st.integers(1, 6))
@settings(deadline=None)
def test_the_distance_to_a_hull_is_that_of_non_negative_least_squares(
    seed: int, rows: int, corners: int, dim: int
) -> None:
    generator = np.random.default_rng(seed)
    points, shots = generator.normal(size=(rows, dim)), generator.normal(size=(corners, dim))
    weight = 1e4  # of the weights' sum being 1
    for point, found in zip(points, distances(points, shots), strict=True):
        weights, _ = nnls(np.vstack([shots.T, np.full(corners, weight)]), np.append(point, weight))
        assert found == pytest.approx(np.linalg.norm(point - shots.T @ weights / weights.sum()), abs=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 6))
@settings(deadline=None)
def test_what_is_mixed_of_the_corners_lies_in_their_hull(seed: int, corners: int, dim: int) -> None:
    generator = np.random.default_rng(seed)
    shots = generator.normal(size=(corners, dim))
    mixed = generator.dirichlet(np.ones(corners), size=5) @ shots
    assert distances(mixed, shots).max() <= rules.PRECISE


def test_rows_in_the_hull_are_drawn_before_those_that_are_only_near() -> None:
    scores = np.array([-0.5, 0.0, -1e-3, -0.4, -2e-4])
    found = {tuple(taken(scores, 4, by="hull", seed=seed)) for seed in range(60)}
    assert {order[:3] for order in found} == {(1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 4, 1), (4, 1, 2), (4, 2, 1)}
    assert {order[3] for order in found} == {3}


@pytest.mark.parametrize("by", METHODS)
def test_a_row_is_as_near_alone_as_among_others(by: ShotNearness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "HULL_BLOCK", 3)
    pool, shots = random_rows(0, 8, 6), random_rows(1, 4, 6)
    alone = [float(score(pool[row : row + 1], shots, by=by)[0]) for row in range(8)]
    np.testing.assert_allclose(score(pool, shots, by=by), alone, atol=1e-6)


@pytest.mark.parametrize("by", METHODS)
def test_the_budget_and_the_seed_decide_what_is_taken(by: ShotNearness) -> None:
    near = score(random_rows(0, 50, 6), random_rows(1, 4, 6), by=by)
    for budget in (1, 10, 50, 60):
        found = taken(near, budget, by=by, seed=3)
        assert len(set(found)) == min(budget, 50)
        assert found == taken(near, budget, by=by, seed=3)
        assert (np.diff(near[found]) <= 0).all()
    differs = taken(near, 10, by=by, seed=3) != taken(near, 10, by=by, seed=4)
    assert differs == (by == "kde")


@pytest.mark.parametrize("by", METHODS)
def test_who_is_left_out_changes_nothing_about_the_others(by: ShotNearness) -> None:
    near = score(random_rows(0, 50, 6), random_rows(1, 4, 6), by=by)
    everybody = np.ones(50, bool)
    order = nearest(near, everybody, 50, by=by, seed=3).tolist()
    first = set(nearest(near, everybody, 10, by=by, seed=3).tolist())
    among = everybody.copy()
    left_out = min(first)
    among[left_out] = False
    found = nearest(near, among, 10, by=by, seed=3).tolist()
    assert first - {left_out} < set(found)
    assert found == [row for row in order if row in found]


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
