"""Annotations: which capabilities the rows of a dataset, or of a task, ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gradstore.types.base import Body, Name, Named, Request
from gradstore.types.datasets import RowProblem
from gradstore.types.jobs import Job

AnnotationSource = Literal["upload", "origin", "labeller"]


class Labeller(Request):
    """A chat model that says which capabilities a row asks for, and how it is asked."""

    model: str = Field(min_length=1, max_length=4096)
    """As the endpoint calls it."""
    url: str | None = Field(None, max_length=4096)
    """Base URL of an OpenAI-compatible API, one of the server's GRADSTORE_LABELLERS; by default the only one."""
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.7, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1, le=1 << 20)
    """Of a reply."""
    calls_per_minute: int = Field(1000, ge=1, le=1_000_000)
    """Requests begun within any 60 seconds, at most."""
    attempts: int = Field(3, ge=1, le=20)
    """Times a row is asked for while the endpoint fails, with a pause in between that doubles."""
    parallel: int = Field(8, ge=1, le=256)
    """Requests that wait for their reply at one time."""


class AnnotationRequest(Request):
    """Label rows of a dataset, or validation rows of a task: by a file, by their origin, or by a chat model."""

    dataset: Named | None = None
    task: Named | None = None
    by: AnnotationSource = "upload"
    """`upload`: the file that is sent says it. `origin`: a row's label is its origin. `labeller`: a chat model is asked
    about each row."""
    taxonomy: Named | None = None
    """By default the thirteen capabilities of CODS; with `by=origin` the origins that the rows have, in alphabetical
    order."""
    on_error: Literal["fail", "skip"] = "fail"
    """Of a file, and of origins that a given taxonomy has not: refuse all, or leave out what cannot be taken and say
    so."""
    labeller: Labeller | None = None
    again: Named | None = None
    """An annotation by a labeller: what it has is kept, and the rows whose replies could not be read are asked for
    again, in the same way."""
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> AnnotationRequest:
        if self.again is not None:
            if self.model_dump(exclude_defaults=True, exclude={"again", "name", "dry_run"}):
                raise ValueError("again asks in the same way as before: leave everything else out")
            return self
        if (self.dataset is None) == (self.task is None):
            raise ValueError("name either a dataset or a task")
        if self.dry_run and self.by == "upload":
            raise ValueError("a file is read when it is sent: dry_run goes with by=origin, by=labeller and again")
        if (self.by == "labeller") != (self.labeller is not None):
            raise ValueError("by=labeller goes with the labeller to ask")
        return self


class AnnotationEstimate(Body):
    """What an annotation would cost (`dry_run=true`)."""

    rows: int
    calls: int
    """Rows that a labeller is asked about, each once while it does not fail; 0 with `by=origin`."""
    reused_rows: int
    """Rows whose labels are kept (`again`)."""
    max_tokens: int
    """Tokens that its replies have together at most."""
    seconds: float
    """What `calls_per_minute` allows: it takes as long at least."""


class AnnotatedCapability(Body):
    """How many rows ask for a capability."""

    name: str
    rows: int


class UnparsedReply(Body):
    """A row that has no labels, because what was replied is no list of letters."""

    row: int
    """Position among the rows, from 0."""
    id: str | None
    reply: str
    """The beginning of the reply, or what went wrong with the request."""


class AnnotationResult(Body):
    """What an annotation has of the rows."""

    by: AnnotationSource
    dataset: str | None
    task: str | None
    taxonomy: str
    """Its id."""
    capabilities: list[AnnotatedCapability]
    """In the order of the taxonomy."""
    rows: int
    labelled_rows: int
    """Rows of which is known what they ask for, be it nothing of the taxonomy."""
    problems: list[RowProblem]
    """The first entries of an upload that were left out (`on_error=skip`)."""
    total_problems: int
    unparsed: list[UnparsedReply]
    """The first rows whose replies could not be read."""
    total_unparsed: int


class AnnotatedRow(Body):
    """A row with its labels."""

    row: int
    """Position among the rows, from 0."""
    id: str | None
    categories: list[str] | None
    """What it asks for; null where nothing is known."""
    reply: str | None
    """A labeller's reply that could not be read."""


class AnnotatedRows(Body):
    """A page of an annotation's rows, in their order."""

    annotation: str
    data: list[AnnotatedRow]
    has_more: bool
    next: int | None
    """`after` of the next page; null at the end."""


AnnotationJob = Job[AnnotationRequest, AnnotationResult]
