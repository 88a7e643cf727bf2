"""The commands of datasets, the pools of examples: sending them, and looking into them."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.nouns import group_of
from gradstore._cli.options import Json, Reference, Rows, given, takes
from gradstore._cli.output import (
    Columns,
    ago,
    beginning,
    is_terminal,
    print_json,
    print_lines,
    print_list,
    print_table,
    say,
)
from gradstore._cli.session import session

READ: Columns = {
    "row": lambda row: row.row,
    "id": lambda row: row.id,
    "origin": lambda row: row.origin,
    "text": lambda row: beginning(row.turns, 80),
}

LENGTHS: Columns = {
    "origin": lambda origin: origin[0],
    "rows": lambda origin: origin[1].rows,
    "shortest": lambda origin: origin[1].shortest,
    "median": lambda origin: origin[1].median,
    "longest": lambda origin: origin[1].longest,
}

datasets = group_of(
    "datasets",
    {
        "id": lambda dataset: dataset.id,
        "name": lambda dataset: dataset.name,
        "rows": lambda dataset: dataset.rows,
        "bytes": lambda dataset: dataset.bytes,
        "age": lambda dataset: ago(dataset.created_at),
    },
    help="Pools of examples to choose from.",
)


@datasets.command("upload")
@takes(endpoints.datasets_upload, without=["filename", "progress"])
def upload_dataset(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, JSON or Parquet; - is stdin.")],
    *,
    filename: Annotated[str | None, typer.Option(help="Name to know the file by, needed for stdin.")] = None,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Upload a pool of examples and print its id. The same rows again give the same id."""
    piped = str(file) == "-"
    if piped and filename is None:
        raise typer.BadParameter("stdin needs a name, such as --filename pool.jsonl")
    if not piped and not file.is_file():
        raise typer.BadParameter(f"{file} is a folder: name a file in it" if file.is_dir() else f"there is no {file}")
    sent = sys.stdin.buffer if piped else file
    with session(ctx) as store:
        stored = store.datasets.upload(sent, filename=filename, progress=is_terminal(), **given(fields))
        report = stored.report
        say(f"{stored.rows:,} rows, {report.skipped:,} left out" + ("" if stored.created else "; stored before"))
        for remark in (*report.problems, *report.notes):
            say(f"  line {remark.line}: {remark.detail}")
        if report.total_notes > len(report.notes):
            say(f"  … and {report.total_notes - len(report.notes):,} more remarks")
        if as_json:
            print_json(stored)
        else:
            typer.echo(stored.id)


@datasets.command("rows")
@takes(endpoints.datasets_rows, without=["limit", "after"])
def dataset_rows(
    ctx: typer.Context, reference: Reference, *, limit: Rows = 20, as_json: Json = False, **fields: Any
) -> None:
    """Print rows with the beginning of their text; with --json all of it."""
    with session(ctx) as store:
        print_list(islice(store.datasets.rows(reference, **given(fields)), limit or None), READ, as_json=as_json)


@datasets.command("lengths")
def dataset_lengths(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how long the rows of each origin are, in bytes; with --json their histograms, too."""
    with session(ctx) as store:
        found = store.datasets.lengths(reference)
        print_json(found) if as_json else print_table(found.origins.items(), LENGTHS)


@datasets.command("content")
def dataset_content(
    ctx: typer.Context,
    reference: Reference,
    *,
    source: Annotated[str | None, typer.Option(help="SHA-256 of an upload, to get it byte for byte.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save it there.")] = None,
) -> None:
    """Print the original rows, one per line."""
    if source is not None and output is None:
        raise typer.BadParameter("an upload is saved byte for byte: say where, with --output")
    with session(ctx) as store:
        if output is None:
            print_lines(store.datasets.lines(reference))
        else:
            store.datasets.download(reference, output, source=source, progress=is_terminal())
