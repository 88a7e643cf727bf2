"""The sign of life of a shard at work: a thread that prolongs its lease, and tells the work when to stop.

A thread and not the work itself, because a batch or a model's loading may take longer than a lease. Every second it
looks whether the work is still wanted, which takes no lock: a cancelled job is noticed within that and a batch. Writing
is dearer, since the catalog has one writer at a time: progress is written at most once a second, by a hundredth of the
time, so that many workers, whose writes wait for each other's, write more rarely, and nothing while the lease is young
and nothing has come on.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from datastore.errors import first_line
from datastore.leases import Claim, Jobs

log = logging.getLogger(__name__)

LOOK_INTERVAL = 1.0  # seconds
WRITING_SHARE = 0.01  # of the time, that is spent on writing progress


class Stopped(Exception):
    """The shard is not to be gone on with: lost to another worker, cancelled, or its worker has been asked to leave."""


class Heartbeat:
    """Keeps a claim alive while its `with` block runs."""

    def __init__(self, jobs: Jobs, claim: Claim, *, leaving: threading.Event) -> None:
        self._jobs = jobs
        self._claim = claim
        self._leaving = leaving
        self._done = 0
        self._total: int | None = None
        self._lost = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{claim.shard}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def report(self, done: int, total: int | None = None) -> None:
        """Say how far the work is. Raises `Stopped` when it is not wanted any more."""
        self._done, self._total = done, total
        self.check()

    def check(self) -> None:
        """Raise `Stopped` when the work is not wanted any more."""
        if self._lost.is_set() or self._leaving.is_set():
            raise Stopped

    def _beat(self) -> None:
        period = self._jobs.lease / 3
        pace = LOOK_INTERVAL
        written: tuple[int, int | None] = (0, None)
        renewed = time.monotonic()
        while not self._over.wait(min(period, LOOK_INTERVAL)):
            current, began = (self._done, self._total), time.monotonic()
            writes = began - renewed >= (period if current == written else min(pace, period))
            try:
                if writes:
                    held = self._jobs.renew(self._claim, done=current[0], total=current[1])
                    pace = max(LOOK_INTERVAL, (time.monotonic() - began) / WRITING_SHARE)
                    written, renewed = current, began
                else:
                    held = self._jobs.wanted(self._claim)
            except SQLAlchemyError as error:  # the catalog may be back before the lease ends; the commit is fenced
                log.warning("heartbeat missed", extra={**self._claim.labels, "reason": first_line(error)})
                continue
            if not held:
                self._lost.set()
                return
