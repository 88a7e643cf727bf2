"""Where the files of a segment lie: in its folder, or in an S3-compatible bucket with a bounded cache on the disk.

Both give a chunk as bytes mapped into memory, so that what is read from a bucket is what is read from a disk, bit for
bit. A chunk's checksum covers the whole chunk, so a chunk is what is fetched: by ranges of 8 MiB, several at a time,
compared with its checksum before anything is made of it, and kept in the cache until others need the room. A chunk has
at most 64 MiB (datastore/shards.py); 256 random rows of as many chunks cost as many chunks the first time.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from datastore.bucket import Bucket, Bytes
from datastore.errors import Damaged

CHECKSUM_BYTES = 4
ADVICE = "gradstore doctor --deep --repair on the server has it computed again"


def checksum(body: NDArray[Any]) -> bytes:
    """The crc32c of a block, as zarr appends it to the chunk's bytes."""
    return int(google_crc32c.value(body)).to_bytes(CHECKSUM_BYTES, "little")


class Files(ABC):
    """The files of one segment: `zarr.json`, `features/c.0.0`."""

    @abstractmethod
    def document(self, name: str) -> dict[str, Any]:
        """A JSON file. Raises `Damaged` where it is missing or none."""

    @abstractmethod
    def chunk(self, name: str, *, size: int, check: bool) -> Bytes:
        """A chunk and its checksum, read-only; `check` compares them. Raises `Damaged` for missing or other bytes."""

    def pick(self, name: str, rows: Sequence[int], *, size: int, out: Bytes) -> None:
        """Fill `out` (n, bytes of a row) with rows of a chunk, unchecked. Raises `Damaged` for missing bytes."""
        width = out.shape[1]
        raw = self.chunk(name, size=size, check=False)
        out[:] = raw[: (size - CHECKSUM_BYTES) // width * width].reshape(-1, width)[rows]

    @abstractmethod
    def receipts(self) -> list[dict[str, Any]]:
        """What the winners have left (docs/on-disk-format.md)."""

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """The Zarr group's folder, where there is one that any tool can open."""


class LocalFiles(Files):
    """A segment's files in a folder."""

    def __init__(self, group: Path, *, receipts: Path) -> None:
        self._group, self._receipts = group, receipts

    @property
    def folder(self) -> Path:
        """See `Files.folder`."""
        return self._group

    def document(self, name: str) -> dict[str, Any]:
        """See `Files.document`."""
        path = self._group / name
        try:
            return _parsed(path.read_bytes(), path)
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error}); {ADVICE}") from error

    def chunk(self, name: str, *, size: int, check: bool) -> Bytes:
        """See `Files.chunk`."""
        path = self._group / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{path} is missing: not published yet, or lost; {ADVICE}") from None
        if found != size:
            raise Damaged(f"{path} has {found:,} bytes instead of {size:,}; {ADVICE}")
        raw = _mapped(path)
        if check and not _is_sound(raw):
            raise Damaged(f"{path} does not match its checksum; {ADVICE}")
        return raw

    def pick(self, name: str, rows: Sequence[int], *, size: int, out: Bytes) -> None:  # noqa: ARG002 - the interface
        """See `Files.pick`: one read a row, several times faster than a fault for each page of a mapped one."""
        path, width = f"{self._group}/{name}", out.shape[1]  # a Path takes as long as the reads do
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise Damaged(f"{path} is missing: not published yet, or lost; {ADVICE}") from None
        try:
            for row, into in zip(rows, out, strict=True):
                if os.preadv(descriptor, [into.data], row * width) != width:
                    raise Damaged(f"{path} ends too early; {ADVICE}")
        finally:
            os.close(descriptor)

    def receipts(self) -> list[dict[str, Any]]:
        """See `Files.receipts`."""
        return [_parsed(path.read_bytes(), path) for path in self._receipts.glob("*.json")]


