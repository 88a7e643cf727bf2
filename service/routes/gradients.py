"""Gradients: jobs that compute features and keep them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from fastapi.responses import JSONResponse
from gradstore.types import GradientsJob, GradientsRequest, Page, Rename

from service.dependencies import BackendDep, Paging, Reference
from service.estimates import of_gradients
from service.openapi import starting
from service.routes.jobs import started, typed, typed_page
from service.routing import noun

router = noun("gradients")


@router.post("", status_code=202, response_model=GradientsJob, responses=starting(GradientsJob, dry_run=True))
def create_gradients(backend: BackendDep, body: GradientsRequest, response: Response) -> GradientsJob | Response:
    """Compute the projected gradients of a dataset or of a task's validation rows; what exists is not computed again.

    `dry_run=true` answers what it would cost, and starts nothing.
    """
    if body.dry_run:
        return JSONResponse(of_gradients(backend, body).model_dump(mode="json"))
    job, _ = backend.features.start(body)
    return started(backend, job, response, model=GradientsJob)


@router.get("")
def list_gradients(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[GradientsJob]:
    """A page of gradients jobs, newest first."""
    return typed_page(backend.jobs.page(kind="gradients", limit=paging.limit, after=paging.after), GradientsJob)


@router.get("/{reference}")
def get_gradients(backend: BackendDep, reference: Reference) -> GradientsJob:
    """A gradients job, and what it left in the store."""
    return typed(backend.jobs.get(reference, kind="gradients"), GradientsJob)


@router.patch("/{reference}")
def rename_gradients(backend: BackendDep, reference: Reference, body: Rename) -> GradientsJob:
    """Give a gradients job another name, or none."""
    return typed(backend.jobs.rename(reference, body.name, kind="gradients"), GradientsJob)


@router.delete("/{reference}", status_code=204)
def delete_gradients(backend: BackendDep, reference: Reference) -> None:
    """Delete a gradients job and the features that no other job has; 409 while it is at work."""
    backend.features.remove(reference)
