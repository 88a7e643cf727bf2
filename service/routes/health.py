"""Whether the service can work, what its store holds, and what Prometheus sees of it."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import Depends, Request, Response
from gradstore import __version__
from gradstore.types import Health, Readiness, Usage

from datastore import usage
from service import readiness
from service.dependencies import BackendDep
from service.metrics import MEDIA_TYPE, Metrics
from service.problems import NotReady
from service.routing import Router

router = Router(tag="service")


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


@router.get("/health")
async def get_health() -> Health:
    """A sign of life: nothing else is asked, so that a service is not restarted for what a restart does not mend."""
    return Health(status="ok", version=__version__)


@router.get("/ready")
def get_ready(backend: BackendDep) -> Readiness:
    """Whether the service can work: catalog, store, bucket, disk, dispatch and workers, each with its reason.

    503 where something is missing that requests cannot do without. `degraded` means that they are answered, and jobs
    wait, or are begun later.
    """
    seen = readiness.workers(backend)
    checks = list(readiness.checks(backend, seen))
    missing = [check for check in checks if not check.ok]
    if any(check.required for check in missing):
        raise NotReady([check for check in missing if check.required])
    return Readiness(
        status="degraded" if missing else "ok",
        version=__version__,
        checks=checks,
        workers=seen,
        free_bytes=shutil.disk_usage(backend.settings.data).free,
    )


@router.get("/usage")
def get_usage(backend: BackendDep) -> Usage:
    """How many things of each noun the store holds, and the bytes that its parts take on the disk."""
    return usage.usage(backend.catalog, backend.settings)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def get_metrics(metrics: Annotated[Metrics, Depends(_metrics)]) -> Response:
    """Requests, jobs, workers and free space in Prometheus's text format."""
    return Response(metrics.text(), headers={"Content-Type": MEDIA_TYPE})
