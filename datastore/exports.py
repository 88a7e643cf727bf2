"""Chosen rows as files: JSONL, CSV and Parquet of the original rows, with columns that say why each was chosen.

A row's own fields keep their names and values; what the selection says of it stands beside them in columns that begin
with `selection_`, since `dataset`, `id` and `score` are names that rows have themselves. All formats are written while
they are sent. CSV and Parquet need to know all columns before the first row, so their rows are read twice; memory holds
one group of rows and what is known of the columns, whatever the selection's size. Rows that have more than
`MOST_COLUMNS` different fields between them are refused: every row would have a cell for each, and JSONL has none.

Parquet: a field's type is the one that all its values share, nested ones included. Where they share none (numbers and
texts, an object with more than `MOST_FIELDS` keys), the whole field is its JSON text. A missing field and a null one
are the same there, as they are for every reader of Parquet.
CSV: texts as they are, everything else as JSON. A text that a spreadsheet would read as a formula gets an apostrophe
before it (OWASP, "CSV Injection"), and so does one that is such a text behind apostrophes of its own: taking the first
one away gives the text again. CSV is for people, JSONL and Parquet are for programs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from gradstore.types import ProblemItem, SelectedRow

from datastore.errors import InvalidInput
from datastore.outflow import Outflow
from datastore.strict_json import compact, parse

COLUMNS: Mapping[str, str] = {
    f"selection_{name}": name for name in ("rank", "score", "task", "subtask", "origin", "dataset", "row", "id")
}
"""Columns that an export adds, and the field of `SelectedRow` that each holds."""
_COLUMN_TYPES = {
    "selection_rank": pa.int64(), "selection_score": pa.float32(), "selection_task": pa.string(),
    "selection_subtask": pa.string(), "selection_origin": pa.string(), "selection_dataset": pa.string(),
    "selection_row": pa.int64(), "selection_id": pa.string(),
}  # fmt: skip
MOST_COLUMNS = 1000  # different fields of the rows of a table; ids as keys would make one for each row
MOST_FIELDS = 64  # keys of a nested object that are still columns; a free dictionary has thousands
GROUP_ROWS = 10_000  # rows of a Parquet row group at most
GROUP_BYTES = 16 << 20  # JSON bytes of a row group at most, one row apart
METADATA_KEY = b"gradstore"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the beginning of a formula, after white space that it drops."""
_INT64 = range(-(1 << 63), 1 << 63)
_EXACT = 1 << 53  # integers up to here are floats without loss

ChosenLines = Callable[[], Iterable[tuple[SelectedRow, bytes]]]
"""Gives, each time it is called, all chosen rows and their original lines, best first."""


def jsonl(rows: ChosenLines, *, scores: bool) -> Iterator[bytes]:
    """One row a line; byte for byte as it was uploaded, or, with `scores`, with the columns behind its own fields."""
    for row, line in rows():
        yield (compact(_with_scores(row, line)) if scores else line) + b"\n"


def table_csv(rows: ChosenLines, *, scores: bool) -> Iterator[bytes]:
    """A table with a heading, the columns in front; see the module for what becomes of values that are no texts.

    Raises `InvalidInput` before the first piece where the rows have more than `MOST_COLUMNS` fields.
    """
    columns = dict.fromkeys(COLUMNS) if scores else {}
    names = [*columns, *dict.fromkeys(name for values in _own(rows, columns) for name in values)]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([uncalculated(name) for name in names])
    for row, line in rows():
        values = _with_scores(row, line) if scores else parse(line)
        writer.writerow([_cell(values.get(name)) for name in names])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()


def parquet(rows: ChosenLines, *, scores: bool, metadata: str) -> Iterator[bytes]:
    """A Parquet file; `metadata` is kept under the key `gradstore` of its schema.

    Raises `InvalidInput` before the first piece where the rows have more than `MOST_COLUMNS` fields.
    """
    columns = _COLUMN_TYPES if scores else {}
    kinds = _Kinds()
    for values in _own(rows, columns):
        kinds.add(values)
    schema = pa.schema([*columns.items(), *kinds.types().items()], {METADATA_KEY: metadata.encode()})
    out = Outflow()
    with pq.ParquetWriter(out, schema) as writer:
        for group in _groups(rows, kinds, scores=scores):
            writer.write_table(pa.Table.from_pylist(group, schema))
            yield out.take()
    yield out.take()


