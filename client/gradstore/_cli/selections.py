"""Choosing rows, `select`, and the commands of what it has answered."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.names import Names
from gradstore._cli.nouns import group_of
from gradstore._cli.options import Json, Reference, Rows, Timeout, given, takes
from gradstore._cli.output import (
    Columns,
    ago,
    beginning,
    is_terminal,
    print_json,
    print_lines,
    print_list,
    print_object,
    print_table,
    say,
)
from gradstore._cli.session import session
from gradstore._endings import content_format
from gradstore.types import ExportFormat, Selection

if TYPE_CHECKING:
    from gradstore import GradientStore

AsCsv = Annotated[bool, typer.Option("--csv", help="Print the sorted table (file, row, score) as CSV.")]
AsLines = Annotated[bool, typer.Option("--lines", help="Print the chosen original rows.")]


def _of_content(path: Path | None) -> Path | None:
    """Refuse a path that ends as other files do, before anything is chosen."""
    if path is not None:
        try:
            content_format(path)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return path


Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        callback=_of_content,
        help="Save the original rows there, in .jsonl; a path in .csv gets the table.",
    ),
]

SCORING = {
    "method": "What a row's score is: its influence on the task (the default), its likeness by hidden states (rds), a "
    "sentence encoder (embedding) or words (bm25), its influence as predicted (predicted) or as a cascade has computed "
    "it (cascade), its group's estimate (gradex), its place in an ability space (cods), or a number drawn (random).",
    "task": "Task by id or name; repeat for several.",
}

TABLE = 20  # rows of a table, where nothing is said

EXPLAINED: Columns = {
    "rank": lambda row: row.rank,
    "score": lambda row: row.score,
    "origin": lambda row: row.origin,
    "text": lambda row: beginning(row.turns, 60),
    "best subtask": lambda row: max(row.subtasks, key=lambda one: one.score).subtask,
    "nearest": lambda row: beginning(row.nearest.turns, 60),
    "influence": lambda row: row.nearest.influence,
}


def listed(names: Names) -> Columns:
    """What is printed of a selection."""
    return {
        "id": lambda selection: selection.id,
        "name": lambda selection: selection.name,
        "method": lambda selection: selection.recipe.method,
        "tasks": lambda selection: ", ".join(map(names.called, selection.recipe.tasks)) or None,
        "pool": lambda selection: ", ".join(map(names.dataset, selection.recipe.datasets)),
        "rows": lambda selection: selection.count,
        "of": lambda selection: selection.pool,
        "age": lambda selection: ago(selection.created_at),
    }


selections = group_of("selections", listed, help="What select has answered.", own_show=True)


def selected(names: Names) -> Columns:
    """What is printed of a chosen row."""
    return {
        "rank": lambda row: row.rank,
        "score": lambda row: row.score,
        "dataset": lambda row: names.dataset(row.dataset),
        "row": lambda row: row.row,
        "id": lambda row: row.id,
        "origin": lambda row: row.origin,
        "task": lambda row: names.task(row.task),
        "subtask": lambda row: row.subtask,
    }


@takes(endpoints.select, without=["limit", "wait"], texts=SCORING)
def select(
    ctx: typer.Context,
    *,
    recipe: Annotated[
        str | None, typer.Option(help="Selection whose recipe is used again, or a JSON file with one; alone.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name to give the selection.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="How many rows to print; 0 prints all. By default a table has 20 and the rest all."),
    ] = None,
    output: Output = None,
    as_lines: AsLines = False,
    as_csv: AsCsv = False,
    as_json: Json = False,
    timeout: Timeout = None,
    **fields: Any,
) -> None:
    """Choose the examples that help a task most.

    Prints the first of them; the selection's id, for finetunes create --selection, goes to stderr. Options that are
    left out must have one candidate in the store; with several, they are listed.
    """
    if sum((as_lines, as_csv, as_json)) > 1:
        raise typer.BadParameter("choose one of --lines, --csv and --json")
    with session(ctx) as store:
        chosen = store.select(
            **given(fields),
            recipe=_recipe(recipe),
            limit=TABLE if limit is None else limit or None,
            progress=is_terminal(),
            timeout=timeout,
        )
        if name is not None:
            _give_name(store, chosen, name)
        say(f"{chosen.id}: {chosen.count:,} of {chosen.pool:,} rows")
        for reason, count in chosen.left_out.items():
            say(f"  {count:,} rows left out: {reason}")
        names = Names(store)
        _say_what_to_know(chosen, names)
        if output is not None:
            store.selections.save(chosen.id, output, progress=is_terminal())
        if as_lines or as_csv:
            lines = store.selections.lines(chosen.id, format="csv" if as_csv else "ndjson")
            print_lines(islice(lines, limit + as_csv if limit else None))  # a table has a line of headings
        elif as_json:
            print_json(chosen)
        elif output is None:
            print_table(chosen.data, selected(names))


def _give_name(store: GradientStore, chosen: Selection, name: str) -> None:
    """Name a selection that has no name yet; the same question is the same selection, which may have one."""
    if chosen.name not in {None, name}:
        raise typer.BadParameter(
            f"the same selection is called {chosen.name!r} already ({chosen.id}): leave the name out, or say "
            f"`gradstore selections rename {chosen.name} {name}`",
            param_hint="'--name'",
        )
    store.selections.rename(chosen.id, name)


def _recipe(said: str | None) -> dict[str, Any] | str | None:
    """A recipe of a file, as `selections show --json` prints it or as it is; what is no file is a selection."""
    if said is None or not Path(said).is_file():
        return said
    try:
        found = json.loads(Path(said).read_bytes())
    except ValueError as error:
        raise typer.BadParameter(f"{said} is no JSON: {error}") from error
    recipe: dict[str, Any] = found.get("recipe", found) if isinstance(found, dict) else {}
    return recipe


def _say_what_to_know(chosen: Selection, names: Names) -> None:
    """Tell what did not go as asked, and what the chosen rows share with tasks' rows."""
    for note in chosen.notes:
        say(f"  {note}")
    found = chosen.contamination
    if found is None:
        return
    share = f"share {found.ngram} words in a row, or the whole of a shorter row, with a task's"
    if found.chosen:
        say(f"  {found.chosen:,} rows {share}; --exclude-contaminated drops them:")
        for one in found.overlaps[:3]:
            say(f"    row {one.row} and {one.split} row {one.task_row} of {names.task(one.task)}: {one.text[:80]}")
    if found.dropped:
        say(f"  {found.dropped:,} rows passed over that {share}")


