"""Rows that may take their worker down: told to the catalog before they are computed (datastore/isolation.py).

Only at shards of which an attempt has ended with its worker: each batch then costs a write to the catalog.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from datastore.isolation import POISONED, Isolation
from datastore.leases import Claim, Jobs
from worker.heartbeat import Stopped
from worker.loaded import Engine
from worker.reading import Rows

log = logging.getLogger(__name__)


def without_poisoned(rows: Rows, claim: Claim) -> Rows:
    """A shard's rows, those that took their workers down left out with the reason."""
    poisoned = {row - claim.payload["start"] for row in claim.poisoned}
    if not poisoned:
        return rows
    kept = [(row, position) for row, position in zip(rows.encoded, rows.positions, strict=True)
            if position not in poisoned]  # fmt: skip
    return Rows(
        encoded=[row for row, _ in kept],
        positions=[position for _, position in kept],
        reasons=[POISONED if position in poisoned else reason for position, reason in enumerate(rows.reasons)],
    )


class Watch:
    """Records what an attempt is about to compute, and finds out first which of the suspects take the worker down."""

    def __init__(self, jobs: Jobs, claim: Claim, isolation: Isolation, rows: Rows, engine: Engine) -> None:
        self._jobs, self._claim, self._known = jobs, claim, isolation
        self._rows, self._engine = rows, engine
        self._numbers = [claim.payload["start"] + position for position in rows.positions]

    def try_suspects(self, *, pad_id: int) -> None:
        """Compute each suspect alone, those first at which an attempt has ended; what comes of it is thrown away.

        Before them a row that is not suspected: a worker that dies at whatever it computes would make suspects of good
        rows. Which one, changes with the attempt.
        """
        if not self._known.suspects:
            return
        log.warning("rows are tried alone", extra={**self._claim.labels, "rows": list(self._known.suspects)})
        index_of = {number: index for index, number in enumerate(self._numbers)}
        others = [index for number, index in index_of.items() if number not in self._known.suspects]
        if others:
            self._compute(others[self._claim.attempt % len(others)], pad_id=pad_id)
        for number in sorted(self._known.suspects, key=lambda row: (-self._known.suspects[row], row)):
            if number in index_of:
                self._record(replace(self._known, at=(number,)))
                self._compute(index_of[number], pad_id=pad_id)
            self._known = self._known.cleared(number)

    def about_to(self, indices: Sequence[int]) -> None:
        """Record that these of the encoded rows are computed now. Raises `Stopped` where the shard is lost."""
        self._record(replace(self._known, at=tuple(self._numbers[index] for index in indices)))

    def over(self) -> None:
        """Record that nothing is computed any more."""
        self._record(replace(self._known, at=()))

    def _compute(self, index: int, *, pad_id: int) -> None:
        row = self._rows.encoded[index]
        self._engine.features([row], pad_id=pad_id, token_budget=len(row.input_ids))

    def _record(self, isolation: Isolation) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)  # what was recorded before is over
        if not self._jobs.trying(self._claim, isolation):
            raise Stopped
