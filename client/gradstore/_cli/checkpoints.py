"""The commands of checkpoints, and of the runs that put them in order."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.nouns import group_of
from gradstore._cli.options import Json, LocalPath, NewFolder, Reference, given, takes
from gradstore._cli.output import ago, is_terminal, print_json, say
from gradstore._cli.session import session
from gradstore.types import Checkpoint

checkpoints = group_of(
    "checkpoints",
    {
        "id": lambda checkpoint: checkpoint.id,
        "name": lambda checkpoint: checkpoint.name,
        "model": lambda checkpoint: checkpoint.model,
        "run": lambda checkpoint: checkpoint.run,
        "epoch": lambda checkpoint: checkpoint.epoch,
        "learning rate": lambda checkpoint: checkpoint.learning_rate,
        "moments": lambda checkpoint: checkpoint.has_moments,
    },
    help="Adapters and models: from fine-tunes, or your own.",
)

runs = group_of(
    "runs",
    {
        "id": lambda run: run.id,
        "name": lambda run: run.name,
        "model": lambda run: run.model,
        "checkpoints": lambda run: len(run.checkpoints),
        "fine-tune": lambda run: run.finetune,
        "age": lambda run: ago(run.created_at),
    },
    help="The checkpoints of one training, in order.",
)


@checkpoints.command("upload")
@takes(endpoints.checkpoints_upload, without=["progress"])
def upload_checkpoint(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload an adapter folder, or a zip of one. PEFT, HF Trainer or LESS layout; prints its id."""
    with session(ctx) as store:
        _stored_checkpoint(store.checkpoints.upload(path, progress=is_terminal(), **given(fields)), as_json=as_json)


@checkpoints.command("register")
@takes(endpoints.checkpoints_register)
def register_checkpoint(
    ctx: typer.Context,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="Path on the server; left out, the model itself is registered.")
    ] = None,
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Register an adapter folder of the server, or a base model itself. Prints its id."""
    with session(ctx) as store:
        _stored_checkpoint(store.checkpoints.register(path, **given(fields)), as_json=as_json)


def _stored_checkpoint(checkpoint: Checkpoint, *, as_json: bool) -> None:
    if checkpoint.moments_note:
        say(f"it has no Adam moments: {checkpoint.moments_note}")
    if as_json:
        print_json(checkpoint)
    else:
        typer.echo(checkpoint.id)


@checkpoints.command("download")
def download_checkpoint(ctx: typer.Context, reference: Reference, path: NewFolder) -> None:
    """Save the adapter as a PEFT folder."""
    with session(ctx) as store:
        typer.echo(store.checkpoints.download(reference, path, progress=is_terminal()))


@runs.command("create")
@takes(endpoints.runs_create)
def create_run(
    ctx: typer.Context,
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT", help="Checkpoints by id, in order.")],
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Group checkpoints of one base model into a run and print its id."""
    with session(ctx) as store:
        run = store.runs.create(checkpoints, **given(fields))
        if as_json:
            print_json(run)
        else:
            typer.echo(run.id)
