"""The commands of estimates, and of the trainings that they are held against."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, Reference, Rows, Wait, given, takes
from gradstore._cli.output import Columns, print_list, print_table, say
from gradstore._cli.session import session
from gradstore.types import EstimatesRequest, EstimatesResult, EstimateValidationRequest, EstimateValidationResult

LABELS_HELP = "group_by=label: a CSV file with an example's own id and its label in each line."
SUBSETS_HELP = "A JSON file of the subsets, each a list of its groups' labels; by default they are drawn."
TEXTS = {
    "abs_scale": "Length of the step itself, in place of scale.",
    "annotations": "group_by=annotation: the annotation of the pool, by id or name.",
    "c": "C of the logistic regression: how much the rows weigh beside a small step.",
    "checkpoint": "The checkpoint that training would begin with.",
    "clusters": "group_by=cluster: how many.",
    "count": "How many subsets to draw; by default 1,000, with mode=exact 20.",
    "dataset": "The pool, by id or name.",
    "draw_seed": "Seed of the subsets that are drawn.",
    "fraction": "Part of the groups in a subset that is drawn: 0.5 is a half.",
    "group_by": "Rows that are taken or left together: of an origin, a label, an annotation's labels, or a cluster "
    "of the features.",
    "keep_adapters": "mode=exact: keep each subset's adapter as a checkpoint.",
    "max_length": "Tokens kept of a row.",
    "max_new_tokens": "mode=exact: tokens of an answer that a task's metric has the model write.",
    "metric": "What groups are compared by: losses are to fall, accuracies to rise.",
    "mode": "first-order asks no model; exact measures each subset's step with the model on a worker, 200 at most.",
    "precision": "Number type of the base model while it computed.",
    "quantisation": "Quantisation of the base model; none: features of a model without any.",
    "rescale": "Give the step a length; else it is as long as the regression makes it.",
    "scale": "Length of the step as a part of that of the checkpoint's adapter.",
    "search": "How groups are compared: by the subsets that have them (ensemble, surrogate), or by a search for the "
    "best subset (forward-scan, stepwise, backward).",
    "seed": "Seed of the projection.",
    "template": "How a conversation is written as text.",
}
VALIDATION_TEXTS = {
    "estimates": "The estimates, by id or name.",
    "scales": "Lengths of the step to try; by default the estimates' own times 1/8 to 8.",
    "split": "Rows whose losses are measured.",
    "subsets": "How many of the estimates' subsets to train on: the first.",
    "task": "Whose losses are measured; by default the only task of the estimates.",
}
GROUPS: Columns = {
    "group": lambda group: group.group,
    "label": lambda group: group.label,
    "rows": lambda group: group.rows,
    "subsets": lambda group: group.subsets,
    "mean": lambda group: _short(group.mean),
    "± s.e.": lambda group: _short(group.standard_error),
    "ridge": lambda group: _short(group.coefficient),
    "score": lambda group: _short(group.score),
}
SUBSETS: Columns = {
    "subset": lambda subset: subset.subset,
    "groups": lambda subset: " ".join(map(str, subset.groups)),
    "rows": lambda subset: subset.rows,
    "loss": lambda subset: _short(subset.estimates[-1].loss),
    "accuracy": lambda subset: _short(subset.estimates[-1].accuracy),
    "length": lambda subset: _short(subset.length),
}
MEASURED: Columns = {
    "measured": lambda subset: _short(subset.estimates[-1].measured.loss),
    "token loss": lambda subset: _short(subset.estimates[-1].measured.token_loss),
    "value": lambda subset: _short(subset.estimates[-1].measured.value),
    "checkpoint": lambda subset: subset.checkpoint,
}
"""What is known of subsets with mode=exact beside that."""
TRAINED: Columns = {
    "subset": lambda subset: subset.subset,
    "estimate": lambda subset: _short(subset.estimate),
    "calibrated": lambda subset: _short(subset.calibrated),
    "loss": lambda subset: _short(subset.loss),
    "seconds": lambda subset: f"{subset.seconds:.1f}",
}

estimates = group_of("estimates", listed, help="What training on subsets of a pool would give.", own_show=True)
estimate_validations = group_of(
    "estimate-validations", listed, help="How well estimates tell what training gives.", own_show=True
)


@estimates.command("create")
@takes(endpoints.estimates_create, request=EstimatesRequest, without=["labels", "subsets"], texts=TEXTS)
def create_estimates(
    ctx: typer.Context,
    *,
    labels: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help=LABELS_HELP)] = None,
    subsets: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help=SUBSETS_HELP)] = None,
    wait: Wait = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Estimate what training on subsets of a pool would do for tasks.

    Needs features of kind logodds of the pool and of the tasks, at one checkpoint; no model is asked unless --mode
    exact says so. Prints the job's id, or with --wait the groups, best first: select --method gradex takes rows by
    them.
    """
    with session(ctx) as store:
        own = {"labels": _labels(labels), "subsets": _subsets(subsets)}
        asked = given({**fields, **own})
        start(store, "estimates", asked, wait=wait, dry_run=dry_run, as_json=as_json, show=print_groups)


