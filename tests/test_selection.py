"""Selection: the best rows, in order, and how many there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datastore.errors import Conflict
from datastore.influence import Floats, Mask, TaskScores
from datastore.selection import top as best
from datastore.selection.draws import matched
from datastore.selection.make_up import Labelled, left_out, locate
from datastore.selection.tasks import combine
from datastore.selection.top import Selected, count

SCORES = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.25]), min_size=1, max_size=40)


def top(
    score: Floats,
    valid: Mask,
    *,
    pct: float | None = None,
    k: int | None = None,
    excluded: Mask | None = None,
) -> Selected:
    """The best rows of a pool, as many as asked for."""
    wanted = best.wanted(valid, excluded, pct=pct, k=k)
    return best.top(score, best.candidates(valid, excluded), wanted)


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
            top(np.array(values, np.float32), valid, k=k, excluded=excluded)
        return
    found = top(np.array(values, np.float32), valid, k=k, excluded=excluded)
    expected = sorted(candidates, key=lambda row: (-values[row], row))
    assert found.tolist() == expected[:k]
    assert best.ranking(np.array(values), best.candidates(valid, excluded)).tolist() == expected


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
    assert top(np.array([0.1, 0.2], np.float32), np.ones(2, bool), pct=0.05).tolist() == [1]


def test_more_rows_than_there_are_gives_all() -> None:
    assert top(np.array([0.1, 0.2], np.float32), np.ones(2, bool), k=100).tolist() == [1, 0]


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


def test_labels_are_counted_the_most_frequent_first() -> None:
    labels = Labelled(["a", "b", "c"], np.array([0, 1, 1, 2, 1, 1], np.int32))
    assert list(labels.counts().items()) == [("b", 4), ("a", 1), ("c", 1)]
    assert labels.counts(np.array([1, 2, 0])) == {"b": 2, "a": 1}


@given(data=st.data())
def test_a_matched_draw_has_the_lengths_that_are_wanted(data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=30)), np.int32)
    drawn = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(lengths)).astype(np.float32)
    chosen = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    rows = matched(lengths, drawn, np.ones(len(lengths), bool), lengths[sorted(chosen)])
    assert sorted(lengths[rows].tolist()) == sorted(lengths[sorted(chosen)].tolist())
    assert (np.diff(drawn[rows]) < 0).all()
    for length in set(lengths[rows].tolist()):
        of_it = np.flatnonzero(lengths == length)
        best = of_it[np.argsort(-drawn[of_it])][: int((lengths[rows] == length).sum())]
        assert set(best) <= set(rows.tolist()), "of a length those with the highest numbers"


def test_a_length_of_which_there_are_too_few_is_made_up_for_by_the_nearest() -> None:
    lengths = np.array([10, 10, 12, 40, 90])
    among = np.array([True, False, True, True, True])
    rows = matched(lengths, np.arange(5, dtype=np.float32), among, [10, 10])
    assert sorted(rows.tolist()) == [0, 2]


def test_a_matched_draw_is_uniform_among_rows_of_a_length() -> None:
    lengths = np.array([5, 5, 5, 5, 7])
    counts = np.zeros(5)
    for seed in range(2000):
        drawn = np.random.default_rng(seed).permutation(5).astype(np.float32)
        counts[matched(lengths, drawn, np.ones(5, bool), [5])] += 1
    assert counts[4] == 0
    assert abs(counts[:4] - 500).max() < 5 * np.sqrt(500)


def test_what_is_left_out_is_counted_once() -> None:
    excluded = np.array([True, True, False, False, True])
    assert left_out({0: "the gradient is zero", 2: "the loss is not finite"}, excluded) == {
        "excluded": 2,
        "the gradient is zero": 1,
        "the loss is not finite": 1,
    }
    assert left_out({}, np.zeros(3, bool)) == {}
    assert left_out({1: "x"}) == {"x": 1}
