"""The service's own worker: scores are array arithmetic without torch, and must not wait behind a GPU worker's shard."""

from __future__ import annotations

import logging
import threading
import time
from secrets import token_hex

from gradstore.types import Problem

from datastore.errors import GradstoreError
from datastore.leases import Claim, Jobs
from datastore.scoring import Scoring

log = logging.getLogger(__name__)


class _Dropped(Exception):
    """The lease is lost or the job cancelled: what was computed is in the cache, and nothing is recorded."""


class ScoringWorker:
    """A thread that does scoring jobs, one after the other."""

    def __init__(self, jobs: Jobs, scoring: Scoring, *, poll_interval: float) -> None:
        self._jobs = jobs
        self._scoring = scoring
        self._poll_interval = poll_interval  # seconds
        self._bell = threading.Event()
        self._stopping = False
        self._owner = f"service-{token_hex(4)}"
        self._thread = threading.Thread(target=self._loop, name="scoring", daemon=True)

    def start(self) -> None:
        """Begin to look for work."""
        self._thread.start()

    def ring(self) -> None:
        """Look for work now."""
        self._bell.set()

    def stop(self) -> None:
        """Stop after the block of rows at hand; the shard goes back."""
        self._stopping = True
        self._bell.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stopping:
            self._bell.clear()
            try:
                claim = self._jobs.claim(self._owner, kinds=("scoring",)) if self._waiting() else None
            except Exception:  # the thread must outlive a catalog that is away for a while
                log.exception("scoring cannot reach the catalog")
                claim = None
            if claim is None:
                self._bell.wait(self._poll_interval)
            else:
                self._do(claim)

    def _waiting(self) -> bool:
        return self._jobs.waiting(kinds=("scoring",))

    def _do(self, claim: Claim) -> None:
        renewed = time.monotonic()

        def on_rows(done: int) -> None:
            nonlocal renewed
            if self._stopping:
                raise _Dropped
            if time.monotonic() - renewed > self._jobs.lease / 3:
                renewed = time.monotonic()
                if not self._jobs.renew(claim, done=done):
                    raise _Dropped

        try:
            result = self._scoring.work(claim, on_rows)
            self._jobs.succeed(claim, result=result.model_dump(mode="json"))
        except _Dropped:
            self._jobs.release(claim)
        except Exception as error:  # a job's failure is recorded on the job
            self._jobs.fail(claim, _problem(claim, error), permanent=isinstance(error, GradstoreError))


def _problem(claim: Claim, error: Exception) -> Problem:
    if isinstance(error, GradstoreError):
        return Problem(type="scoring-failed", title="Scoring failed", status=422, detail=str(error))
    id = token_hex(8)
    log.error("scoring failed", extra={"job": claim.job, "error_id": id}, exc_info=error)
    detail = f"{type(error).__name__}: the traceback is in the service's log under {id}"
    return Problem(type="scoring-failed", title="Scoring failed", status=500, detail=detail, instance=id)
