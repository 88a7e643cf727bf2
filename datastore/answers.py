"""Answers of /select and /scores: scores turned into rows with their origins, and kept under the recipe's hash.

A selection's rows are one Parquet file, written once: any page of them, and any line, is read back without scoring.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gradstore.types import ScoredRow, SelectedRow, Selection, SelectionRecipe

from datastore.catalog import Catalog
from datastore.datasets import Datasets, Origins, RowLabel, joined
from datastore.errors import NotFound
from datastore.identity import content_id
from datastore.influence import NO_SUBTASK, Mask, TaskScores
from datastore.recipes import Sources
from datastore.rows import Example
from datastore.schema import SelectionRow
from datastore.scoring import Scoring
from datastore.selection import CombinedScores, combine, left_out, locate, make_up, top
from datastore.shapes import example
from datastore.strict_json import parse

BATCH = 1024  # rows of a selection read at a time

_SCHEMA = pa.schema(
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


@dataclass(frozen=True)
class Pool:
    """The rows of one or several datasets, one after the other."""

    datasets: Sequence[str]
    labels: Sequence[Sequence[RowLabel]]

    @property
    def sizes(self) -> list[int]:
        """Rows of each dataset."""
        return [len(labels) for labels in self.labels]

    @property
    def origins(self) -> list[str]:
        """Origin of every row."""
        return [label.origin for labels in self.labels for label in labels]


@dataclass(frozen=True)
class Answers:
    """Selections and score vectors."""

    catalog: Catalog
    datasets: Datasets
    scoring: Scoring
    root: Path

    def find(self, recipe: SelectionRecipe, *, limit: int, after: int = 0) -> Selection | None:
        """The selection that this recipe has given before; None where there is none."""
        try:
            return self.read(selection_id(recipe), limit=limit, after=after)
        except NotFound:
            return None

    def read(self, reference: str, *, limit: int, after: int = 0) -> Selection:
        """A selection and a page of its rows, from rank `after` + 1 on. Raises `NotFound`."""
        return self._answer(self.catalog.selection(reference), limit=limit, after=after)

    def page(self, *, limit: int, after: str | None) -> tuple[list[Selection], bool]:
        """A page of selections, without their rows."""
        rows, has_more = self.catalog.selections(limit=limit, after=after)
        return [self._answer(row, limit=0, after=0) for row in rows], has_more

    def select(
        self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores], *, limit: int, after: int = 0
    ) -> Selection:
        """Choose rows by their scores and record the selection. Raises `Conflict` where no row can be chosen."""
        pool = self._pool(recipe)
        combined = combine(scores, recipe.combine)
        excluded = self._excluded(recipe)
        chosen = top(combined.score, combined.valid, pct=recipe.pct, k=recipe.k, excluded=excluded)
        names = self._subtask_names(recipe, sources)
        table = _table(pool, chosen, combined, names)
        origins = pool.origins
        summary = {
            "count": len(chosen),
            "pool": len(combined.valid) if excluded is None else int((~excluded).sum()),
            "left_out": left_out(self.scoring.reasons(sources), excluded),
            "origins": make_up(origins, chosen.tolist()),
            "pool_origins": make_up(origins),
        }
        id = selection_id(recipe)
        _write_table(self._path(id), table)
        row = self.catalog.add_selection(id=id, recipe=recipe.model_dump(mode="json"), summary=summary)
        return self._answer(row, limit=limit, after=after)

    def scored(
        self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores], *, start: int, stop: int
    ) -> list[ScoredRow]:
        """Rows `start:stop` of the score vector, in the order of the pool."""
        combined = combine(scores, recipe.combine)
        rows = np.arange(start, min(stop, len(combined.score)))
        table = _table(self._pool(recipe), rows, combined, self._subtask_names(recipe, sources))
        found = []
        for row, valid in zip(table.to_pylist(), combined.valid[rows].tolist(), strict=True):
            missing = {} if valid else {"score": None, "task": None, "subtask": None}
            found.append(ScoredRow.model_validate(row | missing))
        return found

    def score_table(self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores]) -> pa.Table:
        """The whole score vector as a table, a null score where a row has no feature."""
        combined = combine(scores, recipe.combine)
        rows = np.arange(len(combined.score))
        names = self._subtask_names(recipe, sources)
        table = _table(self._pool(recipe), rows, combined, names).drop_columns(["rank"])
        masked = pa.array(combined.score, mask=~combined.valid)
        return table.set_column(table.schema.get_field_index("score"), "score", masked)

    def chosen(self, selection: str) -> pa.Table:
        """All rows of a selection as a table, best first. Raises `NotFound`."""
        return pq.read_table(self._path(self.catalog.selection(selection).id), memory_map=True)

    def origins(self, recipe: SelectionRecipe) -> Origins:
        """The origin of every row of a recipe's pool."""
        return joined([self.datasets.origins(dataset) for dataset in recipe.datasets])

    def rows(self, selection: str) -> Iterator[SelectedRow]:
        """All rows of a selection, best first."""
        for batch in pq.ParquetFile(self._path(self.catalog.selection(selection).id)).iter_batches(BATCH):
            for row in batch.to_pylist():
                yield SelectedRow.model_validate(row)

    def lines(self, selection: str) -> Iterator[bytes]:
        """The original rows of a selection, best first, each as one line without its end."""
        return (line for _, line in self.rows_and_lines(selection))

    def rows_and_lines(self, selection: str) -> Iterator[tuple[SelectedRow, bytes]]:
        """All rows of a selection, best first, each with its original line, without its end."""
        with ExitStack() as stack:
            readers: dict[str, Callable[[int], bytes]] = {}
            for row in self.rows(selection):
                if row.dataset not in readers:
                    readers[row.dataset] = stack.enter_context(self.datasets.reader(row.dataset))
                yield row, readers[row.dataset](row.row)

    def rows_and_examples(self, selection: str) -> Iterator[tuple[SelectedRow, Example]]:
        """All rows of a selection, best first, each with the example that it is."""
        for row, line in self.rows_and_lines(selection):
            yield row, example(parse(line), file=row.origin)[0]

    def table(self, selection: str) -> Path:
        """The Parquet file of a selection's rows: their places and scores."""
        return self._path(self.catalog.selection(selection).id)

    def remove(self, reference: str) -> str:
        """Delete a selection and return its id. Raises `NotFound`, `InUse`."""
        return self.catalog.remove(
            SelectionRow, reference, delete_files=lambda gone: self._path(gone).unlink(missing_ok=True)
        )

    def _answer(self, row: SelectionRow, *, limit: int, after: int) -> Selection:
        data = self._page(row.id, after, limit) if limit else []
        return Selection.model_validate(
            {
                "id": row.id,
                "name": row.name,
                "recipe": row.recipe,
                **row.summary,
                "data": data,
                "has_more": after + len(data) < row.summary["count"],
                "created_at": row.created_at,
            }
        )

    def _page(self, id: str, after: int, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = pq.read_table(self._path(id), memory_map=True).slice(after, limit).to_pylist()
        return found

    def _path(self, id: str) -> Path:
        return self.root / f"{id}.parquet"

    def _pool(self, recipe: SelectionRecipe) -> Pool:
        return Pool(recipe.datasets, [self.datasets.labels(dataset) for dataset in recipe.datasets])

    def _subtask_names(self, recipe: SelectionRecipe, sources: Sources) -> list[tuple[str, tuple[str, ...]]]:
        known = self.scoring.subtasks(sources)
        return [(task, known[task]) for task in recipe.tasks]

    def _excluded(self, recipe: SelectionRecipe) -> Mask | None:
        """Rows of the pool whose text is that of an example to leave out (n,); None where nothing is left out."""
        if not recipe.exclude:
            return None
        unwanted = {key for reference in recipe.exclude for key in self._texts(reference)}
        keys = (key for dataset in recipe.datasets for key in self._texts(dataset))
        return np.fromiter((key in unwanted for key in keys), bool)

    def _texts(self, reference: str) -> Iterator[bytes]:
        if not reference.startswith("sel_"):
            yield from map(_text_key, self.datasets.examples(reference))
            return
        for row in self.rows(reference):
            yield from map(_text_key, self.datasets.examples(row.dataset, row.row, row.row + 1))


def selection_id(recipe: SelectionRecipe) -> str:
    """The id of the selection that a recipe gives."""
    return content_id("sel", recipe.model_dump(mode="json"))


def _text_key(example: Example) -> bytes:
    """Equal for two examples that would be trained on alike, whatever their ids and origins."""
    turns = [(message.role, message.prefix, message.content) for message in example.messages]
    text = json.dumps([turns, example.prompt, example.completion])
    return hashlib.sha256(text.encode()).digest()[:16]


def _table(
    pool: Pool, rows: np.ndarray[Any, Any], scores: CombinedScores, names: Sequence[tuple[str, tuple[str, ...]]]
) -> pa.Table:
    places = locate(rows.tolist(), pool.sizes)
    labels = [pool.labels[dataset][row] for dataset, row in places]
    tasks = scores.task[rows].tolist()
    subtasks = scores.subtask[rows].tolist()
    return pa.table(
        {
            "rank": list(range(1, len(places) + 1)),
            "dataset": [pool.datasets[dataset] for dataset, _ in places],
            "row": [row for _, row in places],
            "id": [label.id for label in labels],
            "origin": [label.origin for label in labels],
            "score": scores.score[rows],
            "task": [names[task][0] for task in tasks],
            "subtask": [
                None if number == NO_SUBTASK else names[task][1][number]
                for task, number in zip(tasks, subtasks, strict=True)
            ],
        },
        schema=_SCHEMA,
    )


def _write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
