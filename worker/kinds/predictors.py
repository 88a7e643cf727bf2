"""Influence predictors on a worker: models of scikit-learn, fitted to a sample's scores, predict the whole pool."""

from __future__ import annotations

from functools import partial

from datastore.leases import Claim
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Learn, test and predict; the answer commits the report."""
    result = context.predictors.work(claim, heartbeat.report)
    return partial(context.jobs.succeed, claim, result=result.model_dump(mode="json"))
