"""Jobs, pages and what they have in common."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gradstore.types.base import FINISHED, Basis, Body, JobKind, JobStatus, Name, Request
from gradstore.types.problems import Problem


class Progress(Body):
    """How far a job is."""

    done: int
    total: int
    unit: str
    """What is counted: rows, steps or examples."""
    rate: float | None
    """Units per second over the last minute; null until known."""
    eta_seconds: float | None


RequestT = TypeVar("RequestT", bound=BaseModel)
ResultT = TypeVar("ResultT", bound=BaseModel)


class Job(Body, Generic[RequestT, ResultT]):
    """Work that outlives the request which started it."""

    id: str
    kind: JobKind
    name: str | None
    status: JobStatus
    priority: int = 0
    """Shards of jobs of a higher one are done first."""
    progress: Progress
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: Problem | None
    request: RequestT
    result: ResultT | None

    @property
    def finished(self) -> bool:
        """Whether the job has reached a state that it will not leave by itself."""
        return self.status in FINISHED


class AnyObject(Body):
    """A JSON object whose keys depend on the kind of the job."""

    model_config = ConfigDict(extra="allow")


AnyJob = Job[AnyObject, AnyObject]

ItemT = TypeVar("ItemT", bound=BaseModel)


class Page(Body, Generic[ItemT]):
    """A page of a list: ask for the next one with `after` = the last item's id."""

    data: list[ItemT]
    has_more: bool


class Rename(Request):
    """Give a resource another name; null takes its name away."""

    name: Name | None


class Prioritise(Request):
    """Have a job's shards done before, or after, those of others."""

    priority: int = Field(ge=-10, le=10, strict=True)
    """-10 to 10; jobs start with 0."""


class TrainingsEstimate(Body):
    """What a job that trains models, to measure them, would cost."""

    trainings: int
    reused_trainings: int
    """Trainings that are known to exist: of what is to be scored or selected first, none is."""
    rows: int
    """Rows of one training."""
    tokens: int
    """Tokens of all trainings that are missing, all epochs."""
    seconds: float | None
    """How long these take, shared by the workers that are at work; null where nothing is known of their speed."""
    basis: Basis | None
    """What `seconds` come from: `measured` or `estimated`, as of a fine-tune."""
    memory_bytes: int | None
    """Estimated peak memory of one worker that trains."""


class Estimate(Body):
    """What a job would cost (`dry_run=true`)."""

    rows: int
    tokens: int
    bytes: int
    """Bytes the job would add to the store."""
    free_bytes: int
    """Bytes free where the store lies."""
    seconds: float | None
    """How long it takes; null while no job like it has finished and no worker has been seen, or where the base model's
    weights are no safetensors or cannot be found."""
    basis: Basis | None = None
    """What `seconds` come from: `measured`, the rate of the last finished job of this model; `estimated`, the model's
    operations and the rate at which workers multiply matrices."""
    memory_bytes: int | None
    """Estimated peak memory of one worker; null where the base model's size is not known."""
    reused_rows: int = 0
    """Rows whose features exist already, summed over checkpoints."""
