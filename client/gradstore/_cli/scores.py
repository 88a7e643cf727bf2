"""The commands about a pool's scores: each row's, what every fraction would take, what tasks share."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.names import Names
from gradstore._cli.options import Json, Rows, Timeout, given, takes
from gradstore._cli.output import Columns, is_terminal, print_json, print_list, print_table
from gradstore._cli.selections import SCORING, selected
from gradstore._cli.session import session

SCORED = ("dataset", "row", "score", "id", "origin", "task", "subtask")

CUTS: Columns = {
    "fraction": lambda cut: cut[0],
    "rows": lambda cut: cut[1],
    "score": lambda cut: cut[2],
    "origins": lambda cut: ", ".join(f"{name} {count:,}" for name, count in cut[3] if count),
}


def shared(names: Names) -> Columns:
    """What is printed of a pair of tasks."""
    return {
        "task": lambda pair: names.task(pair.tasks[0]),
        "and": lambda pair: names.task(pair.tasks[1]),
        "shared rows": lambda pair: pair.shared,
        "jaccard": lambda pair: pair.jaccard,
        "rank correlation": lambda pair: pair.rank_correlation,
    }


@takes(endpoints.scores, without=["limit", "after", "wait"], texts=SCORING)
def scores(
    ctx: typer.Context,
    *,
    limit: Rows = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save all scores there, as .npy, .safetensors or .parquet.")
    ] = None,
    as_json: Json = False,
    timeout: Timeout = None,
    **fields: Any,
) -> None:
    """Print or save the scores of a pool's rows."""
    with session(ctx) as store:
        if output is not None:
            store.save_scores(output, progress=is_terminal(), timeout=timeout, **given(fields))
            return
        rows = store.scores(progress=is_terminal(), timeout=timeout, **given(fields))
        columns = selected(Names(store))
        print_list(islice(rows, limit or None), {name: columns[name] for name in SCORED}, as_json=as_json)


@takes(
    endpoints.score_distribution,
    without=["bins", "steps", "wait"],
    texts=SCORING,
)
def distribution(
    ctx: typer.Context,
    *,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Cuts to print, at equal steps.")] = 20,
    as_json: Json = False,
    timeout: Timeout = None,
    **fields: Any,
) -> None:
    """Print what each fraction of a pool would take: rows, the last score, rows of each origin."""
    with session(ctx) as store:
        found = store.score_distribution(steps=steps, progress=is_terminal(), timeout=timeout, **given(fields))
        cuts = found.cuts
        origins = [[(name, own[step]) for name, own in cuts.origins.items()] for step in range(len(cuts.rows))]
        print_json(found) if as_json else print_table(zip(cuts.pct, cuts.rows, cuts.scores, origins, strict=True), CUTS)


@takes(endpoints.overlaps, without=["wait"], texts=SCORING)
def overlaps(ctx: typer.Context, *, as_json: Json = False, timeout: Timeout = None, **fields: Any) -> None:
    """Print what the selections of several tasks share, and how far the tasks agree on the whole pool."""
    with session(ctx) as store:
        found = store.overlaps(progress=is_terminal(), timeout=timeout, **given(fields))
        print_json(found) if as_json else print_table(found.pairs, shared(Names(store)))
