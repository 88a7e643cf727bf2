"""Validations: how well scores predict what training on rows does."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse
from gradstore.types import ValidationEstimate, ValidationJob, ValidationRequest

from service.dependencies import BackendDep, Reference
from service.estimates import of_validation
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("validations")
RESPONSES = starting(ValidationJob, dry_run=True, estimate=ValidationEstimate)


@router.post("", status_code=202, response_model=ValidationJob, responses=RESPONSES)
def create_validation(backend: BackendDep, body: ValidationRequest, response: Response) -> ValidationJob | Response:
    """Train on parts of a pool and compare what scores predict with what comes of it; `dry_run=true` counts the
    trainings and says how long they take."""
    if body.dry_run:
        return JSONResponse(of_validation(backend, body).model_dump(mode="json"))
    job, _ = backend.validations.start(body)
    return started(backend, job, response, model=ValidationJob)


look_and_name(router, kind="validation", model=ValidationJob, one="A validation and what it has found.")


@router.delete("/{reference}", status_code=204)
def delete_validation(backend: BackendDep, reference: Reference) -> None:
    """Delete a validation and the trainings that no other one has; 409 while it is at work."""
    backend.validations.remove(reference)
