"""Influence: the formula of LESS against the definition, written out number by number."""

from __future__ import annotations

import numpy as np
import pytest
from gradstore.types import Aggregate
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.errors import Conflict
from datastore.influence import (
    NO_SUBTASK,
    TaskScores,
    checkpoint_weights,
    everywhere,
    influence,
    masked,
    normalise,
    queries,
    reduce,
    usable_rows,
)

SEEDS = st.integers(0, 2**32 - 1)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The definition, in float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5))


def by_definition(
    train: list[np.ndarray], target: list[np.ndarray], rates: list[float], subtask: np.ndarray, how: str
) -> tuple[list[float], list[int]]:
    """Scores and subtasks of every training row, one product of two vectors after the other."""
    scores, givers = [], []
    for z in range(len(train[0])):
        table = [
            sum(rate / sum(rates) * cosine(train[i][z], target[i][v]) for i, rate in enumerate(rates))
            for v in range(len(subtask))
        ]
        means = {
            s: float(np.mean([table[v] for v in range(len(subtask)) if subtask[v] == s])) for s in sorted(set(subtask))
        }
        chosen = {"max": max, "min": min}.get(how, max)(range(len(table)), key=table.__getitem__)
        if how == "less":
            giver = max(means, key=means.__getitem__)
            scores.append(means[giver])
            givers.append(int(giver))
        elif how == "avg":
            scores.append(float(np.mean(table)))
            givers.append(NO_SUBTASK)
        else:
            scores.append(table[chosen])
            givers.append(int(subtask[chosen]))
    return scores, givers


def gradients(seed: int, *, rows: int = 12, checkpoints: int = 3, dim: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((rows, dim)) * rng.lognormal(size=(rows, 1))).astype(np.float32)
        for _ in range(checkpoints)
    ]


def scores_of(
    train: list[np.ndarray],
    target: list[np.ndarray],
    subtask: np.ndarray,
    *,
    rates: list[float] | None = None,
    how: Aggregate = "less",
    train_valid: list[np.ndarray] | None = None,
    target_valid: list[np.ndarray] | None = None,
) -> TaskScores:
    """The parts of the formula put together, for arrays that fit into memory (datastore/scores.py streams them)."""
    checkpoints = range(len(train))
    usable, _ = usable_rows(target_valid or [np.ones(len(rows), bool) for rows in target], subtask, ())
    valid = everywhere(train_valid or [np.ones(len(rows), bool) for rows in train])
    weights = checkpoint_weights(rates or [1.0] * len(train))
    asked = [queries(normalise(rows[usable]), subtask[usable], how) for rows in target]
    pools = [normalise(np.where(valid[:, None], rows, 0)) for rows in train]
    total = sum(np.float32(weights[i]) * (pools[i] @ asked[i][0].T) for i in checkpoints)
    score, best = reduce(np.asarray(total, np.float32), asked[0][1], how)
    return masked(score, best, valid)


SUBTASK = np.array([0, 0, 1, 2, 2, 2, 1], np.int16)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, how=st.sampled_from(["less", "avg", "max", "min"]))
def test_scores_are_those_of_the_definition(seed: int, how: Aggregate) -> None:
    train, target, rates = gradients(seed), gradients(seed + 1, rows=7), [2e-5, 1.3e-5, 0.4e-5]
    found = scores_of(train, target, SUBTASK, rates=rates, how=how)
    wanted, givers = by_definition(train, target, rates, SUBTASK, how)
    np.testing.assert_allclose(found.score, wanted, atol=2e-6)
    assert found.score.dtype == np.float32
    assert found.valid.all()
    assert found.subtask.tolist() == givers


def test_influence_is_the_cosine_of_every_pair() -> None:
    train, target = gradients(1)[0], gradients(2, rows=5)[0]
    found = influence(train, target)
    assert found.shape == (12, 5)
    for z in range(12):
        for v in range(5):
            assert found[z, v] == pytest.approx(cosine(train[z], target[v]), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-30, 30))
def test_influence_ignores_gradient_length(seed: int, exponent: int) -> None:
    train, target = gradients(seed)[0], gradients(seed + 1, rows=5)[0]
    scaled = train * np.float32(10.0**exponent)
    np.testing.assert_allclose(influence(scaled, target), influence(train, target), atol=1e-5)


@given(seed=SEEDS)
def test_a_row_has_influence_one_on_itself_and_never_more(seed: int) -> None:
    rows = gradients(seed)[0]
    table = influence(rows, rows)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-6)
    assert (np.abs(table) <= 1 + 1e-6).all()
    np.testing.assert_allclose(table, table.T, atol=1e-6)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1.0, 1e18, 1e38])
