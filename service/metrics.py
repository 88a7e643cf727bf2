"""What Prometheus sees: the requests of this process, and the state of the store at the moment of asking."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from datastore.schema import JobRow
from service.dependencies import Backend

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0, 120.0)  # seconds: from a look-up to a large upload


class Metrics:
    """The metrics of one app; a registry of its own lets several live in one process."""

    def __init__(self, backend: Backend) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "gradstore_requests", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "gradstore_request_seconds", "Time to answer.", ("method", "route"), buckets=BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_StoreCollector(backend))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _StoreCollector(Collector):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> list[GaugeMetricFamily]:
        """Name nothing beforehand: registering must not read the catalog."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the catalog and the disk."""
        jobs = GaugeMetricFamily("gradstore_jobs", "Jobs in the catalog.", labels=("kind", "status"))
        query = select(JobRow.kind, JobRow.status, func.count()).group_by(JobRow.kind, JobRow.status)
        with self._backend.catalog.reading() as session:
            for kind, status, number in session.execute(query):
                jobs.add_metric((kind, status), number)
        yield jobs
        workers = len(self._backend.jobs.workers())
        yield GaugeMetricFamily("gradstore_workers", "Workers seen in the last minute.", value=workers)
        free = shutil.disk_usage(self._backend.settings.data).free
        yield GaugeMetricFamily("gradstore_free_bytes", "Bytes free where the store lies.", value=free)
