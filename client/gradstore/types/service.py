"""The service itself: its workers and its health."""

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
