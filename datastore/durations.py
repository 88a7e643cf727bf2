"""How long a job will take: at the rate of the last finished one like it, else at what the workers can compute.

A worker multiplies two matrices when it starts (`worker/speed.py`) and announces the rate. Training, and gradients too,
reach a part of that, `EFFICIENCY`: attention, norms and short rows multiply smaller matrices or none. The part differs
between models and devices, so an estimate from it says minutes, hours or days, and a finished job's rate replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradstore.types import Basis, JobKind, Precision, Worker
from sqlalchemy import select

from datastore.leases import Jobs
from datastore.schema import JobRow

EFFICIENCY = 0.3
"""Part of a worker's matrix rate that its jobs reach."""
LOOKED_AT = 50  # finished jobs, the last ones


@dataclass(frozen=True)
class Duration:
    """Seconds, and what they are made of; None of both while neither a job nor a worker can tell."""

    seconds: float | None
    basis: Basis | None


def duration(
    jobs: Jobs,
    *,
    kind: JobKind,
    units: float,
    done: Callable[[JobRow], float],
    operations: float | None,
    precision: Precision | None,
    alone: bool,
) -> Duration:
    """How long `units` of work take.

    `done` gives the units that a finished job did, 0 for one that tells nothing of this work. `operations` are those of
    all the work, None where the base model's size is not known; `precision` None: each worker's own. `alone`: one
    worker does it all, else they share it.
    """
    rate = _measured(jobs, kind, done)
    if rate is not None:
        return Duration(units / rate, "measured")
    flops = _flops(jobs.known_workers(), precision, alone=alone)
    if operations is None or flops is None:
        return Duration(None, None)
    return Duration(operations / (flops * EFFICIENCY), "estimated")


def own_precision(device: str) -> Precision:
    """What `precision=auto` is on a worker's device."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def _measured(jobs: Jobs, kind: JobKind, done: Callable[[JobRow], float]) -> float | None:
    """Units per second of the last finished job that tells."""
    query = select(JobRow).where(JobRow.kind == kind, JobRow.status == "succeeded")
    with jobs.catalog.reading() as session:
        for job in session.scalars(query.order_by(JobRow.finished_at.desc()).limit(LOOKED_AT)):
            seconds = (job.result or {}).get("seconds", 0)
            units = done(job) if seconds > 0 else 0
            if units > 0:
                return float(units / seconds)
    return None


def _flops(workers: Sequence[Worker], precision: Precision | None, *, alone: bool) -> float | None:
    """Operations a second of the workers together, or of one of them on average."""
    rates = [worker.flops.get(precision or own_precision(worker.device), 0.0) for worker in workers]
    known = [rate for rate in rates if rate > 0]
    if not known:
        return None
    return sum(known) / len(known) if alone else sum(known)
