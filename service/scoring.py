"""The service's own worker: scores are array arithmetic, and must not wait behind a GPU worker's shard.

Small pools are scored here at once. The pieces of large ones are left to workers that are free for them, whose kernels
are faster (worker/products.py) and who share them; where there is none, or none comes, they are done here, too.
"""

from __future__ import annotations

import logging
import threading
import time
from secrets import token_hex

from gradstore.types import JobKind

from datastore.errors import GradstoreError, UnexpectedError, is_outage
from datastore.leases import Claim, Jobs
from datastore.scoring import Scoring
from service.problems import describe

log = logging.getLogger(__name__)

KINDS: tuple[JobKind, ...] = ("scoring",)
AT_ONCE = 32_768
"""Rows times checkpoints of a shard that is not worth waiting for a worker: half a second at 8,192 dims."""
GRACE = 1.0  # seconds that idle workers have to take larger shards


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
        self.expired = 0
        """Leases that it has seen end, so far."""
        self._left_since: float | None = None
        """When shards were first left to workers, in monotonic seconds."""
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
        swept = 0.0
        while not self._stopping:
            self._bell.clear()
            claim = None
            try:
                if time.monotonic() - swept > self._jobs.lease / 3:
                    # a server that was killed may have left a job, and there may be no worker
                    self.expired += self._jobs.sweep()
                    swept = time.monotonic()
                claim = self.claim()
                if claim is not None:
                    self._do(claim)
            except Exception:  # the thread must outlive a catalog that is away for a while; the lease ends by itself
                log.exception("scoring cannot reach the catalog")
                claim = None
            if claim is None:
                self._bell.wait(self._poll_interval)

    def claim(self) -> Claim | None:
        """Take a shard that is small, or that no worker is there for."""
        if not self._jobs.waiting(kinds=KINDS):
            self._left_since = None
            return None
        claim = self._jobs.claim(self._owner, kinds=KINDS, most_units=AT_ONCE)
        if claim is None and not self._leaves_to_workers():
            claim = self._jobs.claim(self._owner, kinds=KINDS)
        if claim is not None:
            self._left_since = None
        return claim

    def _leaves_to_workers(self) -> bool:
        """Whether a worker is at scores already, or one is idle and has not had its time."""
        workers = self._jobs.workers()
        if any(worker.job is not None and worker.job.startswith("scores_") for worker in workers):
            return True
        if self._left_since is None:
            self._left_since = time.monotonic()
        in_time = time.monotonic() - self._left_since < GRACE
        return in_time and any(worker.job is None for worker in workers)

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
            self._scoring.work(claim, on_rows)
            self._jobs.succeed(claim)
        except _Dropped:
            self._jobs.release(claim)
        except GradstoreError as error:
            if is_outage(error):
                self._jobs.release(claim)
            else:
                self._jobs.fail(claim, describe(error, request_id=None), permanent=True)
        except Exception:  # a job's failure is recorded on the job
            id = token_hex(8)
            log.exception("scoring failed", extra={**claim.labels, "error_id": id})
            told = UnexpectedError(f"an unexpected error; its traceback is in the service's log under {id}")
            self._jobs.fail(claim, describe(told, request_id=id), permanent=False)
