"""Several tasks choosing from one pool: in turns and balanced, held against their definitions at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from gradstore.types import Combine, SelectionRecipe
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore.influence import Floats, Mask, TaskScores
from datastore.selection.choose import Chosen, Material, choose
from datastore.selection.contamination import Contamination
from datastore.selection.draws import draw
from datastore.selection.make_up import Labelled
from datastore.selection.tasks import Walk, balanced, by_score, combine, round_robin

Refuses = frozenset[int]


def scores_of(table: Sequence[Sequence[float]] | NDArray[np.float64]) -> list[TaskScores]:
    """The scores of several tasks, a row of the table each."""
    return [
        TaskScores(np.array(row, np.float32), np.full(len(row), number, np.int16), np.ones(len(row), bool))
        for number, row in enumerate(table)
    ]


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[TaskScores], Mask, Refuses]:
    """Scores of up to four tasks, many of them equal, the candidates, and the rows that are refused."""
    rows = draw(st.integers(1, 14))
    numbers = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0, 3.0])
    table = draw(st.lists(st.lists(numbers, min_size=rows, max_size=rows), min_size=1, max_size=4))
    among = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any)))
    return scores_of(table), among, frozenset(draw(st.sets(st.integers(0, rows - 1))))


def walked(walk: Walk, refuses: Refuses = frozenset()) -> tuple[list[tuple[int, int]], list[int]]:
    """What was taken from a walk to its end, and every row that was met."""
    taken, met = [], []
    pick = next(walk, None)
    while pick is not None:
        met.append(pick[0])
        if pick[0] not in refuses:
            taken.append(pick)
        try:
            pick = walk.send(pick[0] not in refuses)
        except StopIteration:
            break
    return taken, met


def in_turns_by_definition(scores: list[TaskScores], among: Mask, refuses: Refuses) -> list[tuple[int, int]]:
    left = [row for row in np.flatnonzero(among).tolist() if row not in refuses]
    taken = []
    while left:
        task = len(taken) % len(scores)
        best = min(left, key=lambda row: (-scores[task].score[row], row))
        left.remove(best)
        taken.append((best, task))
    return taken


def standard(scores: list[TaskScores], among: Mask) -> NDArray[np.float64]:
    table = np.array([task.score for task in scores], np.float64)
    deviation = table[:, among].std(axis=1, keepdims=True)
    return np.divide(table - table[:, among].mean(axis=1, keepdims=True), deviation, where=deviation > 0, out=0 * table)


def balanced_by_definition(scores: list[TaskScores], among: Mask, refuses: Refuses) -> list[tuple[int, int]]:
    table = standard(scores, among)
    left = [row for row in np.flatnonzero(among).tolist() if row not in refuses]
    taken: list[tuple[int, int]] = []
    while left:
        means = table[:, [row for row, _ in taken]].mean(axis=1) if taken else np.zeros(len(table))
        gains = {(row, task): table[task, row] - means[task] for row in left for task in range(len(table))}
        largest = max(gains.values())
        task = min(task for (_, task), gain in gains.items() if gain >= largest - 1e-12)
        row = min(row for row in left if gains[row, task] >= largest - 1e-12)
        taken.append((row, task))
        left.remove(row)
    return taken


@given(pools())
def test_in_turns_each_task_takes_its_best_row_that_is_left(pool: tuple[list[TaskScores], Mask, Refuses]) -> None:
    scores, among, refuses = pool
    taken, met = walked(round_robin(scores, among), refuses)
    assert taken == in_turns_by_definition(scores, among, refuses)
    assert sorted(met) == np.flatnonzero(among).tolist(), "every candidate is met once"


@given(pools())
def test_balanced_takes_what_raises_the_least_served_task_most(pool: tuple[list[TaskScores], Mask, Refuses]) -> None:
    scores, among, refuses = pool
    taken, met = walked(balanced(scores, among), refuses)
    expected = balanced_by_definition(scores, among, refuses)
    table = standard(scores, among)
    for step, (mine, theirs) in enumerate(zip(taken, expected, strict=True)):
        if mine != theirs:  # equal gains within rounding: either is right, and what follows differs
            means = table[:, [row for row, _ in taken[:step]]].mean(axis=1) if step else np.zeros(len(table))
            assert table[mine[1], mine[0]] - means[mine[1]] == pytest.approx(
                table[theirs[1], theirs[0]] - means[theirs[1]], abs=1e-9
            )
            break
    assert sorted(met) == np.flatnonzero(among).tolist()


@given(pools())
def test_by_score_every_candidate_is_met_best_first(pool: tuple[list[TaskScores], Mask, Refuses]) -> None:
    scores, among, _ = pool
    combined = combine(scores, "max")
    _, met = walked(by_score(combined, among))
    assert met == sorted(np.flatnonzero(among).tolist(), key=lambda row: (-combined.score[row], row))


def chosen(scores: list[TaskScores], how: Combine, among: Mask, k: int) -> Chosen:
    """What tasks choose of rows of which nothing is known but their scores."""
    everywhere = Labelled(("pool",), np.zeros(len(among), np.int64))
    material = Material(everywhere, str, refused, Contamination(str, []))
    recipe = SelectionRecipe.model_construct(combine=how, strategy="top")
    return choose(scores, recipe, among, k, material)


def refused(rows: Sequence[int]) -> Floats:
    raise AssertionError(f"features of {rows} were read")


@given(pools())
def test_one_task_alone_is_its_ranking_however_it_chooses(pool: tuple[list[TaskScores], Mask, Refuses]) -> None:
    scores, among, _ = pool
    k = int(among.sum())
    found = [chosen(scores[:1], how, among, k).rows.tolist() for how in get_args(Combine)]
    assert found == [found[0]] * 4


def test_a_task_of_small_numbers_is_served_as_well_as_one_of_large_ones() -> None:
    generator = np.random.default_rng(0)
    scores = scores_of([generator.normal(0, 100, 400), generator.normal(0, 0.01, 400), generator.normal(7, 1, 400)])
    among = np.ones(400, bool)
    by_max = np.bincount(chosen(scores, "max", among, 60).task, minlength=3)
    even = np.bincount(chosen(scores, "balanced", among, 60).task, minlength=3)
    assert by_max.tolist() == [60, 0, 0]
    assert even.min() >= 12
    served = standard(scores, among)[:, chosen(scores, "balanced", among, 60).rows].mean(axis=1)
    assert served.max() - served.min() < 0.35


def test_a_row_carries_the_score_and_subtask_of_the_task_that_took_it() -> None:
    scores = scores_of([[0.9, 0.1, 0.8], [0.2, 0.7, 0.6]])
    found = chosen(scores, "round-robin", np.ones(3, bool), 3)
    assert found.rows.tolist() == [0, 1, 2]
    assert found.task.tolist() == found.subtask.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(found.score, np.array([0.9, 0.7, 0.8], np.float32))


@pytest.mark.parametrize("how", ["round-robin", "balanced"])
def test_ten_tasks_choose_ten_thousand_different_rows_of_two_hundred_thousand(how: Combine) -> None:
    generator = np.random.default_rng(1)
    scores = scores_of(generator.normal(size=(10, 200_000)))
    assert len(set(chosen(scores, how, np.ones(200_000, bool), 10_000).rows.tolist())) == 10_000


def test_a_draw_is_a_permutation_that_its_seed_gives_again() -> None:
    drawn = draw(1000, 3)
    assert len(np.unique(drawn.score)) == 1000
    assert drawn.valid.all()
    np.testing.assert_array_equal(drawn.score, draw(1000, 3).score)
    assert (drawn.score != draw(1000, 4).score).mean() > 0.9
    counts = np.zeros(6)
    for seed in range(3000):
        counts[np.argmax(draw(6, seed).score)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(500), "each row is the first as often as any other"
