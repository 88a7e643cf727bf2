"""Comparisons: several ways to select from one pool, for the same tasks and with the same budget."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse
from gradstore.types import ComparisonEstimate, ComparisonJob, ComparisonRequest

from service.dependencies import BackendDep, Reference
from service.estimates import of_comparison
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("comparisons")
RESPONSES = starting(ComparisonJob, dry_run=True, estimate=ComparisonEstimate)


@router.post("", status_code=202, response_model=ComparisonJob, responses=RESPONSES)
def create_comparison(backend: BackendDep, body: ComparisonRequest, response: Response) -> ComparisonJob | Response:
    """Select in several ways and compare what is selected, what it costs and, with `train=true`, what training on it
    gives; `dry_run=true` counts the trainings and says how long they take."""
    if body.dry_run:
        return JSONResponse(of_comparison(backend, body).model_dump(mode="json"))
    job, _ = backend.comparisons.start(body)
    return started(backend, job, response, model=ComparisonJob)


look_and_name(router, kind="comparison", model=ComparisonJob, one="A comparison and what it has found.")


@router.delete("/{reference}", status_code=204)
def delete_comparison(backend: BackendDep, reference: Reference) -> None:
    """Delete a comparison and the trainings that no other job has; its selections stay. 409 while it is at work."""
    backend.comparisons.remove(reference)