class Objects:
    """The segments in a bucket, each object fetched whenever it is asked for."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def fetch(self, key: str, birth: str, *, size: int | None, check: bool) -> Bytes:  # noqa: ARG002 - the interface
        """An object's bytes; a chunk, whose size is known, with a sound checksum.

        `birth` tells the segment from another of the same name, made after it was deleted. Raises `Damaged` for missing
        or other bytes, `BucketUnreachable`.
        """
        fetched = self._fetched(key, size)
        if fetched is None:
            raise Damaged(f"{self.bucket.url}/{key} is missing: not published yet, or lost; {ADVICE}")
        if size is not None and not _is_sound(fetched):
            raise Damaged(f"{self.bucket.url}/{key} does not match its checksum; {ADVICE}")
        return fetched

    def _fetched(self, key: str, size: int | None) -> Bytes | None:
        if size is not None:
            return self.bucket.fetch(key, size)
        content = self.bucket.read(key)
        return None if content is None else np.frombuffer(content, np.uint8)


class ChunkCache(Objects):
    """What a machine keeps of the segments in a bucket: at most so many bytes; what was used longest ago goes first.

    Processes share it: a lock file lets one at a time change it, and what one has mapped stays readable after another
    has removed it.
    """

    def __init__(self, bucket: Bucket, folder: Path, *, bytes: int) -> None:
        super().__init__(bucket)
        self._folder, self._bytes = folder, bytes

    def fetch(self, key: str, birth: str, *, size: int | None, check: bool) -> Bytes:
        """See `Objects.fetch`: from the cache, or fetched into it."""
        kept = self._kept(key, birth)
        if kept is not None and (size is None or (len(kept) == size and (not check or _is_sound(kept)))):
            return kept
        fetched = super().fetch(key, birth, size=size, check=check)
        self._keep(key, birth, fetched)
        return fetched

    def forget(self, prefix: str) -> None:
        """Remove the objects whose keys begin so."""
        for path in self._folder.glob(f"{_flat(prefix)}*"):
            path.unlink(missing_ok=True)

    def _place(self, key: str, birth: str) -> Path:
        return self._folder / f"{_flat(key)}.{birth}"

    def _kept(self, key: str, birth: str) -> Bytes | None:
        path = self._place(key, birth)
        try:
            os.utime(path)  # used last
            return _mapped(path)
        except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
            return None

    def _keep(self, key: str, birth: str, content: Bytes) -> None:
        """Put an object into the cache, after what was used longest ago has made room for it."""
        if len(content) > self._bytes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            place = self._place(key, birth)
            place.unlink(missing_ok=True)
            self._make_room(len(content))
            partial = self._folder / f".{token_hex(8)}.partial"
            try:
                partial.write_bytes(content.data)
                partial.replace(place)
            except OSError:  # a full disk costs the cache, not the answer
                partial.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        kept = []
        for path in self._folder.iterdir():
            if path.name != ".lock":
                with suppress(FileNotFoundError):
                    kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + needed <= self._bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


class BucketFiles(Files):
    """A segment's files in a bucket, below `prefix`."""

    def __init__(self, objects: Objects, prefix: str, *, birth: str) -> None:
        self._objects, self._prefix, self._birth = objects, prefix, birth

    @property
    def folder(self) -> None:
        """See `Files.folder`."""
        return

    def document(self, name: str) -> dict[str, Any]:
        """See `Files.document`."""
        return self._document(f"{self._prefix}/data.zarr/{name}")

    def chunk(self, name: str, *, size: int, check: bool) -> Bytes:
        """See `Files.chunk`."""
        return self._objects.fetch(f"{self._prefix}/data.zarr/{name}", self._birth, size=size, check=check)

    def receipts(self) -> list[dict[str, Any]]:
        """See `Files.receipts`."""
        return [self._document(found.key) for found in self._objects.bucket.below(f"{self._prefix}/receipts/")]

    def _document(self, key: str) -> dict[str, Any]:
        return _parsed(self._objects.fetch(key, self._birth, size=None, check=False).tobytes(), key)


def _flat(key: str) -> str:
    return key.replace("/", "__")


def _parsed(content: bytes, place: object) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(content))
    except ValueError as error:
        raise Damaged(f"{place} cannot be read ({error}); {ADVICE}") from error


def _mapped(path: Path) -> Bytes:
    """A file's bytes where they lie: `np.memmap` asks after every folder above it first, which took 0.1 ms a chunk."""
    with path.open("rb", buffering=0) as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _is_sound(raw: Bytes) -> bool:
    """Whether a chunk matches the checksum at its end."""
    return checksum(raw[:-CHECKSUM_BYTES]) == raw[-CHECKSUM_BYTES:].tobytes()
