"""The commands of predictors and cascades: influence learnt from a sample, and gradients of the rows predicted best."""

from __future__ import annotations

from typing import Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, start
from gradstore._cli.nouns import group_of
from gradstore._cli.options import DryRun, Json, Reference, Wait, takes
from gradstore._cli.options import given as said
from gradstore._cli.output import Columns, print_object, print_table, say
from gradstore._cli.session import session
from gradstore.types import (
    CascadeEstimate,
    CascadeRequest,
    CascadeResult,
    PredictionReport,
    PredictorRequest,
    PredictorResult,
)

TEXTS = {
    "budget": "Part of the pool whose gradients are computed, the sample included: 0.2 is 20 %.",
    "controls": "Fit three predictors that should fail beside it.",
    "dataset": "The pool, by id or name.",
    "encoder": "Checkpoint of the sentence encoder, where several have embeddings.",
    "features": "What influence is predicted from; repeat for several.",
    "folds": "Folds of the cross-validation that chooses the settings.",
    "fraction": "Part of the pool that is drawn as the sample; by default a tenth.",
    "input_checkpoint": "Checkpoint of the hidden states; by default the last.",
    "levels": "Predict in which of so many quantile levels a score is, instead of the score.",
    "model": "What predicts; auto: whatever predicts best out of fold.",
    "predictor_seed": "Seed of the sample, the folds and the models.",
    "rounds": "Steps in which the budget beyond the sample is spent.",
    "rows": "Rows that are drawn as the sample.",
    "sample": "Dataset of rows of the pool whose gradients are stored, by id or name.",
    "sample_share": "Part of the budget that is the random sample.",
    "seed": "Seed of the projection.",
}
REPORTED: Columns = {
    "predictor": lambda row: row[0],
    "R²": lambda row: None if row[1].r2 is None else f"{row[1].r2:.3f}",
    "accuracy": lambda row: None if row[1].accuracy is None else f"{row[1].accuracy:.3f}",
    "rank correlation": lambda row: f"{row[1].spearman:.3f}",
    "best 5 % among 10 %": lambda row: _recall(row[1], 0.1),
    "among 20 %": lambda row: _recall(row[1], 0.2),
}
STAGES: Columns = {
    "part": lambda stage: stage.part,
    "rows": lambda stage: stage.rows,
    "model": lambda stage: stage.model,
    "R² out of fold": lambda stage: None if stage.r2 is None else f"{stage.r2:.3f}",
    "predicted": lambda stage: None if stage.predicted is None else f"{stage.predicted:.4f}",
    "true": lambda stage: None if stage.true is None else f"{stage.true:.4f}",
}
COSTS: Columns = {
    "part": lambda part: part[0],
    "rows": lambda part: part[1].rows,
    "of them stored": lambda part: part[1].reused_rows,
    "tokens": lambda part: part[1].tokens,
    "bytes": lambda part: part[1].bytes,
    "seconds": lambda part: None if part[1].seconds is None else f"{part[1].seconds:,.1f}",
    "memory, bytes": lambda part: part[1].memory_bytes,
}

predictors = group_of("predictors", listed, help="Influence, predicted from a sample.", own_show=True)
cascades = group_of("cascades", listed, help="Gradients of the rows predicted best.", own_show=True)


@predictors.command("create")
@takes(endpoints.predictors_create, request=PredictorRequest, texts=TEXTS)
def create_predictor(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Learn to predict influence from a sample of a pool.

    Prints the job's id, or with --wait how well rows are predicted that were not learnt from, beside three predictors
    that should fail. select --method predicted chooses by it.
    """
    with session(ctx) as store:
        start(store, "predictors", said(fields), wait=wait, dry_run=dry_run, as_json=as_json, show=print_predictor)


@predictors.command("show")
def show_predictor(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print how well it predicts. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.predictors.get(reference), print_predictor, as_json=as_json)


@cascades.command("create")
@takes(endpoints.cascades_create, request=CascadeRequest, texts=TEXTS)
def create_cascade(
    ctx: typer.Context, *, wait: Wait = False, dry_run: DryRun = False, as_json: Json = False, **fields: Any
) -> None:
    """Compute gradients for a part of a pool: those predicted best.

    Prints the job's id, or with --wait what was computed in which step. select --method cascade chooses among these.
    """
    with session(ctx) as store:
        start(
            store,
            "cascades",
            said(fields),
            wait=wait,
            dry_run=dry_run,
            as_json=as_json,
            show=print_cascade,
            cost=print_cascade_cost,
        )


@cascades.command("show")
def show_cascade(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print what was computed. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.cascades.get(reference), print_cascade, as_json=as_json)


def print_predictor(result: PredictorResult) -> None:
    """Print how well influence is predicted, and how well by predictors without a merit."""
    where = "outside the sample" if result.tested_on == "outside" else "of the sample, out of fold"
    say(f"{result.sample_rows:,} rows learnt from, {result.tested_rows:,} rows {where}")
    rows = [(result.model, result.report), *((each.control, each.report) for each in result.controls)]
    print_table(rows, REPORTED)


def print_cascade_cost(cost: CascadeEstimate, *, as_json: bool) -> None:
    """Print what a cascade would cost, and that of its gradients and of each pass that gives what is predicted from."""
    print_object(cost, as_json=as_json, without=() if as_json else ("gradients", "inputs"))
    if not as_json:
        print_table([("gradients", cost.gradients), *(("inputs", each) for each in cost.inputs)], COSTS)


def print_cascade(result: CascadeResult) -> None:
    """Print the parts of the pool whose gradients were computed."""
    say(f"{result.computed_rows:,} of {result.rows:,} rows computed, {result.saved_rows:,} saved")
    print_table(result.stages, STAGES)


def _recall(report: PredictionReport, budget: float) -> str | None:
    found = next((each.recall for each in report.recalls if each.budget == budget), None)
    return None if found is None else f"{found:.2f}"
