"""Whose rows are meant: a dataset's, or a task's validation rows; and which row has which id.

What comes from outside is joined by the rows' own ids (`Example.id`), never by their order. Where several rows share an
id, what is said of it is said of each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradstore.types import ProblemItem, RowProblem

from datastore.catalog import Catalog
from datastore.datasets import Datasets
from datastore.errors import InvalidInput
from datastore.rows import Example
from datastore.tasks import Tasks

REPORTED = 100
"""Entries of an upload, and rows, that a result or an error names; all are counted."""


@dataclass(frozen=True)
class Owner:
    """A dataset, or a task with its validation rows."""

    id: str
    rows: int

    @property
    def dataset(self) -> str | None:
        """The dataset's id, where it is one."""
        return self.id if self.id.startswith("ds_") else None

    @property
    def task(self) -> str | None:
        """The task's id, where it is one."""
        return None if self.dataset else self.id


@dataclass(frozen=True)
class Owners:
    """The datasets and tasks of a store."""

    catalog: Catalog
    datasets: Datasets
    tasks: Tasks

    def find(self, *, dataset: str | None, task: str | None) -> Owner:
        """The owner that a request names, by id or name. Raises `NotFound`, and `InvalidInput` where it has no rows."""
        if dataset is not None:
            found = self.catalog.dataset(dataset)
            return Owner(found.id, found.rows)
        target = self.catalog.task(task or "")
        if not target.validation:
            raise InvalidInput(f"the task {target.name} has no validation rows: upload it again with some")
        return Owner(target.id, target.validation)

    def examples(self, owner: str, start: int = 0, stop: int | None = None) -> Iterable[Example]:
        """The examples of rows `start` to `stop` of a dataset or task (id)."""
        if owner.startswith("ds_"):
            return self.datasets.examples(owner, start, stop)
        return [row.example for row in self.tasks.validation(owner)[start:stop]]

    def ids(self, owner: str) -> list[str | None]:
        """The id of every row."""
        if owner.startswith("ds_"):
            found: list[str | None] = self.datasets.label_columns(owner).ids.to_pylist()
            return found
        return [example.id for example in self.examples(owner)]

    def origins(self, owner: str) -> list[str]:
        """The origin of every row."""
        if owner.startswith("ds_"):
            labels = self.datasets.label_columns(owner)
            return [labels.origins[number] for number in labels.origin.tolist()]
        return [example.origin for example in self.examples(owner)]

    def places(self, owner: Owner) -> dict[str, list[int]]:
        """The rows that have an id, by the id. Raises `InvalidInput` where no row has one."""
        found: dict[str, list[int]] = {}
        for row, id in enumerate(self.ids(owner.id)):
            if id is not None:
                found.setdefault(id, []).append(row)
        if not found:
            raise InvalidInput(
                f"the rows of {owner.id} have no ids, and what is sent is joined by them: upload rows with a field id"
            )
        return found


class Problems:
    """What is wrong with the entries of an upload: the first ones in words, and how many there are."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.first: list[RowProblem] = []
        self.total = 0

    def add(self, line: int, detail: str) -> None:
        """Note what is wrong with the entry at a line or place, from 1."""
        self.total += 1
        if len(self.first) < REPORTED:
            self.first.append(RowProblem(line=line, detail=detail))

    def refuse(self) -> None:
        """Raise `InvalidInput` naming the first problems, where there are any."""
        if not self.total:
            return
        count = f"1 {self.noun}" if self.total == 1 else f"{self.total:,} {self.noun}s"
        first = self.first[0]
        raise InvalidInput(
            f"{count} cannot be taken; {first.line}: {first.detail}. Correct the file, or send on_error=skip to leave "
            "them out",
            errors=[ProblemItem(line=each.line, detail=each.detail) for each in self.first],
            total_errors=self.total,
        )


def joined_once(seen: dict[str, int], id: str, line: int) -> str | None:
    """Note that an entry of an upload has an id; what is wrong where an earlier one has it, too."""
    first = seen.setdefault(id, line)
    return None if first == line else f"the id {id!r} stands in {first} already"


def unknown_id(id: str, owner: Owner) -> str:
    """What is wrong with an id that no row has."""
    return f"no row of {owner.id} has the id {id!r}"


def row_problems(stored: Sequence[dict[str, object]]) -> list[RowProblem]:
    """The problems that were recorded with a job."""
    return [RowProblem.model_validate(each) for each in stored]
