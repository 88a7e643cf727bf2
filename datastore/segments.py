"""A segment of features as it is read: memory-mapped chunks, checked columns, and nothing that was never written.

An uncompressed chunk file is the raw block of numbers followed by its crc32c, so it is mapped and used in place,
several times faster than zarr's own reading (docs/on-disk-format.md, "Measured").
Groups that some other tool has rewritten (compressed, other chunks) are read through zarr at its speed. Files are
opened anew at each access, so that a store of any size needs no more than a few descriptors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
from gradstore.types import FeatureDtype, FeatureKind
from numpy.typing import NDArray

from datastore.chunk_files import ADVICE, CHECKSUM_BYTES, Files
from datastore.dtypes import STORAGE, decode
from datastore.errors import Damaged
from datastore.shards import CHUNK_ROWS, chunk_rows

FORMAT_VERSION = 1
BLOCK_BYTES = 8 << 20
"""Float32 bytes of the rows that are decoded at once: about what a core's caches hold."""
TAKEN_BYTES = 512 << 10
"""The same of rows that are picked one by one, and multiplied with one question: what the nearest cache holds."""
PICKED_BYTES = 2 << 20
"""Stored bytes of such rows that are read at once."""

REASONS: Final[Mapping[int, str]] = {
    1: "no supervised token",
    2: "loss is not finite",
    3: "gradient is not finite",
    4: "gradient is zero",
    5: "feature is not finite",
    6: "feature is zero",
    254: "another reason",
}
"""Why a row has no feature, by its code in the array `reason`; another reason's words are in the shard's receipt."""
VALID, OTHER_REASON, NOT_WRITTEN = 0, 254, 255
OWN_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {"logodds": ("logodds",)}
"""Arrays of one float32 a row that the segments of a kind have beside those of all kinds."""


