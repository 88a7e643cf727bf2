"""What adapters make of the shots of a task: a loss and a value for each shot, kept under all that they depend on.

That is the adapter, the shots themselves, the chat format, the lengths and the precision, and not the choice that
asked: another one over the same shots, with other numbers of candidates or another similarity, finds them again, also
when the first is deleted. They go with their adapter (datastore/garbage.py).

    losses   (shots,) float64: mean cross-entropy per token of the answer; NaN where truncation leaves nothing of it
    values   (shots,) float64: the task's metric; NaN where there is no prompt
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore.array_files import Arrays
from datastore.identity import content_id
from datastore.schema import JobRow

SCORES_VERSION = 1
"""Counted up when the same adapter would be scored otherwise, so that old scores are not found again."""
_DEPENDS_ON = ("model", "revision", "shots_sha256", "template", "max_length", "max_new_tokens", "precision")


def content(plan: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """All that the scores of an adapter (id) depend on: the id is a hash of its tensors, scale and base model."""
    return {"version": SCORES_VERSION, "adapter": adapter, **{name: plan[name] for name in _DEPENDS_ON}}


def key(plan: Mapping[str, Any], adapter: str) -> str:
    """The name of the scores of an adapter (id), which begins with that of the adapter."""
    return content_id(adapter, content(plan, adapter))


def adapter_of(key: str) -> str:
    """The adapter (id) whose scores have this name.

    >>> adapter_of("ad_00ff_a0a0")
    'ad_00ff'
    """
    return key.rpartition("_")[0]


def arrays(losses: Sequence[float | None], values: Sequence[float | None]) -> Arrays:
    """Scores as they are kept; None is where a shot has none."""
    return {"losses": _numbers(losses), "values": _numbers(values)}


def perplexities(scores: Arrays) -> NDArray[np.float64]:
    """The perplexity of each shot (shots,): infinite where the loss is not finite, NaN where there is no loss."""
    with np.errstate(over="ignore"):
        found: NDArray[np.float64] = np.exp(scores["losses"])
    return found


def recorded(session: Session) -> set[str]:
    """The names of the scores that finished choices have."""
    plans = session.scalars(select(JobRow.plan).where(JobRow.kind == "adapter-choice", JobRow.status == "succeeded"))
    return {key(plan, adapter) for plan in plans for adapter in plan["adapters"]}


def _numbers(given: Sequence[float | None]) -> NDArray[np.float64]:
    """NaN where there is no number; one that is not finite is infinite."""
    return np.array([np.nan if one is None else one if math.isfinite(one) else math.inf for one in given], np.float64)
