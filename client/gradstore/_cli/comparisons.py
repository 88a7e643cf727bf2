"""The commands about comparisons: `compare`, and those of the noun."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, Reference, Wait, given, parameter_sets, takes
from gradstore._cli.output import Columns, print_table, say
from gradstore._cli.session import session
from gradstore.types import ComparedPair, ComparedRow, ComparisonRequest, ComparisonResult, Interval

CONTESTANT_HELP = (
    "A way to select, in the parameters of select, as method=influence,aggregate=avg or as JSON; repeat for each. Left "
    "out: every method for which all that it needs is in the store."
)
TEXTS = {
    "dataset": "The pool, by id or name.",
    "k": "How many rows each selects, instead of a fraction.",
    "model": "With --train: base model, by hub id, or a folder of the server inside an allowed root.",
    "pct": "Fraction of the pool that each selects: 0.05 is 5 %.",
    "repeats": "With --train: trainings on each selection, which differ in their seed.",
    "split": "With --train: rows whose losses are measured.",
    "tasks": "Task by id or name, which is selected for by itself; repeat for several.",
    "train": "Train a model on every selection and measure the task's loss.",
}
Contestants = Annotated[list[str] | None, typer.Option("--contestant", metavar="<name=value,…>", help=CONTESTANT_HELP)]

comparisons = group_of("comparisons", listed, help="Ways to select, side by side.", own_show=True)


@takes(endpoints.comparisons_create, request=ComparisonRequest, without=["contestants"], texts=TEXTS)
def compare(
    ctx: typer.Context,
    *,
    contestants: Contestants = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Compare ways to select, and wait for the table.

    Same pool, tasks and number of rows: what each selects and costs, what each two share, and with --train what
    training on it gives. The same again is answered from what exists. Ctrl-C leaves it at work.
    """
    _compare(ctx, contestants, fields, wait=True, dry_run=dry_run, as_json=as_json)


@comparisons.command("create")
@takes(endpoints.comparisons_create, request=ComparisonRequest, without=["contestants"], texts=TEXTS)
def create_comparison(
    ctx: typer.Context,
    *,
    contestants: Contestants = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Compare ways to select. Prints the job's id, or with --wait the table."""
    _compare(ctx, contestants, fields, wait=wait, dry_run=dry_run, as_json=as_json)


def _compare(
    ctx: typer.Context,
    contestants: Sequence[str] | None,
    fields: dict[str, Any],
    *,
    wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    with session(ctx) as store:
        asked = given({**fields, "contestants": parameter_sets("--contestant", contestants or [])})
        start(store, "comparisons", asked, wait=wait, dry_run=dry_run, as_json=as_json, show=print_compared)


@comparisons.command("show")
def show_comparison(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print the table of a comparison. Before there is one, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.comparisons.get(reference), print_compared, as_json=as_json)


def _sources(row: ComparedRow) -> str:
    """The origins that most of a selection's rows have."""
    return ", ".join(f"{origin} {count / row.rows:.0%}" for origin, count in list(row.origins.items())[:3])


COMPARED: Columns = {
    "contestant": lambda row: row.contestant,
    "selection": lambda row: row.selection,
    "rows": lambda row: row.rows,
    "most from": _sources,
    "scoring s": lambda row: row.cost.scoring_seconds,
    "rests on s": lambda row: row.cost.rests_on_seconds,
}


def print_compared(result: ComparisonResult) -> None:
    """Print for each task the contestants, and what each two of them share; on stderr what is left out."""
    for task in result.tasks:
        say(f"{task.task_name}:" + ("" if task.base_loss is None else f" loss before training {task.base_loss:.4f}"))
        rows = [row for row in result.rows if row.task == task.task]
        print_table(rows, COMPARED if task.base_loss is None else {**COMPARED, **_trained(result.against)})
        if len(rows) > 1:
            pairs = [pair for pair in result.pairs if pair.task == task.task]
            say("share of common rows:")
            print_table(rows, _shares([row.contestant for row in rows], pairs))
    for one in result.left_out:
        say(f"left out: {one.method}: {one.detail}")


def _trained(against: str | None) -> Columns:
    """Columns of what training on the selections has given."""
    return {
        "loss": lambda row: f"{row.loss.value:.4f}",
        "95 %": lambda row: _interval(row.loss.interval),
        f"more than {against or 'random'}": lambda row: (
            None if row.loss.difference is None else f"{row.loss.difference:+.4f}"
        ),
        "95 % ": lambda row: _interval(row.loss.difference_interval),
    }


def _shares(contestants: Sequence[str], pairs: Sequence[ComparedPair]) -> Columns:
    """A column for each contestant: which part of their rows those of a line share with it."""
    known = {frozenset(pair.contestants): pair.share for pair in pairs}

    def share(column: str, row: ComparedRow) -> str | None:
        found = known.get(frozenset({row.contestant, column}))
        return None if found is None else f"{found:.2f}"

    return {"": lambda row: row.contestant, **{column: partial(share, column) for column in contestants}}


def _interval(interval: Interval | None) -> str | None:
    return None if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