@dataclass(frozen=True)
class ArrayFormat:
    """An array of a segment: what a row is, and what stands where nothing was written."""

    name: str
    dtype: np.dtype[Any]
    fill: float
    chunk_rows: int
    width: int | None = None  # columns; None for one number a row

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return () if self.width is None else (self.width,)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's file, with its checksum."""
        return self.chunk_rows * (self.width or 1) * self.dtype.itemsize + CHECKSUM_BYTES

    def chunks(self, rows: int) -> int:
        """Chunks that hold so many rows."""
        return -(-rows // self.chunk_rows)

    def key(self, chunk: int) -> str:
        """Zarr's name of a chunk, and of its file inside the array's folder."""
        return f"c.{chunk}" if self.width is None else f"c.{chunk}.0"


def array_formats(
    rows: int, *, dim: int, dtype: FeatureDtype, kind: FeatureKind | None = None
) -> dict[str, ArrayFormat]:
    """The arrays of a new segment by name, in the order in which they are written; `kind` is its features'."""
    storage = STORAGE[dtype]
    width = storage.width(dim)
    numbers = ("scales", "lengths", "norms", "raw_norms", "losses", *OWN_COLUMNS.get(kind or "", ()))
    short = chunk_rows(rows, row_bytes=4)
    formats = [
        ArrayFormat(
            "features", storage.dtype, storage.fill,
            chunk_rows(rows, row_bytes=width * storage.dtype.itemsize), width,
        ),
        *(ArrayFormat(name, np.dtype("<f4"), np.nan, short) for name in numbers),
        ArrayFormat("tokens", np.dtype("<i4"), -1, short),
        ArrayFormat("reason", np.dtype("u1"), NOT_WRITTEN, short),
    ]  # fmt: skip
    return {each.name: each for each in formats}


def stored_bytes(rows: int, *, dim: int, dtype: FeatureDtype, kind: FeatureKind | None = None) -> int:
    """Bytes that a segment takes on the disk, metadata apart."""
    formats = array_formats(rows, dim=dim, dtype=dtype, kind=kind).values()
    return sum(each.chunks(rows) * each.chunk_bytes for each in formats)


class Rows(ABC):
    """Features of consecutive rows: one segment, or the segments of a grown feature set one after the other.

    A feature is decoded × scale (docs/on-disk-format.md). Its direction, which is what an influence needs, is
    decoded / length.
    """

    dim: int
    dtype: FeatureDtype
    rows: int

    @abstractmethod
    def stored(self, start: int, stop: int, *, check: bool = False) -> NDArray[Any]:
        """Rows `start:stop` as they are stored (n, width), see `dtypes.STORAGE`: read-only, in place within a chunk.

        `check` compares the checksums of all chunks met first. Raises `Damaged` where bytes are missing.
        """

    @abstractmethod
    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """One number for each of the rows `start:stop`, of one of the `columns`; checksums are always compared.

        Raises `Damaged`, and KeyError for a column that features of this kind do not have.
        """

    @abstractmethod
    def stored_rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, in ascending order, as they are stored (n, width); checksums are not compared.

        A row costs one read of its own bytes, about 5 µs from the memory's cache of files. Raises `Damaged` where bytes
        are missing.
        """

    def column(self, name: str) -> NDArray[Any]:
        """One number per row, see `part`."""
        return self.part(name, 0, self.rows)

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """What there is of each row beside its feature: what `part` can be asked for."""

    @property
    @abstractmethod
    def reasons(self) -> dict[int, str]:
        """The rows without a feature, and why."""

    @property
    @abstractmethod
    def edges(self) -> list[int]:
        """Rows at which a chunk begins, and the number of rows: between two of them `stored` copies nothing."""

    @property
    @abstractmethod
    def names(self) -> list[tuple[str, int]]:
        """Segments and their rows, in order."""

    def place(self, start: int, stop: int) -> tuple[str, int, int]:
        """The segment that rows `start:stop` lie in, with the first of them there and the one after the last."""
        first = 0
        for name, rows in self.names:
            if first <= start and stop <= first + rows:
                return name, start - first, stop - first
            first += rows
        raise IndexError(f"rows {start}:{stop} do not lie in one segment of {self.names}")

    def features(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start:stop` as they were computed, up to the rounding of the stored dtype: float32 (n, dim)."""
        scales: NDArray[np.float32] = self.part("scales", start, stop)
        return self.decoded(start, stop, check=True) * scales[:, None]

    def decoded(self, start: int, stop: int, *, check: bool = False) -> NDArray[np.float32]:
        """Rows `start:stop` as numbers, not yet multiplied with their scales: float32 (n, dim), read-only or new."""
        return decode(self.stored(start, stop, check=check), self.dtype, self.dim)

    def decoded_blocks(self, *, check: bool = False) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows as (start, decoded rows), `BLOCK_BYTES` at a time."""
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        for first, last in pairwise(self.edges):
            stored = self.stored(first, last, check=check)
            for start in range(0, last - first, step):
                yield first + start, decode(stored[start : start + step], self.dtype, self.dim)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows, in ascending order, as numbers not yet multiplied with their scales: float32 (n, dim)."""
        return decode(self.stored_rows(rows), self.dtype, self.dim)

    def taken_blocks(self, rows: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Some rows, in ascending order, a few at a time: (places in `rows`, decoded rows), as `take` has them.

        Several times faster than `take` where a row is used once: it never leaves the core's caches.
        """
        storage = STORAGE[self.dtype]
        read = max(1, PICKED_BYTES // (storage.width(self.dim) * storage.dtype.itemsize))
        step = max(1, TAKEN_BYTES // (4 * self.dim))
        for first in range(0, len(rows), read):
            stored = self.stored_rows(rows[first : first + read])
            for start in range(0, len(stored), step):
                few = stored[start : start + step]
                yield slice(first + start, first + start + len(few)), decode(few, self.dtype, self.dim)

    def blocks(self, *, rows: int = CHUNK_ROWS, check: bool = False) -> Iterator[tuple[int, NDArray[Any]]]:
        """All rows as (start, stored rows), at most `rows` at a time, in place."""
        for first, last in pairwise(self.edges):
            for start in range(first, last, rows):
                yield start, self.stored(start, min(start + rows, last), check=check)

    @property
    def scales(self) -> NDArray[np.float32]:
        """What a decoded row is multiplied with (n,)."""
        return self.column("scales")

    @property
    def lengths(self) -> NDArray[np.float32]:
        """L2 norm of the row as it is decoded (n,)."""
        return self.column("lengths")

    @property
    def norms(self) -> NDArray[np.float32]:
        """L2 norm of what was projected: Adam's step, the gradient, its sign; of a hidden state its own (n,)."""
        return self.column("norms")

    @property
    def raw_norms(self) -> NDArray[np.float32]:
        """L2 norm of the gradient itself; of a hidden state its own (n,)."""
        return self.column("raw_norms")

    @property
    def losses(self) -> NDArray[np.float32]:
        """Mean cross-entropy per supervised token (n,)."""
        return self.column("losses")

    @property
    def logodds(self) -> NDArray[np.float32]:
        """Mean log-odds of the supervised tokens (n,); only features of kind `logodds` have them."""
        return self.column("logodds")

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Supervised tokens (n,)."""
        return self.column("tokens")

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which rows have a feature (n,)."""
        return cast("NDArray[np.bool_]", self.column("reason") == VALID)


def ranges(views: Sequence[Rows], *, most: int | None = None) -> list[tuple[int, int]]:
    """Ranges of rows, of at most so many, that lie in one segment of each of the views, which share their rows."""
    borders = {0}
    for view in views:
        starts = np.cumsum([0, *(rows for _, rows in view.names)]).tolist()
        borders.update(starts)
        if most is not None:
            borders.update(cut for start, stop in pairwise(starts) for cut in range(start, stop, most))
    return list(pairwise(sorted(borders)))


class Segment(Rows):
    """One Zarr group: an immutable range of rows."""

    def __init__(self, name: str, files: Files) -> None:
        header = _header(name, files)
        self.name = name
        self.rows = int(header["rows"])
        self.dim = int(header["dim"])
        self.dtype = cast("FeatureDtype", header["dtype"])
        self.recipe = cast("dict[str, Any]", header["recipe"])
        intended = array_formats(self.rows, dim=self.dim, dtype=self.dtype, kind=self.recipe.get("kind"))
        metadata = {each: files.document(f"{each}/zarr.json") for each in intended}
        self.formats = _found_formats(intended, metadata)
        self._chunks = _chunks(name, files, self.formats, metadata, self.rows)
        self._files = files
        self._columns: dict[str, NDArray[Any]] = {}

    def stored(self, start: int, stop: int, *, check: bool = False) -> NDArray[Any]:
        """See `Rows.stored`."""
        _inside(start, stop, self.rows)
        return self._chunks.read("features", start, stop, check=check)

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See `Rows.part`."""
        _inside(start, stop, self.rows)
        found = self._chunks.read(name, start, stop, check=True)
        if name == "reason" and (found == NOT_WRITTEN).any():
            raise Damaged(f"{self.name}: rows were never written; {ADVICE}")
        return found

    def stored_rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """See `Rows.stored_rows`."""
        _ascending(rows, self.rows)
        return self._chunks.take("features", rows)

    def column(self, name: str) -> NDArray[Any]:
        """See `Rows.column`; read once."""
        if name not in self._columns:
            self._columns[name] = super().column(name)
        return self._columns[name]

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Rows.columns`."""
        return tuple(name for name in self.formats if name != "features")

    @property
    def reasons(self) -> dict[int, str]:
        """See `Rows.reasons`."""
        codes = self.column("reason")
        texts = self._texts() if (codes == OTHER_REASON).any() else {}
        return {int(row): texts.get(int(row), REASONS[int(codes[row])]) for row in np.flatnonzero(codes)}

    def _texts(self) -> dict[int, str]:
        """The words of reasons that have no code of their own."""
        return {int(row): text for receipt in self._files.receipts() for row, text in receipt["reasons"].items()}

    @property
    def edges(self) -> list[int]:
        """See `Rows.edges`."""
        return [*range(0, self.rows, self.formats["features"].chunk_rows), self.rows]

    @property
    def names(self) -> list[tuple[str, int]]:
        """See `Rows.names`."""
        return [(self.name, self.rows)]


class FeatureView(Rows):
    """The segments of a feature set as one: a grown dataset's rows lie in its prefix's segments and a new one."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        kinds = {(segment.dim, segment.dtype) for segment in segments}
        if len(kinds) != 1:
            raise ValueError(f"the segments of a feature set share one dim and dtype, these have {sorted(kinds)}")
        self.segments = tuple(segments)
        self.dim, self.dtype = segments[0].dim, segments[0].dtype
        self._starts = [0]
        for segment in segments:
            self._starts.append(self._starts[-1] + segment.rows)
        self.rows = self._starts[-1]

    def stored(self, start: int, stop: int, *, check: bool = False) -> NDArray[Any]:
        """See `Rows.stored`."""
        _inside(start, stop, self.rows)
        parts = [segment.stored(first, last, check=check) for segment, first, last in self._covering(start, stop)]
        return _joined(parts, self.segments[0].formats["features"])

    def part(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """See `Rows.part`."""
        _inside(start, stop, self.rows)
        parts = [segment.part(name, first, last) for segment, first, last in self._covering(start, stop)]
        return _joined(parts, self.segments[0].formats[name])

    def stored_rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """See `Rows.stored_rows`."""
        _ascending(rows, self.rows)
        borders = np.searchsorted(rows, self._starts)
        parts = [
            segment.stored_rows(rows[low:high] - first)
            for segment, first, (low, high) in zip(self.segments, self._starts, pairwise(borders), strict=False)
            if low < high
        ]
        return _joined(parts, self.segments[0].formats["features"])

    def column(self, name: str) -> NDArray[Any]:
        """See `Rows.column`."""
        return np.concatenate([segment.column(name) for segment in self.segments])

    def _covering(self, start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
        """The segments that rows `start:stop` lie in, with the first row of each and the one after its last."""
        for segment, (first, last) in zip(self.segments, pairwise(self._starts), strict=True):
            if first < stop and start < last:
                yield segment, max(start, first) - first, min(stop, last) - first

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Rows.columns`."""
        return self.segments[0].columns

    @property
    def reasons(self) -> dict[int, str]:
        """See `Rows.reasons`."""
        starts = zip(self._starts, self.segments, strict=False)
        return {first + row: text for first, segment in starts for row, text in segment.reasons.items()}

    @property
    def edges(self) -> list[int]:
        """See `Rows.edges`."""
        starts = zip(self._starts, self.segments, strict=False)
        return [first + edge for first, segment in starts for edge in segment.edges[:-1]] + [self.rows]

    @property
    def names(self) -> list[tuple[str, int]]:
        """See `Rows.names`."""
        return [(segment.name, segment.rows) for segment in self.segments]


# Reading chunks ---------------------------------------------------------------------------------------------------


class _Chunks(Protocol):
    def read(self, name: str, start: int, stop: int, *, check: bool) -> NDArray[Any]: ...

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class _MappedChunks:
    """Chunk files in the layout of this store, mapped into memory."""

    files: Files
    formats: Mapping[str, ArrayFormat]

    def read(self, name: str, start: int, stop: int, *, check: bool) -> NDArray[Any]:
        each = self.formats[name]
        parts = []
        for chunk in range(start // each.chunk_rows, each.chunks(stop)):
            first = chunk * each.chunk_rows
            rows = self._chunk(each, chunk, check=check)
            parts.append(rows[max(start - first, 0) : min(stop - first, each.chunk_rows)])
        return _joined(parts, each)

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        each = self.formats[name]
        found = np.empty((len(rows), *each.row_shape), each.dtype)
        chunks, starts = np.unique(rows // each.chunk_rows, return_index=True)
        for chunk, (low, high) in zip(chunks.tolist(), pairwise([*starts.tolist(), len(rows)]), strict=True):
            self.files.pick(
                f"{each.name}/{each.key(chunk)}",
                (rows[low:high] - chunk * each.chunk_rows).tolist(),
                size=each.chunk_bytes,
                out=found[low:high].view(np.uint8).reshape(high - low, -1),
            )
        return found

    def _chunk(self, each: ArrayFormat, chunk: int, *, check: bool) -> NDArray[Any]:
        raw = self.files.chunk(f"{each.name}/{each.key(chunk)}", size=each.chunk_bytes, check=check)
        body = raw[:-CHECKSUM_BYTES]
        return body.view(each.dtype).reshape(each.chunk_rows, *each.row_shape)


@dataclass(frozen=True)
class _ZarrChunks:
    """A group in any other layout, read by zarr, which compares the checksums that the layout has."""

    group: Path
    formats: Mapping[str, ArrayFormat]

    def read(self, name: str, start: int, stop: int, *, check: bool) -> NDArray[Any]:  # noqa: ARG002 - the interface
        import zarr  # noqa: PLC0415 - only for layouts of others

        try:
            array = zarr.open_array(self.group / name, mode="r")
            rows = np.asarray(array[start:stop])
        except (OSError, ValueError, RuntimeError) as error:
            raise Damaged(f"{self.group / name} cannot be read ({error}); {ADVICE}") from error
        if name in {"features", "lengths"} and _unwritten(rows, self.formats[name].fill):
            raise Damaged(f"{self.group / name}: rows were never written; {ADVICE}")
        return rows.astype(self.formats[name].dtype, copy=False)

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        parts = [self.read(name, row, row + 1, check=True) for row in rows.tolist()]
        return _joined(parts, self.formats[name])


def _unwritten(rows: NDArray[Any], fill: float) -> bool:
    """Whether the fill value stands anywhere in an array that holds it for nothing else; 0 holds for signs too."""
    return bool(np.isnan(rows).any() if np.isnan(fill) else fill and (rows == fill).any())


def _found_formats(
    formats: Mapping[str, ArrayFormat], metadata: Mapping[str, Mapping[str, Any]]
) -> dict[str, ArrayFormat]:
    """The formats with the rows that a chunk has in this group: segments of earlier versions have 1,024 always."""
    return {
        name: replace(each, chunk_rows=metadata[name]["chunk_grid"]["configuration"]["chunk_shape"][0])
        for name, each in formats.items()
    }


def _chunks(
    segment: str,
    files: Files,
    formats: Mapping[str, ArrayFormat],
    metadata: Mapping[str, Mapping[str, Any]],
    rows: int,
) -> _Chunks:
    if all(_has_own_layout(metadata[name], each, rows) for name, each in formats.items()):
        return _MappedChunks(files, formats)
    if files.folder is None:
        raise Damaged(f"{segment} lies in a bucket in another layout than gradstore's: copy its folder to the disk")
    return _ZarrChunks(files.folder, formats)


def _has_own_layout(metadata: Mapping[str, Any], each: ArrayFormat, rows: int) -> bool:
    """Whether an array's chunk files are raw blocks followed by a crc32c."""
    codecs = [codec["name"] for codec in metadata["codecs"]]
    little = metadata["codecs"][0].get("configuration", {}).get("endian", "little") == "little"
    return (
        codecs == ["bytes", "crc32c"]
        and little
        and metadata["data_type"] == each.dtype.name
        and metadata["shape"] == [rows, *each.row_shape]
        and metadata["chunk_grid"]["configuration"]["chunk_shape"] == [each.chunk_rows, *each.row_shape]
        and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    )


def _joined(parts: Sequence[NDArray[Any]], each: ArrayFormat) -> NDArray[Any]:
    """One array of consecutive parts, in place where there is one."""
    if not parts:
        return np.empty((0, *each.row_shape), each.dtype)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _header(segment: str, files: Files) -> dict[str, Any]:
    attributes = files.document("zarr.json")["attributes"]
    header = cast("dict[str, Any]", attributes["gradstore"])
    if header["format"] != FORMAT_VERSION:
        raise Damaged(
            f"{segment} has the format {header['format']}, this version reads {FORMAT_VERSION}: use a newer gradstore"
        )
    return {**header, "recipe": attributes["recipe"]}


def _ascending(rows: NDArray[np.int64], total: int) -> None:
    if len(rows) and not (rows[0] >= 0 and rows[-1] < total and (np.diff(rows) > 0).all()):
        raise IndexError(f"the rows asked for are not in ascending order within 0:{total}")


def _inside(start: int, stop: int, rows: int) -> None:
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"rows {start}:{stop} are not within 0:{rows}")
