"""Validations of estimates on a worker: a model is trained on a subset and measured, and not kept."""

from __future__ import annotations

from functools import partial

from datastore.leases import Claim
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.trainings import measure


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Do one training unless it has been done before; with the last one goes what all of them come to."""
    training = context.estimate_validations.training(claim.plan, claim.payload)
    measure(training, context, heartbeat)
    return partial(context.estimate_validations.finish, claim, training.key)
