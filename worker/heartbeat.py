"""The sign of life of a shard at work: a thread that prolongs its lease, and tells the work when to stop.

A thread and not the work itself, because a batch or a model's loading may take longer than a lease. It writes progress
at most once a second, and nothing while there is no progress and the lease is young: on SQLite each write is a commit.
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

PROGRESS_INTERVAL = 1.0  # seconds


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
        written: tuple[int, int | None] = (0, None)
        renewed = time.monotonic()
        while not self._over.wait(min(period, PROGRESS_INTERVAL)):
            current = (self._done, self._total)
            if current == written and time.monotonic() - renewed < period:
                continue
            try:
                held = self._jobs.renew(self._claim, done=current[0], total=current[1])
            except SQLAlchemyError as error:  # the catalog may be back before the lease ends; the commit is fenced
                log.warning("heartbeat missed", extra={"job": self._claim.job, "reason": first_line(error)})
                continue
            if not held:
                self._lost.set()
                return
            written, renewed = current, time.monotonic()
