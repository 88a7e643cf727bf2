"""The API as an ASGI application."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from anyio.to_thread import current_default_thread_limiter, run_sync
from fastapi import FastAPI
from fastapi.routing import APIRoute
from gradstore import __version__

from datastore import tracing
from datastore.catalog import Catalog
from datastore.errors import BucketUnreachable
from datastore.keys import Keys
from datastore.settings import Settings
from service import openapi, problems
from service.access import Access
from service.dependencies import Backend
from service.door import Auditing, Door, is_loopback
from service.metrics import Metrics
from service.middleware import Bodies, Conversation
from service.queue import Queue, queue_of
from service.routes import (
    adapter_choices,
    adapters,
    allocations,
    attributions,
    audit,
    cascades,
    checkpoints,
    comparisons,
    conversions,
    dashboard,
    datasets,
    distributions,
    embeddings,
    estimates,
    evaluations,
    exports,
    finetunes,
    generations,
    gradients,
    health,
    imports,
    jobs,
    predictors,
    projectors,
    runs,
    select,
    selections,
    streams,
    tasks,
    taxonomies,
    validations,
    workers,
)
from service.routes import (
    annotations as annotating,  # the name is taken by __future__
)

log = logging.getLogger(__name__)

ROUTERS = (
    datasets.router,
    tasks.router,
    checkpoints.router,
    adapter_choices.router,
    adapters.router,
    allocations.router,
    runs.router,
    gradients.router,
    imports.router,
    select.router,
    distributions.router,
    selections.router,
    exports.router,
    finetunes.router,
    conversions.router,
    evaluations.router,
    generations.router,
    validations.router,
    predictors.router,
    cascades.router,
    attributions.router,
    estimates.validations,
    estimates.router,
    comparisons.router,
    projectors.router,
    embeddings.router,
    streams.router,
    annotating.router,
    taxonomies.router,
    jobs.router,
    audit.router,
    workers.router,
    health.router,
    dashboard.router,
)
THREADS = 128  # handlers at work at once; a GET /select that waits for scores is one of them
ABANDONED = 86400.0  # seconds after which what a killed server left half-done is deleted


def create_app(settings: Settings, *, catalog: Catalog | None = None, queue: Queue | None = None) -> FastAPI:
    """The API over the store that `settings` name; by default with the catalog and queue that they name, too."""
    settings.data.mkdir(parents=True, exist_ok=True)
    backend = Backend.of(settings, catalog or Catalog(settings.catalog_url), queue or queue_of(settings.broker))
    app = FastAPI(
        title="gradstore",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.backend = backend
    app.state.metrics = Metrics(backend)
    app.state.dashboard = dashboard.Files()
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = partial(openapi.document, app)  # type: ignore[method-assign]  # FastAPI's way of changing it
    problems.install(app)
    app.add_middleware(
        Door, access=Access(Keys(backend.catalog), settings, among_strangers=not is_loopback(settings.host))
    )
    app.add_middleware(Bodies, max_upload_bytes=settings.max_upload_bytes)
    app.add_middleware(Auditing, audit=backend.audit)
    app.add_middleware(Conversation, observe=app.state.metrics.observe)  # the last one added is the outermost
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    backend: Backend = app.state.backend
    await run_sync(backend.catalog.migrate)
    await run_sync(_sweep, backend)
    threading.Thread(target=_sweep_bucket, args=[backend], name="bucket", daemon=True).start()  # it may be away
    current_default_thread_limiter().total_tokens = THREADS
    backend.scorer.start()
    yield
    backend.stopping.set()
    await run_sync(backend.scorer.stop)
    await run_sync(tracing.close)
    backend.catalog.close()


def _sweep_bucket(backend: Backend) -> None:
    """Delete what killed processes left in the bucket, if there is one."""
    try:
        for depot in backend.depots:
            depot.sweep(older_than=ABANDONED)
    except BucketUnreachable as error:
        log.warning("the bucket was not swept", extra={"reason": str(error)})


def _sweep(backend: Backend) -> None:
    """Delete what killed servers left of uploads, tasks, scores and requests."""
    backend.catalog.free_unanswered_keys()
    backend.tasks.sweep(older_than=ABANDONED)
    backend.scoring.cache.sweep(older_than=ABANDONED)
    for folder in (backend.settings.data / "incoming").glob("form-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED:
            log.info("an abandoned upload is deleted", extra={"folder": folder.name})
            shutil.rmtree(folder, ignore_errors=True)
