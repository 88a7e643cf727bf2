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

from datastore.errors import InvalidDataset, TooLarge
from datastore.json_rows import ROW_LIMIT, TOO_LONG, RawRow, Unreadable
from datastore.strict_json import TOO_DEEP, NotJson, compact

BATCH = 32  # rows decoded at a time: 1 µs more per row than 256, and an eighth of the memory for long rows
PAGES = 1 << 20  # bytes read ahead per column; with pyarrow's default a row group is held whole, 100 MB where this is 9


def rows(path: Path, *, limit: int) -> Iterator[RawRow | Unreadable]:
    """Every row in order, by position from 1.

    Raises InvalidDataset where the file cannot be opened, TooLarge where it unpacks to more than `limit` bytes.
    """
    try:
        file = pq.ParquetFile(path, buffer_size=PAGES, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise InvalidDataset(f"the Parquet file cannot be opened ({error}): was it cut off?") from error
    with file:
        _check_columns(file.schema_arrow.names)
        position = 1
        try:
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata, limit)):
                for row in _values(batch):
                    yield _row(position, row)
                    position += 1
        except (pa.ArrowException, OSError) as error:
            yield Unreadable(position, f"the Parquet data are damaged from here on ({error})")


def _batch_rows(metadata: pq.FileMetaData, limit: int) -> int:
    """Rows to decode at a time: so few that they fit into `limit` bytes even if each is the longest there can be.

    One value may stand for many rows (Parquet's dictionaries), so a file of some kilobytes could fill the memory.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [group.column(number).total_uncompressed_size for group in groups for number in range(group.num_columns)]
    if sum(sizes) > limit:
        raise TooLarge(
            f"the Parquet file unpacks to {sum(sizes):,} bytes, where {limit:,} are plausible for its size: "
            "send its rows as JSONL"
        )
    return min(BATCH, max(1, limit // max(sizes, default=1)))


def _check_columns(names: list[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InvalidDataset(f"the Parquet file has several columns called {min(twice)!r}: rename them")


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Unreadable]:
    """The rows of a batch as Python values; one that has none is Unreadable, without its position."""
    coarse = pa.schema([field.with_type(_coarse(field.type)) for field in batch.schema])
    if coarse != batch.schema:
        batch = batch.cast(coarse, safe=False)
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:  # text that is not UTF-8, dates beyond 9999 …
        if len(batch) > 1:
            values = [value for number in range(len(batch)) for value in _values(batch.slice(number, 1))]
        else:
            values = [Unreadable(0, f"a value has no form in JSON ({error}): leave its column out of the file")]
    yield from values


def _coarse(kind: pa.DataType) -> pa.DataType:
    """The type with microseconds for nanoseconds, which only pandas' dates have, written otherwise than Python's."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_coarse(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_coarse(kind.value_type)))
    return kind


def _row(position: int, row: dict[str, Any] | Unreadable) -> RawRow | Unreadable:
    if isinstance(row, Unreadable):
        return Unreadable(position, row.detail)
    try:
        text = compact(_json(row))
    except (NotJson, ValueError) as error:
        return Unreadable(position, str(error))
    except RecursionError:
        return Unreadable(position, TOO_DEEP)
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
