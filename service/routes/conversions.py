"""Conversions: jobs that make feature sets of another dtype from stored ones."""

from __future__ import annotations

from fastapi import Response
from gradstore.types import ConversionJob, ConversionRequest

from service.dependencies import BackendDep, Reference
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("conversions")


@router.post("", status_code=202, responses=starting(ConversionJob))
def create_conversion(backend: BackendDep, body: ConversionRequest, response: Response) -> ConversionJob:
    """Round stored features to a narrower dtype, without a model; what exists is not converted again."""
    job, _ = backend.conversions.start(body)
    return started(backend, job, response, model=ConversionJob)


look_and_name(router, kind="conversion", model=ConversionJob, one="A conversion, and what it left in the store.")


@router.delete("/{reference}", status_code=204)
def delete_conversion(backend: BackendDep, reference: Reference) -> None:
    """Delete a conversion and the features that no other job has; 409 while it is at work."""
    backend.features.remove(reference, kind="conversion")
