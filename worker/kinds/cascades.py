"""Cascades on a worker: the gradients that a stage needs are computed here too, unless others compute them."""

from __future__ import annotations

from functools import partial

from gradstore.types import GradientsRequest

from datastore.leases import Claim
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.kinds.needed import finished


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Go through the stages; the answer commits what they came to."""
    compute = partial(_computed, context, heartbeat)
    result = context.cascades.work(claim, compute, heartbeat.report)
    return partial(context.jobs.succeed, claim, result=result.model_dump(mode="json"))


def _computed(context: Context, heartbeat: Heartbeat, request: GradientsRequest) -> str:
    """Have a gradients job done, and return its id. Raises `Conflict` where it has failed or was cancelled."""
    job, _ = context.features.start(request)
    finished(job, context, heartbeat, kind="gradients")
    return job.id
