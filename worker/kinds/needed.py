"""Jobs that another job needs: done here, by whoever needs them, unless others are at them.

A worker that merely waited would be one worker less, and alone it would wait for ever: so it takes their shards itself,
each under its own lease, and waits only for those that others are at. Should these have died, it puts their shards
back, as every worker's loop does.
"""

from __future__ import annotations

from gradstore.types import FINISHED, AnyJob, JobKind

from datastore.errors import Conflict
from worker.context import Context
from worker.heartbeat import Heartbeat

LOOK_INTERVAL = 0.2
"""Seconds between two looks at shards that others are at."""


def finished(job: AnyJob, context: Context, heartbeat: Heartbeat, *, kind: JobKind) -> None:
    """Have a job of a kind done. Raises `Conflict` where it has failed or was cancelled, and `Stopped`."""
    from worker.jobs import run, tend  # noqa: PLC0415 - which imports this

    seen = tend(context)
    while job.status not in FINISHED:
        heartbeat.check()
        shard = context.jobs.claim(context.owner, kinds=[kind], job=job.id)
        if shard is not None:
            run(shard, context)
        elif not context.leaving.wait(LOOK_INTERVAL):
            seen = tend(context, seen)
        job = context.jobs.get(job.id)
    if job.status != "succeeded":
        why = "was cancelled" if job.error is None else f"has failed: {job.error.detail}"
        raise Conflict(f"{job.id}, which this job needs, {why}; POST /jobs/{job.id}/retry, and then retry this one")
