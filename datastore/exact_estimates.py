"""Estimates with `mode=exact`: what a pass of the model at θ* + Δ gives, beside what the first order says of it.

A shard is one subset, and the first shard measures θ* itself too. What is measured of each row becomes numbers for
each subtask and for all rows of a task here; the passes are a worker's (worker/exact_estimates.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gradstore.types import EstimatesRequest, FeatureSet, MeasuredEstimate

from datastore import gradex
from datastore.array_files import Arrays
from datastore.gradex import Numbers, TargetRows
from datastore.leases import NewShard

MEASURES = ("loss", "accuracy", "token_loss", "value")
"""The fields of a measurement, each of which is an array of a shard."""
AT_CHECKPOINT = "at_checkpoint"
"""What a shard that measures θ* itself says in its payload, and what the names of the arrays begin with."""
SETTINGS = (
    "projection", "dim", "seed", "projection_version", "template", "max_length", "precision", "quantisation",
    "logodds_form",
)  # fmt: skip
"""What of the features a worker must know to take their projection back, and to measure what they are of."""


@dataclass(frozen=True)
class MeasuredRows:
    """What the model has done on the rows of a task that have a feature: (rows,) each, NaN where there is none."""

    log_odds: Numbers
    token_losses: Numbers
    """Mean cross-entropy of each row's tokens."""
    values: Numbers
    """The task's metric."""


def settings(request: EstimatesRequest, features: FeatureSet) -> dict[str, Any]:
    """What a plan has of a request with `mode=exact`."""
    found = {name: getattr(features, name) for name in SETTINGS}
    return found | {"max_new_tokens": request.max_new_tokens, "keep_adapters": request.keep_adapters}


def one_by_one(shards: Sequence[NewShard]) -> Iterator[NewShard]:
    """A shard for each subset, since a subset takes as long as a thousand that are not measured."""
    first = True
    for shard in shards:
        for payload in _each(shard.payload):
            yield NewShard({**payload, AT_CHECKPOINT: first}, units=1)
            first = False


def _each(payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "draw" in payload:
        for number in range(*payload["draw"]):
            yield {**payload, "draw": [number, number + 1]}
    else:
        for subset in payload["subsets"]:
            yield {**payload, "subsets": [subset]}


def arrays_of(targets: Sequence[TargetRows], rows: Sequence[MeasuredRows], *, at_checkpoint: bool = False) -> Arrays:
    """What was measured of the tasks' rows as arrays (1, targets), by subtask and of all rows of each task."""
    parts = [_means(target, measured) for target, measured in zip(targets, rows, strict=True)]
    prefix = f"{AT_CHECKPOINT}_" if at_checkpoint else ""
    columns = (np.concatenate(part)[None] for part in zip(*parts, strict=True))
    return {f"{prefix}measured_{name}": column for name, column in zip(MEASURES, columns, strict=True)}


def _means(target: TargetRows, rows: MeasuredRows) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    losses, accuracies = gradex.measured(target, rows.log_odds)
    return losses, accuracies, gradex.means(target, rows.token_losses), gradex.means(target, rows.values)


def measurements(arrays: Arrays, subset: int, *, at_checkpoint: bool = False) -> Iterator[MeasuredEstimate | None]:
    """What was measured for each target with a subset, or at the checkpoint; None for ever where nothing was."""
    prefix = f"{AT_CHECKPOINT}_" if at_checkpoint else ""
    columns = [arrays.get(f"{prefix}measured_{name}") for name in MEASURES]
    if columns[0] is None:
        while True:
            yield None
    rows = [column[subset].tolist() for column in columns if column is not None]
    for values in zip(*rows, strict=True):
        numbers = (None if np.isnan(value) else value for value in values)
        yield MeasuredEstimate(**dict(zip(MEASURES, numbers, strict=True)))