@selections.command("explain")
@takes(endpoints.selections_explanations, without=["limit", "after"])
def explain_selection(
    ctx: typer.Context, reference: Reference, *, limit: Rows = 10, as_json: Json = False, **fields: Any
) -> None:
    """Print chosen rows with their best subtask and the validation example nearest to each; with --json all scores."""
    with session(ctx) as store:
        rows = store.selections.explanations(reference, **given(fields))
        print_list(islice(rows, limit or None), EXPLAINED, as_json=as_json)


@selections.command("show")
def show_selection(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print a selection without its rows."""
    with session(ctx) as store:
        print_object(store.selections.get(reference, limit=0), as_json=as_json)


@selections.command("rows")
def selection_rows(ctx: typer.Context, reference: Reference, *, limit: Rows = 20, as_json: Json = False) -> None:
    """Print the chosen rows' places and scores, best first."""
    with session(ctx) as store:
        print_list(islice(store.selections.rows(reference), limit or None), selected(Names(store)), as_json=as_json)


@selections.command("content")
def selection_content(
    ctx: typer.Context, reference: Reference, *, as_csv: AsCsv = False, output: Output = None
) -> None:
    """Print the chosen original rows, best first."""
    with session(ctx) as store:
        if output is not None:
            store.selections.save(reference, output, progress=is_terminal())
        else:
            print_lines(store.selections.lines(reference, format="csv" if as_csv else "ndjson"))


@selections.command("export")
def export_selection(
    ctx: typer.Context,
    reference: Reference,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File in .jsonl, .csv or .parquet; a trainer's folder, or its .zip.")
    ],
    format: Annotated[ExportFormat | None, typer.Option(help="By default by the path's ending.")] = None,
    scores: Annotated[bool, typer.Option(help="Say rank, score and place of each row, too.")] = True,
) -> None:
    """Save the chosen rows for other programs.

    As a table, or as a folder that TRL, Axolotl or LLaMA-Factory works with: data, configuration and provenance card.
    """
    with session(ctx) as store:
        typer.echo(store.selections.export(reference, output, format=format, scores=scores, progress=is_terminal()))


@selections.command("provenance")
def selection_provenance(
    ctx: typer.Context,
    reference: Reference,
    *,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page to read.")] = False,
    as_json: Json = False,
) -> None:
    """Print what selected these rows, from what, when and how."""
    with session(ctx) as store:
        if markdown:
            typer.echo(store.selections.card(reference), nl=False)
        else:
            print_object(store.selections.provenance(reference), as_json=as_json)
