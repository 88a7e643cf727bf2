"""Evaluations: models measured on the test rows of tasks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from gradstore.types import EvaluationJob, EvaluationRequest, Page, Rename

from service.dependencies import BackendDep, Paging, Reference
from service.openapi import starting
from service.routes.jobs import started, typed, typed_page
from service.routing import noun

router = noun("evaluations")


@router.post("", status_code=202, responses=starting(EvaluationJob))
def create_evaluation(backend: BackendDep, body: EvaluationRequest, response: Response) -> EvaluationJob:
    """Measure loss and the task's metric per subtask, with confidence intervals, the base model beside it."""
    job, _ = backend.evaluations.start(body)
    return started(backend, job, response, model=EvaluationJob)


@router.get("")
def list_evaluations(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[EvaluationJob]:
    """A page of evaluations, newest first."""
    return typed_page(backend.jobs.page(kind="evaluation", limit=paging.limit, after=paging.after), EvaluationJob)


@router.get("/{reference}")
def get_evaluation(backend: BackendDep, reference: Reference) -> EvaluationJob:
    """An evaluation and what was measured."""
    return typed(backend.jobs.get(reference, kind="evaluation"), EvaluationJob)


@router.patch("/{reference}")
def rename_evaluation(backend: BackendDep, reference: Reference, body: Rename) -> EvaluationJob:
    """Give an evaluation another name, or none."""
    return typed(backend.jobs.rename(reference, body.name, kind="evaluation"), EvaluationJob)


@router.delete("/{reference}", status_code=204)
def delete_evaluation(backend: BackendDep, reference: Reference) -> None:
    """Delete an evaluation; 409 while it is at work."""
    backend.jobs.remove(reference, kind="evaluation")
