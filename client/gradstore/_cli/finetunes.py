"""The commands of fine-tunes: the warm-up, and the trainings on what was selected."""

from __future__ import annotations

from typing import Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, started
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, NewFolder, Reference, Wait, given, takes
from gradstore._cli.output import is_terminal, print_object
from gradstore._cli.session import session
from gradstore.types import FinetuneRequest

finetunes = group_of("finetunes", listed, help="Trainings: the warm-up, and those on selections.")


@finetunes.command("create")
@takes(endpoints.finetunes_create, request=FinetuneRequest)
def create_finetune(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Train a model on a dataset, a random part, or a selection.

    Prints the job's id. The defaults are LESS's recipe. The checkpoints of all epochs form a run, which gradients are
    computed for.
    """
    with session(ctx) as store:
        if dry_run:
            print_object(store.finetunes.estimate(**given(fields)), as_json=as_json)
        else:
            started(store, "finetunes", store.finetunes.create(**given(fields)), wait=wait, as_json=as_json)


@finetunes.command("download")
def download_finetune(ctx: typer.Context, reference: Reference, path: NewFolder) -> None:
    """Save the last checkpoint as a PEFT folder. Of a full fine-tune, the model."""
    with session(ctx) as store:
        typer.echo(store.finetunes.download(reference, path, progress=is_terminal()))
