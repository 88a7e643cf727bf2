"""Rows out of a Parquet file, as the JSON they would be in a JSONL file.

A column cannot tell a missing field from a null one, so nulls of structs and rows are left out: the rows of a JSONL
file come back from Parquet with the same meaning, and make the same dataset.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from datastore.errors import InvalidDataset
from datastore.json_rows import ROW_LIMIT, TOO_LONG, RawRow, Unreadable
from datastore.strict_json import NotJson, compact

BATCH = 32  # rows decoded at a time: 1 µs more per row than 256, and an eighth of the memory for long rows
PAGES = 1 << 20  # bytes read ahead per column; with pyarrow's default a row group is held whole, 100 MB where this is 9


def rows(path: Path) -> Iterator[RawRow | Unreadable]:
    """Every row in order, by position from 1; raises InvalidDataset where the file cannot be opened."""
    try:
        file = pq.ParquetFile(path, buffer_size=PAGES, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise InvalidDataset(f"the Parquet file cannot be opened ({error}): was it cut off?") from error
    with file:
        _check_columns(file.schema_arrow.names)
        position = 1
        try:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    yield _row(position, row)
                    position += 1
        except (pa.ArrowException, OSError) as error:
            yield Unreadable(position, f"the Parquet data are damaged from here on ({error})")


def _check_columns(names: list[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InvalidDataset(f"the Parquet file has several columns called {min(twice)!r}: rename them")


def _row(position: int, row: dict[str, Any]) -> RawRow | Unreadable:
    try:
        text = compact(_json(row))
    except (NotJson, ValueError) as error:
        return Unreadable(position, str(error))
    return RawRow(position, text) if len(text) <= ROW_LIMIT else Unreadable(position, TOO_LONG)


def _json(value: Any) -> Any:
    """A Parquet value as JSON: a null field is a missing one, since columns have no other way to say so."""
    if isinstance(value, dict):
        converted = {name: _json(item) for name, item in value.items()}
        return {name: item for name, item in converted.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dt.timedelta | Decimal | UUID):
        return str(value)
    return value


def _number(value: float) -> float | None:
    """NaN is how data frames write a missing number."""
    if math.isinf(value):
        raise ValueError("an infinite number, which JSON cannot hold")
    return None if math.isnan(value) else value


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError("a column holds bytes that are no text: leave it out of the file") from error
