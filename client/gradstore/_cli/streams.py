"""The commands of what CODS learns from: streams of numbers, annotations, and the taxonomies of these."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start, started
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, LocalPath, Reference, Rows, Wait, given, parameter_set, takes
from gradstore._cli.output import Columns, ago, is_terminal, print_json, print_list, print_table, say
from gradstore._cli.session import session
from gradstore.types import AnnotationRequest, AnnotationResult, StreamRequest

ANNOTATED = {
    "again": "Annotation by a labeller: keep what it has, and ask again about the rows whose reply could not be read.",
    "by": "Take a row's origin as its label, or ask a chat model.",
    "on_error": "What to do with entries that cannot be taken: refuse all, or leave them out and say so.",
    "taxonomy": "Taxonomy by id or name; by default the thirteen of CODS, and of origins the origins themselves.",
}
STREAMED = {
    "checkpoint": "Checkpoint whose model reads the rows, by id or name.",
    "feature_set": "Feature set of the job, where it has several.",
    "kind": "Gradients of this store, pooled hidden states, or the routing of a mixture-of-experts model.",
    "layers": "Layer that is read, from 0; repeat for several. By default five, evenly spaced.",
    "on_error": "What to do with rows that are not finite or whose id is unknown: refuse all, or leave them out.",
}
LABELLER = "Whom to ask, as model=NAME,url=https://host/v1,calls_per_minute=600 or as JSON."
LABELS: Columns = {
    "row": lambda row: row.row,
    "id": lambda row: row.id,
    "categories": lambda row: None if row.categories is None else ", ".join(row.categories),
    "reply": lambda row: row.reply,
}

taxonomies = group_of(
    "taxonomies",
    {
        "id": lambda taxonomy: taxonomy.id,
        "name": lambda taxonomy: taxonomy.name,
        "capabilities": lambda taxonomy: len(taxonomy.capabilities),
        "age": lambda taxonomy: ago(taxonomy.created_at),
    },
    help="The capabilities that rows are labelled with.",
)
labels = group_of("annotations", listed, help="Which capabilities rows ask for.", own_show=True)
streams = group_of("streams", listed, help="Rows of numbers: gradients, hidden states, routing, your own.")


@taxonomies.command("create")
def create_taxonomy(
    ctx: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", exists=True, help="JSON array of {name, definition}; else the 13 of CODS."),
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(help="Name to give it, instead of remembering its id.")] = None,
    as_json: Json = False,
) -> None:
    """Record capabilities. Prints the taxonomy's id."""
    capabilities = None if file is None else json.loads(file.read_text("utf-8"))
    with session(ctx) as store:
        made = store.taxonomies.create(capabilities, name=name)
        print_json(made) if as_json else typer.echo(made.id)


@labels.command("upload")
@takes(endpoints.annotations_upload, request=AnnotationRequest, without=["progress"], texts=ANNOTATED)
def upload_annotation(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload labels: a file of {id, categories}, JSONL, a JSON array or Parquet. Prints the annotation's id."""
    with session(ctx) as store:
        job = store.annotations.upload(path, progress=is_terminal(), **given(fields))
        _say_left_out(job.result)
        started(store, "annotations", job, wait=False, as_json=as_json)


@labels.command("create")
@takes(endpoints.annotations_create, request=AnnotationRequest, without=["labeller"], texts=ANNOTATED)
def create_annotation(
    ctx: typer.Context,
    *,
    labeller: Annotated[str | None, typer.Option(metavar="<name=value,…>", help=LABELLER)] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Label rows by their origin, or by a chat model. Prints the job's id, or with --wait how many rows ask for what.

    The server asks only the addresses that its operator allows (GRADSTORE_LABELLERS), with the key that it was given.
    """
    with session(ctx) as store:
        asked = given({**fields, "labeller": None if labeller is None else parameter_set("--labeller", labeller)})
        start(
            store,
            "annotations",
            asked,
            wait=wait,
            dry_run=dry_run,
            as_json=as_json,
            show=print_counts if wait else None,
        )


@labels.command("show")
def show_annotation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how many rows ask for each capability. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.annotations.get(reference), print_counts, as_json=as_json)


@labels.command("rows")
def annotation_rows(
    ctx: typer.Context,
    reference: Reference,
    *,
    unparsed: Annotated[bool, typer.Option("--unparsed", help="Only rows whose reply could not be read.")] = False,
    limit: Rows = 20,
    as_json: Json = False,
) -> None:
    """Print rows with their labels, or with the reply that could not be read."""
    with session(ctx) as store:
        print_list(islice(store.annotations.rows(reference, unparsed=unparsed), limit or None), LABELS, as_json=as_json)


@streams.command("upload")
@takes(endpoints.streams_upload, request=StreamRequest, without=["progress"], texts=STREAMED)
def upload_stream(ctx: typer.Context, path: LocalPath, *, as_json: Json = False, **fields: Any) -> None:
    """Upload rows of numbers: a folder or zip with an .npy and ids.json, or a .safetensors with ids. Prints the id."""
    with session(ctx) as store:
        job = store.streams.upload(path, progress=is_terminal(), **given(fields))
        _say_left_out(job.result)
        started(store, "streams", job, wait=False, as_json=as_json)


@streams.command("create")
@takes(endpoints.streams_create, request=StreamRequest, texts=STREAMED)
def create_stream(ctx: typer.Context, *, wait: Wait = False, as_json: Json = False, **fields: Any) -> None:
    """Name gradients of this store as a stream, or compute hidden states or routing weights. Prints the job's id."""
    with session(ctx) as store:
        started(store, "streams", store.streams.create(**given(fields)), wait=wait, as_json=as_json)


@streams.command("content")
def stream_content(
    ctx: typer.Context,
    reference: Reference,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to save them, as .npy or .safetensors.")],
    start: Annotated[int | None, typer.Option(min=0, help="The first row.")] = None,
    stop: Annotated[int | None, typer.Option(min=0, help="The row after the last one.")] = None,
) -> None:
    """Save the rows of a stream: float32, in the order of the dataset's or the task's rows. An absent row is NaN.

    A .safetensors has the rows' ids with them, as streams upload takes them.
    """
    with session(ctx) as store:
        typer.echo(store.streams.save(reference, output, start=start, stop=stop, progress=is_terminal()))


def print_counts(result: AnnotationResult) -> None:
    """Print how many rows ask for each capability; what has no labels goes to stderr."""
    print_table(result.capabilities, {"capability": lambda each: each.name, "rows": lambda each: f"{each.rows:,}"})
    say(f"{result.labelled_rows:,} of {result.rows:,} rows have labels")
    if result.total_unparsed:
        say(f"{result.total_unparsed:,} replies could not be read: annotations create --again asks for them again")
    _say_left_out(result)


def _say_left_out(result: Any) -> None:
    if result is None or not result.total_problems:
        return
    say(f"{result.total_problems:,} entries were left out")
    for problem in result.problems[:5]:
        say(f"  {problem.line}: {problem.detail}")
