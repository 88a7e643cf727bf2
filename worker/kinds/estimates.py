"""Estimates on a worker: arithmetic over stored features; with `mode=exact`, passes of the model beside it."""

from __future__ import annotations

from functools import partial

from datastore.leases import Claim
from worker import exact_estimates
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Estimate a shard's subsets; with the last shard goes what all of them come to."""
    if "exact" in claim.plan:
        key, kept = exact_estimates.work(claim, context, heartbeat)
        return partial(context.estimates.finish, claim, key, kept)
    key = context.estimates.work(claim, heartbeat.report)
    return partial(context.estimates.finish, claim, key)
