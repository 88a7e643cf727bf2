"""What estimated subsets say of the groups they are made of: means, a surrogate, and what a search has chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from gradstore.types import EstimatedGroup, EstimatesResult, EstimateTarget, SearchStep, Surrogate

from datastore import gradex
from datastore.array_files import Arrays
from datastore.correlation import spearman
from datastore.estimate_parts import unpacked
from datastore.estimate_worlds import World
from datastore.gradex import UNGROUPED, Groups, Members, Numbers
from datastore.subset_searches import SEARCHES, Found

LEAST_HELD_OUT = 10
"""Subsets of which a part is held out to judge the surrogate."""
OnSubsets = Callable[[int], None]


def result_of(
    plan: dict[str, Any], arrays: Arrays, world: World, groups: Groups, targets: Sequence[EstimateTarget]
) -> EstimatesResult:
    """What estimates come to, from the arrays of all their subsets in order."""
    members = unpacked(arrays, len(plan["names"]))
    values = arrays[array_of(plan)][:, [overall(targets, task) for task in plan["tasks"]]].mean(axis=1)
    searched = plan["search"] in SEARCHES
    coefficients = None if searched else gradex.ridge(values, members)
    scores = arrays["scores"] if searched else preferences(values, members, plan)
    sign = _sign(plan)
    return EstimatesResult(
        checkpoint=plan["checkpoint"],
        targets=list(targets),
        groups=list(_groups(plan, world, values, members, coefficients, scores)),
        subsets=len(members),
        surrogate=None if searched else _surrogate(values, members),
        chosen=np.flatnonzero(arrays["chosen"]).tolist() if searched else None,
        chosen_value=sign * float(arrays["value"][0]) if searched else None,
        trace=list(_trace(arrays, sign)) if searched else [],
        rows=len(world.pool.features),
        missing_rows=int(world.missing.sum()),
        ungrouped_rows=int((groups == UNGROUPED).sum()),
        adapter_length=world.length if plan["relative"] else None,
        seconds=float(arrays["seconds"].sum()),
    )


def search(world: World, plan: dict[str, Any], on_subsets: OnSubsets) -> Arrays:
    """What a search comes to, with all subsets that it has tried."""
    tried: list[Arrays] = []
    places = np.cumsum([target.subtasks + 1 for target in world.targets]) - 1

    def evaluate(members: Members) -> Numbers:
        tried.append(world.estimate(members, plan))
        on_subsets(sum(len(each["members"]) for each in tried))
        values: Numbers = _sign(plan) * tried[-1][array_of(plan)][:, places].mean(axis=1)
        return values

    found: Found = SEARCHES[plan["search"]](len(plan["names"]), evaluate)
    arrays = {name: np.concatenate([each[name] for each in tried]) for name in tried[0]}
    return arrays | {
        "chosen": found.chosen,
        "value": np.array(found.value),
        "scores": found.scores,
        "steps": np.array([(step.group, step.kept) for step in found.trace], np.int64).reshape(-1, 2),
        "values": np.array([step.value for step in found.trace]),
    }


def _trace(arrays: Arrays, sign: int) -> Iterator[SearchStep]:
    for (group, kept), value in zip(arrays["steps"].tolist(), arrays["values"].tolist(), strict=True):
        yield SearchStep(group=group, value=sign * value, kept=bool(kept))


def array_of(plan: dict[str, Any]) -> str:
    """Which array has what groups are compared by."""
    if "exact" in plan:
        return "measured_token_loss" if plan["metric"] == "loss" else "measured_value"
    return "losses" if plan["metric"] == "loss" else "accuracies"


def _sign(plan: dict[str, Any]) -> int:
    """What a value is multiplied with for more to be better."""
    return -1 if plan["metric"] == "loss" else 1


def preferences(values: Numbers, members: Members, plan: dict[str, Any]) -> Numbers:
    """Which groups are preferred (groups,): more is better, NaN of a group that no subset has."""
    means, counts, _ = gradex.ensemble(values, members)
    found = means if plan["search"] == "ensemble" else np.where(counts > 0, gradex.ridge(values, members), np.nan)
    return _sign(plan) * found


def _surrogate(values: Numbers, members: Members) -> Surrogate | None:
    """How well the ridge regression does on the last fifth of the subsets, at most a hundred."""
    if len(values) < LEAST_HELD_OUT:
        return None
    held_out = min(100, len(values) // 5)
    coefficients = gradex.ridge(values[:-held_out], members[:-held_out])
    told, true = members[-held_out:] @ coefficients, values[-held_out:]
    return Surrogate(
        held_out=held_out,
        relative_rss=gradex.relative_rss(told, true),
        spearman=float(spearman(told[:, None], true[:, None])[0]),
    )


def _groups(
    plan: dict[str, Any],
    world: World,
    values: Numbers,
    members: Members,
    coefficients: Numbers | None,
    scores: Numbers,
) -> Iterator[EstimatedGroup]:
    means, counts, errors = gradex.ensemble(values, members)
    for group, (label, rows) in enumerate(zip(plan["names"], world.pool.sizes.tolist(), strict=True)):
        yield EstimatedGroup(
            group=group,
            label=label,
            rows=rows,
            subsets=int(counts[group]),
            mean=number_of(means[group]),
            standard_error=number_of(errors[group]),
            coefficient=None if coefficients is None else float(coefficients[group]),
            score=number_of(scores[group]),
        )


def overall(targets: Sequence[EstimateTarget], task: str) -> int:
    """The place of the estimate for all rows of a task."""
    return next(place for place, target in enumerate(targets) if target.task == task and target.subtask is None)


def number_of(value: float) -> float | None:
    """The number, and null for NaN."""
    return None if np.isnan(value) else float(value)
