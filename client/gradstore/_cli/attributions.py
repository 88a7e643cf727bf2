"""The commands about attributions: `why`, and those of the noun."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, started
from gradstore._cli.names import Names
from gradstore._cli.nouns import group_of
from gradstore._cli.options import Json, Reference, Wait, given, takes
from gradstore._cli.output import Columns, is_terminal, print_json, print_table, say
from gradstore._cli.session import session
from gradstore.types import Attribution, AttributionRecipe, AttributionRequest, AttributionResult, InfluentialRow

Parts = Annotated[bool, typer.Option("--parts", help="Print the part of each checkpoint in the scores, too.")]
TEXTS = {
    "datasets": "Pool by id or name, where several have features; repeat to search several.",
    "k": "How many examples to find at either end.",
    "kind": "Kind of the pool's features.",
    "max_length": "Tokens kept of a row.",
    "precision": "Number type of the base model while it computes.",
    "quantisation": "Quantisation of the base model; none: features of a model without any.",
    "template": "How a conversation is written as text.",
    "text": "Show the beginning of each example's text.",
}

attributions = group_of("attributions", listed, help="Training examples behind what a model said.", own_show=True)


@takes(endpoints.attributions_create, request=AttributionRequest, texts=TEXTS)
def why(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model was asked.")],
    response: Annotated[str, typer.Argument(metavar="RESPONSE", help="What it said.")],
    *,
    parts: Parts = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Show the training examples behind what a model said.

    Prints those that make the answer likelier when they are trained on, and those that oppose it most. The same
    question again is answered from what exists. Options that are left out must have one candidate in the store.
    """
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    with session(ctx) as store:
        job = store.attributions.create({"messages": turns}, **given(fields))
        say(f"attribution {job.id}")
        done = store.attributions.wait(job, progress=is_terminal(), poll=0.5)
        if as_json:
            print_json(done)
        else:
            print_result(done.result, Names(store), parts=parts)


@attributions.command("create")
@takes(endpoints.attributions_create, request=AttributionRequest, texts=TEXTS)
def create_attributions(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL of what the model said; - is stdin.")],
    *,
    wait: Wait = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Find the training examples behind each row of a file.

    Rows are as datasets have them: prompt and completion, or messages. Prints the job's id, or with --wait what
    was found.
    """
    rows = _rows(file)
    with session(ctx) as store:
        job = store.attributions.create(rows, **given(fields))
        show = partial(print_result, names=Names(store))
        started(store, "attributions", job, wait=wait, as_json=as_json, show=show)


@attributions.command("show")
def show_attribution(ctx: typer.Context, reference: Reference, *, parts: Parts = False, as_json: Json = False) -> None:
    """Print what was found. Before that, everything known about the job."""
    with session(ctx) as store:
        show = partial(print_result, names=Names(store), parts=parts)
        print_outcome(store.attributions.get(reference), show, as_json=as_json)


def print_result(result: AttributionResult, names: Names, *, parts: bool = False) -> None:
    """Print what was found for each question; how it was found goes to stderr."""
    for search in result.searches:
        how = "every row" if search.recall is None else f"an index, which finds {search.recall:.1%} of the first 100"
        say(f"{names.dataset(search.dataset)}: {search.rows:,} rows, by {how} ({search.seconds:.2f} s)")
    columns = _columns(result.recipe if parts else None)
    for number, each in enumerate(result.data, start=1):
        if len(result.data) > 1:
            typer.echo(f"row {number}")
        _print_question(each, columns)


def _print_question(found: Attribution, columns: Columns) -> None:
    if found.reason is not None:
        say(f"nothing can be said about this row: {found.reason}")
        return
    typer.echo(f"loss {found.loss:.4g} over {found.tokens:,} tokens")
    for title, rows in (("helps most", found.most), ("opposes most", found.least)):
        typer.echo(f"\n{title}")
        print_table(rows, columns)
    typer.echo("")


def _columns(recipe: AttributionRecipe | None) -> Columns:
    """What is printed of an example; with a recipe, the part of each of its checkpoints."""
    by_checkpoint = {
        checkpoint: _part(number) for number, checkpoint in enumerate(recipe.checkpoints if recipe else ())
    }
    return {
        "rank": lambda row: row.rank,
        "score": lambda row: row.score,
        **by_checkpoint,
        "origin": lambda row: row.origin,
        "row": lambda row: row.row,
        "id": lambda row: row.id,
        "text": _first_line,
    }


def _part(number: int) -> Callable[[InfluentialRow], float]:
    return lambda row: row.per_checkpoint[number]


def _first_line(row: InfluentialRow) -> str | None:
    lines = (row.text or "").strip().splitlines()
    return None if not lines else lines[0] if len(lines[0]) <= 80 else f"{lines[0][:79]}…"


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. Raises a usage error that names the line."""
    piped = str(file) == "-"
    if not piped and not file.is_file():
        raise typer.BadParameter(f"there is no file {file}")
    text = sys.stdin.read() if piped else file.read_text(encoding="utf-8")
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise typer.BadParameter(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise typer.BadParameter(f"line {number} is no JSON object")
        found.append(row)
    if not found:
        raise typer.BadParameter(f"{file} holds no rows")
    return found
