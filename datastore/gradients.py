"""The feature store: one Zarr v3 group per segment, one row per example, written by attempts and published by winners.

    <root>/<segment>/data.zarr/             what anybody's zarr reads (docs/on-disk-format.md)
    <root>/<segment>/attempts/<start>-<attempt>/   what an attempt has written, whole or absent
    <root>/<segment>/receipts/<start>.json  which bytes the rows from `start` have, for good
    <root>/unfinished/                      what a killed process left behind

zarr writes the metadata; the chunk files are written here, since each is the raw block with its crc32c, flushed to the
disk before it counts. A shard of 1,024 × 8,192 int8 costs 8 MiB, 9 files and about 20 flushes.
The catalog decides which attempt wins. Its publication is a hard link (the receipt, which only one attempt can get) and
a few renames, repeated by anybody until they are done: a worker that wakes late finds the receipt taken and changes
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import FeatureDtype
from numpy.typing import NDArray

from datastore.chunk_files import ADVICE, Files, LocalFiles, checksum
from datastore.dtypes import decode, encode, lengths
from datastore.durable import place, sweep, sync_folder, unfinished, untouched_for, write_file
from datastore.errors import Conflict, Damaged, NotFound
from datastore.segments import (
    FORMAT_VERSION,
    OTHER_REASON,
    OWN_COLUMNS,
    REASONS,
    VALID,
    ArrayFormat,
    FeatureView,
    Segment,
    array_formats,
)
from datastore.shards import CHUNK_ROWS
from datastore.sizes import bytes_of

GROUP = "data.zarr"
MANIFEST = "manifest.json"
_CODES = {text: code for code, text in REASONS.items()}


@dataclass(frozen=True)
class Block:
    """What a worker has computed for consecutive rows; a row with a reason has no feature."""

    features: NDArray[np.float32]
    """(n, dim)"""
    norms: NDArray[np.float32]
    """L2 norm of what was projected: Adam's step, the gradient, its sign; of a hidden state its own (n,)."""
    raw_norms: NDArray[np.float32]
    """L2 norm of the gradient itself; of a hidden state its own (n,)."""
    losses: NDArray[np.float32]
    """Mean cross-entropy per supervised token (n,)."""
    tokens: NDArray[np.int32]
    """Supervised tokens (n,)."""
    reasons: Sequence[str | None]
    """Why a row has no feature; None where it has one."""
    logodds: NDArray[np.float32] | None = None
    """Mean log-odds of the supervised tokens (n,); None of other kinds than `logodds`."""

    @property
    def excluded(self) -> dict[int, str]:
        """The rows without a feature, counted from the block's first row, and why."""
        return {row: reason for row, reason in enumerate(self.reasons) if reason is not None}


@dataclass(frozen=True)
class Attempt:
    """What an attempt has written and nobody has published or discarded."""

    segment: str
    start: int
    attempt: int
    age_seconds: float
    bytes: int
    place: str
    """Folder or key below the store."""


def sound(block: Block) -> Block:
    """The block with a reason for every row that must not be read as numbers: not finite, or without a direction."""
    finite = np.isfinite(block.features).all(axis=1)
    found = [
        (~np.isfinite(block.losses), REASONS[2]),
        (~(np.isfinite(block.norms) & np.isfinite(block.raw_norms)), REASONS[3]),
        (~finite, REASONS[5]),
        (~block.features.any(axis=1), REASONS[6]),
    ]
    reasons = list(block.reasons)
    for rows, text in found:
        for row in np.flatnonzero(rows):
            reasons[row] = reasons[row] or text
    return replace(block, reasons=reasons)


