"""Attributions: which training examples speak for, and against, what a model has said."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from gradstore.types import AttributionJob, AttributionRequest, Page, Rename

from service.dependencies import BackendDep, Paging, Reference
from service.openapi import starting
from service.routes.jobs import started, typed, typed_page
from service.routing import noun

router = noun("attributions")


@router.post("", status_code=202, responses=starting(AttributionJob))
def create_attribution(backend: BackendDep, body: AttributionRequest, response: Response) -> AttributionJob:
    """Find the training examples with the most and the least influence on what a model has said.

    A worker computes the gradient of each row and searches the pool's; what was computed before is not again.
    """
    job, _ = backend.attributions.start(body)
    return started(backend, job, response, model=AttributionJob)


@router.get("")
def list_attributions(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[AttributionJob]:
    """A page of attributions, newest first."""
    return typed_page(backend.jobs.page(kind="attribution", limit=paging.limit, after=paging.after), AttributionJob)


@router.get("/{reference}")
def get_attribution(backend: BackendDep, reference: Reference) -> AttributionJob:
    """An attribution and what was found."""
    return typed(backend.jobs.get(reference, kind="attribution"), AttributionJob)


@router.patch("/{reference}")
def rename_attribution(backend: BackendDep, reference: Reference, body: Rename) -> AttributionJob:
    """Give an attribution another name, or none."""
    return typed(backend.jobs.rename(reference, body.name, kind="attribution"), AttributionJob)


@router.delete("/{reference}", status_code=204)
def delete_attribution(backend: BackendDep, reference: Reference) -> None:
    """Delete an attribution and the gradients that no other one asks for; 409 while it is at work."""
    backend.attributions.remove(reference)
