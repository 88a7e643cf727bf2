"""The bank of adapters: checkpoints of plain LoRA that can be chosen for a task and mixed."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Response
from fastapi.responses import StreamingResponse
from gradstore.types import (
    Adapter,
    AdapterRegister,
    AdaptersWanted,
    ModelName,
    Name,
    Named,
    Page,
    Rename,
    Revision,
    TrainedOn,
)
from gradstore.types import Request as RequestBody

from datastore.archives import allowed_folder
from datastore.schema import AdapterRow
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.forms import Form, form_or_json
from service.openapi import upload
from service.routes.checkpoints import ZIP, register_folder, weights
from service.routing import noun

router = noun("adapters")


class AdapterForm(RequestBody):
    """The fields beside the files."""

    name: Name | None = None
    base_model: ModelName | None = None
    """By default the one named in the adapter's own configuration."""
    revision: Revision | None = None
    dataset: Named | None = None
    """Dataset of this store that it was trained on."""
    trained_on: TrainedOn | None = None
    """What it was trained on, in words."""


class AdapterFilter(Paging, AdaptersWanted):
    """Which adapters are listed."""


Sent = Annotated[Form | AdapterRegister, Depends(form_or_json(AdapterRegister))]


@router.post(
    "",
    status_code=201,
    openapi_extra=upload(AdapterForm, file="files", also_json=AdapterRegister),
    responses={200: {"model": Adapter, "description": "The same adapter was in the bank already."}},
)
def create_adapter(backend: BackendDep, sent: Sent, response: Response) -> Adapter:
    """Put an adapter into the bank: its files or a zip, or JSON naming a fine-tune, a checkpoint or a server folder."""
    wanted = sent.read(AdapterForm, files=["files", "file"]) if isinstance(sent, Form) else sent
    checkpoint, brought = _checkpoint(backend, sent, wanted)
    adapter, new = backend.adapters.add(
        checkpoint, brought=brought, name=wanted.name, dataset=wanted.dataset, trained_on=wanted.trained_on
    )
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/adapters/{adapter.id}"
    return adapter


@router.get("")
def list_adapters(backend: BackendDep, asked: Annotated[AdapterFilter, Query()]) -> Page[Adapter]:
    """A page of adapters, newest first."""
    dataset = None if asked.dataset is None else backend.catalog.dataset(asked.dataset).id
    return backend.catalog.adapters(**asked.model_dump() | {"dataset": dataset})


@router.get("/{reference}")
def get_adapter(backend: BackendDep, reference: Reference) -> Adapter:
    """An adapter."""
    return backend.catalog.adapter(reference)


@router.get("/{reference}/content", response_class=StreamingResponse, responses=ZIP)
def get_adapter_content(backend: BackendDep, reference: Reference) -> StreamingResponse:
    """The adapter as a zip of a PEFT folder."""
    adapter = backend.catalog.adapter(reference)
    return weights(backend, adapter.checkpoint, named=adapter.id)


@router.patch("/{reference}")
def rename_adapter(backend: BackendDep, reference: Reference, body: Rename) -> Adapter:
    """Give an adapter another name, or none."""
    return backend.catalog.adapter(backend.catalog.rename(AdapterRow, reference, body.name))


@router.delete("/{reference}", status_code=204)
def delete_adapter(backend: BackendDep, reference: Reference) -> None:
    """Take an adapter out of the bank; 409 while something needs it."""
    backend.adapters.remove(reference)


def _checkpoint(
    backend: Backend, sent: Form | AdapterRegister, wanted: AdapterForm | AdapterRegister
) -> tuple[str, bool]:
    """The checkpoint that has the adapter's files, and whether it was stored for this."""
    if isinstance(sent, AdapterRegister) and sent.checkpoint is not None:
        return sent.checkpoint, False
    if isinstance(sent, AdapterRegister) and sent.finetune is not None:
        return backend.adapters.last_of(sent.finetune), False
    if isinstance(sent, Form):
        folder = sent.content()
    else:
        folder = allowed_folder(sent.path or "", backend.settings.allowed_roots)
    stored, new = register_folder(backend, folder, model=wanted.base_model, revision=wanted.revision)
    return stored.id, new
