"""Tasks: what the model should get better at, uploaded as files or registered from a folder of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import Depends, Query, Response
from fastapi.responses import StreamingResponse
from gradstore.types import Name, Page, Rename, RepeatedRowCount, Split, Task, TaskKind, TaskRegister
from gradstore.types import Request as RequestBody

from datastore.archives import allowed_folder
from datastore.few_shot import repeated
from datastore.schema import TaskRow
from datastore.selection.rules import refused
from datastore.tasks import StoredTask
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.forms import Form, form_or_json
from service.openapi import upload
from service.routes.selections import NDJSON
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


class TaskRows(RequestBody):
    """Which rows of a task, and how many."""

    split: Split = "validation"
    rows: RepeatedRowCount | None = None
    """Repeat them until there are so many, a million at most, or take as many of them; by default each once."""


@router.get(
    "/{reference}/content",
    response_class=StreamingResponse,
    responses={200: {"description": "The rows.", "content": {NDJSON: {"schema": {"type": "string"}}}}},
)
def get_task_content(backend: BackendDep, reference: Reference, asked: Annotated[TaskRows, Query()]) -> Response:
    """The task's rows as a dataset takes them, one a line; with `rows` the few are repeated up to a budget."""
    task = backend.catalog.task(reference)
    found = backend.tasks.validation(task.id) if asked.split == "validation" else backend.tasks.test(task.id)
    if not found:
        raise refused("split", f"the task {task.name} has no {asked.split} rows")
    lines = repeated([row.example for row in found], asked.rows)
    headers = {"Content-Disposition": f'attachment; filename="{task.id}-{asked.split}.jsonl"'}
    return StreamingResponse(lines, media_type=NDJSON, headers=headers)


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
        look=backend.tasks.look, delete=backend.tasks.delete,
    )  # fmt: skip
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/tasks/{task.id}"
    return task
