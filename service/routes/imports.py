"""Imports: features that another program has computed, uploaded or named in a folder of the server."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Response
from gradstore.types import ImportJob, ImportRequest

from datastore.archives import allowed_folder
from datastore.errors import refusal
from datastore.imports import fingerprint
from service.dependencies import BackendDep, Reference
from service.forms import Form, form_or_json
from service.openapi import starting, upload
from service.routes.jobs import look_and_name, started
from service.routing import noun

router = noun("imports")

Sent = Annotated[Form | ImportRequest, Depends(form_or_json(ImportRequest))]


@router.post(
    "",
    status_code=202,
    response_model=ImportJob,
    openapi_extra=upload(ImportRequest, file="files", also_json=ImportRequest),
    responses=starting(ImportJob),
)
def create_import(backend: BackendDep, sent: Sent, response: Response) -> ImportJob:
    """Import features of a dataset or of a task's validation rows: files or one zip, or JSON naming a server path.

    LESS's gradient folder, .pt (tensors only), .npy or .safetensors. Their rows, dim and numbers are checked by a
    worker, and nothing of a refused import is stored.
    """
    if isinstance(sent, Form):
        request = sent.read(ImportRequest, files=["files", "file"])
        if request.path is not None:
            raise refusal("send either files or a path of the server", "/path")
        files, mark, uploaded = sent.content(), [[file.name, file.sha256] for file in sent.files], True
    else:
        request = sent
        if request.path is None:
            raise refusal("name a path of the server, or send the files as multipart/form-data", "/path")
        files = allowed_folder(request.path, backend.settings.allowed_roots)
        mark, uploaded = fingerprint(files), False
    job, _ = backend.imports.start(request, files, fingerprint=mark, uploaded=uploaded)
    return started(backend, job, response, model=ImportJob)


look_and_name(router, kind="import", model=ImportJob, one="An import, and what was found in its files.")


@router.delete("/{reference}", status_code=204)
def delete_import(backend: BackendDep, reference: Reference) -> None:
    """Delete an import and its features; 409 while it is at work."""
    backend.imports.forget(backend.features.remove(reference, kind="import"))
