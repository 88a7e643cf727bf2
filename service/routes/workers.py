"""Workers: who computes, on what, and what each is at."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from gradstore.types import Page, Worker

from service.dependencies import BackendDep, Paging, Reference
from service.routing import noun

router = noun("workers")


@router.get("")
def list_workers(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[Worker]:
    """A page of the workers that were seen in the last minute, by id."""
    return backend.jobs.page_of_workers(limit=paging.limit, after=paging.after)


@router.get("/{reference}")
def get_worker(backend: BackendDep, reference: Reference) -> Worker:
    """A worker that was seen in the last minute, by id."""
    return backend.jobs.worker(reference)
