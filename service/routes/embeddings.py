"""Embeddings: where a projector places the rows of a dataset, or the validation rows of a task."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from gradstore.types import EmbeddedRows, EmbeddingEstimate, EmbeddingJob, EmbeddingRequest
from gradstore.types import Request as RequestBody
from pydantic import Field

from service.dependencies import BackendDep, Reference
from service.files import NPY, SAFETENSORS, npy, safetensors, wanted_type
from service.openapi import starting
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("embeddings")
RESPONSES = starting(EmbeddingJob, dry_run=True, estimate=EmbeddingEstimate)


@router.post("", status_code=202, response_model=EmbeddingJob, responses=RESPONSES)
def create_embedding(backend: BackendDep, body: EmbeddingRequest, response: Response) -> EmbeddingJob | Response:
    """Place rows in a projector's ability space, by streams that were made as the projector's own were.

    `dry_run=true` answers rows and bytes.
    """
    if body.dry_run:
        return JSONResponse(backend.embeddings.estimate(body).model_dump(mode="json"))
    job, _ = backend.embeddings.start(body)
    return started(backend, job, response, model=EmbeddingJob)


look_and_name(router, kind="embedding", model=EmbeddingJob, one="An embedding, and what its rows call for.")


class EmbeddingQuery(RequestBody):
    """Which rows are shown, and how."""

    limit: int = Field(20, ge=0, le=1000)
    after: int = Field(0, ge=0, le=10**12)
    """How many rows come before the page."""
    format: Literal["json", "npy", "safetensors"] | None = None
    """By default what `Accept` asks for, else JSON: files hold all rows."""


@router.get(
    "/{reference}/rows",
    response_model=EmbeddedRows,
    responses={200: {"content": {NPY: {}, SAFETENSORS: {}}}},
)
def embedding_rows(
    request: Request, reference: Reference, asked: Annotated[EmbeddingQuery, Query()], backend: BackendDep
) -> Response:
    """Where the rows are: unit vectors, the probability of each capability, and ⟨v, b̂⟩ with each base vector.

    As npy the unit vectors (rows, dim), as safetensors all three and which rows have a place; NaN where one has none.
    """
    accepted = {NPY: "npy", SAFETENSORS: "safetensors"}.get(wanted_type(request, [NPY, SAFETENSORS]) or "")
    form = asked.format or accepted
    if form in {"npy", "safetensors"}:
        job = backend.jobs.get(reference, kind="embedding")
        places = backend.embeddings.places(job.id)
        there = places.present[:, None]
        names = ("embedding", "probabilities", "similarities")
        arrays = {name: np.where(there, getattr(places, name), np.float32(np.nan)) for name in names}
        if form == "npy":
            return npy(arrays["embedding"], job.id)
        present = {"present": places.present.astype(np.uint8)}
        return safetensors({**arrays, **present}, job.id, metadata=job.model_dump_json(include={"id", "result"}))
    page = backend.embeddings.rows(reference, start=asked.after, stop=asked.after + asked.limit)
    return Response(page.model_dump_json(), media_type="application/json")


@router.delete("/{reference}", status_code=204)
def delete_embedding(backend: BackendDep, reference: Reference) -> None:
    """Delete an embedding; 409 while it is at work."""
    backend.embeddings.remove(reference)
