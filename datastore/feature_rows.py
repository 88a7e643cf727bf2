"""What is known of the rows of a feature set beside their features: lengths, loss, tokens, and why a row has none.

Features of kind `logodds` have the log-odds of each row, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from gradstore.types import FeatureRow
from numpy.typing import NDArray

from datastore.segments import Rows

_ARRAYS = {"norm": "norms", "raw_norm": "raw_norms", "loss": "losses", "logodds": "logodds", "tokens": "tokens"}
"""Fields of a row, and the arrays of the store that hold them, where the kind of features has them."""
_MEASURED = ("norm", "raw_norm", "loss", "logodds")
"""Fields that a row without a feature does not have."""


def page(view: Rows, start: int, stop: int) -> list[FeatureRow]:
    """Rows `start:stop`, as far as there are any. Raises `Damaged`."""
    part = table(view).slice(min(start, view.rows), stop - start)  # pyarrow knows no number beyond 64 bits
    return [FeatureRow.model_validate(row) for row in part.to_pylist()]


def table(view: Rows) -> pa.Table:
    """All rows as a table: null where a row has no feature, and the reason. Raises `Damaged`."""
    missing = ~view.valid
    columns = {
        name: pa.array(column, mask=missing if name in _MEASURED else None) for name, column in _columns(view).items()
    }
    reasons = view.reasons
    words = pa.array([reasons.get(row) for row in range(view.rows)], pa.string())
    return pa.table({"row": pa.array(np.arange(view.rows)), **columns, "reason": words})


def array(view: Rows) -> NDArray[Any]:
    """All rows as a structured array: NaN where a row has no feature, and the reason's code. Raises `Damaged`."""
    columns = _columns(view) | {"reason": view.column("reason")}
    found = np.empty(view.rows, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        found[name] = np.where(view.valid, column, np.nan) if name in _MEASURED else column
    return found


def _columns(view: Rows) -> dict[str, NDArray[Any]]:
    """The fields of all rows that the kind of features has."""
    return {name: view.column(array) for name, array in _ARRAYS.items() if array in view.columns}
