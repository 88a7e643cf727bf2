"""The chosen rows of each selection: one Parquet file, written once, of which any page is read without the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from gradstore.types import SelectedRow

from datastore.depot import LOCAL, Depot
from datastore.durable import replacing, sweep_files
from datastore.errors import Damaged

SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("dataset", pa.string()),
        ("row", pa.int64()),
        ("id", pa.string()),
        ("origin", pa.string()),
        ("score", pa.float32()),
        ("task", pa.string()),
        ("subtask", pa.string()),
    ]
)
GROUP_ROWS = 1024
"""Rows of a group of the file: a page reads those groups that it lies in."""
BATCH = 1024  # rows read at a time


@dataclass(frozen=True)
class SelectionFiles:
    """The files of a folder, by the ids of their selections; reading one that is lost or broken raises `Damaged`."""

    root: Path
    depot: Depot = LOCAL

    def write(self, id: str, table: pa.Table) -> None:
        """Keep the rows of a selection, best first: whole or not at all."""
        with replacing(self._place(id)) as partial:
            with partial.open("wb") as file:
                pq.write_table(table, file, row_group_size=GROUP_ROWS)
                file.flush()
                os.fsync(file.fileno())
            self.depot.publish(partial, self._place(id))

    def page(self, id: str, *, limit: int, after: int) -> list[dict[str, Any]]:
        """At most so many rows, from rank `after` + 1 on."""
        with self._open(id) as file:
            first, last = after // GROUP_ROWS, min(-(-(after + limit) // GROUP_ROWS), file.num_row_groups)
            if first >= last:
                return []
            groups = file.read_row_groups(list(range(first, last)))
        found: list[dict[str, Any]] = groups.slice(after - first * GROUP_ROWS, limit).to_pylist()
        return found

    def rows(self, id: str) -> Iterator[SelectedRow]:
        """All rows, best first."""
        with self._open(id) as file:
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield SelectedRow.model_validate(row)

    def table(self, id: str, *, columns: list[str] | None = None) -> pa.Table:
        """All rows as a table, best first."""
        with self._open(id) as file:
            return file.read(columns=columns)

    def path(self, id: str) -> Path:
        """Where the file lies, if there is one. Raises `BucketUnreachable`."""
        with suppress(Damaged):  # who reads it is told
            self.depot.ensure(self._place(id))
        return self._place(id)

    def remove(self, id: str) -> None:
        """Delete a selection's file."""
        self.depot.delete(self._place(id))
        self._place(id).unlink(missing_ok=True)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep_files(self.root, older_than=older_than)

    def _place(self, id: str) -> Path:
        return self.root / f"{id}.parquet"

    def _open(self, id: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path(id), memory_map=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise Damaged(
                f"the rows of {id} cannot be read ({error}): ask for the selection again, by its recipe or its question"
            ) from error
