"""GradEx's arithmetic against scikit-learn, scipy and brute force, and on groups whose worth is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn import linear_model

from datastore import gradex
from datastore.gradex import UNGROUPED, Members, Numbers, Pool, TargetRows

DIM = 12
GROUPS = 9


def rows(count: int, *, seed: int = 0, dim: int = DIM, shift: float = 0.3) -> Numbers:
    """Features of rows that lean to one side."""
    return np.random.default_rng(seed).normal(shift, 1, (count, dim))


def grouped(count: int, *, seed: int = 1, groups: int = GROUPS) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, groups, count)


def drawn(count: int, *, groups: int = GROUPS, size: int = 4) -> Members:
    found = np.zeros((count, groups), bool)
    for number, subset in enumerate(found):
        subset[np.random.default_rng([7, number]).choice(groups, size, replace=False)] = True
    return found


def gradient(features: Numbers, weights: Numbers, c: float) -> Numbers:
    """Of ½‖w‖² + C Σ log(1 + exp(−wᵀg)), written down once more."""
    found: Numbers = weights - c * features.T @ (1 / (1 + np.exp(features @ weights)))
    return found


@pytest.mark.parametrize("c", [1e-4, 6e-2, 1.0, 30.0])
def test_each_subset_has_the_weights_of_its_own_regression(c: float) -> None:
    features, groups, members = rows(400), grouped(400), drawn(8)
    found = gradex.fit(Pool.of(features, groups, count=GROUPS), members, c=c)
    for subset, weights, loss in zip(members, found.weights, found.losses, strict=True):
        mine = features[subset[groups]]
        assert np.linalg.norm(gradient(mine, weights, c)) <= 1e-10 * np.linalg.norm(weights)
        slow = minimize(
            lambda w, mine=mine: 0.5 * w @ w + c * np.logaddexp(0, -(mine @ w)).sum(),
            np.zeros(DIM),
            jac=lambda w, mine=mine: gradient(mine, w, c),
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-9},
        )
        np.testing.assert_allclose(weights, slow.x, rtol=1e-4, atol=1e-5 * np.linalg.norm(weights))
        assert loss == pytest.approx(np.logaddexp(0, -(mine @ weights)).mean())


def test_it_is_the_two_class_regression_with_labels_drawn_at_random_to_ten_digits() -> None:
    features, c = rows(300), 6e-2
    members = np.ones((1, 1), bool)
    found = gradex.fit(Pool.of(features, np.zeros(300, np.int64), count=1), members, c=c).weights[0]
    for seed in range(3):
        labels = np.random.default_rng(seed).random(300) < 0.7
        turned = np.where(labels[:, None], features, -features)
        model = linear_model.LogisticRegression(
            C=c, fit_intercept=False, solver="newton-cholesky", tol=1e-14, max_iter=1000
        )
        theirs = model.fit(turned, labels).coef_[0]
        assert np.linalg.norm(theirs - found) <= 1e-10 * np.linalg.norm(found)


def test_a_small_c_takes_a_step_along_the_mean_gradient() -> None:
    features = rows(200)
    found = gradex.fit(Pool.of(features, np.zeros(200, np.int64), count=1), np.ones((1, 1), bool), c=1e-6).weights[0]
    np.testing.assert_allclose(found, 0.5e-6 * features.sum(axis=0), rtol=1e-3)


def test_weights_do_not_depend_on_what_is_solved_beside_them_nor_on_where_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, members = Pool.of(rows(400), grouped(400), count=GROUPS), drawn(10)
    together = gradex.fit(pool, members, c=0.1).weights
    alone = np.concatenate([gradex.fit(pool, one[None], c=0.1).weights for one in members])
    np.testing.assert_allclose(alone, together, atol=1e-9 * np.linalg.norm(together))
    again = gradex.fit(pool, members, c=0.1, start=rows(10, seed=5)).weights
    np.testing.assert_allclose(again, together, atol=1e-9 * np.linalg.norm(together))
    monkeypatch.setattr(gradex, "BATCH_BYTES", 8 * DIM * DIM * 3)
    np.testing.assert_allclose(gradex.fit(pool, members, c=0.1).weights, together, atol=1e-9 * np.linalg.norm(together))


@pytest.mark.parametrize("groups", [1, 3, 40, 300])
def test_large_groups_are_cut_and_small_ones_share_a_block(groups: int) -> None:
    features, own = rows(600), grouped(600, groups=groups)
    own[:5] = UNGROUPED
    members = np.random.default_rng(0).random((6, groups)) < 0.5
    members[0] = False
    found = gradex.fit(Pool.of(features, own, count=groups), members, c=0.5).weights
    assert not found[0].any(), "a subset without rows learns nothing"
    for subset, weights in zip(members, found, strict=True):
        mine = features[(own >= 0) & subset[own]]
        assert np.linalg.norm(gradient(mine, weights, 0.5)) <= 1e-10 * np.linalg.norm(weights)


def test_features_of_any_size_are_solved() -> None:
    for factor in (1e-6, 1e3):
        features = rows(300) * factor
        found = gradex.fit(Pool.of(features, np.zeros(300, np.int64), count=1), np.ones((1, 1), bool), c=1.0)
        left = np.linalg.norm(gradient(features, found.weights[0], 1.0))
        assert left <= max(1e-10 * np.linalg.norm(found.weights), 1e-15 * np.linalg.norm(features, axis=1).sum())
        assert found.steps < 30


# The step and what it does --------------------------------------------------------------------------------------------


def test_a_step_has_the_length_that_a_projection_gives_it() -> None:
    parameters, scale, theta = 4000, 0.3, 7.0
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (parameters, DIM)) / np.sqrt(DIM)
    weights = rows(5, seed=3)
    factors, lengths = gradex.step_factors(
        gradex.unprojected_lengths(weights, parameters=parameters), scale=scale, length=theta
    )
    np.testing.assert_allclose(lengths, scale * theta)
    steps = factors[:, None] * (weights @ signs.T)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), scale * theta, rtol=0.1)
    plain, lengths = gradex.step_factors(
        gradex.unprojected_lengths(weights, parameters=parameters), scale=None, length=theta
    )
    np.testing.assert_allclose(plain, 1)
    np.testing.assert_allclose(lengths, np.linalg.norm(weights @ signs.T, axis=1), rtol=0.1)
    factors, lengths = gradex.step_factors(
        gradex.unprojected_lengths(np.zeros((1, DIM)), parameters=parameters), scale=scale, length=theta
    )
    assert (factors[0], lengths[0]) == (0, 0)


def test_an_estimate_is_the_mean_loss_of_log_odds_after_the_step() -> None:
    target = TargetRows(rows(7, dim=1)[:, 0], rows(7, seed=2), np.array([0, 1, 1, 0, 1, 0, 1]), 3)
    weights, factors = rows(4, seed=3), np.array([0.0, 1.0, 2.0, 50.0])
    losses, accuracies = gradex.estimated(target, weights, factors)
    for subset in range(4):
        after = [target.log_odds[row] + factors[subset] * target.features[row] @ weights[subset] for row in range(7)]
        loss = np.array([np.log1p(np.exp(-each)) if each > -700 else -each for each in after])
        for subtask in (0, 1):
            mine = target.labels == subtask
            assert losses[subset, subtask] == pytest.approx(loss[mine].mean())
            assert accuracies[subset, subtask] == pytest.approx((np.array(after) > 0)[mine].mean())
        assert losses[subset, 3] == pytest.approx(loss.mean())
        assert np.isnan(losses[subset, 2])
        assert accuracies[subset, 3] == pytest.approx((np.array(after) > 0).mean())


def planted(*, good: int, bad: int, seed: int = 0) -> tuple[Numbers, TargetRows]:
    """Rows whose gradients lead a target's answers up, rows without sense, and the target."""
    generator = np.random.default_rng(seed)
    direction = np.ones(40) / np.sqrt(40)
    right = generator.normal(0, 1, (good, 40)) + 1.5 * direction
    wrong = generator.normal(0, 1, (bad, 40)) - 0.5 * direction
    target = TargetRows(
        generator.normal(0, 1, 60), generator.normal(0, 0.3, (60, 40)) + direction, np.zeros(60, np.int64), 1
    )
    return np.concatenate([right, wrong]), target


