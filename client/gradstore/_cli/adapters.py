"""The commands of the bank of adapters."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start
from gradstore._cli.nouns import add_delete, add_rename, add_show, bare_group, group_of
from gradstore._cli.options import DryRun, Json, Limit, LocalPath, NewFolder, Reference, Rows, Wait, given, takes
from gradstore._cli.output import Columns, is_terminal, print_json, print_list, print_table, say
from gradstore._cli.session import session
from gradstore.types import Adapter, AdapterChoiceRequest, AdapterChoiceResult

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

CHOICE = {
    "adapters": "Adapters by id or name; repeat for several. By default all of the bank that are as is said.",
    "candidates": "So many of the best are candidates.",
    "max_length": "Tokens kept of a shot.",
    "max_new_tokens": "Tokens of an answer that the task's metric has an adapter write.",
    "precision": "Number type of the base model; by default that of the adapters' training, where they share one.",
    "seed": "Seed of the shots that are drawn.",
    "shots": "At most so many of the task's validation rows, drawn from its subtasks alike; by default all.",
    "similarity": "What the diversity of a set is measured by: the tensors A and B, or ΔW = BA.",
    "size": "How many adapters to choose.",
    "task": "Task by id or name, whose validation rows are the shots.",
    "template": "How a conversation is written as text; by default as in the adapters' training, where they share one.",
}
RANKED: Columns = {
    "adapter": lambda one: one.name or one.adapter,
    "perplexity": lambda one: None if one.perplexity is None else f"{one.perplexity:.4g}",
    "accuracy": lambda one: f"{one.accuracy:.4g}",
    "ranks": lambda one: f"{one.perplexity_rank} + {one.accuracy_rank}",
    "chosen": lambda one: "chosen" if one.chosen else "candidate" if one.candidate else None,
}
SETS: Columns = {
    "members": lambda found: ", ".join(found.members),
    "similarity": lambda found: f"{found.similarity:.4f}",
    "diversity rank": lambda found: found.diversity_rank,
    "total": lambda found: found.total,
}

adapters = bare_group("adapters", help="The bank of LoRA adapters that can be chosen for a task and mixed.")
choices = group_of("adapter-choices", listed, help="Which adapters were chosen for a task, and why.", own_show=True)
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


@adapters.command("choose")
@takes(endpoints.adapter_choices_create, request=AdapterChoiceRequest, texts=ASKED | CHOICE)
def choose_adapters(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Choose adapters of one base model for a task, to be mixed.

    Each is ranked by its perplexity and its accuracy on the shots; of the best, the set is chosen whose ranks, with
    that of its diversity, sum up least. Prints the job's id, or with --wait all adapters, best first.
    """
    with session(ctx) as store:
        start(store, "adapter-choices", given(fields), wait=wait, dry_run=dry_run, as_json=as_json, show=print_chosen)


@adapters.command("download")
def download_adapter(ctx: typer.Context, reference: Reference, path: NewFolder) -> None:
    """Save an adapter as a PEFT folder."""
    with session(ctx) as store:
        typer.echo(store.adapters.download(reference, path, progress=is_terminal()))


@choices.command("show")
def show_choice(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print the adapters of a choice and what was chosen. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.adapter_choices.get(reference), print_chosen, as_json=as_json)


@choices.command("rows")
def print_sets(ctx: typer.Context, reference: Reference, *, limit: Rows = 20, as_json: Json = False) -> None:
    """Print the sets of candidates that a choice was made from, the best first."""
    with session(ctx) as store:
        print_list(islice(store.adapter_choices.sets(reference), limit or None), SETS, as_json=as_json)


def print_chosen(result: AdapterChoiceResult) -> None:
    """Print all adapters, best first, and the set that was chosen."""
    print_table(result.adapters, RANKED)
    best = result.chosen
    say(f"chosen of {result.sets:,} sets: similarity {best.similarity:.4f}, diversity rank {best.diversity_rank}")


def _put(adapter: Adapter, *, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        typer.echo(adapter.id)
