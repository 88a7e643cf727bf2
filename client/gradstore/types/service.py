"""The service itself: its workers, its health, and what its store holds."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from gradstore.types.base import Body, Precision


class Worker(Body):
    """A worker seen lately."""

    id: str
    device: str
    job: str | None
    seen_at: datetime
    flops: dict[Precision, float] = Field({})
    """Operations a second (FLOP/s) of a matrix product, by precision, measured when the worker started."""


class Health(Body):
    """Whether the service can work."""

    status: Literal["ok", "degraded"]
    version: str
    catalog: bool
    dispatch: bool
    workers: list[Worker]
    free_bytes: int


class Usage(Body):
    """What the store holds, and the disk that it takes."""

    counts: dict[str, int]
    """How many there are of each noun: datasets, tasks, checkpoints, runs, gradients, selections, …"""
    bytes: dict[str, int]
    """Bytes on the server's disk by part: datasets (with the uploads), tasks, checkpoints, features,
    features-cache (read from a bucket), scores, selections, ngrams (of tasks, for finding contamination), indexes,
    questions (of attributions), trainings (of validations), imports (features that wait for theirs), work (unfinished
    fine-tunes), and other (a SQLite catalog, uploads at work)."""
    free_bytes: int
    """Bytes free where the store lies."""
