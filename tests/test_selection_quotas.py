"""Quotas: whole rows of fractions, and what a group cannot fill goes to the others."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.influence import TaskScores
from datastore.selection.quotas import apportion, fill
from datastore.selection.tasks import Walks

WEIGHTS = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)


def walks_of(values: list[float]) -> Walks:
    valid = np.ones(len(values), bool)
    return Walks([TaskScores(np.array(values, np.float32), np.zeros(len(values), np.int16), valid)], "max", valid)


def everything(row: int) -> bool:
    return row >= 0


@given(WEIGHTS, st.data(), st.integers(0, 60))
def test_groups_get_their_share_and_what_others_cannot_fill(
    weights: list[int], data: st.DataObject, total: int
) -> None:
    capacities = [data.draw(st.integers(0, 20)) for _ in weights]
    found = apportion([Fraction(weight) for weight in weights], capacities, total)
    able = sum(capacity for weight, capacity in zip(weights, capacities, strict=True) if weight)
    assert sum(found) == min(total, able)
    full = [had == capacity for had, capacity in zip(found, capacities, strict=True)]
    assert all(0 <= had <= capacity for had, capacity in zip(found, capacities, strict=True))
    levels = [
        (Fraction(had, weight), Fraction(1, weight)) for had, weight in zip(found, weights, strict=True) if weight
    ]
    for here, (level, step) in enumerate(levels):
        for there, (other, _) in enumerate(levels):
            open_there = not [one for one, weight in zip(full, weights, strict=True) if weight][there]
            if open_there and here != there:
                assert level - step < other + levels[there][1], "no group is a whole row ahead of one with rows left"


def test_a_group_whose_rows_are_all_refused_leaves_its_places_though_nothing_was_taken_yet() -> None:
    picks, given_ = fill(
        walks_of([0.0] * 4), np.array([0, 0, 1, 0]), [Fraction(1), Fraction(2)], 1, lambda row: row == 3
    )
    assert ([row for row, _ in picks], given_) == ([3], [1, 0])


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(-1, 3)), min_size=1, max_size=25),
    st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any),
    st.integers(1, 25),
    st.data(),
)
@settings(deadline=None)
def test_a_quota_is_filled_with_the_best_of_each_group(
    rows: list[tuple[float, int]], weights: list[int], k: int, data: st.DataObject
) -> None:
    values, groups = [value for value, _ in rows], np.array([group for _, group in rows])
    refuses = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    picks, given_ = fill(
        walks_of(values), groups, [Fraction(weight) for weight in weights], k, lambda row: row not in refuses
    )
    taken = {row for row, _ in picks}
    able = [[row for row in np.flatnonzero(groups == group).tolist() if row not in refuses] for group in range(4)]
    expected = apportion([Fraction(weight) for weight in weights], [len(group) for group in able], k)
    assert given_ == expected
    for group, number in zip(able, expected, strict=True):
        best = sorted(group, key=lambda row: (-values[row], row))[:number]
        assert taken & set(group) == set(best)
    assert len(picks) == len(taken) == sum(expected)


def test_in_turns_the_shares_of_origins_hold_and_every_task_is_served() -> None:
    generator = np.random.default_rng(2)
    valid = np.ones(300, bool)
    scores = [TaskScores(generator.normal(size=300).astype(np.float32), np.zeros(300, np.int16), valid) for _ in "abc"]
    groups = np.repeat([0, 1, 2], [10, 90, 200])
    picks, given_ = fill(Walks(scores, "round-robin", valid), groups, [Fraction(1)] * 3, 90, everything)
    assert given_ == [10, 40, 40]
    assert np.bincount([task for _, task in picks]).min() >= 25
