"""The commands of evaluations, and the table of what was measured."""

from __future__ import annotations

from typing import Any

import typer

from gradstore import _endpoints as endpoints
from gradstore._cli.jobs import listed, print_outcome, started
from gradstore._cli.nouns import group_of
from gradstore._cli.options import AS_TRAINED, Json, Reference, Wait, given, takes
from gradstore._cli.output import Columns, print_table
from gradstore._cli.session import session
from gradstore.types import EvaluationRequest, EvaluationResult, Interval

MEASURED: Columns = {
    "model": lambda row: row.model,
    "task": lambda row: row.task_name,
    "subtask": lambda row: row.subtask or "(all)",
    "examples": lambda row: row.examples,
    "loss": lambda row: row.loss,
    "95 %": lambda row: _interval(row.loss_interval),
    "metric": lambda row: row.metric,
    "value": lambda row: row.value,
    "95 % ": lambda row: _interval(row.interval),
    "unparsed": lambda row: row.unparsed,
}

COMBINING = {
    "adapters": "Adapter of the bank by id or name; repeat it, with --combine, for several as one model.",
    "arrow_temperature": "arrow: of the softmax over the likeness of a token's adapters; by default 1.",
    "arrow_top_k": "arrow: adapters that a token gets; by default 3.",
    "combine": "How several adapters become one model: a merge of PEFT's, or arrow, which chooses by token.",
    "merge_density": "Merges that drop values: the fraction that is kept.",
    "merge_rank": "Merges by svd: rank of the result; by default the highest of the adapters.",
    "merge_weights": "Weight of an adapter in a merge, in their order; repeatable, by default equal.",
}

evaluations = group_of("evaluations", listed, help="Models measured on tasks.", own_show=True)


@evaluations.command("create")
@takes(
    endpoints.evaluations_create,
    request=EvaluationRequest,
    without=["adapter"],  # as an option it is one of adapters
    texts={**AS_TRAINED, **COMBINING, "checkpoint": "Checkpoint by id or name."},
)
def create_evaluation(ctx: typer.Context, *, wait: Wait = False, as_json: Json = False, **fields: Any) -> None:
    """Measure a model on the test rows of tasks.

    The model is a fine-tune, a checkpoint, an adapter of the bank or several as one, or a base model. Prints the job's
    id, or with --wait what was measured.
    """
    with session(ctx) as store:
        job = store.evaluations.create(**_one_or_several(given(fields)))
        started(store, "evaluations", job, wait=wait, as_json=as_json, show=print_measured)


@evaluations.command("show")
def show_evaluation(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
    """Print what was measured. Before that, everything known about the job."""
    with session(ctx) as store:
        print_outcome(store.evaluations.get(reference), print_measured, as_json=as_json)


def _one_or_several(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with an adapter that was named alone as the one."""
    several = fields.get("adapters", [])
    if len(several) != 1:
        return fields
    return {name: value for name, value in fields.items() if name != "adapters"} | {"adapter": several[0]}


def print_measured(result: EvaluationResult) -> None:
    """Print a row for each model, task and subtask."""
    print_table(result.rows, MEASURED)


def _interval(interval: Interval | None) -> str | None:
    return None if interval is None else f"{interval.low:.4g} to {interval.high:.4g}"
