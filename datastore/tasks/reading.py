"""What every task reader works with: the examples of a task, and a folder of its files that collects what is wrong.

A reader is an object with a `kind` and a method `read`; a module of `datastore.tasks` that holds one as `READER` is a
built-in task. Files are found by their names wherever they lie in the folder, so a zip of `mmlu/`, a zip of `eval/` and
loose files all do.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from gradstore.types import Metric, ProblemItem

from datastore import files
from datastore.errors import InvalidDataset, InvalidTask, TooLarge
from datastore.json_rows import Unreadable
from datastore.rows import Example, Message
from datastore.strict_json import NotJson, canonical, parse
from datastore.tasks.patterns import OnMultiple

SHOWN = 20  # problems listed; the others are counted
DETAIL = 400  # characters of a problem, which may quote the file
WHOLE = 256 << 20  # bytes of a file that is read whole; the benchmarks' largest has 20 MB
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class TaskExample:
    """An example of a task, and how an answer to it is judged."""

    example: Example
    """The last assistant turn, or the completion, is the right answer."""
    subtask: str
    metric: Metric
    choices: tuple[str, ...] = ()
    """`choice`: the texts that may stand in the place of the answer."""
    answers: tuple[str, ...] = ()
    """Right answers: one of `choices`, or what a generated text is compared with."""
    pattern: str | None = None
    """`exact_match`: the regular expression whose first match (its first group) in a generated text is the answer."""
    on_multiple: OnMultiple = "first"
    """`exact_match`: which of several matches is the answer; `fail`: none of them."""
    rationale: str | None = None
    """The answer with its reasons, the answer first: what an adapter's perplexity is measured on when some are chosen
    for a task. Without one that is the answer itself."""

    @property
    def reasoned(self) -> Example:
        """The example with its rationale in the place of the answer, where it has one."""
        if self.rationale is None:
            return self.example
        if self.example.messages:
            *turns, last = self.example.messages
            return replace(self.example, messages=(*turns, replace(last, content=self.rationale)))
        return replace(self.example, completion=self.rationale)


@dataclass(frozen=True)
class TaskRows:
    """What a reader found, in the order of the files."""

    validation: list[TaskExample]
    """Examples to select for."""
    test: list[TaskExample] = field(default_factory=list)
    """Examples to evaluate on."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about what was read."""


class Reader(Protocol):
    """Reads the files of one kind of task."""

    @property
    def kind(self) -> str:
        """Name under which the task is uploaded."""
        ...

    def read(self, folder: Path) -> TaskRows:
        """Read the task's files from `folder` (or the one file it is); raises InvalidTask."""
        ...


def question(kind: str, number: str, text: str, answer: str, *, prefix: str = "") -> Example:
    """Make the example of one user turn and one assistant turn, whose `prefix` is given to the model."""
    turns = (Message("user", text), Message("assistant", answer, prefix))
    return Example(id=number, origin=kind, messages=turns)


