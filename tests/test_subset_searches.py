"""Searches for a subset of groups, against the best of all subsets and the published scan written out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datastore.subset_searches import SEARCHES, Evaluate, backward, forward_scan, stepwise

WORTH = np.array([2.0, -1.0, 3.0, 0.0, -2.0, 1.0])


def additive(worth: NDArray[np.float64] = WORTH) -> Evaluate:
    return lambda members: members @ worth


def tried(evaluate: Evaluate) -> tuple[list[int], Evaluate]:
    """An evaluation that counts."""
    counts: list[int] = []

    def counted(members: NDArray[np.bool_]) -> NDArray[np.float64]:
        counts.append(len(members))
        return evaluate(members)

    return counts, counted


def test_a_scan_goes_through_the_groups_once_and_keeps_what_is_no_worse() -> None:
    counts, evaluate = tried(additive())
    found = forward_scan(len(WORTH), evaluate)
    assert counts == [1] * 6
    assert [(step.group, step.kept) for step in found.trace] == [
        (0, True), (1, False), (2, True), (3, True), (4, False), (5, True),
    ]  # fmt: skip
    np.testing.assert_array_equal(np.flatnonzero(found.chosen), [0, 2, 3, 5])
    assert found.value == 6
    np.testing.assert_array_equal(found.scores, [3, -1, 3, 0, -2, 1])


def test_a_scan_depends_on_the_order_where_groups_are_worth_less_together() -> None:
    def either(members: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.array([{(True, False): 1.0, (False, True): 2.0}.get(tuple(row.tolist()), 0.0) for row in members])

    assert forward_scan(2, either).value == 1
    assert stepwise(2, either).value == 2


def test_stepwise_and_backward_find_the_groups_that_are_worth_something() -> None:
    for search in (stepwise, backward):
        counts, evaluate = tried(additive())
        found = search(len(WORTH), evaluate)
        assert found.value == 6
        assert set(np.flatnonzero(found.chosen)) | {3} == {0, 2, 3, 5}  # group 3 changes nothing
        order = np.argsort(-found.scores, kind="stable")
        np.testing.assert_array_equal(order[:3], [2, 0, 5])
        np.testing.assert_array_equal(order[-2:], [1, 4])
        assert sum(counts) == (21 if search is stepwise else 1 + sum(range(2, 7)))
        assert len(set(found.scores.tolist())) == 6


def test_a_trace_leads_to_the_subset_that_was_chosen() -> None:
    generator = np.random.default_rng(3)
    pairs = generator.normal(size=(8, 8))
    evaluate: Evaluate = lambda members: np.einsum("sg,gh,sh->s", members * 1.0, pairs, members * 1.0)  # noqa: E731
    for name, search in SEARCHES.items():
        found = search(8, evaluate)
        chosen = np.full(8, name == "backward")
        for step in found.trace:
            if step.kept:
                chosen[step.group] = name != "backward"
        np.testing.assert_array_equal(chosen, found.chosen)
        assert evaluate(found.chosen[None])[0] == found.value
        assert found.value >= max((step.value for step in found.trace), default=found.value)
