"""What trainings that are measured would cost: each takes what a fine-tune like it does, and workers share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradstore.types import Basis, Estimate

from datastore.durations import duration
from datastore.leases import Jobs
from datastore.trainings import MEASURE


@dataclass(frozen=True)
class TrainingsCost:
    """What trainings take that are missing."""

    tokens: int
    """Of all epochs."""
    seconds: float | None
    """Shared by the workers that are at work."""
    basis: Basis | None


def cost_of(jobs: Jobs, of_one: Estimate, *, recipe: dict[str, Any], missing: int) -> TrainingsCost:
    """What `missing` trainings by a recipe take, at the rate of the last ones of its model, else of a fine-tune."""
    tokens = of_one.tokens * recipe["epochs"] * missing
    alone, basis = _measured(jobs, recipe["model"], tokens)
    if alone is None and of_one.seconds is not None:
        alone, basis = of_one.seconds * missing, of_one.basis
    workers = max(1, len(jobs.workers()))
    return TrainingsCost(tokens, None if alone is None else alone / min(workers, max(1, missing)), basis)


def _measured(jobs: Jobs, model: str, tokens: int) -> tuple[float | None, Basis | None]:
    """Seconds of so many tokens, at the rate of the last job that trained this model; None where there is none."""
    for kind in MEASURE:
        found = duration(
            jobs,
            kind=kind,
            units=tokens,
            done=lambda job: job.result["tokens"] if job.result and _model(job.plan) == model else 0.0,
            operations=None,
            precision=None,
            alone=True,
        )
        if found.seconds is not None:
            return found.seconds, found.basis
    return None, None


def _model(plan: dict[str, Any]) -> str | None:
    return (plan["recipe"] or {}).get("model")
