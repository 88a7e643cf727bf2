"""Checkpoints: adapters with their optimizer state, brought from elsewhere or left by a fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Query, Response
from fastapi.responses import StreamingResponse
from gradstore.types import Checkpoint, CheckpointRegister, ModelName, Name, Page, Precision, Rename, Revision
from gradstore.types import Request as RequestBody
from pydantic import Field

from datastore import models
from datastore.archives import allowed_folder
from datastore.checkpoints import base_model
from datastore.errors import Conflict, InvalidCheckpoint, PathNotAllowed
from datastore.schema import CheckpointRow
from service import zips
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.forms import Form, form_or_json
from service.openapi import upload
from service.routing import noun
from service.uploads import store_and_record

router = noun("checkpoints")


class CheckpointForm(RequestBody):
    """The fields beside the files."""

    name: Name | None = None
    model: ModelName | None = None
    """Base model; by default the one named in the adapter's own configuration."""
    revision: Revision | None = None
    learning_rate: float | None = Field(None, gt=0)
    """Mean learning rate of the epoch, the checkpoint's weight in the influence."""
    step: int | None = Field(None, ge=0, lt=1 << 53)
    precision: Precision = "float32"


Sent = Annotated[Form | CheckpointRegister, Depends(form_or_json(CheckpointRegister))]
ZIP: dict[int | str, dict[str, Any]] = {
    200: {"description": "The files.", "content": {"application/zip": {"schema": {"type": "string"}}}}
}


@router.post(
    "",
    status_code=201,
    openapi_extra=upload(CheckpointForm, file="files", also_json=CheckpointRegister),
    responses={200: {"model": Checkpoint, "description": "The same checkpoint was stored already."}},
)
def create_checkpoint(backend: BackendDep, sent: Sent, response: Response) -> Checkpoint:
    """Store an adapter folder of PEFT, the HF Trainer or LESS: its files or one zip, or JSON naming a server folder.

    JSON that names a model and no folder registers the base model itself, as it is before any training.
    """
    if isinstance(sent, Form):
        return _register(backend, sent.read(CheckpointForm, files=["files", "file"]), sent.content(), response)
    if sent.path is None:
        return _register_base(backend, sent, response)
    return _register(backend, sent, allowed_folder(sent.path, backend.settings.allowed_roots), response)


@router.get("")
def list_checkpoints(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[Checkpoint]:
    """A page of checkpoints, newest first."""
    return backend.catalog.checkpoints(limit=paging.limit, after=paging.after)


@router.get("/{reference}")
def get_checkpoint(backend: BackendDep, reference: Reference) -> Checkpoint:
    """A checkpoint."""
    return backend.catalog.checkpoint(reference)


@router.get("/{reference}/content", response_class=StreamingResponse, responses=ZIP)
def get_checkpoint_content(backend: BackendDep, reference: Reference) -> StreamingResponse:
    """The adapter as a zip of a PEFT folder; of a full fine-tune, the model. 409 for a base model itself."""
    checkpoint = backend.catalog.checkpoint(reference)
    if checkpoint.method == "none":
        raise Conflict(f"{checkpoint.id} is {checkpoint.model} itself, of which nothing is stored here")
    return weights(backend, checkpoint.id)


@router.patch("/{reference}")
def rename_checkpoint(backend: BackendDep, reference: Reference, body: Rename) -> Checkpoint:
    """Give a checkpoint another name, or none."""
    return backend.catalog.checkpoint(backend.catalog.rename(CheckpointRow, reference, body.name))


@router.delete("/{reference}", status_code=204)
def delete_checkpoint(backend: BackendDep, reference: Reference) -> None:
    """Delete a checkpoint; 409 while a run or something else needs it."""
    backend.catalog.remove(CheckpointRow, reference, delete_files=backend.checkpoints.delete)


def weights(backend: Backend, checkpoint: str, *, named: str | None = None) -> StreamingResponse:
    """The weights of a checkpoint as a zip, named as the checkpoint or otherwise."""
    folder = backend.checkpoints.weights(checkpoint)
    headers = {"ETag": f'"{checkpoint}"', "Content-Disposition": f'attachment; filename="{named or checkpoint}.zip"'}
    return StreamingResponse(zips.stream(folder), media_type="application/zip", headers=headers)


def _register(
    backend: Backend, wanted: CheckpointForm | CheckpointRegister, folder: Path, response: Response
) -> Checkpoint:
    stored = register_folder(
        backend, folder, model=wanted.model, revision=wanted.revision, learning_rate=wanted.learning_rate,
        step=wanted.step, precision=wanted.precision, name=wanted.name,
    )  # fmt: skip
    return _answer(response, *stored)


def register_folder(backend: Backend, folder: Path, *, model: str | None, **fields: Any) -> tuple[Checkpoint, bool]:
    """Store and record the checkpoint in a folder; says whether it is new."""
    allowed = _allowed_model(backend, model, folder)
    return _recorded(backend, lambda: backend.checkpoints.register(folder, model=allowed, **fields))


def _register_base(backend: Backend, wanted: CheckpointRegister, response: Response) -> Checkpoint:
    model = models.resolve(wanted.model or "", roots=backend.settings.allowed_roots)

    def register() -> Checkpoint:
        return backend.checkpoints.register_base(
            model, revision=wanted.revision, learning_rate=wanted.learning_rate, precision=wanted.precision,
            name=wanted.name,
        )  # fmt: skip

    return _answer(response, *_recorded(backend, register))


def _recorded(backend: Backend, register: Callable[[], Checkpoint]) -> tuple[Checkpoint, bool]:
    _, checkpoint, new = store_and_record(
        backend.catalog, CheckpointRow, store=register, record=backend.catalog.add_checkpoint,
        look=backend.checkpoints.look, delete=backend.checkpoints.delete,
    )  # fmt: skip
    return checkpoint, new


def _answer(response: Response, checkpoint: Checkpoint, new: bool) -> Checkpoint:
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/checkpoints/{checkpoint.id}"
    return checkpoint


def _allowed_model(backend: Backend, model: str | None, folder: Path) -> str | None:
    """The base model that was sent; without one, check that the one the files name may be read."""
    roots = backend.settings.allowed_roots
    if model is not None:
        return models.resolve(model, roots=roots)
    named = base_model(folder)
    if named is not None:
        try:
            models.resolve(named, roots=roots)
        except PathNotAllowed as error:
            raise InvalidCheckpoint(
                f"the adapter was trained on {named!r}, which is neither a hub id nor a folder that this server may "
                "read; say where its base model is with `model`"
            ) from error
    return None
