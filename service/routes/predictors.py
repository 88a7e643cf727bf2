"""Predictors: influence learnt from a sample of a pool, and predicted for all of it."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse
from gradstore.types import PredictorEstimate, PredictorJob, PredictorRequest

from service.dependencies import BackendDep, Reference
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("predictors")
RESPONSES = starting(PredictorJob, dry_run=True, estimate=PredictorEstimate)


@router.post("", status_code=202, response_model=PredictorJob, responses=RESPONSES)
def create_predictor(backend: BackendDep, body: PredictorRequest, response: Response) -> PredictorJob | Response:
    """Learn to predict a task's influence from a sample of the pool, say how well that goes, and predict all rows.

    `dry_run=true` answers what would be read and fitted, and starts nothing.
    """
    if body.dry_run:
        return JSONResponse(backend.predictors.estimate(body).model_dump(mode="json"))
    job, _ = backend.predictors.start(body)
    return started(backend, job, response, model=PredictorJob)


look_and_name(router, kind="predictor", model=PredictorJob, one="A predictor and how well it predicts.")


@router.delete("/{reference}", status_code=204)
def delete_predictor(backend: BackendDep, reference: Reference) -> None:
    """Delete a predictor and its predictions; 409 while it is at work."""
    backend.predictors.remove(reference)
