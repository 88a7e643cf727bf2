"""Runs: the checkpoints of one training, in order."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from gradstore.types import Page, Rename, Run, RunCreate

from datastore.checkpoints import run_id
from datastore.errors import InUse, refusal
from datastore.schema import RunRow
from service.dependencies import BackendDep, Paging, Reference
from service.routing import noun
from service.uploads import is_recorded

router = noun("runs")


@router.post(
    "",
    status_code=201,
    responses={200: {"model": Run, "description": "A run of the same checkpoints exists already."}},
)
def create_run(backend: BackendDep, body: RunCreate, response: Response) -> Run:
    """Group checkpoints of one base model into a run, in this order."""
    checkpoints = [backend.catalog.checkpoint(reference).id for reference in body.checkpoints]
    if len(set(checkpoints)) < len(checkpoints):
        detail = "a checkpoint is named twice"
        raise refusal(detail, "/checkpoints")
    id = run_id(checkpoints)
    known = is_recorded(backend.catalog, RunRow, id)
    run = backend.catalog.add_run(id=id, checkpoints=checkpoints, name=body.name)
    response.status_code = 200 if known else 201
    response.headers["Location"] = f"/runs/{run.id}"
    return run


@router.get("")
def list_runs(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[Run]:
    """A page of runs, newest first."""
    return backend.catalog.runs(limit=paging.limit, after=paging.after)


@router.get("/{reference}")
def get_run(backend: BackendDep, reference: Reference) -> Run:
    """A run with its checkpoints."""
    return backend.catalog.run(reference)


@router.patch("/{reference}")
def rename_run(backend: BackendDep, reference: Reference, body: Rename) -> Run:
    """Give a run another name, or none."""
    return backend.catalog.run(backend.catalog.rename(RunRow, reference, body.name))


@router.delete("/{reference}", status_code=204)
def delete_run(backend: BackendDep, reference: Reference) -> None:
    """Ungroup the checkpoints, which stay; 409 while something needs the run, as its fine-tune does."""
    run = backend.catalog.run(reference)
    if run.finetune is not None:
        raise InUse("run", run.id, [run.finetune])
    backend.catalog.remove(RunRow, run.id)