def test_normalised_rows_have_length_one_whatever_their_size(size: float) -> None:
    rows = np.array([[1, 2, -2], [0, 0, 0], [0, 3, 0]], np.float32) * np.float32(size)
    found = normalise(rows).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 0, 1], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_rows_changes_nothing_but_their_order(seed: int) -> None:
    train, target = gradients(seed), gradients(seed + 1, rows=7)
    rng = np.random.default_rng(seed)
    rows, references = rng.permutation(12), rng.permutation(7)
    straight = scores_of(train, target, SUBTASK)
    turned = scores_of([each[rows] for each in train], [each[references] for each in target], SUBTASK[references])
    np.testing.assert_allclose(turned.score, straight.score[rows], atol=1e-6)
    np.testing.assert_array_equal(turned.subtask, straight.subtask[rows])


def test_the_mean_row_of_a_subtask_replaces_its_rows() -> None:
    target = normalise(gradients(3, rows=7)[0])
    folded, labels = queries(target, SUBTASK, "less")
    assert folded.shape == (3, 9)
    assert labels.tolist() == [0, 1, 2]
    np.testing.assert_allclose(folded[2], target[3:6].mean(axis=0), atol=1e-7)


def test_a_larger_learning_rate_weighs_more() -> None:
    aligned, opposed = np.array([[1, 0]], np.float32), np.array([[-1, 0]], np.float32)
    target = [aligned, aligned]
    found = scores_of([aligned, opposed], target, np.zeros(1, np.int16), rates=[3e-5, 1e-5])
    assert found.score[0] == pytest.approx(0.5)


@pytest.mark.parametrize("rates", [[], [0.0, 0.0], [1.0, -1e-9], [float("nan"), 1.0], [float("inf")]])
def test_weights_that_mean_nothing_are_refused(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        checkpoint_weights(rates)


def test_weights_sum_to_one() -> None:
    assert checkpoint_weights([2e-5, 1e-5, 1e-5]) == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize("how", ["less", "avg", "max", "min"])
def test_a_training_row_that_fails_at_one_checkpoint_has_no_score_and_disturbs_no_other(how: Aggregate) -> None:
    train, target = gradients(5), gradients(6, rows=7)
    whole = scores_of(train, target, SUBTASK, how=how)
    valid = [np.ones(12, bool) for _ in train]
    valid[0][4] = valid[1][4] = False
    train[0][4], train[1][4] = np.nan, np.inf
    found = scores_of(train, target, SUBTASK, how=how, train_valid=valid)
    assert np.flatnonzero(~found.valid).tolist() == [4]
    assert (found.score[4], found.subtask[4]) == (0, NO_SUBTASK)
    others = found.valid
    np.testing.assert_allclose(found.score[others], whole.score[others], atol=1e-6)


@pytest.mark.parametrize("how", ["less", "avg", "max", "min"])
def test_a_validation_row_that_fails_at_one_checkpoint_is_left_out_at_all(how: Aggregate) -> None:
    train, target = gradients(5), gradients(6, rows=7)
    valid = [np.ones(7, bool) for _ in target]
    valid[2][3] = False
    target[2][3] = np.inf
    found = scores_of(train, target, SUBTASK, how=how, target_valid=valid)
    rest = [0, 1, 2, 4, 5, 6]
    without = scores_of(train, [each[rest] for each in target], SUBTASK[rest], how=how)
    np.testing.assert_allclose(found.score, without.score, atol=1e-6)
    np.testing.assert_array_equal(found.subtask, without.subtask)


def test_a_subtask_without_a_row_is_left_out_with_a_note() -> None:
    masks = [
        np.array([False, True, True, True, True, True, True]),
        np.array([True, False, True, True, True, True, True]),
    ]
    usable, notes = usable_rows(masks, SUBTASK, ["history", "law", "physics"])
    assert usable.tolist() == [False, False, True, True, True, True, True]
    assert len(notes) == 2
    assert "2 of 7 validation rows" in notes[0]
    assert "'history' is left out" in notes[1]


def test_a_task_without_a_row_is_an_error_and_not_a_score() -> None:
    masks = [np.array([True, False]), np.array([False, True])]
    with pytest.raises(Conflict, match="none of the 2 validation rows"):
        usable_rows(masks, np.zeros(2, np.int16), ["all"])
