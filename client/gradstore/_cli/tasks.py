"""The commands of tasks: their files come from this machine or lie on the server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.nouns import group_of
from gradstore._cli.options import Json, LocalPath, given, takes
from gradstore._cli.output import ago, is_terminal, print_json, say
from gradstore._cli.session import session
from gradstore.types import Task

ServerPath = Annotated[str, typer.Argument(metavar="PATH", help="Path on the server, inside an allowed root.")]

KINDS = "What the files hold: mmlu, bbh, tydiqa, gsm8k, scienceqa, jsonl, or what else the server can read."

tasks = group_of(
    "tasks",
    {
        "id": lambda task: task.id,
        "name": lambda task: task.name,
        "kind": lambda task: task.kind,
        "subtasks": lambda task: len(task.subtasks),
        "validation": lambda task: task.validation,
        "test": lambda task: task.test,
        "age": lambda task: ago(task.created_at),
    },
    help="What a model should get better at, by a few rows.",
)


@tasks.command("upload")
@takes(endpoints.tasks_upload, without=["progress"], texts={"kind": KINDS})
def upload_task(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload a task's files and print its id. A folder is sent as a zip."""
    with session(ctx) as store:
        _stored_task(store.tasks.upload(path, progress=is_terminal(), **given(fields)), as_json=as_json)


@tasks.command("register")
@takes(endpoints.tasks_register, texts={"kind": KINDS})
def register_task(ctx: typer.Context, path: ServerPath, *, as_json: Json = False, **fields: Any) -> None:
    """Register a task that lies on the server. Prints its id."""
    with session(ctx) as store:
        _stored_task(store.tasks.register(path, **given(fields)), as_json=as_json)


def _stored_task(task: Task, *, as_json: bool) -> None:
    say(f"{task.validation:,} validation and {task.test:,} test rows in {len(task.subtasks):,} subtasks")
    for note in task.notes:
        say(f"  {note}")
    if as_json:
        print_json(task)
    else:
        typer.echo(task.id)
