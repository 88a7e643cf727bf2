"""What Prometheus sees of the store: jobs, shards that wait, workers, bytes, as the catalog has them when it is asked.

A counter must never go back, and a job may be deleted or begun anew. So what jobs have done is counted from one look to
the next, in this process: what was done before it started is not in it, nor a job that came and went between two looks.

Bytes are found by walking the disk, which takes long in a large store: a thread does it, at most every ten minutes, and
a look gives what was found last.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from datastore.catalog import utc_now
from datastore.errors import first_line
from datastore.leases import OPEN
from datastore.schema import JobRow, ShardRow, WorkerRow
from datastore.usage import bytes_by_part
from service.dependencies import Backend

log = logging.getLogger(__name__)

CLOCKS = timedelta(minutes=1)
"""So far the clocks of hosts may be apart: a job that ended on another is still seen to have done its last rows."""
WALK_INTERVAL = 600.0  # seconds between two walks over the disk


class StoreMetrics(Collector):
    """Collects when it is asked."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._progress = _Progress()
        self._bytes = _Bytes(backend)

    def describe(self) -> list[Metric]:
        """Name nothing beforehand: registering must not read the catalog."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the catalog and the disk; a catalog that is away is told as such."""
        try:
            found = list(self._of_the_catalog())
        except SQLAlchemyError as error:
            log.warning("the catalog does not answer", extra={"reason": first_line(error)})
            found = []
        yield GaugeMetricFamily("gradstore_catalog_up", "Whether the catalog answers.", value=1 if found else 0)
        yield from found
        expiries = self._backend.scorer.expired
        yield CounterMetricFamily(
            "gradstore_lease_expiries", "Shards put back by this process: their worker was gone.", value=expiries
        )
        free = shutil.disk_usage(self._backend.settings.data).free
        yield GaugeMetricFamily("gradstore_free_bytes", "Bytes free where the store lies.", value=free)
        parts = GaugeMetricFamily("gradstore_store_bytes", "Bytes on the disk by part of the store.", labels=("part",))
        for part, size in self._bytes.latest().items():
            parts.add_metric((part,), size)
        yield parts

    def _of_the_catalog(self) -> Iterator[Metric]:
        with self._backend.catalog.reading() as session:
            yield _jobs(session)
            yield _shards(session)
            yield _oldest(session)
            yield self._progress.counted(session)
            workers = self._backend.jobs.workers()
            yield _memory(session, {worker.id for worker in workers})
        yield GaugeMetricFamily("gradstore_workers", "Workers seen in the last minute.", value=len(workers))
        busy = sum(worker.job is not None for worker in workers)
        yield GaugeMetricFamily("gradstore_workers_busy", "Workers that are at a shard.", value=busy)


class _Progress:
    """What jobs have done since this process first saw them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looked_at = utc_now()
        self._seen: dict[str, int] = {}
        self._total: Counter[tuple[str, str]] = Counter()

    def counted(self, session: Session) -> Metric:
        """The counter, brought up to date."""
        with self._lock:
            self._look(session)
            rows = CounterMetricFamily(
                "gradstore_done", "What jobs have done, in their units.", labels=("kind", "unit")
            )
            for labels, number in sorted(self._total.items()):
                rows.add_metric(labels, number)
            return rows

    def _look(self, session: Session) -> None:
        now = utc_now()
        query = select(JobRow.id, JobRow.kind, JobRow.unit, JobRow.done, JobRow.created_at).where(
            or_(JobRow.status.in_(OPEN), JobRow.finished_at >= self._looked_at - CLOCKS)
        )
        seen = {}
        for id, kind, unit, done, created_at in session.execute(query):
            before = self._seen.get(id, 0 if created_at >= self._looked_at else done)
            self._total[kind, unit] += max(0, done - before)
            seen[id] = max(done, before)  # a shard that was put back is done again, and counted once
        self._looked_at, self._seen = now, seen


class _Bytes:
    """The bytes of the store's parts, found by a thread."""

    def __init__(self, backend: Backend) -> None:
        self._settings = backend.settings
        self._lock = threading.Lock()
        self._walking = False
        self._walked_at: float | None = None
        self._found: dict[str, int] = {}

    def latest(self) -> dict[str, int]:
        """What was found last, at first nothing; a new walk begins where that is long ago."""
        with self._lock:
            due = self._walked_at is None or time.monotonic() - self._walked_at > WALK_INTERVAL
            if due and not self._walking:
                self._walking = True
                threading.Thread(target=self._walk, name="bytes", daemon=True).start()
            return self._found

    def _walk(self) -> None:
        try:
            found = bytes_by_part(self._settings)
        except OSError as error:
            log.warning("the store's bytes cannot be counted", extra={"reason": first_line(error)})
            found = {}
        with self._lock:
            self._found, self._walked_at, self._walking = found or self._found, time.monotonic(), False


def _jobs(session: Session) -> Metric:
    jobs = GaugeMetricFamily("gradstore_jobs", "Jobs in the catalog.", labels=("kind", "status"))
    query = select(JobRow.kind, JobRow.status, func.count()).group_by(JobRow.kind, JobRow.status)
    for kind, status, number in session.execute(query):
        jobs.add_metric((kind, status), number)
    return jobs


def _shards(session: Session) -> Metric:
    """The queue's depth, and what is at work; a kind that has had none is not there."""
    shards = GaugeMetricFamily("gradstore_shards", "Shards of jobs that go on.", labels=("kind", "status"))
    query = (
        select(ShardRow.kind, ShardRow.status, func.count())
        .join(JobRow, JobRow.id == ShardRow.job_id)
        .where(JobRow.status.in_(OPEN), ShardRow.status.in_(OPEN))
        .group_by(ShardRow.kind, ShardRow.status)
    )
    for kind, status, number in session.execute(query):
        shards.add_metric((kind, status), number)
    return shards


def _oldest(session: Session) -> Metric:
    oldest = GaugeMetricFamily(
        "gradstore_oldest_waiting_seconds", "Age of the oldest job that nobody has begun.", labels=("kind",)
    )
    query = select(JobRow.kind, func.min(JobRow.created_at)).where(JobRow.status == "queued").group_by(JobRow.kind)
    created: datetime
    for kind, created in session.execute(query):
        oldest.add_metric((kind,), max(0.0, (utc_now() - created).total_seconds()))
    return oldest


def _memory(session: Session, seen: set[str]) -> Metric:
    memory = GaugeMetricFamily(
        "gradstore_worker_memory_bytes", "Memory of workers' devices.", labels=("worker", "device", "state")
    )
    for worker in session.scalars(select(WorkerRow).where(WorkerRow.id.in_(seen))):
        for state, size in (worker.memory or {}).items():
            memory.add_metric((worker.id, worker.device, state), size)
    return memory
