"""What handlers ask for, by type: the parts of the store that this process has opened."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated, Self, cast

from fastapi import Depends, Path, Request
from gradstore.types import Request as RequestBody
from pydantic import ConfigDict, Field

from datastore.audit import Audit
from datastore.catalog import Catalog
from datastore.settings import Settings
from datastore.store import OpenStore, open_store
from service.queue import Queue
from service.scoring import ScoringWorker


@dataclass(frozen=True)
class Backend(OpenStore):
    """Everything behind the API."""

    queue: Queue
    scorer: ScoringWorker
    audit: Audit
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the server is asked to stop: streams that would never end, end."""

    @classmethod
    def of(cls, settings: Settings, catalog: Catalog, queue: Queue) -> Self:
        """Put the parts together."""
        store = open_store(settings, catalog)
        scorer = ScoringWorker(store.jobs, store.scoring, poll_interval=settings.poll_interval)
        return cls(**vars(store), queue=queue, scorer=scorer, audit=Audit(catalog, settings.audit_days))


def backend_of(request: Request) -> Backend:
    """The backend of the app that got the request."""
    return cast("Backend", request.app.state.backend)


class Paging(RequestBody):
    """Which part of a list is asked for."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int = Field(20, ge=1, le=1000)
    """How many at most."""
    after: str | None = Field(None, max_length=255)
    """Id of the last item of the page before."""


async def _at_once(request: Request) -> Backend:
    """The backend without the hop to a thread and back that FastAPI gives a plain function."""
    return backend_of(request)


BackendDep = Annotated[Backend, Depends(_at_once)]
Reference = Annotated[
    str, Path(description="An id or a name.", min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")
]
