"""The commands of validations: the scores they judge are said on the command line, and how well each predicts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, Reference, Wait, given, parameter_sets, takes
from gradstore._cli.output import Columns, print_table
from gradstore._cli.session import session
from gradstore.types import Interval, ValidationRequest, ValidationResult

SCORES_HELP = (
    "Scores to judge, as kind=adam,dim=1024,precondition=trackstar or as JSON; repeat to compare several on the same "
    "trainings, the first with each of the others. Left out: the only scores that there are."
)
TEXTS = {
    "dataset": "The pool, by id or name.",
    "fraction": "lds: part of the pool in a subset: 0.5 is a half.",
    "k": "leave-top-k-out: how many rows to leave out.",
    "kind": "Correlate predicted and measured losses over random subsets, or train without the best rows.",
    "pct": "leave-top-k-out: part of the pool to leave out: 0.05 is 5 %.",
    "repeats": "Trainings of a subset that differ in their seed; without the best rows, and as many random draws. By "
    "default 1, and 5.",
    "split": "Rows whose losses are measured.",
    "subsets": "lds: models to train, each on a subset of its own.",
    "targets": "lds: what a prediction is for, each row or the mean of a subtask.",
}
JUDGED: Columns = {
    "scores": lambda row: row.label,
    "value": lambda row: f"{row.value:.3f}",
    "95 %": lambda row: _interval(row.interval),
    "more than the first": lambda row: None if row.difference is None else f"{row.difference:+.3f}",
    "95 % ": lambda row: _interval(row.difference_interval),
}

validations = group_of("validations", listed, help="How well scores predict what training does.", own_show=True)


@validations.command("create")
@takes(endpoints.validations_create, request=ValidationRequest, without=["scores"], texts=TEXTS)
def create_validation(
    ctx: typer.Context,
    *,
    scores: Annotated[list[str] | None, typer.Option(metavar="<name=value,…>", help=SCORES_HELP)] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Train on parts of a pool; see how well scores predict it.

    Prints the job's id, or with --wait a value for each of the scores: more is better. The trainings are the cost, and
    those that exist are not done again, so other scores can be judged later.
    """
    with session(ctx) as store:
        asked = given({**fields, "scores": parameter_sets("--scores", scores or [])})
        start(store, "validations", asked, wait=wait, dry_run=dry_run, as_json=as_json, show=print_judged)


@validations.command("show")
def show_validation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how well scores predict. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.validations.get(reference), print_judged, as_json=as_json)


def print_judged(result: ValidationResult) -> None:
    """Print how well each of the scores predicts."""
    print_table(result.scores, JUDGED)


def _interval(interval: Interval | None) -> str | None:
    return None if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"
