"""Projectors: networks that place rows in an ability space, trained on rows whose capabilities are known."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from fastapi.responses import FileResponse, JSONResponse
from gradstore.types import (
    CapabilityHistogram,
    Named,
    ProjectorEpochs,
    ProjectorEstimate,
    ProjectorJob,
    ProjectorRequest,
)
from gradstore.types import Request as RequestBody

from service.dependencies import BackendDep, Reference
from service.files import SAFETENSORS
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("projectors")
RESPONSES = starting(ProjectorJob, dry_run=True, estimate=ProjectorEstimate)


@router.post("", status_code=202, response_model=ProjectorJob, responses=RESPONSES)
def create_projector(backend: BackendDep, body: ProjectorRequest, response: Response) -> ProjectorJob | Response:
    """Train a network that tells from its streams which capabilities a row calls for; the same request is the same
    projector. `dry_run=true` answers rows, steps and bytes."""
    if body.dry_run:
        return JSONResponse(backend.projectors.estimate(body).model_dump(mode="json"))
    job, _ = backend.projectors.start(body)
    return started(backend, job, response, model=ProjectorJob)


look_and_name(router, kind="projector", model=ProjectorJob, one="A projector, and how well it tells capabilities.")


@router.get("/{reference}/epochs", response_model=ProjectorEpochs)
def projector_epochs(backend: BackendDep, reference: Reference) -> ProjectorEpochs:
    """The epochs that have ended so far, also while the projector is at work."""
    return ProjectorEpochs(data=backend.projectors.epochs(reference))


@router.get(
    "/{reference}/content",
    response_class=FileResponse,
    responses={200: {"description": "The network.", "content": {SAFETENSORS: {"schema": {"type": "string"}}}}},
)
def get_projector_content(backend: BackendDep, reference: Reference) -> FileResponse:
    """The network as safetensors, with what its rows are standardised with; dims and config are in the metadata."""
    job = backend.projectors.trained(reference)
    return FileResponse(
        backend.projectors.files.weights(job.id),
        media_type=SAFETENSORS,
        filename=f"{job.id}.safetensors",
        headers={"ETag": f'"{job.id}"'},
    )


class HistogramQuery(RequestBody):
    """Whose capabilities are counted."""

    selection: Named


@router.get("/{reference}/histogram", response_model=CapabilityHistogram)
def projector_histogram(
    backend: BackendDep, reference: Reference, asked: Annotated[HistogramQuery, Query()]
) -> CapabilityHistogram:
    """How many rows of a selection, and of the datasets it was chosen from, call for each capability.

    The selection may be of any method. 409 where the projector has not placed the rows of these datasets.
    """
    job = backend.projectors.trained(reference)
    selection = backend.answers.read(asked.selection, limit=0)
    chosen = ((row.dataset, row.row) for row in backend.answers.rows(selection.id))
    return backend.embeddings.histogram(job.id, selection.id, selection.recipe.datasets, chosen)


@router.delete("/{reference}", status_code=204)
def delete_projector(backend: BackendDep, reference: Reference) -> None:
    """Delete a projector; 409 while it is at work, and while it has embeddings."""
    backend.projectors.remove(reference)