def test_mostly_good_rows_are_estimated_to_give_a_lower_loss_than_mostly_bad_ones() -> None:
    features, target = planted(good=225, bad=225)
    chosen = np.r_[np.zeros(200), np.full(25, 1), np.full(25, 0), np.full(200, 1)].astype(np.int64)
    pool = Pool.of(features, chosen, count=2)
    fits = gradex.fit(pool, np.eye(2, dtype=bool), c=0.06)
    factors, _ = gradex.step_factors(gradex.unprojected_lengths(fits.weights, parameters=400), scale=1.0, length=3.0)
    losses, accuracies = gradex.estimated(target, fits.weights, factors)
    before, _ = gradex.estimated(target, fits.weights, np.zeros(2))
    assert losses[0, -1] < before[0, -1] < losses[1, -1]
    assert accuracies[0, -1] > accuracies[1, -1]


def test_an_ensemble_and_a_surrogate_tell_clean_groups_from_noisy_ones() -> None:
    features, target = planted(good=300, bad=200)
    groups = np.arange(500) // 25  # 12 clean groups, then 8 noisy ones
    members = drawn(200, groups=20, size=7)
    fits = gradex.fit(Pool.of(features, groups, count=20), members, c=0.06)
    factors, _ = gradex.step_factors(gradex.unprojected_lengths(fits.weights, parameters=400), scale=1.0, length=1.0)
    values = gradex.estimated(target, fits.weights, factors)[0][:, -1]
    means, counts, errors = gradex.ensemble(values, members)
    assert means[:12].max() < means[12:].min()
    assert gradex.ridge(values, members)[:12].max() < gradex.ridge(values, members)[12:].min()
    assert counts.sum() == 7 * 200
    assert (errors > 0).all()


def test_an_ensemble_is_the_mean_over_the_subsets_with_a_group() -> None:
    values, members = rows(6, dim=1)[:, 0], drawn(6, groups=5, size=2)
    members[:, 4] = False
    members[:, 3] = np.arange(6) == 2
    means, counts, errors = gradex.ensemble(values, members)
    for group in range(4):
        mine = values[members[:, group]]
        assert means[group] == pytest.approx(mine.mean())
        assert counts[group] == len(mine)
        if len(mine) > 1:
            assert errors[group] == pytest.approx(mine.std(ddof=1) / np.sqrt(len(mine)))
    assert np.isnan(means[4])
    assert np.isnan(errors[3])


def test_a_surrogate_is_ridge_regression_without_an_intercept() -> None:
    values, members = rows(30, dim=1)[:, 0], drawn(30)
    theirs = linear_model.Ridge(alpha=1.0, fit_intercept=False).fit(members.astype(float), values).coef_
    np.testing.assert_allclose(gradex.ridge(values, members), theirs, atol=1e-10)
    assert gradex.relative_rss(np.array([1.0, 2.0]), np.array([1.0, 1.0])) == pytest.approx(0.5)
