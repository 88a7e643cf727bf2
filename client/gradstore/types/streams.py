"""Streams: named rows of numbers of a dataset or a task, joined by the rows' own ids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gradstore.types.base import Body, Name, Named, Precision, Quantisation, Request, TemplateName
from gradstore.types.datasets import RowProblem
from gradstore.types.jobs import Job

StreamKind = Literal["gradients", "hidden", "routing", "upload"]
MAX_LAYERS = 1000
"""More than any model has: a model's own number is known when it is read."""


class StreamRequest(Request):
    """Numbers for rows of a dataset, or for validation rows of a task: sent as a file, of this store, or computed."""

    kind: StreamKind = "upload"
    """`upload`: the file that is sent has them. `gradients`: a feature set of this store. `hidden`: what the attention
    of some layers puts out, pooled. `routing`: how a mixture-of-experts model spreads a row's tokens over its experts.
    """
    dataset: Named | None = None
    task: Named | None = None
    gradients: Named | None = None
    """`kind=gradients`: the job (of gradients, an import or a conversion) whose features are meant, by id or name."""
    feature_set: str | None = Field(None, max_length=255)
    """`kind=gradients`: which of the job's feature sets, where it has several."""
    checkpoint: Named | None = None
    """`hidden` and `routing`: the checkpoint whose model reads the rows."""
    layers: list[Annotated[int, Field(ge=0, lt=MAX_LAYERS)]] | None = Field(None, min_length=1, max_length=MAX_LAYERS)
    """`hidden`: which layers, from 0; by default five, evenly spaced: 3, 7, 11, 15 and 19 of 24."""
    template: TemplateName | None = None
    max_length: int | None = Field(None, ge=2, le=1 << 20)
    """Tokens of a row; the rest is cut off."""
    precision: Precision | None = None
    quantisation: Quantisation | None = None
    token_budget: int | None = Field(None, ge=1, le=1 << 24)
    """Tokens of a batch, padding included; changes results by rounding only."""
    on_error: Literal["fail", "skip"] = "fail"
    """`upload`: refuse a file with rows that are not finite or whose ids are unknown, or leave these out and say so."""
    name: Name | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StreamRequest:
        own = {"gradients", "feature_set"}
        given = set(self.model_dump(exclude_defaults=True)) - {"kind", "name", "on_error"}
        if self.kind == "gradients":
            if self.gradients is None or given - own:
                raise ValueError("kind=gradients takes gradients, a job, and feature_set where it has several")
            return self
        if given & own:
            raise ValueError(f"{', '.join(sorted(given & own))} goes with kind=gradients")
        if (self.dataset is None) == (self.task is None):
            raise ValueError("name either a dataset or a task")
        if self.kind == "upload" and given - {"dataset", "task"}:
            raise ValueError(f"{', '.join(sorted(given - {'dataset', 'task'}))} goes with kind=hidden or kind=routing")
        if self.kind != "upload" and self.checkpoint is None:
            raise ValueError("name the checkpoint whose model reads the rows")
        if self.layers is not None and self.kind != "hidden":
            raise ValueError("layers go with kind=hidden")
        if self.layers is not None and sorted(set(self.layers)) != self.layers:
            raise ValueError("layers stand in ascending order, each once")
        return self


class AbsentRow(Body):
    """A row that a stream has nothing of."""

    row: int
    """Position in the dataset, or among the task's validation rows, from 0."""
    id: str | None
    reason: str


class StreamResult(Body):
    """What a stream has of the rows."""

    kind: StreamKind
    dataset: str | None
    task: str | None
    rows: int
    """Rows of the dataset, or validation rows of the task."""
    dim: int
    """Numbers of a row."""
    present_rows: int
    """Rows that the stream has."""
    zero_rows: int
    """Of these, rows of zeros alone."""
    absent: list[AbsentRow]
    """The first rows that it has not."""
    total_absent: int
    problems: list[RowProblem]
    """The first rows of an upload that were left out (`on_error=skip`)."""
    total_problems: int
    layers: list[int] | None
    """`hidden` and `routing`: the layers, in the order in which they stand in a row."""
    feature_set: str | None
    """`gradients`: the feature set."""


StreamJob = Job[StreamRequest, StreamResult]
