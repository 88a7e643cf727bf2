"""Streams: named rows of numbers, of this store, sent as a file, or computed by a worker."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import Depends, Query, Request, Response
from gradstore.types import StreamJob, StreamRequest

from datastore import feature_files
from datastore.selection.rules import refused
from service.dependencies import BackendDep, Reference
from service.files import NPY, SAFETENSORS, ArrayQuery, array, tag
from service.forms import Form, form_or_json
from service.openapi import starting, upload
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("streams")

Sent = Annotated[Form | StreamRequest, Depends(form_or_json(StreamRequest))]


@router.post(
    "",
    status_code=202,
    response_model=StreamJob,
    openapi_extra=upload(StreamRequest, file="files", also_json=StreamRequest),
    responses=starting(StreamJob),
)
def create_stream(backend: BackendDep, sent: Sent, response: Response) -> StreamJob:
    """Give rows numbers: files with an .npy or .safetensors and its ids, or JSON that says which gradients, or what to
    compute.

    Rows are joined by id. Pickles are refused.
    """
    if not isinstance(sent, Form):
        job, _ = backend.streams.start(sent)
        return started(backend, job, response, model=StreamJob)
    request = sent.read(StreamRequest, files=["files", "file"])
    if request.kind != "upload":
        detail = "files are of kind=upload: send JSON for the other kinds"
        raise refused("kind", detail)
    job, _ = backend.streams.upload(request, sent.content())
    return started(backend, job, response, model=StreamJob)


look_and_name(router, kind="stream", model=StreamJob, one="A stream, and which rows it has.")


@router.get("/{reference}/content", response_class=Response, responses={200: {"content": {NPY: {}, SAFETENSORS: {}}}})
def get_stream_content(
    request: Request, reference: Reference, parameters: Annotated[ArrayQuery, Query()], backend: BackendDep
) -> Response:
    """The rows of a stream, float32 (rows, dim), in the order of its dataset's or task's; NaN where one is absent.

    As safetensors the tensor `rows`, with the rows' ids in the metadata: what `POST /streams` takes. 409 before the
    stream has succeeded.
    """
    job = backend.streams.made(reference)
    described = StreamJob.model_validate(job.model_dump()).model_dump_json(include={"id", "result"})
    numbers, ids = backend.streams.numbers(job.id), backend.streams.ids(job.id)
    start, stop = parameters.span(job.id, len(ids))
    form = parameters.form(request)
    if form == "safetensors":
        metadata = {"ids": json.dumps(ids[start:stop], ensure_ascii=False), "gradstore": described}
        file = feature_files.safetensors(numbers, start, stop, name="rows", metadata=metadata)
    else:
        file = feature_files.npy(numbers, start, stop)
    return array(file, job.id, form, tag=tag(form, str(start), str(stop), described), of=job)


@router.delete("/{reference}", status_code=204)
def delete_stream(backend: BackendDep, reference: Reference) -> None:
    """Delete a stream and its rows; 409 while it is at work, or something needs it."""
    backend.streams.remove(reference)
