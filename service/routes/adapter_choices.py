"""Choices: which adapters of the bank to mix for a task, from a few of its rows."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from fastapi.responses import JSONResponse
from gradstore.types import (
    AdapterChoiceEstimate,
    AdapterChoiceJob,
    AdapterChoiceRequest,
    AdapterSets,
    AdapterShots,
)
from gradstore.types import Request as RequestBody
from pydantic import Field

from service.dependencies import BackendDep, Reference
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("adapters/choices")
"""Asked before the adapters: here `choices` is no name."""
RESPONSES = starting(AdapterChoiceJob, dry_run=True, estimate=AdapterChoiceEstimate)


@router.post("", status_code=202, response_model=AdapterChoiceJob, responses=RESPONSES)
def create_adapter_choice(
    backend: BackendDep, body: AdapterChoiceRequest, response: Response
) -> AdapterChoiceJob | Response:
    """Choose adapters of one base model for a task: by their ranks on its validation rows, and by how they differ.

    `dry_run=true` answers how many are to be scored, and how many sets there are. 422 for adapters that are too few or
    cannot be compared, and for a task without a metric.
    """
    if body.dry_run:
        return JSONResponse(backend.adapter_choices.estimate(body).model_dump(mode="json"))
    job, _ = backend.adapter_choices.start(body)
    return started(backend, job, response, model=AdapterChoiceJob)


look_and_name(
    router, kind="adapter-choice", model=AdapterChoiceJob, one="A choice of adapters, all ranks, and what was chosen."
)


class ChoiceQuery(RequestBody):
    """Which sets, or shots, are shown."""

    limit: int = Field(20, ge=1, le=1000)
    """How many at most."""
    after: int = Field(0, ge=0, le=10**12)
    """How many come before the page."""


@router.get("/{reference}/sets")
def adapter_choice_sets(
    backend: BackendDep, reference: Reference, parameters: Annotated[ChoiceQuery, Query()]
) -> AdapterSets:
    """Every set of candidates, the best first: similarity, rank and total; 409 before the choice is made."""
    return backend.adapter_choices.sets(reference, after=parameters.after, limit=parameters.limit)


@router.get("/{reference}/shots")
def adapter_choice_shots(
    backend: BackendDep, reference: Reference, parameters: Annotated[ChoiceQuery, Query()]
) -> AdapterShots:
    """The shots in the order of the task's rows, and what every adapter makes of each; 409 before."""
    return backend.adapter_choices.shots(reference, after=parameters.after, limit=parameters.limit)


@router.delete("/{reference}", status_code=204)
def delete_adapter_choice(backend: BackendDep, reference: Reference) -> None:
    """Delete a choice; the scores of its adapters stay, and its adapters can be deleted. 409 while it is at work."""
    backend.adapter_choices.remove(reference)
