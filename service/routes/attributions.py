"""Attributions: which training examples speak for, and against, what a model has said."""

from __future__ import annotations

from fastapi import Response
from gradstore.types import AttributionJob, AttributionRequest

from service.dependencies import BackendDep, Reference
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("attributions")


@router.post("", status_code=202, responses=starting(AttributionJob))
def create_attribution(backend: BackendDep, body: AttributionRequest, response: Response) -> AttributionJob:
    """Find the training examples with the most and the least influence on what a model has said.

    A worker computes the gradient of each row and searches the pool's; what was computed before is not again.
    """
    job, _ = backend.attributions.start(body)
    return started(backend, job, response, model=AttributionJob)


look_and_name(router, kind="attribution", model=AttributionJob, one="An attribution and what was found.")


@router.delete("/{reference}", status_code=204)
def delete_attribution(backend: BackendDep, reference: Reference) -> None:
    """Delete an attribution and the gradients that no other one asks for; 409 while it is at work."""
    backend.attributions.remove(reference)
