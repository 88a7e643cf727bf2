"""Datasets on disk: uploads in, rows out, everything named by its content.

    root/ds_…/            one dataset (dataset_files.py)
    root/sources/<sha256> the uploads, byte for byte
    root/incoming/        uploads that are being read; what a dead process left here is swept away

A dataset's id is a chained hash of its canonical rows, so the same rows in any packaging are the same dataset, and the
id of every prefix is met on the way. docs/datasets.md says what becomes of every awkward file.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal

import numpy as np
from gradstore.types import DatasetSource, ProblemItem, RowProblem, UploadReport
from numpy.typing import NDArray

from datastore import files
from datastore.dataset_files import (
    LINES,
    SOURCES,
    DatasetFolder,
    DatasetWriter,
    RowLabels,
    add_source,
)
from datastore.depot import LOCAL, Depot
from datastore.durable import sync_folder
from datastore.errors import InvalidDataset, NotFound
from datastore.json_rows import RawRow, Unreadable
from datastore.repeats import Repeat, repeats
from datastore.rows import Example
from datastore.shapes import BadRow, example
from datastore.strict_json import NotJson, canonical, compact, parse

__all__ = ["REPORTED", "Datasets", "Ingested", "Origins", "RowLabels", "joined"]

REPORTED = 100  # problems, and remarks, that a report holds; all are counted
LABELS_KEPT = 16  # datasets whose rows' ids and origins are kept in memory: 8 bytes a row and its id's own
DETAIL = 400  # characters of a reason, which may quote the row
ABANDONED = 60.0  # seconds after which an unlocked folder of incoming/ belongs to nobody
NO_DATASETS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Ingested:
    """What became of an upload."""

    id: str
    rows: int
    bytes: int
    """Size of the original rows, one line each."""
    origins: dict[str, int]
    prefix: str | None
    """The longest known dataset with fewer rows that begins this one."""
    source: DatasetSource
    """This upload."""
    sources: list[DatasetSource]
    """The uploads that brought the rows, those of the dataset appended to among them, oldest first."""
    report: UploadReport
    created: bool
    """False where the same rows were stored already."""


@dataclass(frozen=True)
class Origins:
    """The origin of every row of a dataset, as numbers that arrays can be grouped by."""

    names: tuple[str, ...]
    """Of one dataset, the most frequent first."""
    codes: NDArray[np.int32]
    """Number of each row's origin among `names` (n,)."""


