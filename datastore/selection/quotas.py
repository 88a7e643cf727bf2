"""Quotas: shares of the chosen rows for groups of the pool, such as origins or clusters.

A quota is a share, and what a group cannot fill goes to the others in proportion to theirs: with weights w_g and
capacities c_g, group g gets min(c_g, λ·w_g) rows, where λ is such that these are as many as are wanted
("water-filling"). Fractions of rows are rounded by largest remainder, of equal ones the first group's.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from datastore.influence import Mask
from datastore.selection.tasks import Filter, Pick, Walks

Groups = NDArray[np.int64]


def apportion(weights: Sequence[Fraction], capacities: Sequence[int], total: int) -> list[int]:
    """How many rows each group gets of `total`; no more than its capacity, and none without a weight.

    >>> apportion([Fraction(1), Fraction(1), Fraction(2)], [1, 9, 9], 9)
    [1, 3, 5]
    """
    full: set[int] = set()
    open_ = [group for group, weight in enumerate(weights) if weight > 0]
    while True:
        left = total - sum(capacities[group] for group in full)
        sharing = [group for group in open_ if group not in full]
        weight = sum((weights[group] for group in sharing), Fraction(0))
        shares = {group: left * weights[group] / weight for group in sharing}
        over = {group for group, share in shares.items() if share >= capacities[group]}
        if not over:
            break
        full |= over
    found = [capacities[group] if group in full else int(shares.get(group, 0)) for group in range(len(weights))]
    remainders = sorted(sharing, key=lambda group: (found[group] - shares[group], group))
    for group in remainders[: max(0, left - sum(found[group] for group in sharing))]:
        found[group] += 1
    return found


def fill(
    walks: Walks, groups: Groups, weights: Sequence[Fraction], k: int, keep: Filter
) -> tuple[list[Pick], list[int]]:
    """The first `k` rows of a walk that fit into the quotas, and how many rows each group gave.

    A group that turns out to have too few rows (some may be refused by `keep` on the way) leaves its places to the
    others: the rows that were passed over are walked once more, with what is left of the quotas. `groups` has each
    row's group (n,); a row of group -1 is passed over.
    """
    given, picks = [0] * len(weights), list[Pick]()
    passed = walks.among & (groups >= 0)
    capacities = np.bincount(groups[passed], minlength=len(weights)).tolist()
    while len(picks) < k:
        targets = apportion(weights, capacities, k)
        before, skipped = len(picks), np.zeros(len(groups), bool)
        for row, task in walks.accepted(passed, picks, _within(groups, given, targets, skipped, keep)):
            given[groups[row]] += 1
            picks.append((row, task))
            if len(picks) == k:
                break
        waiting = np.bincount(groups[skipped], minlength=len(weights))
        left = [had + more for had, more in zip(given, waiting.tolist(), strict=True)]
        if not waiting.any() or (len(picks) == before and left == capacities):
            break
        capacities, passed = left, skipped
    return picks, given


def _within(groups: Groups, given: list[int], targets: Sequence[int], skipped: Mask, keep: Filter) -> Filter:
    """Keep the rows whose group has places left; those that have none are noted."""

    def fits(row: int) -> bool:
        group = groups[row]
        if given[group] >= targets[group]:
            skipped[row] = True
            return False
        return keep(row)

    return fits