def _own(rows: ChosenLines, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """The fields of each row that are none of the columns. Raises `InvalidInput` where they are too many for a table.

    It ends at the first row that makes them so, so what is known of them is bounded, too.
    """
    names: set[str] = set()
    for row, line in rows():
        values = {name: value for name, value in parse(line).items() if name not in columns}
        names.update(values)
        if len(names) > MOST_COLUMNS:
            detail = (
                f"the rows up to rank {row.rank:,} have {len(names):,} different fields, and a table has at most "
                f"{MOST_COLUMNS:,} columns of them: ask for format=jsonl, which has no columns"
            )
            raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="format")])
        yield values


def _with_scores(row: SelectedRow, line: bytes) -> dict[str, Any]:
    """The row's own fields and the columns; those of an export that was uploaded again are replaced."""
    return {**parse(line), **{column: getattr(row, name) for column, name in COLUMNS.items()}}


def _groups(rows: ChosenLines, kinds: _Kinds, *, scores: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows as Parquet takes them, so many at a time that they fit into the memory."""
    group: list[dict[str, Any]] = []
    size = 0
    for row, line in rows():
        if group and (len(group) == GROUP_ROWS or size + len(line) > GROUP_BYTES):
            yield group
            group, size = [], 0
        values = _with_scores(row, line) if scores else parse(line)
        group.append({name: kinds.fitted(name, value) for name, value in values.items()})
        size += len(line)
    yield group


# Cells --------------------------------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return uncalculated(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def uncalculated(text: str) -> str:
    """A text that no spreadsheet calculates, another one for every text.

    >>> uncalculated("=1+1"), uncalculated("two"), uncalculated("'=1+1"), uncalculated("'two'")
    ("'=1+1", 'two', "''=1+1", "'two'")
    """
    bare = text.lstrip("'")
    return f"'{text}" if bare.startswith(_FORMULA) or bare.lstrip().startswith(_FORMULA) else text


# Types --------------------------------------------------------------------------------------------------------------


class _NoType(Exception):
    """The values have no type in common."""


@dataclass
class _Kind:
    """What is known of the values in one place: the set of their kinds, and what is inside them."""

    names: set[str] = field(default_factory=set)
    items: _Kind | None = None
    fields: dict[str, _Kind] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """See one more value."""
        if value is None:
            return
        self.names.add(_kind_name(value))
        if isinstance(value, list):
            self.items = self.items or _Kind()
            for item in value:
                self.items.add(item)
        elif isinstance(value, dict):
            for name, item in value.items():
                if name in self.fields or len(self.fields) <= MOST_FIELDS:  # one more tells that they are too many
                    self.fields.setdefault(name, _Kind()).add(item)

    def type(self) -> pa.DataType:
        """The type that all the values share. Raises `_NoType`."""
        names = self.names
        if not names:
            return pa.string()  # null in every row
        if names <= {"integer", "exact", "number"} and not {"integer", "number"} <= names:
            return pa.float64() if "number" in names else pa.int64()
        if len(names) > 1:
            raise _NoType
        return self._nested() if names & {"list", "object"} else _SIMPLE[next(iter(names))]()

    def _nested(self) -> pa.DataType:
        if "list" in self.names:
            return pa.list_((self.items or _Kind()).type())
        if not 0 < len(self.fields) <= MOST_FIELDS:  # Parquet has no object without a field
            raise _NoType
        return pa.struct([(name, kind.type()) for name, kind in self.fields.items()])


def _kind_name(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "exact" if abs(value) <= _EXACT else "integer" if value in _INT64 else "huge"
    names = {float: "number", str: "text", list: "list", dict: "object"}
    return names[type(value)]


def _no_type() -> pa.DataType:
    raise _NoType


_SIMPLE: Mapping[str, Callable[[], pa.DataType]] = {"bool": pa.bool_, "text": pa.string, "huge": _no_type}


@dataclass
class _Kinds:
    """What is known of each field of the rows."""

    fields: dict[str, _Kind] = field(default_factory=dict)
    _types: dict[str, pa.DataType] | None = None
    _texts: set[str] = field(default_factory=set)

    def add(self, row: Mapping[str, Any]) -> None:
        """See one more row."""
        for name, value in row.items():
            self.fields.setdefault(name, _Kind()).add(value)

    def types(self) -> dict[str, pa.DataType]:
        """The type of each field, in the order in which they were seen first."""
        if self._types is None:
            self._types = {name: self._type(name, kind) for name, kind in self.fields.items()}
        return self._types

    def fitted(self, name: str, value: Any) -> Any:
        """A value as its column takes it."""
        return compact(value).decode() if name in self._texts and value is not None else value

    def _type(self, name: str, kind: _Kind) -> pa.DataType:
        try:
            return kind.type()
        except _NoType:
            self._texts.add(name)
            return pa.string()
