"""The commands of the bank of adapters."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.nouns import add_delete, add_rename, add_show, bare_group
from gradstore._cli.options import Json, Limit, LocalPath, NewFolder, Reference, given, takes
from gradstore._cli.output import Columns, is_terminal, print_json, print_list
from gradstore._cli.session import session
from gradstore.types import Adapter

LISTED: Columns = {
    "id": lambda adapter: adapter.id,
    "name": lambda adapter: adapter.name,
    "base model": lambda adapter: adapter.base_model,
    "rank": lambda adapter: adapter.rank,
    "alpha": lambda adapter: adapter.alpha,
    "targets": lambda adapter: ", ".join(adapter.targets),
    "trained on": lambda adapter: adapter.trained_on or adapter.selection or adapter.dataset,
}
SAYS = {
    "base_model": "Base model: hub id, or a folder of the server; by default the one the adapter's own files name.",
    "checkpoint": "Checkpoint by id or name.",
    "dataset": "Dataset of the store that it was trained on, by id or name; of a fine-tune it is known.",
    "finetune": "Fine-tune by id or name, whose last checkpoint is meant.",
    "trained_on": "What it was trained on, in words.",
}
ASKED = {
    "base_model": "Only of this base model, as the list shows it.",
    "dataset": "Only those trained on this dataset.",
    "rank": "Only of this rank.",
    "revision": "Only of this revision of the base model.",
    "target": "Only those on this kind of module (q_proj); repeat for those on all of several.",
}

adapters = bare_group("adapters", help="The bank of LoRA adapters that can be chosen for a task and mixed.")
add_show(adapters, "adapters")
add_rename(adapters, "adapters")
add_delete(adapters, "adapters", help="Take some out of the bank; refused while something else needs them.")


@adapters.command("upload")
@takes(endpoints.adapters_upload, without=["progress"], texts=SAYS)
def upload_adapter(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload a PEFT folder, or a zip of one, into the bank. Prints its id."""
    with session(ctx) as store:
        _put(store.adapters.upload(path, progress=is_terminal(), **given(fields)), as_json=as_json)


@adapters.command("register")
@takes(endpoints.adapters_register, texts=SAYS)
def register_adapter(
    ctx: typer.Context,
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="PEFT folder on the server.")] = None,
    *,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Put an adapter into the bank: of a fine-tune, a checkpoint, or a folder of the server. Prints its id."""
    with session(ctx) as store:
        _put(store.adapters.register(path, **given(fields)), as_json=as_json)


@adapters.command("list")
@takes(endpoints.adapters_list, texts=ASKED)
def list_adapters(ctx: typer.Context, *, limit: Limit = None, as_json: Json = False, **fields: Any) -> None:
    """List the adapters, the newest first."""
    with session(ctx) as store:
        print_list(islice(store.adapters.list(**given(fields)), limit), LISTED, as_json=as_json)


@adapters.command("download")
def download_adapter(ctx: typer.Context, reference: Reference, path: NewFolder) -> None:
    """Save an adapter as a PEFT folder."""
    with session(ctx) as store:
        typer.echo(store.adapters.download(reference, path, progress=is_terminal()))


def _put(adapter: Adapter, *, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        typer.echo(adapter.id)
