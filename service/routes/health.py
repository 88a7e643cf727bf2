"""Whether the service can work, what its store holds, and what Prometheus sees of it."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import Depends, Request, Response
from gradstore import __version__
from gradstore.types import Health, Usage

from datastore import usage
from service.dependencies import BackendDep
from service.metrics import MEDIA_TYPE, Metrics
from service.routing import Router

router = Router(tag="service")


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


@router.get("/health", responses={503: {"model": Health, "description": "The catalog does not answer."}})
def get_health(backend: BackendDep, response: Response) -> Health:
    """Whether catalog and dispatch work, the workers of the last minute, and the free space.

    `degraded` with status 200 means that workers are not woken and find their work later.
    """
    catalog, dispatch = backend.catalog.alive(), backend.queue.alive()
    if not catalog:
        response.status_code = 503
    return Health(
        status="ok" if catalog and dispatch else "degraded",
        version=__version__,
        catalog=catalog,
        dispatch=dispatch,
        workers=backend.jobs.workers() if catalog else [],
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
