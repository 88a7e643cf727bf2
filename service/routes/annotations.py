"""Annotations: which capabilities rows ask for, sent as a file, taken from their origins, or asked of a chat model."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Response
from fastapi.responses import JSONResponse
from gradstore.types import AnnotatedRows, AnnotationEstimate, AnnotationJob, AnnotationRequest
from gradstore.types import Request as RequestBody
from pydantic import ConfigDict, Field

from datastore.selection.rules import refused
from service.dependencies import BackendDep, Reference
from service.forms import Form, form_or_json
from service.openapi import starting, upload
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("annotations")

Sent = Annotated[Form | AnnotationRequest, Depends(form_or_json(AnnotationRequest))]


@router.post(
    "",
    status_code=202,
    response_model=AnnotationJob,
    openapi_extra=upload(AnnotationRequest, file="file", also_json=AnnotationRequest),
    responses=starting(AnnotationJob, dry_run=True, estimate=AnnotationEstimate),
)
def create_annotation(backend: BackendDep, sent: Sent, response: Response) -> AnnotationJob | Response:
    """Label rows: a file of {id, categories}, joined by id, or JSON that says by=origin, or by=labeller and who to ask.

    The file is JSONL, a JSON array or Parquet. A labeller's replies that are no list of letters are listed, and asked
    for again by another annotation (`again`). `dry_run=true` answers how many rows a labeller would be asked about.
    """
    if not isinstance(sent, Form):
        if sent.dry_run:
            return JSONResponse(backend.annotations.estimate(sent).model_dump(mode="json"))
        job, _ = backend.annotations.start(sent)
        return started(backend, job, response, model=AnnotationJob)
    request = sent.read(AnnotationRequest, files=["file"])
    if request.by != "upload" or request.again is not None:
        detail = "a file says the labels itself: send JSON for by=origin, by=labeller and again"
        raise refused("by", detail)
    job, _ = backend.annotations.upload(request, sent.only_file("file").path)
    return started(backend, job, response, model=AnnotationJob)


look_and_name(router, kind="annotation", model=AnnotationJob, one="An annotation, with its counts and what is missing.")


class LabelsWanted(RequestBody):
    """Which rows of an annotation are looked at."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int = Field(1000, ge=1, le=10_000)
    """How many at most."""
    after: int = Field(0, ge=0, le=10**12)
    """Rows before the page: `next` of the page before."""
    unparsed: bool = False
    """Only rows of which a labeller's reply could not be read."""


@router.get("/{reference}/rows")
def list_annotation_rows(
    backend: BackendDep, reference: Reference, wanted: Annotated[LabelsWanted, Query()]
) -> AnnotatedRows:
    """A page of rows with their ids and labels, in their order."""
    return backend.annotations.page(reference, after=wanted.after, limit=wanted.limit, unparsed=wanted.unparsed)


@router.delete("/{reference}", status_code=204)
def delete_annotation(backend: BackendDep, reference: Reference) -> None:
    """Delete an annotation and its labels; 409 while it is at work, or something needs it."""
    backend.annotations.remove(reference)
