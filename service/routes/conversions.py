"""Conversions: jobs that make feature sets of another dtype from stored ones."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from gradstore.types import ConversionJob, ConversionRequest, Page, Rename

from service.dependencies import BackendDep, Paging, Reference
from service.openapi import starting
from service.routes.jobs import started, typed, typed_page
from service.routing import noun

router = noun("conversions")


@router.post("", status_code=202, responses=starting(ConversionJob))
def create_conversion(backend: BackendDep, body: ConversionRequest, response: Response) -> ConversionJob:
    """Round stored features to a narrower dtype, without a model; what exists is not converted again."""
    job, _ = backend.conversions.start(body)
    return started(backend, job, response, model=ConversionJob)


@router.get("")
def list_conversions(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[ConversionJob]:
    """A page of conversions, newest first."""
    return typed_page(backend.jobs.page(kind="conversion", limit=paging.limit, after=paging.after), ConversionJob)


@router.get("/{reference}")
def get_conversion(backend: BackendDep, reference: Reference) -> ConversionJob:
    """A conversion, and what it left in the store."""
    return typed(backend.jobs.get(reference, kind="conversion"), ConversionJob)


@router.patch("/{reference}")
def rename_conversion(backend: BackendDep, reference: Reference, body: Rename) -> ConversionJob:
    """Give a conversion another name, or none."""
    return typed(backend.jobs.rename(reference, body.name, kind="conversion"), ConversionJob)


@router.delete("/{reference}", status_code=204)
def delete_conversion(backend: BackendDep, reference: Reference) -> None:
    """Delete a conversion and the features that no other job has; 409 while it is at work."""
    backend.features.remove(reference, kind="conversion")
