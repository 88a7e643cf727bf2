"""Comparisons on a worker: a contestant's selection is made, or a model trained on one, measured, and not kept."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from gradstore.types import SelectionRecipe

from datastore.errors import Conflict
from datastore.leases import Claim
from datastore.recipes import Sources
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.kinds.needed import finished
from worker.trainings import measure


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Make a selection, or do a training on one; with the last shard goes what all of them come to."""
    plan, payload = claim.plan, claim.payload
    if "choose" in payload:
        selection, seconds = _choose(plan, payload, context, heartbeat)
        return partial(context.comparisons.finish_selection, claim, selection, seconds)
    if "base" not in payload:
        _choose(plan, payload, context, heartbeat)
    training = context.comparisons.training(plan, payload)
    measure(training, context, heartbeat)
    return partial(context.comparisons.finish_training, claim, training.key)


def _choose(
    plan: dict[str, Any], payload: dict[str, Any], context: Context, heartbeat: Heartbeat
) -> tuple[str, float | None]:
    """A selection, made unless it exists, and the seconds from scores to rows where it was made."""
    recipe = context.comparisons.recipe(plan, payload)
    found = context.answers.find(recipe, limit=0)
    if found is not None:
        return found.id, None
    sources = context.recipes.sources(recipe)
    _score(recipe, sources, context, heartbeat)
    began = time.monotonic()
    scores = context.scoring.known(recipe, sources)
    if scores is None:
        raise Conflict("the scores were deleted as soon as they were computed: retry the job")
    made = context.answers.select(recipe, sources, scores, limit=0)
    return made.id, time.monotonic() - began


def _score(recipe: SelectionRecipe, sources: Sources, context: Context, heartbeat: Heartbeat) -> None:
    """Have a recipe's scores in the cache: this worker does those shards of their job that no other one is at."""
    if context.scoring.known(recipe, sources) is not None:
        return
    finished(context.scoring.start(recipe, sources), context, heartbeat, kind="scoring")
