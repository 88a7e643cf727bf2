"""Selection: the best rows, in order, and how many there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datastore.errors import Conflict
from datastore.influence import TaskScores
from datastore.selection import combine, count, left_out, locate, make_up, top

SCORES = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.25]), min_size=1, max_size=40)


def scores_of(*values: float, subtask: int = 0, valid: list[bool] | None = None) -> TaskScores:
    return TaskScores(
        np.array(values, np.float32),
        np.full(len(values), subtask, np.int16),
        np.ones(len(values), bool) if valid is None else np.array(valid),
    )


@given(values=SCORES, k=st.integers(1, 12), data=st.data())
def test_the_best_rows_come_first_and_equal_ones_in_order(values: list[float], k: int, data: st.DataObject) -> None:
    n = len(values)
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    excluded = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    candidates = [row for row in range(n) if valid[row] and not excluded[row]]
    if not candidates:
        with pytest.raises(Conflict, match="can be chosen"):
            top(np.array(values), valid, k=k, excluded=excluded)
        return
    found = top(np.array(values), valid, k=k, excluded=excluded)
    assert found.tolist() == sorted(candidates, key=lambda row: (-values[row], row))[:k]


def test_rows_without_a_score_are_never_chosen_whatever_stands_there() -> None:
    score = np.array([0.1, 9e9, 0.3], np.float32)
    assert top(score, np.array([True, False, True]), k=3).tolist() == [2, 0]


def test_of_equal_rows_the_first_are_chosen() -> None:
    score = np.array([0.5, 1, 0.5, 0.5, 1, 0.5], np.float32)
    assert top(score, np.ones(6, bool), k=4).tolist() == [1, 4, 0, 2]


@given(pool=st.integers(1, 10**7), percent=st.integers(1, 100))
@example(pool=100, percent=29)
@example(pool=1_000_000, percent=57)
def test_a_fraction_is_rounded_down_as_it_is_written(pool: int, percent: int) -> None:
    assert count(pool, pct=percent / 100) == max(1, pool * percent // 100)


def test_a_fraction_is_of_the_pools_rows_that_are_not_excluded() -> None:
    score = np.arange(100, dtype=np.float32)
    valid = np.ones(100, bool)
    valid[90:] = False
    excluded = np.zeros(100, bool)
    excluded[:50] = True
    assert top(score, valid, pct=0.1).tolist() == [89, 88, 87, 86, 85, 84, 83, 82, 81, 80]
    assert top(score, valid, pct=0.1, excluded=excluded).tolist() == [89, 88, 87, 86, 85]
    assert len(top(score, valid, pct=1, excluded=excluded)) == 40


def test_the_smallest_fraction_still_gives_a_row() -> None:
    assert top(np.array([0.1, 0.2]), np.ones(2, bool), pct=0.05).tolist() == [1]


def test_more_rows_than_there_are_gives_all() -> None:
    assert top(np.array([0.1, 0.2]), np.ones(2, bool), k=100).tolist() == [1, 0]


@pytest.mark.parametrize("asked", [{}, {"pct": 0.1, "k": 3}])
def test_one_of_fraction_and_number_is_needed(asked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="either a fraction or a number"):
        count(10, **asked)  # type: ignore[arg-type]  # built from a table


def test_several_tasks_give_their_largest_score() -> None:
    tasks = [scores_of(0.1, 0.9, 0.3, subtask=4), scores_of(0.2, 0.8, 0.3, subtask=7)]
    found = combine(tasks, "max")
    np.testing.assert_allclose(found.score, [0.2, 0.9, 0.3])
    assert found.task.tolist() == [1, 0, 0]
    assert found.subtask.tolist() == [7, 4, 4]


def test_several_tasks_give_their_mean() -> None:
    found = combine([scores_of(0.1, 0.9), scores_of(0.3, -0.1)], "mean")
    np.testing.assert_allclose(found.score, [0.2, 0.4])
    assert found.task.tolist() == [1, 0]


def test_one_task_combined_is_itself() -> None:
    task = scores_of(0.1, -0.9, 0.3, subtask=2, valid=[True, False, True])
    for found in (combine([task], "max"), combine([task], "mean")):
        np.testing.assert_array_equal(found.score, task.score)
        np.testing.assert_array_equal(found.valid, task.valid)
        assert found.task.tolist() == [0, 0, 0]


def test_a_row_counts_only_where_every_task_has_a_score() -> None:
    found = combine([scores_of(1, 1, valid=[True, False]), scores_of(1, 1)], "max")
    assert found.valid.tolist() == [True, False]


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_rows_of_several_pools_are_found_in_theirs(sizes: list[int]) -> None:
    wanted = [(pool, row) for pool, size in enumerate(sizes) for row in range(size)]
    assert locate(range(sum(sizes)), sizes) == wanted


def test_make_up_counts_the_chosen_rows_by_label() -> None:
    labels = ["a", "b", "b", "c", "b", "a"]
    assert make_up(labels, [1, 2, 5]) == {"b": 2, "a": 1}
    assert list(make_up(labels).items()) == [("b", 3), ("a", 2), ("c", 1)]


def test_what_is_left_out_is_counted_once() -> None:
    excluded = np.array([True, True, False, False, True])
    assert left_out({0: "the gradient is zero", 2: "the loss is not finite"}, excluded) == {
        "excluded": 2,
        "the gradient is zero": 1,
        "the loss is not finite": 1,
    }
    assert left_out({}, np.zeros(3, bool)) == {}
    assert left_out({1: "x"}) == {"x": 1}
