"""Tasks: what the model should get better at, uploaded as files or registered from a folder of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import Depends, Query, Response
from gradstore.types import Name, Page, Rename, Task, TaskKind, TaskRegister
from gradstore.types import Request as RequestBody

from datastore.archives import allowed_folder
from datastore.schema import TaskRow
from datastore.tasks import StoredTask
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.forms import Form, form_or_json
from service.openapi import upload
from service.routing import noun
from service.uploads import store_and_record

router = noun("tasks")


class TaskForm(RequestBody):
    """The fields beside the files."""

    name: Name
    kind: TaskKind
    replace: bool = False
    """Take the name from the task that has it."""


Sent = Annotated[Form | TaskRegister, Depends(form_or_json(TaskRegister))]


@router.post(
    "",
    status_code=201,
    openapi_extra=upload(TaskForm, file="files", also_json=TaskRegister),
    responses={200: {"model": Task, "description": "The same task was stored already."}},
)
def create_task(backend: BackendDep, sent: Sent, response: Response) -> Task:
    """Store a task: files or one zip of them, or JSON naming a folder of the server inside an allowed root."""
    if isinstance(sent, Form):
        return _store(backend, sent.read(TaskForm, files=["files", "file"]), sent.content(), response)
    return _store(backend, sent, allowed_folder(sent.path, backend.settings.allowed_roots), response)


@router.get("")
def list_tasks(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[Task]:
    """A page of tasks, newest first."""
    return backend.catalog.tasks(limit=paging.limit, after=paging.after)


@router.get("/{reference}")
def get_task(backend: BackendDep, reference: Reference) -> Task:
    """A task with its subtasks."""
    return backend.catalog.task(reference)


@router.patch("/{reference}")
def rename_task(backend: BackendDep, reference: Reference, body: Rename) -> Task:
    """Give a task another name."""
    return backend.catalog.task(backend.catalog.rename(TaskRow, reference, body.name))


@router.delete("/{reference}", status_code=204)
def delete_task(backend: BackendDep, reference: Reference) -> None:
    """Delete a task; 409 while something needs it."""
    task = backend.catalog.remove(TaskRow, reference, delete_files=backend.tasks.delete)
    backend.scoring.cache.delete(task)
    backend.answers.ngrams.delete(task)


def _store(backend: Backend, wanted: TaskForm | TaskRegister, folder: Path, response: Response) -> Task:
    def record(stored: StoredTask) -> Task:
        return backend.catalog.add_task(
            id=stored.id, name=wanted.name, kind=stored.kind, subtasks=stored.subtasks, notes=stored.notes,
            replace=wanted.replace,
        )  # fmt: skip

    _, task, new = store_and_record(
        backend.catalog, TaskRow, store=lambda: backend.tasks.store(wanted.kind, folder), record=record,
        look=backend.tasks.validation, delete=backend.tasks.delete,
    )  # fmt: skip
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/tasks/{task.id}"
    return task
