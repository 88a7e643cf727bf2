"""The life of a worker: look for shards, do them, and keep house beside that.

`work_until_left` is the whole of a polling worker. A Celery worker calls `drain` when a message comes
(worker/celery_app.py) and has the same `Caretaker`: a thread, so that a worker that is busy for an hour is seen to be
alive, and puts back what dead workers held.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from gradstore.types import JobKind
from sqlalchemy.exc import SQLAlchemyError

from datastore.errors import BucketUnreachable, first_line
from datastore.leases import Claim, Publication
from worker.context import Context
from worker.devices import memory
from worker.jobs import KINDS, Outcome, compute, tend, tidy
from worker.speed import measure

log = logging.getLogger(__name__)

CARE_INTERVAL = 5.0  # seconds between two signs of life and looks after the others, where the lease is not shorter
TIDY_INTERVAL = 600.0  # seconds between two looks for what killed processes left on the disk


class Caretaker:
    """Shows that the worker is alive, and finishes what dead ones left, while its `with` block runs."""

    def __init__(self, context: Context, *, kinds: Collection[JobKind] = KINDS) -> None:
        self._context = context
        self._kinds = kinds
        self._at: tuple[str, int] | None = None
        """Job and shard."""
        self._over = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._care, name="caretaker", daemon=True)

    def __enter__(self) -> Self:
        self._flops = measure(self._context.device)  # before there is work to be measured with it
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._wake.set()
        self._thread.join()
        try:
            self._context.jobs.leave(self._context.owner)
        except SQLAlchemyError as problem:
            log.warning("the catalog does not answer", extra={"reason": first_line(problem)})

    def working_on(self, claim: Claim | None) -> None:
        """Say which shard the worker is at, for its next sign of life; the claim itself has recorded it, too."""
        self._at = (claim.job, claim.number) if claim else None

    def _care(self) -> None:
        interval = min(CARE_INTERVAL, self._context.settings.lease / 3)
        waiting: Sequence[Publication] = ()
        looked = tidied = -math.inf
        while True:
            self._wake.clear()
            if self._over.is_set():
                return
            try:
                self._announce()
                if time.monotonic() - looked >= interval:
                    looked = time.monotonic()
                    waiting = tend(self._context, waiting)
                if time.monotonic() - tidied >= TIDY_INTERVAL:
                    tidied = time.monotonic()
                    tidy(self._context)
            except (SQLAlchemyError, OSError, BucketUnreachable) as problem:  # which the worker outlives
                log.warning("care is late", extra={"reason": first_line(problem)})
            self._wake.wait(interval)

    def _announce(self) -> None:
        device, (job, shard) = self._context.device, self._at or (None, None)
        self._context.jobs.announce(
            self._context.owner, device=str(device), job=job, shard=shard, flops=self._flops, kinds=self._kinds,
            host=socket.gethostname(), memory=memory(device),
        )  # fmt: skip


def drain(
    context: Context,
    caretaker: Caretaker,
    *,
    kinds: Collection[JobKind] = KINDS,
    on_claim: Callable[[], None] = lambda: None,
) -> int:
    """Do shards until none waits or the worker is asked to leave; returns how many.

    A shard is written and committed while the next one is computed, and all are when this returns.

    `on_claim` is called after each claim, before the work. Raises SQLAlchemyError where the catalog does not answer.
    """
    count = 0
    committing: Future[Outcome] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="committing") as thread:
        while True:
            claim = _claim(context, kinds)
            commit = _compute(claim, context, caretaker, on_claim) if claim is not None else None
            before, committing = committing, thread.submit(commit) if commit is not None else None
            if before is not None:
                before.result()  # and then another look: what could not be committed waits again
            elif committing is None:
                break
            count += commit is not None
    return count


def _compute(
    claim: Claim, context: Context, caretaker: Caretaker, on_claim: Callable[[], None]
) -> Callable[[], Outcome]:
    on_claim()
    caretaker.working_on(claim)
    try:
        return compute(claim, context)
    finally:
        caretaker.working_on(None)


def _claim(context: Context, kinds: Collection[JobKind]) -> Claim | None:
    """Take a shard, where one waits and the worker is not asked to leave."""
    # a look that takes no lock comes first: idle workers leave SQLite to those who write
    if context.leaving.is_set() or not context.jobs.waiting(kinds=kinds):
        return None
    return context.jobs.claim(context.owner, kinds=kinds, prefer=context.ahead.shard, turns=context.turns)


def work_until_left(context: Context, *, kinds: Collection[JobKind] = KINDS, once: bool = False) -> None:
    """Look for shards and do them until the worker is asked to leave; with `once`, until none waits."""
    log.info("worker ready", extra={"worker": context.owner, "device": str(context.device), "kinds": sorted(kinds)})
    with Caretaker(context, kinds=kinds) as caretaker:
        while not context.leaving.is_set():
            try:
                drain(context, caretaker, kinds=kinds)
            except SQLAlchemyError as problem:
                log.warning("the catalog does not answer", extra={"reason": first_line(problem)})
                context.leaving.wait(1.0)
            if once:
                break
            context.leaving.wait(context.settings.poll_interval)
    log.info("worker left", extra={"worker": context.owner})
