"""The service itself: its workers, its health, and what its store holds."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from gradstore.types.base import Body, JobKind, Precision


class Memory(Body):
    """The memory that a worker computes in: its GPU's, of which others may use a part, or the machine's."""

    used: int
    """Bytes taken of a GPU, by whomever; of a machine's, those of the worker alone."""
    total: int
    """Bytes that there are."""


class Worker(Body):
    """A worker seen lately."""

    id: str
    host: str | None = None
    device: str
    kinds: list[JobKind] | None = None
    """Kinds of jobs that it does."""
    job: str | None
    """Id of the job that it is at."""
    shard: int | None = None
    """Number of the shard within that job."""
    memory: Memory | None = None
    started_at: datetime | None = None
    seen_at: datetime
    """Its last sign of life; it gives one every five seconds."""
    flops: dict[Precision, float] = Field({})
    """Operations a second (FLOP/s) of a matrix product, by precision, measured when the worker started."""


class Health(Body):
    """A sign of life."""

    status: Literal["ok"]
    version: str


class Check(Body):
    """What is known of one thing that the service needs, or does less without."""

    name: Literal["catalog", "store", "bucket", "disk", "dispatch", "workers"]
    ok: bool
    required: bool
    """Whether the service is unready without it."""
    detail: str
    """What was found, or what is wrong and what to do."""


class Readiness(Body):
    """Whether the service can work."""

    status: Literal["ok", "degraded"]
    """`degraded`: something is missing that requests do not wait for, such as a worker."""
    version: str
    checks: list[Check]
    workers: list[Worker]
    free_bytes: int
    """Bytes free where the store lies."""


class Usage(Body):
    """What the store holds, and the disk that it takes."""

    counts: dict[str, int]
    """How many there are of each noun: datasets, tasks, checkpoints, runs, gradients, selections, …"""
    bytes: dict[str, int]
    """Bytes on the server's disk by part: datasets (with the uploads), tasks, checkpoints, features,
    features-cache (read from a bucket), scores, selections, ngrams (of tasks, for finding contamination), indexes,
    questions (of attributions), trainings (of validations and comparisons), estimates, matrices (rows of streams, and
    labels), imports (features that wait for theirs), work (unfinished fine-tunes), and other (a SQLite catalog, uploads
    at work)."""
    free_bytes: int
    """Bytes free where the store lies."""
