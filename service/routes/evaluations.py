"""Evaluations: models measured on the test rows of tasks."""

from __future__ import annotations

from fastapi import Response
from gradstore.types import EvaluationJob, EvaluationRequest

from service.dependencies import BackendDep, Reference
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("evaluations")


@router.post("", status_code=202, responses=starting(EvaluationJob))
def create_evaluation(backend: BackendDep, body: EvaluationRequest, response: Response) -> EvaluationJob:
    """Measure loss and the task's metric per subtask, with confidence intervals, the base model beside it."""
    job, _ = backend.evaluations.start(body)
    return started(backend, job, response, model=EvaluationJob)


look_and_name(router, kind="evaluation", model=EvaluationJob, one="An evaluation and what was measured.")


@router.delete("/{reference}", status_code=204)
def delete_evaluation(backend: BackendDep, reference: Reference) -> None:
    """Delete an evaluation; 409 while it is at work."""
    backend.jobs.remove(reference, kind="evaluation")
