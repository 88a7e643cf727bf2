"""The folder of one dataset: what is in it, how it is written once, and how it is read by row.

    dataset.json       Manifest: id, chain digest, rows, bytes, origins, and the file each range of rows came from
    lines.jsonl        the original rows, one line each, in order
    offsets.i64        (rows + 1) int64, little-endian: where each line begins, and where the last one ends
    labels.jsonl       ["id", "origin"] per row
    keys.u64           (rows, 2) uint64, little-endian: keys of id and text (repeats.py)
    sources/<sha256>.json    DatasetSource of every upload these rows came from

Examples are not stored: they are read from the lines each time, which takes about 30 µs per row and keeps the disk at
one copy of the text beside the upload itself.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from gradstore.types import DatasetSource
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from datastore.durable import sync_folder
from datastore.errors import Damaged
from datastore.repeats import keys
from datastore.rows import Example
from datastore.shapes import example

MANIFEST, LINES, OFFSETS, LABELS, KEYS, SOURCES = (
    "dataset.json", "lines.jsonl", "offsets.i64", "labels.jsonl", "keys.u64", "sources",
)  # fmt: skip
EMPTY_CHAIN = sha256(b"gradstore rows 1").digest()
"""Where every chain begins; a change of what rows mean (shapes.py) takes another number, and so other ids."""
LABELS_AT_ONCE = 512  # so few that the garbage collector does not meet them: 65,536 take three times as long
_OFFSET, _KEY_PAIR = struct.Struct("<q"), struct.Struct("<QQ")


@dataclass(frozen=True)
class RowLabels:
    """What the rows of a dataset are called, and where they come from, in columns."""

    ids: pa.Array
    """Each row's own id, as text, or null (n,)."""
    origins: tuple[str, ...]
    """The different origins, in order of appearance."""
    origin: NDArray[np.int32]
    """The number of each row's origin (n,)."""


class Part(BaseModel):
    """A range of rows that one upload brought."""

    model_config = ConfigDict(frozen=True)

    rows: int
    file: str


class Manifest(BaseModel):
    """What a dataset is; written last, so a folder with a manifest is complete."""

    model_config = ConfigDict(frozen=True)

    layout: Literal[1] = 1
    id: str
    digest: str
    """The whole chain digest, from which appending goes on."""
    rows: int
    bytes: int
    """Size of the original rows, a line end after each."""
    origins: dict[str, int]
    parts: tuple[Part, ...]


def chain(digest: bytes, canonical: bytes) -> bytes:
    """The digest of the rows so far and one more."""
    return sha256(digest + canonical).digest()


def dataset_id(digest: bytes) -> str:
    """The name of the rows with this chain digest."""
    return f"ds_{digest.hex()[:24]}"