@estimates.command("show")
def show_estimates(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print what estimates say of the groups. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.estimates.get(reference), print_groups, as_json=as_json)


@estimates.command("rows")
def print_subsets(ctx: typer.Context, reference: Reference, *, limit: Rows = 20, as_json: Json = False) -> None:
    """Print the subsets and their estimates; without --json for all rows of the last task."""
    with session(ctx) as store:
        measured = MEASURED if store.estimates.get(reference).request.mode == "exact" else {}
        print_list(islice(store.estimates.subsets(reference), limit or None), {**SUBSETS, **measured}, as_json=as_json)


@estimate_validations.command("create")
@takes(endpoints.estimate_validations_create, request=EstimateValidationRequest, texts=VALIDATION_TEXTS)
def create_estimate_validation(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Train on some of the subsets of estimates, and compare.

    Prints the job's id, or with --wait how the estimates agree with the losses after training. The trainings are the
    cost, and those that exist are not done again.
    """
    with session(ctx) as store:
        start(
            store,
            "estimate-validations",
            given(fields),
            wait=wait,
            dry_run=dry_run,
            as_json=as_json,
            show=print_agreement,
        )


@estimate_validations.command("show")
def show_estimate_validation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how well estimates tell what training gives. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.estimate_validations.get(reference), print_agreement, as_json=as_json)


def print_groups(result: EstimatesResult) -> None:
    """Print the groups, best first, and what a search has chosen."""
    best = sorted(result.groups, key=lambda group: -(group.score if group.score is not None else float("-inf")))
    print_table(best, GROUPS)
    if result.chosen is not None:
        say(f"chosen: {' '.join(map(str, result.chosen))}, estimated to give {_short(result.chosen_value)}")


def print_agreement(result: EstimateValidationResult) -> None:
    """Print the trained subsets, and how the estimates agree."""
    print_table(result.subsets, TRAINED)
    low, high = result.spearman_low, result.spearman_high
    say(f"rank correlation {result.own.spearman:.3f} ({low:.3f} to {high:.3f})")
    own, best = result.own.relative_rss, result.best.relative_rss
    say(f"relative error {own:.3%}, with scale {result.best.scale:g} {best:.3%}")
    say(f"of a line through the others {result.line_rss:.3%}, of a constant {result.constant_rss:.3%}")
    say(f"a training takes {result.speedup:,.0f} times as long as an estimate")


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _labels(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    wrong = next((number for number, row in enumerate(rows, start=1) if len(row) != 2), None)
    if wrong is not None:
        raise ValueError(f"--labels {path}: line {wrong} has not two values, an example's id and its label")
    return dict(rows)


def _subsets(path: Path | None) -> list[list[str]] | None:
    if path is None:
        return None
    try:
        found: list[list[str]] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--subsets {path}: this is no JSON: {error}") from error
    return found
