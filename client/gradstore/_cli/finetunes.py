"""The commands of fine-tunes: the warm-up, and the trainings on what was selected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, start
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, NewFolder, Reference, Wait, given, parameter_set, takes
from gradstore._cli.output import is_terminal
from gradstore._cli.session import session
from gradstore.types import FinetuneRequest

Mixture = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME=VALUE,…",
        help="Train a mixture of LoRA experts: its settings as experts=4,top_k=2,rank=8, or a JSON file of them.",
    ),
]

finetunes = group_of("finetunes", listed, help="Trainings: the warm-up, and those on selections.")


@finetunes.command("create")
@takes(endpoints.finetunes_create, request=FinetuneRequest, without=["mixture"])
def create_finetune(
    ctx: typer.Context,
    *,
    mixture: Mixture = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Train a model on a dataset, a random part, or a selection.

    Prints the job's id. The defaults are LESS's recipe. The checkpoints of all epochs form a run, which gradients are
    computed for.
    """
    asked = given({**fields, "mixture": _mixture(mixture)})
    with session(ctx) as store:
        start(store, "finetunes", asked, wait=wait, dry_run=dry_run, as_json=as_json)


def _mixture(text: str | None) -> dict[str, Any] | None:
    """The settings that a file has, or the option says."""
    if text is None:
        return None
    file = Path(text)
    return parameter_set("--mixture", file.read_text(encoding="utf-8") if text.endswith(".json") else text)


@finetunes.command("download")
def download_finetune(ctx: typer.Context, reference: Reference, path: NewFolder) -> None:
    """Save the last checkpoint as a PEFT folder. Of a full fine-tune, the model."""
    with session(ctx) as store:
        typer.echo(store.finetunes.download(reference, path, progress=is_terminal()))
