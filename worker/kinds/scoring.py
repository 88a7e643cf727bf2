"""A shard of a scoring job, done by a worker: a piece of a pool's scores, multiplied on the worker's device."""

from __future__ import annotations

from functools import partial

from datastore.leases import Claim
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.products import TorchKernel, one_thread_each


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Compute the shard's scores; the answer commits the shard, and says whether it was in time."""
    with one_thread_each():
        context.scoring.work(claim, heartbeat.report, kernel=TorchKernel(context.device))
    return partial(context.jobs.succeed, claim)
