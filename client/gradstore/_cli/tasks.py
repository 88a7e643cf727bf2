"""The commands of tasks: their files come from this machine or lie on the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.nouns import group_of
from gradstore._cli.options import Json, LocalPath, Reference, given, takes
from gradstore._cli.output import ago, is_terminal, print_json, say
from gradstore._cli.session import session
from gradstore.types import Split, Task

ServerPath = Annotated[str, typer.Argument(metavar="PATH", help="Path on the server, inside an allowed root.")]

KINDS = (
    "What the files hold: mmlu, bbh, tydiqa, gsm8k, scienceqa, scienceqa-written, jsonl, or what else the server can "
    "read."
)

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


@tasks.command("download")
def download_task(
    ctx: typer.Context,
    reference: Reference,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The JSONL file to write.")],
    *,
    split: Annotated[Split | None, typer.Option("--split", help="Which rows; by default those of validation.")] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, max=1_000_000, help="Repeat them until there are so many.")
    ] = None,
) -> None:
    """Save a task's rows as a dataset takes them.

    With --rows the few are repeated: training on these alone is the baseline of a selection of as many rows.
    """
    with session(ctx) as store:
        typer.echo(store.tasks.download(reference, path, split=split, rows=rows, progress=is_terminal()))


def _stored_task(task: Task, *, as_json: bool) -> None:
    say(f"{task.validation:,} validation and {task.test:,} test rows in {len(task.subtasks):,} subtasks")
    for note in task.notes:
        say(f"  {note}")
    if as_json:
        print_json(task)
    else:
        typer.echo(task.id)
