"""Estimates: what training on subsets of a pool would give, without training; and how that agrees with trainings."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from fastapi.responses import JSONResponse
from gradstore.types import (
    EstimatedSubsets,
    EstimatesCost,
    EstimatesJob,
    EstimatesRequest,
    EstimateValidationJob,
    EstimateValidationRequest,
    ValidationEstimate,
)
from gradstore.types import Request as RequestBody
from pydantic import Field

from service.dependencies import BackendDep, Reference
from service.estimates import of_estimate_validation
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("estimates")
validations = noun("estimates/validations")
"""Asked before the others: here `validations` is no name."""


VALIDATION_RESPONSES = starting(EstimateValidationJob, dry_run=True, estimate=ValidationEstimate)
RESPONSES = starting(EstimatesJob, dry_run=True, estimate=EstimatesCost)


@validations.post("", status_code=202, response_model=EstimateValidationJob, responses=VALIDATION_RESPONSES)
def create_estimate_validation(
    backend: BackendDep, body: EstimateValidationRequest, response: Response
) -> EstimateValidationJob | Response:
    """Train on some of the subsets of estimates, and compare the losses that come of it with those estimated.

    `dry_run=true` counts the trainings and says how long they take. 409 before the estimates are done.
    """
    if body.dry_run:
        return JSONResponse(of_estimate_validation(backend, body).model_dump(mode="json"))
    job, _ = backend.estimate_validations.start(body)
    return started(backend, job, response, model=EstimateValidationJob)


look_and_name(
    validations, kind="estimate-validation", model=EstimateValidationJob, one="A validation and what it has found."
)


@validations.delete("/{reference}", status_code=204)
def delete_estimate_validation(backend: BackendDep, reference: Reference) -> None:
    """Delete a validation of estimates and the trainings that nothing else has; 409 while it is at work."""
    backend.estimate_validations.remove(reference)


@router.post("", status_code=202, response_model=EstimatesJob, responses=RESPONSES)
def create_estimates(backend: BackendDep, body: EstimatesRequest, response: Response) -> EstimatesJob | Response:
    """Estimate what training on each of many subsets of a pool would do for tasks, from stored features alone.

    `dry_run=true` answers how many subsets that is, and what would be read. 409 with the POST to send where features of
    kind `logodds` are missing.
    """
    if body.dry_run:
        return JSONResponse(backend.estimates.estimate(body).model_dump(mode="json"))
    job, _ = backend.estimates.start(body)
    return started(backend, job, response, model=EstimatesJob)


look_and_name(router, kind="estimates", model=EstimatesJob, one="Estimates, and what they say of the groups.")


class SubsetsQuery(RequestBody):
    """Which subsets are shown."""

    limit: int = Field(20, ge=1, le=1000)
    """How many at most."""
    after: int = Field(0, ge=0, le=10**12)
    """How many subsets come before the page."""


@router.get("/{reference}/subsets")
def estimated_subsets(
    backend: BackendDep, reference: Reference, parameters: Annotated[SubsetsQuery, Query()]
) -> EstimatedSubsets:
    """The subsets in order, each with its groups and what training on it is estimated to give; 409 before."""
    return backend.estimates.subsets(reference, after=parameters.after, limit=parameters.limit)


@router.delete("/{reference}", status_code=204)
def delete_estimates(backend: BackendDep, reference: Reference) -> None:
    """Delete estimates and the arrays that no others have; 409 while they are at work, or validated."""
    backend.estimates.remove(reference)
