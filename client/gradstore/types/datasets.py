"""Datasets, what became of an upload, and their rows as they are looked at."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from gradstore.types.base import Body


class DatasetSource(Body):
    """A file that was uploaded, kept byte for byte under its own hash."""

    sha256: str
    filename: str
    format: Literal["jsonl", "json", "parquet"]
    bytes: int
    rows: int
    """Rows taken from the file."""
    skipped: int
    """Rows left out by `on_error=skip`."""
    created_at: datetime


class RowProblem(Body):
    """A row that could not be taken, or was taken with a remark."""

    line: int
    """Line of a JSONL file, or position in a JSON array or Parquet file, counted from 1."""
    detail: str


class UploadReport(Body):
    """What became of the rows of an upload."""

    rows: int
    skipped: int
    problems: list[RowProblem]
    """The first rows that were left out, with reasons."""
    notes: list[RowProblem]
    """Remarks on rows that were taken: repeated ids, missing ids and the like."""
    total_notes: int


class Dataset(Body):
    """A pool of examples to select from, named by the hash of its canonical rows."""

    id: str
    name: str | None
    rows: int
    bytes: int
    origins: dict[str, int]
    """Rows per origin: the `dataset` field of the rows, else the file's name."""
    prefix: str | None
    """The longest stored dataset whose rows begin this one: its features are reused."""
    sources: list[DatasetSource]
    created_at: datetime


class UploadedDataset(Dataset):
    """A dataset and what became of the upload."""

    created: bool
    """False where the same rows were already stored."""
    report: UploadReport


class Turn(Body):
    """A turn of a conversation, or one of the two parts of a row that has a prompt and a completion."""

    role: Literal["system", "user", "assistant", "tool", "prompt", "completion"]
    prefix: str
    """Unsupervised beginning of an assistant's turn; mostly empty."""
    content: str


class ExampleRow(Body):
    """A row of a dataset as it is trained on."""

    row: int
    """Position in the dataset, from 0."""
    id: str | None
    """The example's own id, as uploaded."""
    origin: str
    turns: list[Turn]


class ExampleRows(Body):
    """A page of a dataset's rows, in their order."""

    dataset: str
    data: list[ExampleRow]
    has_more: bool
    next: int | None
    """`after` of the next page; null at the end. A search looks through a part of the rows at once, so a page may hold
    less than `limit`, even nothing, and go on here."""


class OriginLengths(Body):
    """How long the rows of one origin are, in bytes."""

    rows: int
    shortest: int
    median: float
    longest: int
    counts: list[int]
    """Rows between two `edges`, the lower one included."""


class Lengths(Body):
    """How long a dataset's rows are: bytes of the JSON line that each is kept as."""

    dataset: str
    edges: list[int]
    """Borders of the bins in bytes, one more than there are bins; about equal in ratio."""
    origins: dict[str, OriginLengths]
    """By origin, the most frequent first."""