def joined(parts: Sequence[Origins]) -> Origins:
    """The origins of the rows of several datasets, one after the other."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    numbers = {name: number for number, name in enumerate(names)}
    codes = [np.array([numbers[name] for name in part.names], np.int32)[part.codes] for part in parts]
    return Origins(names, np.concatenate(codes))


class Datasets:
    """The datasets under one folder. Any number of processes may ingest and read at once; deleting a dataset while the
    same file is being uploaded is for the catalog to prevent, which knows what is in use."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        self._root, self._depot = root, depot
        self._sources, self._incoming = root / "sources", root / "incoming"
        for folder in (self._sources, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        self._labels = lru_cache(maxsize=LABELS_KEPT)(self._read_labels)

    def ingest(
        self,
        upload: BinaryIO,
        *,
        filename: str,
        on_error: Literal["fail", "skip"] = "fail",
        append_to: str | None = None,
        known: Mapping[str, int] = NO_DATASETS,
    ) -> Ingested:
        """Store the rows of a file, behind those of `append_to` where given.

        `known` maps ids of stored datasets to their rows, and is searched for the longest prefix. With
        `on_error="fail"` one bad row refuses the file and nothing is stored; with `"skip"` the good rows are taken.
        Raises InvalidDataset (with up to `REPORTED` lines and reasons), NotFound and TooLarge.
        """
        base = None if append_to is None else self._folder(append_to)
        name = _file_name(filename)
        with self._workplace() as work:
            digest, size = _spool(upload, work / "source")
            packaging = files.sniff(work / "source")
            intake = _Intake(noun="line" if packaging.format == "jsonl" else "row", known=known)
            with DatasetWriter(work / "dataset", file=name, base=base) as writer:
                intake.prefix = append_to
                for raw in files.read(work / "source", packaging):
                    intake.take(raw, writer, file=name, store=on_error == "skip" or not intake.problems.total)
                intake.check(name, refuse=on_error == "fail")
                draft = writer.finish()
            intake.find_repeats(draft, start=0 if base is None else base.manifest.rows)
            source = DatasetSource(
                sha256=digest,
                filename=name,
                format=packaging.format,
                bytes=size,
                rows=intake.rows,
                skipped=intake.problems.total,
                created_at=datetime.now(UTC),
            )
            return self._place(work, draft, source, intake)

    def examples(self, dataset: str, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        """The examples of rows `start` to `stop`, as a slice counts them."""
        folder = self._folder(dataset)
        return folder.examples(range(folder.manifest.rows)[start:stop])

    def examples_at(self, dataset: str, rows: Iterable[int]) -> Iterator[Example]:
        """The examples of any rows, in the order asked; raises IndexError."""
        return self._folder(dataset).examples_at(rows)

    def origins(self, dataset: str) -> Origins:
        """The origin of every row, see `label_columns`."""
        labels = self.label_columns(dataset)
        counts = np.bincount(labels.origin, minlength=len(labels.origins))
        order = np.argsort(-counts, kind="stable")
        numbers = np.empty(len(order), np.int32)
        numbers[order] = np.arange(len(order))
        return Origins(tuple(labels.origins[place] for place in order), numbers[labels.origin])

    def sizes(self, dataset: str) -> NDArray[np.int64]:
        """Bytes of every row as one line, without its end (n,)."""
        sizes: NDArray[np.int64] = np.diff(self._folder(dataset).offsets()) - 1
        return sizes

    def label_columns(self, dataset: str) -> RowLabels:
        """Id and origin of every row, in columns; of the datasets asked for last they are kept in memory."""
        self._folder(dataset)  # a dataset that is gone is not found here either
        return self._labels(dataset)

    def text_keys(self, dataset: str) -> NDArray[np.uint64]:
        """A 64-bit key of every row's text (n,): rows that would be trained on alike have the same (repeats.py)."""
        return np.asarray(self._folder(dataset).keys()[:, 1])

    def example_reader(self, dataset: str) -> AbstractContextManager[Callable[[int], Example]]:
        """Reads examples by row, for callers that want many of them in any order; raises IndexError."""
        return self._folder(dataset).example_reader()

    def lines(self, dataset: str, rows: Iterable[int]) -> Iterator[bytes]:
        """The original rows asked for, in the order asked, each as one line without its end; raises IndexError.

        A JSONL row comes back byte for byte (in UTF-8, where the file was UTF-16); an element of an array and a row
        of Parquet as compact JSON.
        """
        return self._folder(dataset).lines(rows)

    def reader(self, dataset: str) -> AbstractContextManager[Callable[[int], bytes]]:
        """Reads one original row at a time, as `lines` gives it, in any order."""
        return self._folder(dataset).reader()

    def content(self, dataset: str) -> Path:
        """A file of all original rows in order, one line each."""
        return self._folder(dataset).path / LINES

    def source(self, sha256: str) -> Path:
        """An upload, byte for byte."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not self._depot.ensure(self._sources / sha256):
            raise NotFound("source", sha256, collection="/datasets")
        return self._sources / sha256

    def sources(self, dataset: str) -> list[DatasetSource]:
        """The uploads that brought a dataset's rows, oldest first."""
        folder = self._folder(dataset)
        for name in self._later_sources(dataset):
            self._depot.ensure(folder.path / SOURCES / name)
        return folder.sources()

    def look(self, dataset: str) -> None:
        """Raise `NotFound` where a dataset's files are missing."""
        if not self._depot.exists(self._home(dataset)):
            raise NotFound("dataset", dataset, collection="/datasets")

    def delete(self, dataset: str, *, keep_sources: Collection[str]) -> None:
        """Remove a dataset, and its uploads except those that other datasets still name."""
        self.look(dataset)
        home, later = self._home(dataset), self._later_sources(dataset)
        records = [*later, *(Path(name).name for name in self._depot.files(home) if name.startswith(f"{SOURCES}/"))]
        for upload in {Path(name).stem for name in records} - set(keep_sources):
            self._depot.delete(self._sources / upload)
            (self._sources / upload).unlink(missing_ok=True)
        for name in later:
            self._depot.delete(home / SOURCES / name)
        self._depot.delete(home)  # last: interrupted before, all of it is done again
        with self._workplace() as work:
            if home.is_dir():
                home.rename(work / "dataset")
                sync_folder(self._root)

    def _later_sources(self, dataset: str) -> list[str]:
        """The records of uploads of rows that were stored already."""
        return self._depot.names(self._root / dataset / SOURCES, "*.json")

    def _home(self, dataset: str) -> Path:
        """A dataset's place. Raises `NotFound` for what is no id."""
        if not re.fullmatch(r"ds_[0-9a-f]{24}", dataset):
            raise NotFound("dataset", dataset, collection="/datasets")
        return self._root / dataset

    def _folder(self, dataset: str) -> DatasetFolder:
        home = self._home(dataset)
        if not self._depot.ensure(home):
            raise NotFound("dataset", dataset, collection="/datasets")
        try:
            return DatasetFolder(home)
        except FileNotFoundError as error:  # deleted at this moment
            raise NotFound("dataset", dataset, collection="/datasets") from error

    def _place(self, work: Path, draft: DatasetFolder, source: DatasetSource, intake: _Intake) -> Ingested:
        """Give the upload and the dataset their names; where another was faster, or the rows are old, only the upload.

        The upload comes first: a crash in between leaves a file that its next upload finds, never a dataset without.
        """
        self._depot.publish(work / "source", self._sources / source.sha256)
        (work / "source").replace(self._sources / source.sha256)
        sync_folder(self._sources)
        source = add_source(draft.path, source)
        home = self._root / draft.manifest.id
        created = self._depot.keep(draft.path, home)
        if not created:
            source = self._add_source(home, source)
        folder = DatasetFolder(home)
        stored = folder.manifest
        return Ingested(
            id=stored.id,
            rows=stored.rows,
            bytes=stored.bytes,
            origins=stored.origins,
            prefix=intake.prefix,
            source=source,
            sources=self.sources(stored.id),
            report=intake.report(),
            created=created,
        )

    def _add_source(self, home: Path, source: DatasetSource) -> DatasetSource:
        """Record another upload of rows that are stored; raises FileNotFoundError where they are being deleted."""
        if not self._depot.ensure(home):
            raise FileNotFoundError(home)
        source = add_source(home, source)
        record = home / SOURCES / f"{source.sha256}.json"
        self._depot.publish(record, record)
        return source

    def _read_labels(self, dataset: str) -> RowLabels:
        return self._folder(dataset).label_columns()

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """A folder of one's own under `incoming/`, locked while it is used and gone afterwards."""
        self._sweep()
        folder = Path(tempfile.mkdtemp(dir=self._incoming))
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what killed processes left: the system took their locks away."""
        for folder in self._incoming.iterdir():
            try:
                if time.time() - folder.stat().st_mtime < ABANDONED:
                    continue  # perhaps made a moment ago, and about to be locked
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)


@dataclass
class _Findings:
    """The first findings, in the order of the file, and the number of all."""

    first: list[RowProblem] = field(default_factory=list)
    total: int = 0

    def add(self, line: int, detail: str) -> None:
        self.total += 1
        if len(self.first) < REPORTED:
            shown = detail if len(detail) <= DETAIL else detail[: DETAIL - 1] + "…"
            self.first.append(RowProblem(line=line, detail=shown))

    def merge(self, first: list[RowProblem], *, total: int) -> None:
        self.total += total
        self.first = sorted(self.first + first, key=lambda finding: finding.line)[:REPORTED]


class _Intake:
    """What is learnt about an upload while its rows are taken."""

    def __init__(self, *, noun: str, known: Mapping[str, int]) -> None:
        self.prefix: str | None = None
        self.rows = 0
        self.problems, self.notes = _Findings(), _Findings()
        self._noun = noun
        self._known = known
        self._known_rows = frozenset(known.values())
        self._lines = array("q")  # where each row taken stands in the file
        self._without_id, self._first_without_id = 0, 0

    def take(self, raw: RawRow | Unreadable, writer: DatasetWriter, *, file: str, store: bool) -> None:
        """Write one row, or note why it is none."""
        if isinstance(raw, Unreadable):
            self.problems.add(raw.line, raw.detail)
            return
        try:
            row = parse(raw.text)
            found, remarks = example(row, file=file)
            canonical_row = canonical(row)
            line = raw.text if self._noun == "line" else compact(row)  # a line is kept byte for byte
        except (NotJson, BadRow) as error:
            hint = "" if raw.ended or isinstance(error, BadRow) else "; the file ends in this line: was it cut off?"
            self.problems.add(raw.line, f"{error}{hint}")
            return
        self.rows += 1
        if not store:
            return
        self._note_prefix(writer)
        writer.add(line, canonical=canonical_row, example=found)
        self._lines.append(raw.line)
        if found.id is None:
            self._without_id += 1
            self._first_without_id = self._first_without_id or raw.line
        for remark in remarks:
            self.notes.add(raw.line, remark)

    def check(self, file: str, *, refuse: bool) -> None:
        """Raise InvalidDataset where nothing was found, or something bad that may not be left out."""
        bad = self.problems.total
        if not self.rows and not bad:
            raise InvalidDataset(f"{file} holds no rows")
        if self.rows and not (bad and refuse):
            return
        advice = "correct the file" + (f", or send on_error=skip to take the other {self.rows:,}" if self.rows else "")
        count = "1 row" if bad == 1 else f"{bad:,} rows"
        raise InvalidDataset(
            f"{count} of {file} cannot be taken, so nothing was stored: {advice}",
            errors=[ProblemItem(line=problem.line, detail=problem.detail) for problem in self.problems.first],
            total_errors=bad,
        )

    def find_repeats(self, dataset: DatasetFolder, *, start: int) -> None:
        """Note the rows from `start` on that bring an id or a text again."""
        total, first = repeats(dataset.keys(), start=start, limit=REPORTED)
        found = [RowProblem(line=self._lines[one.row - start], detail=self._repeated(one, start)) for one in first]
        if self._without_id:
            total += 1
            detail = f"no id, as in {self._without_id:,} {self._noun}s in all: their positions name them"
            found.append(RowProblem(line=self._first_without_id, detail=detail))
        self.notes.merge(found, total=total)

    def report(self) -> UploadReport:
        """What is told to the one who uploaded."""
        return UploadReport(
            rows=self.rows,
            skipped=self.problems.total,
            problems=self.problems.first,
            notes=self.notes.first,
            total_notes=self.notes.total,
        )

    def _note_prefix(self, writer: DatasetWriter) -> None:
        if writer.rows in self._known_rows and self._known.get(writer.id) == writer.rows:
            self.prefix = writer.id

    def _repeated(self, repeat: Repeat, start: int) -> str:
        if repeat.same_id is not None and repeat.same_text is not None:
            return f"id and text of {self._place(repeat.same_id, start)} again"
        if repeat.same_id is not None:
            return f"the id of {self._place(repeat.same_id, start)} again, with another text"
        return f"the text of {self._place(repeat.same_text or 0, start)} again"

    def _place(self, row: int, start: int) -> str:
        if row < start:
            return f"row {row + 1} of the dataset appended to"
        return f"{self._noun} {self._lines[row - start]}"


def _spool(upload: BinaryIO, path: Path) -> tuple[str, int]:
    """Copy the upload to disk; returns its SHA-256 and size in bytes."""
    digest, size = sha256(), 0
    with path.open("wb") as file:
        while chunk := upload.read(files.CHUNK):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _file_name(filename: str) -> str:
    """The last part of a path of any system, printable and of bearable length."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(mark for mark in name if mark.isprintable())[:255].strip() or "upload"