class DatasetFolder:
    """A stored dataset, read by row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        self._ends = list(accumulate(part.rows for part in self.manifest.parts))
        self._offsets: np.ndarray | None = None
        size = (path / LINES).stat().st_size
        if size != self.manifest.bytes:
            raise Damaged(
                f"the rows of {self.manifest.id} take {size:,} bytes on disk and should take {self.manifest.bytes:,}: "
                "delete the dataset and upload its file again"
            )

    def offsets(self) -> np.ndarray:
        """Where each line begins, and where the last one ends: (rows + 1) int64, memory-mapped once."""
        if self._offsets is None:
            self._offsets = np.memmap(self.path / OFFSETS, dtype="<i8", mode="r")
        return self._offsets

    def keys(self) -> np.ndarray:
        """Keys of id and text: (rows, 2) uint64, memory-mapped."""
        return np.memmap(self.path / KEYS, dtype="<u8", mode="r").reshape(-1, 2)

    def label_columns(self) -> RowLabels:
        """The labels of all rows, some 0.5 µs of CPU a row to read (200,000 rows: 0.09 s) and a few bytes to keep."""
        ids, codes = [], []
        numbers: dict[str, int] = {}
        with (self.path / LABELS).open("rb") as file:
            while lines := list(islice(file, LABELS_AT_ONCE)):
                labels = json.loads(b"[" + b",".join(lines) + b"]")
                ids.append(pa.array([label[0] for label in labels], pa.string()))
                codes += [numbers.setdefault(label[1], len(numbers)) for label in labels]
        return RowLabels(pa.chunked_array(ids, pa.string()).combine_chunks(), tuple(numbers), np.array(codes, np.int32))

    def lines(self, rows: Iterable[int]) -> Iterator[bytes]:
        """The original rows asked for, in the order asked, without line ends; raises IndexError."""
        with self.reader() as read:
            yield from map(read, rows)

    @contextmanager
    def reader(self) -> Iterator[Callable[[int], bytes]]:
        """Reads the original row of a number, without its line end; raises IndexError."""
        offsets, total = self.offsets(), self.manifest.rows
        with (self.path / LINES).open("rb") as file:

            def read(row: int) -> bytes:
                if not 0 <= row < total:
                    raise IndexError(f"{self.manifest.id} has {total} rows, from 0; it has no row {row}")
                begin, end = int(offsets[row]), int(offsets[row + 1])
                return os.pread(file.fileno(), end - begin - 1, begin)

            yield read

    @contextmanager
    def example_reader(self) -> Iterator[Callable[[int], Example]]:
        """Reads the example of a row; raises IndexError."""
        with self.reader() as line:
            yield lambda row: example(json.loads(line(row)), file=self._file(row))[0]

    def examples(self, rows: range) -> Iterator[Example]:
        """The examples of consecutive rows."""
        with (self.path / LINES).open("rb") as file:
            file.seek(int(self.offsets()[rows.start]))
            for row, line in zip(rows, file, strict=False):  # the file goes on behind the last row asked for
                yield example(json.loads(line), file=self._file(row))[0]

    def examples_at(self, rows: Iterable[int]) -> Iterator[Example]:
        """The examples of any rows, in the order asked; raises IndexError."""
        with self.example_reader() as read:
            yield from map(read, rows)

    def sources(self) -> list[DatasetSource]:
        """The uploads these rows came from, oldest first."""
        records = [
            DatasetSource.model_validate_json(path.read_bytes()) for path in (self.path / SOURCES).glob("*.json")
        ]
        return sorted(records, key=lambda source: (source.created_at, source.sha256))

    def _file(self, row: int) -> str:
        return self.manifest.parts[bisect_right(self._ends, row)].file


class DatasetWriter:
    """Writes a dataset row by row into a new folder, going on from `base` where rows are appended."""

    def __init__(self, path: Path, *, file: str, base: DatasetFolder | None) -> None:
        path.mkdir()
        (path / SOURCES).mkdir()
        self._path, self._file = path, file
        self._before: tuple[Part, ...] = ()
        self._origins: Counter[str] = Counter()
        self.rows, self.bytes, self.digest = 0, 0, EMPTY_CHAIN
        if base is not None:
            self._go_on_from(base)
        self._stack = ExitStack()
        self._lines, self._offsets, self._labels, self._keys = (
            self._stack.enter_context((path / name).open("ab")) for name in (LINES, OFFSETS, LABELS, KEYS)
        )
        if base is None:
            self._offsets.write(_OFFSET.pack(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def id(self) -> str:
        """The id of the rows written so far."""
        return dataset_id(self.digest)

    def add(self, line: bytes, *, canonical: bytes, example: Example) -> None:
        """Append one row."""
        self.rows += 1
        self.bytes += len(line) + 1
        self.digest = chain(self.digest, canonical)
        self._origins[example.origin] += 1
        self._lines.write(line + b"\n")
        self._offsets.write(_OFFSET.pack(self.bytes))
        self._labels.write(json.dumps([example.id, example.origin], ensure_ascii=False).encode() + b"\n")
        self._keys.write(_KEY_PAIR.pack(*keys(example)))

    def finish(self) -> DatasetFolder:
        """Everything on disk, and the manifest after it."""
        for file in (self._lines, self._offsets, self._labels, self._keys):
            file.flush()
            os.fsync(file.fileno())
        self._stack.close()
        manifest = Manifest(
            id=self.id,
            digest=self.digest.hex(),
            rows=self.rows,
            bytes=self.bytes,
            origins=dict(self._origins),
            parts=(*self._before, Part(rows=self.rows - sum(part.rows for part in self._before), file=self._file)),
        )
        write_through(self._path / MANIFEST, manifest.model_dump_json(indent=1).encode())
        return DatasetFolder(self._path)

    def _go_on_from(self, base: DatasetFolder) -> None:
        for name in (LINES, OFFSETS, LABELS, KEYS):
            shutil.copyfile(base.path / name, self._path / name)
        for record in (base.path / SOURCES).glob("*.json"):
            shutil.copyfile(record, self._path / SOURCES / record.name)
        manifest = base.manifest
        self._before, self._origins = manifest.parts, Counter(manifest.origins)
        self.rows, self.bytes, self.digest = manifest.rows, manifest.bytes, bytes.fromhex(manifest.digest)


def add_source(path: Path, source: DatasetSource) -> DatasetSource:
    """Record an upload; one with the same bytes that is recorded already stays as it is, and is returned."""
    record = path / SOURCES / f"{source.sha256}.json"
    draft = record.with_suffix(f".{os.urandom(8).hex()}")
    write_through(draft, source.model_dump_json(indent=1).encode())
    try:
        os.link(draft, record)
        sync_folder(record.parent)
    except FileExistsError:
        return DatasetSource.model_validate_json(record.read_bytes())
    finally:
        draft.unlink()
    return source


def write_through(path: Path, content: bytes) -> None:
    """Write a small file and have it on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
