"""Rows as tables: pandas and datasets are optional, and asked for only here.

Rows are what the client returns or iterates over (selected rows, scores, jobs, evaluation rows), plain mappings, or
lines of JSON as `selections.lines` and `datasets.lines` give them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from gradstore.errors import MissingExtra

if TYPE_CHECKING:
    import datasets
    import pandas as pd

Row = BaseModel | Mapping[str, Any] | bytes | str


def to_pandas(rows: Iterable[Row]) -> pd.DataFrame:
    """One row each, one column per field; nested values stay Python objects. Needs gradstore[pandas]."""
    try:
        import pandas as pd  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingExtra("pandas", extra="pandas") from error
    return pd.DataFrame.from_records([_record(row) for row in rows])


def to_datasets(rows: Iterable[Row]) -> datasets.Dataset:
    """Make a datasets.Dataset of the rows; a field must have one type in all of them. Needs gradstore[datasets]."""
    try:
        import datasets  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingExtra("datasets", extra="datasets") from error
    return datasets.Dataset.from_list([_record(row) for row in rows])


def _record(row: Row) -> dict[str, Any]:
    if isinstance(row, BaseModel):
        return row.model_dump()
    return dict(json.loads(row) if isinstance(row, bytes | str) else row)
