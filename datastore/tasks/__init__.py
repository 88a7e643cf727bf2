"""Target tasks: their files read into examples, and those kept under the hash of their content.

A built-in task is one module of this package with a `READER` (see `datastore.tasks.reading`), found by being there.

    <root>/<task id>/validation.jsonl   one TaskExample per line, ordered by subtask: the order of its feature rows
                     test.jsonl         likewise
                     manifest.json      kind, and the SHA-256 of both files
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradstore.types import Metric, Split, Subtask

from datastore.depot import LOCAL, Depot, evict
from datastore.durable import sweep, unfinished, write_file
from datastore.errors import Damaged, InvalidTask, NotFound
from datastore.identity import DIGITS, content_id
from datastore.rows import Example, Message
from datastore.strict_json import canonical
from datastore.tasks.reading import Reader, TaskExample, TaskRows

__all__ = ["Reader", "StoredTask", "TaskExample", "TaskRows", "Tasks", "lines", "readers"]

FORMAT = 1
_ID = re.compile(rf"task_[0-9a-f]{{{DIGITS}}}")


@dataclass(frozen=True)
class StoredTask:
    """A task as it was stored."""

    id: str
    kind: str
    subtasks: list[Subtask]
    notes: list[str]


def readers() -> dict[str, Reader]:
    """Every built-in task by its kind: the modules of this package that hold a READER."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
    found: list[Reader] = [module.READER for module in modules if hasattr(module, "READER")]
    return {reader.kind: reader for reader in found}


class Tasks:
    """The stored tasks under one folder."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        self._root, self._depot = root, depot

    def store(self, kind: str, folder: Path) -> StoredTask:
        """Read the files of a task and keep its examples; the same examples are the same task.

        `folder` may be a single file. Raises InvalidTask, naming files and lines.
        """
        reader = readers().get(kind)
        if reader is None:
            raise InvalidTask(f"no kind of task is called {kind!r}; there are {', '.join(sorted(readers()))}")
        rows = reader.read(folder)
        validation, test = _ordered(rows.validation), _ordered(rows.test)
        if not validation:
            raise InvalidTask(f"the {kind} files hold no validation row: there is nothing to select for")
        subtasks = _subtasks(validation, test)
        content = {"validation.jsonl": lines(validation), "test.jsonl": lines(test)}
        digests = {name: hashlib.sha256(text).hexdigest() for name, text in content.items()}
        task = content_id("task", {"kind": kind, "files": digests})
        if not self._depot.exists(self._root / task):
            manifest = canonical({"format": FORMAT, "kind": kind, "files": digests})
            with unfinished(self._root / "unfinished", task) as partial:
                for name, text in {**content, "manifest.json": manifest}.items():
                    write_file(partial / name, text)
                self._depot.keep(partial, self._root / task)
        return StoredTask(id=task, kind=kind, subtasks=subtasks, notes=[*_coverage(subtasks), *rows.notes])

    def validation(self, task: str) -> list[TaskExample]:
        """The examples to select for, in the order of the task's feature rows; raises NotFound, Damaged."""
        return self._examples(task, "validation")

    def subtasks(self, task: str) -> tuple[str, ...]:
        """Names of the subtasks of the examples to select for, in order of appearance: scores number them so."""
        return tuple(dict.fromkeys(row.subtask for row in self.validation(task)))

    def test(self, task: str) -> list[TaskExample]:
        """The examples to evaluate on, ordered by subtask; raises NotFound, Damaged."""
        return self._examples(task, "test")

    def look(self, task: str) -> None:
        """Raise `NotFound` where a task's files are missing."""
        if not self._depot.exists(self._root / task):
            raise NotFound("task", task, collection="/tasks")

    def delete(self, task: str) -> None:
        """Remove a task's examples; one that is not there is removed already."""
        if _ID.fullmatch(task):
            self._depot.delete(self._root / task)
            evict(self._root / task)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep(self._root / "unfinished", older_than=older_than)

    def _examples(self, task: str, split: Split) -> list[TaskExample]:
        folder = self._root / task
        if not _ID.fullmatch(task) or not self._depot.ensure(folder):
            raise NotFound("task", task, collection="/tasks")
        name = f"{split}.jsonl"
        try:
            text = (folder / name).read_bytes()
            digest = json.loads((folder / "manifest.json").read_bytes())["files"][name]
        except (OSError, ValueError, KeyError) as error:
            raise Damaged(f"the files of task {task} cannot be read ({error}): upload the task again") from error
        if hashlib.sha256(text).hexdigest() != digest:
            raise Damaged(f"{name} of task {task} has changed since it was stored: delete the task and upload it again")
        return [_task_example(json.loads(line)) for line in text.split(b"\n")[:-1]]


def _ordered(rows: Sequence[TaskExample]) -> list[TaskExample]:
    return sorted(rows, key=lambda row: row.subtask)


def _subtasks(validation: Sequence[TaskExample], test: Sequence[TaskExample]) -> list[Subtask]:
    measured, selecting = _metrics(test), _metrics(validation)
    for name, metric in selecting.items():
        if metric not in ("none", measured.setdefault(name, metric)):
            raise _different(name, metric, measured[name])
    metrics = selecting | measured
    counts = [Counter(row.subtask for row in rows) for rows in (validation, test)]
    return [
        Subtask(name=name, validation=counts[0][name], test=counts[1][name], metric=metric)
        for name, metric in sorted(metrics.items())
    ]


def _metrics(rows: Sequence[TaskExample]) -> dict[str, Metric]:
    """The one metric of each subtask's rows in a split; validation rows are not measured and need none."""
    found: dict[str, Metric] = {}
    for row in rows:
        if found.setdefault(row.subtask, row.metric) != row.metric:
            raise _different(row.subtask, found[row.subtask], row.metric)
    return found


def _different(subtask: str, first: Metric, second: Metric) -> InvalidTask:
    return InvalidTask(f"subtask {subtask!r} has rows with the metrics {first} and {second}: part them")


def _coverage(subtasks: Sequence[Subtask]) -> list[str]:
    """Notes on subtasks without rows to select for, or without rows to evaluate on."""
    if not any(subtask.test for subtask in subtasks):
        return ["no test rows: the task can be selected for, not evaluated on"]
    notes = []
    for split in ("validation", "test"):
        without = [subtask.name for subtask in subtasks if not getattr(subtask, split)]
        if without:
            shown = ", ".join(without[:5]) + (" …" if len(without) > 5 else "")
            covered = len(subtasks) - len(without)
            notes.append(f"{split} rows for {covered} of {len(subtasks)} subtasks, none for {shown}")
    return notes


def lines(rows: Sequence[TaskExample]) -> bytes:
    """Rows as they are stored, a line each."""
    return b"".join(canonical(_stored(row)) + b"\n" for row in rows)


def _stored(row: TaskExample) -> dict[str, Any]:
    """A row's fields; those that rows did not have at first only where they say something: a task's id is its rows'."""
    value = asdict(row)
    if row.on_multiple == "first":
        del value["on_multiple"]
    if row.rationale is None:
        del value["rationale"]
    return value


def _task_example(value: dict[str, Any]) -> TaskExample:
    example = value.pop("example")
    messages = tuple(Message(**message) for message in example.pop("messages"))
    choices, answers = (tuple(value.pop(name)) for name in ("choices", "answers"))
    return TaskExample(example=Example(messages=messages, **example), choices=choices, answers=answers, **value)
