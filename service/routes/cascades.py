"""Cascades: true gradients for the part of a pool that is predicted best."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse
from gradstore.types import CascadeEstimate, CascadeJob, CascadeRequest

from service.dependencies import BackendDep, Reference
from service.estimates import of_cascade
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("cascades")
RESPONSES = starting(CascadeJob, dry_run=True, estimate=CascadeEstimate)


@router.post("", status_code=202, response_model=CascadeJob, responses=RESPONSES)
def create_cascade(backend: BackendDep, body: CascadeRequest, response: Response) -> CascadeJob | Response:
    """Compute gradients of a random sample and of the rows predicted best from it; `GET /select?method=cascade`
    chooses among them. `dry_run=true` answers what would be computed."""
    if body.dry_run:
        return JSONResponse(of_cascade(backend, body).model_dump(mode="json"))
    job, _ = backend.cascades.start(body)
    return started(backend, job, response, model=CascadeJob)


look_and_name(router, kind="cascade", model=CascadeJob, one="A cascade, what it computed and what that saved.")


@router.delete("/{reference}", status_code=204)
def delete_cascade(backend: BackendDep, reference: Reference) -> None:
    """Delete a cascade with its scores, the datasets it made and their gradients; 409 while it is at work."""
    backend.cascades.remove(reference)