class FeatureStore:
    """The segments of all feature sets under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, segment: str, *, rows: int, dim: int, dtype: FeatureDtype, attributes: Mapping[str, Any]) -> None:
        """Make room for a segment; again for one that exists, nothing happens.

        `attributes` say how the features came about and stand in the group's attributes as `recipe`. Raises `Conflict`
        where the segment exists with another shape or recipe.
        """
        wanted = (rows, dim, dtype, json.loads(json.dumps(dict(attributes))))
        if not self._is_there(segment):
            with unfinished(self._unfinished, segment) as partial:
                _create_group(partial / GROUP, rows=rows, dim=dim, dtype=dtype, recipe=attributes)
                self._keep_group(segment, partial)
        found = self.open(segment)
        if (found.rows, found.dim, found.dtype, found.recipe) != wanted:
            raise Conflict(f"the segment {segment} exists with another shape or recipe: its name is not a content hash")

    def write(self, segment: str, *, start: int, attempt: int, block: Block) -> str:
        """Keep the rows from `start` as this attempt's own, flushed to the disk; returns the digest of the bytes.

        Rows that are not `sound` get a reason. Nothing is visible to readers before `publish`. Raises `Conflict` where
        the attempt has written other bytes before, `NotEnoughSpace`, and `NotFound` for a deleted segment.
        """
        target = self.open(segment)
        _check_fit(target, start, block)
        with unfinished(self._unfinished, f"{segment}.{start}-{attempt}") as partial:
            block = sound(block)
            manifest = _manifest(start, block, _write_chunks(partial, target, start, block))
            write_file(partial / MANIFEST, manifest)
            kept = self._keep_attempt(segment, start, attempt, partial)
        digest = digest_of(manifest)
        if kept not in {None, digest}:
            raise Conflict(f"attempt {attempt} has already written other bytes for rows from {start} of {segment}")
        return digest

    def publish(self, segment: str, *, start: int, attempt: int, digest: str) -> None:
        """Give the bytes of a committed attempt the chunks' keys; anybody may repeat it, at any point.

        Raises `Conflict`, changing nothing, where the rows belong to other bytes or the attempt has not written these.
        """
        source = self._attempt(segment, start, attempt)
        receipt = self._receipt(segment, start)
        if not receipt.exists():
            self._claim(segment, start, source, digest)
        try:
            manifest = receipt.read_bytes()
        except FileNotFoundError:
            raise Conflict(f"rows from {start} of {segment} were given up while they were published") from None
        if digest_of(manifest) != digest:
            raise Conflict(f"rows from {start} of {segment} belong to another attempt; nothing was changed")
        touched = set()
        for name in json.loads(manifest)["files"]:
            key = self._folder(segment) / GROUP / name
            _move(source / flat_name(name), key)
            touched.add(key.parent)
        for folder in touched:
            sync_folder(folder)
        shutil.rmtree(source, ignore_errors=True)

    def discard(self, segment: str, *, start: int, attempt: int) -> None:
        """Remove what an attempt has written, if anything. Raises `Conflict` for one whose publication is under way."""
        source = self._attempt(segment, start, attempt)
        if not source.is_dir():
            return
        receipt = self._receipt(segment, start)
        if receipt.exists() and receipt.read_bytes() == (source / MANIFEST).read_bytes():
            group = self._folder(segment) / GROUP
            if not all((group / name).exists() for name in json.loads(receipt.read_bytes())["files"]):
                raise Conflict(
                    f"attempt {attempt} is being published for rows from {start} of {segment}: publish it again"
                )
        shutil.rmtree(source, ignore_errors=True)

    def give_up(self, segment: str, *, start: int, attempt: int) -> None:
        """Remove all bytes of rows whose publication cannot be finished: then another attempt's can be published.

        The catalog knows that nobody reads them yet. Who is publishing them at this moment finds nothing more to move.
        Raises FileNotFoundError where the whole store is away, as a disk may be.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not there; nothing was given up")
        with unfinished(self._unfinished, f"{segment}.{start}-{attempt}") as partial:
            with contextlib.suppress(FileNotFoundError):
                self._attempt(segment, start, attempt).rename(partial / "attempt")  # first: no more files get keys
            receipt = self._receipt(segment, start)
            if receipt.exists():
                for name in json.loads(receipt.read_bytes())["files"]:
                    (self._folder(segment) / GROUP / name).unlink(missing_ok=True)
                receipt.unlink()  # last: killed before this, all of it is done again

    def forget(self, segment: str, *, start: int, stop: int) -> None:
        """Remove the published bytes of rows, whole chunks of them, and their receipt, as if nobody had written them.

        The catalog decides who may, and that nobody commits these rows meanwhile. Raises `Damaged` where the segment's
        metadata cannot be read.
        """
        for path in self.files(segment, start=start, stop=stop):
            path.unlink(missing_ok=True)
        self._receipt(segment, start).unlink(missing_ok=True)

    def files(self, segment: str, *, start: int, stop: int) -> list[Path]:
        """Where the chunks of rows lie, or will, in the folder."""
        group = self._folder(segment) / GROUP
        return [group / name for name in chunk_sizes(self.open(segment), start, stop)]

    def receipts(self, segment: str) -> dict[int, str]:
        """First row of every range of a segment that somebody has published, and the digest of its bytes."""
        folder = self._folder(segment) / "receipts"
        return {int(path.stem): digest_of(path.read_bytes()) for path in sorted(folder.glob("*.json"))}

    def renew(self, segment: str) -> None:
        """Have no machine take what it keeps of a segment for what is there now. A folder is no cache, and stays."""

    def faults(self, segment: str, ranges: Iterable[tuple[int, int]], *, deep: bool) -> Iterator[tuple[int, int, str]]:
        """The published ranges of rows of which bytes are missing, cut or changed: (start, stop, what is wrong).

        It is looked at what is kept for good, whatever this machine has of it. Checksums of features are compared when
        it is `deep`. Raises `NotFound` and, for unreadable metadata, `Damaged`.
        """
        opened = self.afresh(segment)
        for start, stop in ranges:
            try:
                _read(opened, start, stop, check=deep)
            except Damaged as error:
                yield start, stop, str(error)

    def afresh(self, segment: str) -> Segment:
        """A segment as `open` has it, read from where it is kept for good."""
        return self.open(segment)

    def is_local(self, segment: str) -> bool:
        """Whether a segment lies in the folder, and not only in the bucket."""
        return self._folder(segment).is_dir()

    def open(self, segment: str) -> Segment:
        """A segment as it stands. Raises `NotFound`; reading rows that are not published raises `Damaged`."""
        files = self._files(segment)
        if files is None:
            raise NotFound("segment", segment, collection="/gradients")
        return Segment(segment, files)

    def view(self, segments: Sequence[str]) -> FeatureView:
        """The segments of a feature set as one, in this order. Raises `NotFound`."""
        return FeatureView([self.open(segment) for segment in segments])

    def bytes(self, segment: str) -> int:
        """Bytes that a segment takes on the disk by now, attempts apart; 0 where it does not exist."""
        return bytes_of(self._folder(segment) / GROUP)

    def delete(self, segment: str) -> None:
        """Remove a segment and all attempts at it; nothing happens where there is none."""
        with unfinished(self._unfinished, segment) as partial:
            try:
                self._folder(segment).rename(partial / segment)
            except FileNotFoundError:
                return
            sync_folder(self.root)

    def attempts(self) -> list[Attempt]:
        """What attempts have written and nobody has published or discarded; the catalog knows which are wanted."""
        return [
            Attempt(
                path.parent.parent.name, *start_and_attempt(path.name), untouched_for(path),
                bytes=bytes_of(path), place=f"{self.root.name}/{path.relative_to(self.root)}",
            )
            for path in sorted(self.root.glob("*/attempts/*-*"))
        ]  # fmt: skip

    def names(self) -> list[str]:
        """The segments that there are, whether the catalog knows them or not."""
        return [path.name for path in self.root.glob("seg_*")]

    def age(self, segment: str) -> float:
        """Seconds since the last change of a segment."""
        return untouched_for(self._folder(segment))

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep(self._unfinished, older_than=older_than)

    def _is_there(self, segment: str) -> bool:
        return self._folder(segment).is_dir()

    def _files(self, segment: str) -> Files | None:
        """A segment's files, where there is one."""
        folder = self._folder(segment)
        return LocalFiles(folder / GROUP, receipts=folder / "receipts") if folder.is_dir() else None

    def _keep_group(self, segment: str, partial: Path) -> None:
        """Make a new segment of a folder with its group; where another was faster, nothing happens."""
        for folder in ("attempts", "receipts"):
            (partial / folder).mkdir()
        place(partial, self._folder(segment))

    def _keep_attempt(self, segment: str, start: int, attempt: int, partial: Path) -> str | None:
        """Keep a folder with what an attempt has written; the digest of what it has written before, if anything.

        Raises `NotFound` for a deleted segment.
        """
        final = self._attempt(segment, start, attempt)
        try:
            return None if place(partial, final) else digest_of((final / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise NotFound("segment", segment, collection="/gradients") from None

    @property
    def _unfinished(self) -> Path:
        return self.root / "unfinished"

    def _folder(self, segment: str) -> Path:
        return self.root / segment

    def _attempt(self, segment: str, start: int, attempt: int) -> Path:
        return self._folder(segment) / "attempts" / f"{start}-{attempt}"

    def _receipt(self, segment: str, start: int) -> Path:
        return self._folder(segment) / "receipts" / f"{start}.json"

    def _claim(self, segment: str, start: int, source: Path, digest: str) -> None:
        """Make the attempt's manifest the receipt of its rows, unless another publisher was faster.

        What looks wrong is wrong only while there is no receipt: another publisher may have moved the files meanwhile.
        """
        receipt = self._receipt(segment, start)
        problem = self._unpublishable(segment, source, digest)
        if problem is None:
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(source / MANIFEST, receipt)
        if not receipt.exists():
            raise Conflict(problem or f"{source.name} of {segment} was discarded while it was published")
        sync_folder(receipt.parent)

    def _unpublishable(self, segment: str, source: Path, digest: str) -> str | None:
        """Why an attempt cannot become the winner, if so."""
        try:
            manifest = (source / MANIFEST).read_bytes()
        except FileNotFoundError:
            return f"{source.name} of {segment} has written nothing, or was discarded: compute the shard again"
        if digest_of(manifest) != digest:
            return f"{source.name} of {segment} has written other bytes than these; nothing was changed"
        group = self._folder(segment) / GROUP
        taken = [name for name in json.loads(manifest)["files"] if (group / name).exists()]
        if taken:
            return f"{taken[0]} of {segment} is published already by a shard of another size; nothing was changed"
        return None


def _create_group(path: Path, *, rows: int, dim: int, dtype: FeatureDtype, recipe: Mapping[str, Any]) -> None:
    import zarr  # noqa: PLC0415 - readers of features do without it
    from zarr.codecs import BytesCodec, Crc32cCodec  # noqa: PLC0415

    header = {"format": FORMAT_VERSION, "rows": rows, "dim": dim, "dtype": dtype, "reasons": dict(REASONS)}
    group = zarr.create_group(path, zarr_format=3, attributes={"gradstore": header, "recipe": dict(recipe)})
    for each in array_formats(rows, dim=dim, dtype=dtype, kind=recipe.get("kind")).values():
        group.create_array(
            each.name,
            shape=(rows, *each.row_shape),
            chunks=(each.chunk_rows, *each.row_shape),
            dtype=each.dtype,
            fill_value=each.fill,
            filters=None,
            serializer=BytesCodec(endian="little") if each.dtype.itemsize > 1 else BytesCodec(endian=None),
            compressors=[Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("row",) if each.width is None else ("row", "dim" if each.width == dim else "byte"),
        )
    for metadata in path.rglob("zarr.json"):
        with metadata.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(metadata.parent)


def _check_fit(segment: Segment, start: int, block: Block) -> None:
    rows = len(block.reasons)
    stop = start + rows
    if start % CHUNK_ROWS or not rows or stop > segment.rows or (stop % CHUNK_ROWS and stop != segment.rows):
        raise ValueError(
            f"rows {start}:{stop} are no whole number of chunks of {CHUNK_ROWS:,} rows "
            f"of {segment.name}, which has {segment.rows:,} rows"
        )
    if block.features.shape != (rows, segment.dim):
        raise ValueError(f"the features have the shape {block.features.shape}, not {(rows, segment.dim)}")
    own = [name for names in OWN_COLUMNS.values() for name in names]
    for name in ("norms", "raw_norms", "losses", "tokens", *own):
        values = getattr(block, name)
        if (values is None) == (name in segment.formats):
            raise ValueError(f"features of kind {segment.recipe.get('kind')} have {name}, or have none: not these")
        if values is not None and values.shape != (rows,):
            raise ValueError(f"{name} has the shape {values.shape}, not {(rows,)}")


def _write_chunks(folder: Path, target: Segment, start: int, block: Block) -> dict[str, dict[str, Any]]:
    """Write a file per chunk and array; returns the key, bytes and sha256 of each."""
    files: dict[str, dict[str, Any]] = {}
    features = target.formats["features"]
    scales, lengths_ = [], []
    for first in range(0, len(block.reasons), features.chunk_rows):  # a chunk at a time: they may be long
        stored, some_scales, some_lengths = _encoded(block, slice(first, first + features.chunk_rows), target.dtype)
        files |= _write_chunk(folder, features, start + first, stored)
        scales.append(some_scales)
        lengths_.append(some_lengths)
    columns = _columns(block)
    columns["scales"], columns["lengths"] = np.concatenate(scales), np.concatenate(lengths_)
    for name, values in columns.items():
        each = target.formats[name]
        for first in range(0, len(values), each.chunk_rows):
            files |= _write_chunk(folder, each, start + first, values[first : first + each.chunk_rows])
    return files


def _write_chunk(folder: Path, each: ArrayFormat, start: int, values: NDArray[Any]) -> dict[str, dict[str, Any]]:
    body = _padded(values, each)
    key = f"{each.name}/{each.key(start // each.chunk_rows)}"
    raw, check = body.view(np.uint8).reshape(-1).data, checksum(body)
    write_file(folder / flat_name(key), raw, check)
    hashed = hashlib.sha256(raw)
    hashed.update(check)
    return {key: {"bytes": each.chunk_bytes, "sha256": hashed.hexdigest()}}


def _encoded(
    block: Block, rows: slice, dtype: FeatureDtype
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float64]]:
    """Rows as they are stored, their scales and their lengths; of a row with a reason zeros, whatever was computed."""
    valid = np.array([reason is None for reason in block.reasons[rows]])
    features = np.where(valid[:, None], block.features[rows], 0).astype(np.float32, copy=False)
    stored, scales = encode(features, dtype)
    stored = np.where(valid[:, None], stored, 0).astype(stored.dtype, copy=False)
    decoded = decode(stored, dtype, features.shape[1])
    return stored, np.where(valid, scales, np.float32(0)), np.where(valid, lengths(decoded), 0)


def _columns(block: Block) -> dict[str, NDArray[Any]]:
    """The other arrays of a block."""
    codes = np.array([_code(reason) for reason in block.reasons], np.uint8)
    valid = codes == VALID
    return {
        "norms": np.where(valid, block.norms, 0),
        "raw_norms": np.where(valid, block.raw_norms, 0),
        "losses": np.where(valid, block.losses, 0),
        **({} if block.logodds is None else {"logodds": np.where(valid, block.logodds, 0)}),
        "tokens": block.tokens,
        "reason": codes,
    }


def _code(reason: str | None) -> int:
    return VALID if reason is None else _CODES.get(reason, OTHER_REASON)


def _padded(values: NDArray[Any], each: ArrayFormat) -> NDArray[Any]:
    """The values of a whole chunk: where the array ends within it, the fill value follows, as zarr has it."""
    body = np.full((each.chunk_rows, *each.row_shape), each.fill, each.dtype)
    body[: len(values)] = values
    return body


def _manifest(start: int, block: Block, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    texts = {str(start + row): reason for row, reason in block.excluded.items() if reason not in _CODES}
    content = {"files": files, "reasons": texts, "start": start, "stop": start + len(block.reasons)}
    return json.dumps(content, sort_keys=True, indent=1).encode()


def digest_of(manifest: bytes) -> str:
    """What the catalog calls an attempt's bytes."""
    return hashlib.sha256(manifest).hexdigest()


def chunk_sizes(segment: Segment, start: int, stop: int) -> dict[str, int]:
    """The chunks that hold rows of a segment, by their names in the group, and the bytes of each."""
    return {
        f"{each.name}/{each.key(chunk)}": each.chunk_bytes
        for each in segment.formats.values()
        for chunk in range(start // each.chunk_rows, each.chunks(stop))
    }


def _read(segment: Segment, start: int, stop: int, *, check: bool) -> None:
    """Read rows and throw them away; columns are always compared with their checksums. Raises `Damaged`."""
    for column in segment.columns:
        segment.part(column, start, stop)
    for first, last in pairwise([start, *(edge for edge in segment.edges if start < edge < stop), stop]):
        segment.stored(first, last, check=check)


def flat_name(key: str) -> str:
    """Name of a chunk's file inside an attempt's folder."""
    return key.replace("/", ".")


def _move(source: Path, key: Path) -> None:
    try:
        source.replace(key)
    except FileNotFoundError:
        if not key.exists():
            raise Damaged(f"{key} is lost, and so is {source}; {ADVICE}") from None


def start_and_attempt(name: str) -> tuple[int, int]:
    """First row and number of an attempt, from the name of its folder."""
    start, attempt = name.split("-")
    return int(start), int(attempt)
