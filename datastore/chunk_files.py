"""Where the files of a segment lie: in its folder, or in an S3-compatible bucket with a bounded cache on the disk.

Both give a chunk as bytes mapped into memory, so that what is read from a bucket is what is read from a disk, bit for
bit. A chunk's checksum covers the whole chunk, so a chunk is what is fetched: by ranges of 8 MiB, several at a time,
compared with its checksum before anything is made of it, and kept in the cache until others need the room. A chunk has
at most 64 MiB (datastore/shards.py); 256 random rows of as many chunks cost as many chunks the first time.
"""

from __future__ import annotations

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from datastore.errors import BucketUnreachable, Damaged, first_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CHECKSUM_BYTES = 4
ADVICE = "delete this feature set and POST /gradients again to compute it anew"
RANGE_BYTES = 8 << 20
"""Of one request to a bucket: its round trip is a small part of the transfer."""
_AT_ONCE = 8  # ranges of a chunk
_RETRIES, _RETRY_SECONDS, _TIMEOUT_SECONDS = 5, 60, 30

Bytes = NDArray[np.uint8]


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


class Bucket:
    """The segments under an address `s3://bucket/prefix`, read through a cache of at most so many bytes.

    Keys, region and endpoint come from the usual variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …). Failed
    requests are tried again, with growing pauses, for a minute. Processes share the cache: a lock file lets one at a
    time change it, and what one has mapped stays readable after another has removed it.
    """

    def __init__(self, url: str, *, cache: Path, cache_bytes: int) -> None:
        self.url, self._cache, self._cache_bytes = url.rstrip("/"), cache, cache_bytes
        self._opened: ObjectStore | None = None

    def segment(self, name: str) -> Files | None:
        """The files of a segment; None where the bucket has no such. Raises `BucketUnreachable`."""
        files = BucketFiles(self, name)
        return (
            files if self.fetch(files.key("zarr.json"), size=None, check=False, missing_ok=True) is not None else None
        )

    def fetch(self, key: str, *, size: int | None, check: bool, missing_ok: bool = False) -> Bytes | None:
        """An object's bytes from the cache, or fetched into it; a chunk, whose size is known, with a sound checksum.

        Raises `Damaged` for missing or other bytes, `BucketUnreachable`.
        """
        kept = self._kept(key)
        if kept is not None and (size is None or (len(kept) == size and (not check or _is_sound(kept)))):
            return kept
        fetched = self._fetched(key, size)
        if fetched is None:
            if missing_ok:
                return None
            raise Damaged(f"{self.url}/{key} is missing: not copied there, or lost; copy it again")
        if size is not None and not _is_sound(fetched):
            raise Damaged(f"{self.url}/{key} does not match its checksum; copy it again")
        self._keep(key, fetched)
        return fetched

    def names(self, prefix: str) -> list[str]:
        """The keys below a prefix. Raises `BucketUnreachable`."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            return [str(item["path"]) for page in obstore.list(self._objects(), prefix=prefix) for item in page]

    def _objects(self) -> ObjectStore:
        if self._opened is None:
            from obstore.store import from_url  # noqa: PLC0415 - only where a bucket is configured

            options: dict[str, Any] = {"timeout": timedelta(seconds=_TIMEOUT_SECONDS)}
            if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
                options["allow_http"] = True
            retries: dict[str, Any] = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
            self._opened = cast(
                "ObjectStore",
                from_url(self.url, client_options=options, retry_config=retries),  # type: ignore[call-overload]
            )
        return self._opened

    def _fetched(self, key: str, size: int | None) -> Bytes | None:
        """An object from the bucket, by ranges; None where there is none."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            try:
                if size is None:
                    return np.frombuffer(memoryview(obstore.get(self._objects(), key).bytes()), np.uint8)
                found = int(obstore.head(self._objects(), key)["size"])
            except FileNotFoundError:
                return None
            if found != size:
                raise Damaged(f"{self.url}/{key} has {found:,} bytes instead of {size:,}; copy it again")
            content = np.empty(size, np.uint8)

            def fill(start: int) -> None:
                part = content[start : start + RANGE_BYTES]
                fetched = obstore.get_range(self._objects(), key, start=start, length=len(part))
                part[:] = np.frombuffer(memoryview(fetched), np.uint8)

            with ThreadPoolExecutor(_AT_ONCE) as threads:
                list(threads.map(fill, range(0, size, RANGE_BYTES)))
            content.flags.writeable = False
            return content

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        from obstore.exceptions import BaseError  # noqa: PLC0415

        try:
            yield
        except BaseError as error:
            raise BucketUnreachable(self.url, first_line(error)) from error

    def _place(self, key: str) -> Path:
        return self._cache / key.replace("/", "__")

    def _kept(self, key: str) -> Bytes | None:
        path = self._place(key)
        try:
            os.utime(path)  # used last
            return _mapped(path)
        except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
            return None

    def _keep(self, key: str, content: Bytes) -> None:
        """Put an object into the cache, after what was used longest ago has made room for it."""
        if len(content) > self._cache_bytes:
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        with (self._cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            place = self._place(key)
            place.unlink(missing_ok=True)
            self._make_room(len(content))
            partial = self._cache / f".{token_hex(8)}.partial"
            try:
                partial.write_bytes(content.data)
                partial.replace(place)
            except OSError:  # a full disk costs the cache, not the answer
                partial.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        kept = []
        for path in self._cache.iterdir():
            if path.name != ".lock":
                with suppress(FileNotFoundError):
                    kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + needed <= self._cache_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


class BucketFiles(Files):
    """A segment's files in a bucket."""

    def __init__(self, bucket: Bucket, segment: str) -> None:
        self._bucket, self._segment = bucket, segment

    @property
    def folder(self) -> None:
        """See `Files.folder`."""
        return

    def key(self, name: str) -> str:
        """The object of a file."""
        return f"{self._segment}/data.zarr/{name}"

    def document(self, name: str) -> dict[str, Any]:
        """See `Files.document`."""
        return self._document(self.key(name))

    def chunk(self, name: str, *, size: int, check: bool) -> Bytes:
        """See `Files.chunk`."""
        return cast("Bytes", self._bucket.fetch(self.key(name), size=size, check=check))

    def receipts(self) -> list[dict[str, Any]]:
        """See `Files.receipts`."""
        return [self._document(key) for key in self._bucket.names(f"{self._segment}/receipts/")]

    def _document(self, key: str) -> dict[str, Any]:
        raw = cast("Bytes", self._bucket.fetch(key, size=None, check=False))
        return _parsed(raw.tobytes(), key)


def _parsed(content: bytes, place: object) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(content))
    except ValueError as error:
        raise Damaged(f"{place} cannot be read ({error}); {ADVICE}") from error


def _mapped(path: Path) -> Bytes:
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _is_sound(raw: Bytes) -> bool:
    """Whether a chunk matches the checksum at its end."""
    return checksum(raw[:-CHECKSUM_BYTES]) == raw[-CHECKSUM_BYTES:].tobytes()
