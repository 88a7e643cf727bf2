"""Datasets and what became of an upload."""

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
