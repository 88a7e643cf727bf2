"""Finding the rows that take their worker down: a crash tells nothing but that the worker is gone.

The first attempt at a shard records nothing. Once one has ended with its worker, the next record in the catalog which
rows they are about to compute. Where the worker goes down at several, the next attempt computes each of these alone
before anything else, for nothing but to see whether it lives; a row at which, alone, two attempts have ended is
poisoned and left out. One culprit costs four attempts, each further one three:

    an attempt that knows of nothing → at a batch → at a row alone → at the same row alone → the rest of the shard

A worker that dies for another reason, at a power cut say, makes rows suspects that are then computed alone, and
cleared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

POISONED = "takes its worker down"
"""Why a row that was found out so has no feature."""
DEATHS = 2  # of a row alone, after which it is poisoned
CULPRIT_ATTEMPTS = 3  # that finding one may cost, beside those that every shard has
MOST_POISONED = 16  # rows of a shard: beyond, it is not for the rows that its workers die


@dataclass(frozen=True)
class Isolation:
    """What is known of a shard whose attempts have ended with their workers."""

    at: tuple[int, ...] = ()
    """Rows that the present attempt is at, or that the last one was at when it ended."""
    suspects: Mapping[int, int] = field(default_factory=dict)
    """Rows that are to be computed alone first, and how many attempts have ended at each of them alone."""

    @classmethod
    def read(cls, stored: Sequence[Any] | None) -> Self | None:
        """What `ShardRow.trying` has; None where no attempt has ended with its worker."""
        return None if stored is None else cls(tuple(stored[0]), dict(stored[1]))

    def stored(self) -> list[Any]:
        """What `ShardRow.trying` gets."""
        return [list(self.at), [list(item) for item in self.suspects.items()]]

    def ended(self) -> tuple[Self, int | None]:
        """What is known after an attempt has ended with its worker, and the row that is poisoned, if one is."""
        if len(self.at) != 1:
            suspects = {**dict.fromkeys(self.at, 0), **self.suspects}
            return replace(self, at=(), suspects=suspects), None
        row = self.at[0]
        deaths = self.suspects.get(row, 0) + 1
        others = {other: count for other, count in self.suspects.items() if other != row}
        if deaths >= DEATHS:
            return replace(self, at=(), suspects=others), row
        return replace(self, at=(), suspects={row: deaths, **others}), None

    def cleared(self, row: int) -> Self:
        """What is known once a row has been computed alone."""
        return replace(self, at=(), suspects={other: count for other, count in self.suspects.items() if other != row})


def attempts(isolation: Isolation | None, *, poisoned: Sequence[int], at_most: int) -> int:
    """How many attempts at a shard may fail, of which there are `at_most` where no row is suspected."""
    suspected = isolation is not None and bool(isolation.suspects)
    return at_most + CULPRIT_ATTEMPTS * (len(poisoned) + suspected) if len(poisoned) <= MOST_POISONED else 0