class TaskFolder:
    """The files of one task. Problems are collected, so that one upload shows all of them; `finish` raises them."""

    def __init__(self, folder: Path, *, kind: str) -> None:
        self.kind = kind
        self._folder = folder if folder.is_dir() else folder.parent
        found = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        self.paths = [path for path in found if path.is_file() and not self._hidden(path)]
        self._read: set[Path] = set()
        self._problems: list[ProblemItem] = []
        self._total = 0

    def _hidden(self, path: Path) -> bool:
        parts = path.relative_to(self._folder).parts
        return "__MACOSX" in parts or any(part.startswith(".") for part in parts)

    def name(self, path: Path) -> str:
        """The file's name as the user knows it: its place in the folder."""
        return path.relative_to(self._folder).as_posix()

    def find(self, *patterns: str, but: Iterable[str] = ()) -> list[Path]:
        """Files whose names match one of `patterns` and none of `but`."""
        return [
            path
            for path in self.paths
            if any(fnmatch(path.name, pattern) for pattern in patterns)
            and not any(fnmatch(path.name, pattern) for pattern in but)
        ]

    def find_test(self, *patterns: str, but: Iterable[str] = ()) -> list[Path]:
        """Like `find`; where a folder called `test` holds such files, these alone."""
        found = self.find(*patterns, but=but)
        return [path for path in found if "test" in path.relative_to(self._folder).parts[:-1]] or found

    def require(self, found: list[Path], needed: str) -> list[Path]:
        """Return `found`; raises InvalidTask naming what is `needed` where it is empty."""
        if not found:
            held = ", ".join(self.name(path) for path in self.paths[:8]) + (" …" if len(self.paths) > 8 else "")
            raise InvalidTask(f"a {self.kind} task needs {needed}; the upload holds {held or 'no file'}")
        return found

    def only(self, found: list[Path]) -> Path:
        """Return the one file in `found`; raises InvalidTask where there are several."""
        if len(found) > 1:
            names = ", ".join(self.name(path) for path in found[:5])
            raise InvalidTask(f"which of these is meant? {names}: upload one of them")
        return found[0]

    # Reading --------------------------------------------------------------------------------------------------------

    def text(self, path: Path) -> str:
        """The text of a UTF-8 file with its line ends as they are; empty (with a problem) where it is none."""
        try:
            return self._bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.problem(path, f"byte 0x{error.object[error.start]:02X} at {error.start + 1} is not UTF-8")
            return ""

    def csv(self, path: Path) -> list[tuple[int, list[str]]]:
        """The rows of a CSV file, each with the line it begins on; blank lines are left out."""
        reader = csv.reader(io.StringIO(self.text(path), newline=""), strict=True)
        rows, line = [], 1
        try:
            for row in reader:
                if row:
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            self.problem(path, f"no CSV: {error}", line=line)
        return rows

    def json(self, path: Path) -> Any:
        """The value of a JSON file, or None (with a problem) where it is none."""
        try:
            value = parse(self._bytes(path).removeprefix(b"\xef\xbb\xbf"))
            canonical(value)  # finds lone surrogates, which could not be stored
        except NotJson as error:
            self.problem(path, str(error))
            return None
        return value

    def _bytes(self, path: Path) -> bytes:
        """The content of a file; raises TooLarge beyond `WHOLE`, which a zip of some kilobytes can unpack to."""
        self._read.add(path)
        size = path.stat().st_size
        if size > WHOLE:
            raise TooLarge(f"{self.name(path)} has {size:,} bytes; a {self.kind} file of at most {WHOLE:,} is read")
        return path.read_bytes()

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a JSONL file (or a JSON array, or Parquet, packed or not), each with its line or position."""
        self._read.add(path)
        try:
            for raw in files.read(path, files.sniff(path)):
                if isinstance(raw, Unreadable):
                    self.problem(path, raw.detail, line=raw.line)
                    continue
                row = self._row(path, raw.line, raw.text)
                if row is not None:
                    yield raw.line, row
        except InvalidDataset as error:
            self.problem(path, str(error))

    def _row(self, path: Path, line: int, text: bytes) -> dict[str, Any] | None:
        try:
            row = parse(text)
            canonical(row)
        except NotJson as error:
            self.problem(path, str(error), line=line)
            return None
        if not isinstance(row, dict):
            self.problem(path, "no JSON object", line=line)
            return None
        return row

    def texts(self, path: Path, row: Mapping[str, Any], *names: str, line: int | None = None) -> list[str] | None:
        """The named fields, which must be texts; None (with a problem) where one is not."""
        wrong = [name for name in names if not isinstance(row.get(name), str)]
        if wrong:
            self.problem(path, f"{', '.join(wrong)} must be given as text", line=line)
            return None
        return [row[name] for name in names]

    # Problems and notes ---------------------------------------------------------------------------------------------

    def problem(self, path: Path, detail: str, *, line: int | None = None) -> None:
        """Remember what is wrong with a file, or with the row on a line of it."""
        self._total += 1
        if len(self._problems) < SHOWN:
            shown = detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"
            self._problems.append(ProblemItem(detail=f"{self.name(path)}: {shown}", line=line))

    def finish(self, rows: TaskRows) -> TaskRows:
        """Return `rows` with a note on files that were not read; raises InvalidTask where problems were found."""
        if self._problems:
            first = self._problems[0]
            where = f" (line {first.line})" if first.line else ""
            more = f", and {self._total - 1:,} more" if self._total > 1 else ""
            raise InvalidTask(
                f"the files are not a {self.kind} task as they stand: {first.detail}{where}{more}",
                errors=self._problems,
                total_errors=self._total,
            )
        unread = [self.name(path) for path in self.paths if path not in self._read]
        note = f"not read: {', '.join(unread[:5])}" + (f" and {len(unread) - 5} more files" if len(unread) > 5 else "")
        return TaskRows(rows.validation, rows.test, [*rows.notes, *([note] if unread else [])])
