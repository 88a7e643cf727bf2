"""An S3-compatible bucket: objects that are whole or absent, put once, copied, listed and read by ranges.

Keys, region and endpoint come from the usual variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …). Failed requests
are tried again, with growing pauses, for a minute; then `BucketUnreachable` is raised. What is sent is signed with its
SHA-256, which the server compares; objects of one part are compared again by their MD5 where the server tells it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from datastore.errors import BucketRefused, BucketUnreachable, Damaged, first_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RANGE_BYTES = 8 << 20
"""Of one request: its round trip is a small part of the transfer."""
AT_ONCE = 8  # requests of one transfer
_RETRIES, _RETRY_SECONDS, _TIMEOUT_SECONDS = 10, 60, 30
_LOOK_SECONDS = 3  # of one look, which is not tried again

Bytes = NDArray[np.uint8]
ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class Found:
    """What a bucket tells of an object."""

    key: str
    bytes: int
    modified_at: datetime
    tag: str | None
    """Of an object that came in one part and is not encrypted with a key of its own: the MD5 of its content."""

    @property
    def age(self) -> float:
        """Seconds since it was put."""
        return (datetime.now(UTC) - self.modified_at).total_seconds()


def at_once(work: Callable[[ItemT], FoundT], items: Iterable[ItemT]) -> list[FoundT]:
    """Do some requests side by side; what they return, in order. The first error is raised."""
    with ThreadPoolExecutor(AT_ONCE, "bucket") as threads:
        return list(threads.map(work, items))


class Bucket:
    """The objects under an address `s3://bucket/prefix`; every method raises `BucketUnreachable`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: ObjectStore | None = None

    def reach(self) -> None:
        """See whether the bucket answers, asked once and within seconds, where all else tries again for a minute."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            once = _open(self.url, retries=0, patience=_LOOK_SECONDS, timeout=_LOOK_SECONDS)
            next(iter(obstore.list(once, chunk_size=1)), None)

    def head(self, key: str) -> Found | None:
        """What is told of an object; None where there is none."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            try:
                return _found(obstore.head(self._objects(), key))
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes | None:
        """A small object; None where there is none."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            try:
                return bytes(obstore.get(self._objects(), key).bytes())
            except FileNotFoundError:
                return None

    def fetch(self, key: str, size: int) -> Bytes | None:
        """An object whose size is known, by ranges; None where there is none. Raises `Damaged` for another size."""
        content = np.empty(size, np.uint8)

        def fill(start: int, part: bytes | memoryview) -> None:
            content[start : start + len(part)] = np.frombuffer(part, np.uint8)

        if not self._ranges(key, size, fill):
            return None
        content.flags.writeable = False
        return content

    def download(self, key: str, path: Path, size: int) -> bool:
        """Write an object whose size is known to a new file, flushed to the disk; False where there is none.

        Raises `Damaged` for another size.
        """
        with path.open("xb") as file:
            found = self._ranges(key, size, lambda start, part: os.pwrite(file.fileno(), part, start))
            os.fsync(file.fileno())
        return found

    def put(self, key: str, content: bytes | Path, *, create: bool = False) -> bool:
        """Put an object, or a file as one; with `create` only where there is none: False where there is."""
        import obstore  # noqa: PLC0415
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

        small = isinstance(content, bytes) or content.stat().st_size <= RANGE_BYTES
        with self._reaching():
            try:
                obstore.put(
                    self._objects(), key, content, mode="create" if create else "overwrite",
                    use_multipart=False if create or small else None,
                )  # fmt: skip
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def put_checked(self, key: str, content: bytes) -> None:
        """Put an object in one part, and see that it is what was sent. Raises `Damaged`."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            tag = obstore.put(self._objects(), key, content, use_multipart=False)["e_tag"]
        if _plain(tag) != hashlib.md5(content, usedforsecurity=False).hexdigest() and self.read(key) != content:
            raise Damaged(f"{self.url}/{key} is not what was sent: the next attempt writes it again")

    def copy_checked(self, source: str, target: str, *, sha256: str) -> bool:
        """Copy an object inside the bucket, and see that it is the same; False where there is no source.

        Raises `Damaged`.
        """
        import obstore  # noqa: PLC0415

        before = self.head(source)
        if before is None:
            return False
        with self._reaching():
            try:
                obstore.copy(self._objects(), source, target)
            except FileNotFoundError:
                return False
        after = self.head(target)
        if after is not None and after.tag == before.tag and after.bytes == before.bytes:
            return True
        content = self.read(target)
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            raise Damaged(f"{self.url}/{target} is not what {source} was")
        return True

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the bucket; nothing happens where there is none."""
        import obstore  # noqa: PLC0415

        with self._reaching(), suppress(FileNotFoundError):
            obstore.copy(self._objects(), source, target)

    def sha256(self, key: str, size: int) -> str | None:
        """The SHA-256 of an object whose size is known, read by ranges; None where there is none any more."""
        import obstore  # noqa: PLC0415

        def fetch(start: int) -> memoryview:
            with self._reaching():
                return memoryview(
                    obstore.get_range(self._objects(), key, start=start, length=min(RANGE_BYTES, size - start))
                )

        digest, step = hashlib.sha256(), AT_ONCE * RANGE_BYTES
        try:
            for first in range(0, size, step):
                for part in at_once(fetch, range(first, min(first + step, size), RANGE_BYTES)):
                    digest.update(part)
        except BucketRefused:
            if self.head(key) is None:
                return None
            raise
        return digest.hexdigest()

    def below(self, prefix: str) -> list[Found]:
        """All objects whose keys begin so; `prefix` ends with a slash."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            return [_found(item) for page in obstore.list(self._objects(), prefix=prefix) for item in page]

    def inside(self, prefix: str) -> tuple[list[Found], list[str]]:
        """The objects of a folder and the names of the folders in it; `prefix` ends with a slash."""
        import obstore  # noqa: PLC0415

        with self._reaching():
            listed = obstore.list_with_delimiter(self._objects(), prefix)
            folders = [folder.rstrip("/").rpartition("/")[2] for folder in listed["common_prefixes"]]
            return [_found(item) for item in listed["objects"]], folders

    def delete(self, *keys: str) -> None:
        """Delete objects, as far as they are there."""
        import obstore  # noqa: PLC0415

        if keys:
            with self._reaching():
                obstore.delete(self._objects(), list(keys))

    def delete_below(self, prefix: str) -> None:
        """Delete all objects whose keys begin so; `prefix` ends with a slash."""
        self.delete(*(found.key for found in self.below(prefix)))

    def _ranges(self, key: str, size: int, take: Callable[[int, bytes | memoryview], object]) -> bool:
        """Fetch an object by ranges, several at a time; False where there is none."""
        import obstore  # noqa: PLC0415

        found = self.head(key)
        if found is None:
            return False
        if found.bytes != size:
            raise Damaged(f"{self.url}/{key} has {found.bytes:,} bytes instead of {size:,}")

        def fetch(start: int) -> bool:
            length = min(RANGE_BYTES, size - start)
            with self._reaching():
                try:
                    part = obstore.get_range(self._objects(), key, start=start, length=length)
                except FileNotFoundError:
                    return False
            take(start, memoryview(part))
            return True

        return all(at_once(fetch, range(0, size, RANGE_BYTES)))

    def _objects(self) -> ObjectStore:
        if self._opened is None:
            self._opened = _open(self.url, retries=_RETRIES, patience=_RETRY_SECONDS, timeout=_TIMEOUT_SECONDS)
        return self._opened

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        from obstore import exceptions  # noqa: PLC0415

        try:
            yield
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise BucketRefused(self.url, first_line(error)) from error
        except FileNotFoundError as error:  # of an object it is caught where it is asked for
            raise BucketRefused(self.url, "there is no such bucket") from error
        except exceptions.BaseError as error:
            if "404 Not Found" in str(error):  # of a list, which has no other kind
                raise BucketRefused(self.url, "there is no such bucket") from error
            raise BucketUnreachable(self.url, first_line(error)) from error


def _open(url: str, *, retries: int, patience: float, timeout: float) -> ObjectStore:
    """A client of the bucket; `patience` and `timeout` are seconds of all tries and of one."""
    from obstore.store import from_url  # noqa: PLC0415 - only where a bucket is configured

    options: dict[str, Any] = dict.fromkeys(("timeout", "connect_timeout"), timedelta(seconds=timeout))
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = True
    again: dict[str, Any] = {"max_retries": retries, "retry_timeout": timedelta(seconds=patience)}
    return cast("ObjectStore", from_url(url, client_options=options, retry_config=again))  # type: ignore[call-overload]


def _found(item: Any) -> Found:
    return Found(str(item["path"]), int(item["size"]), item["last_modified"], _plain(item["e_tag"]))


def _plain(tag: str | None) -> str | None:
    return None if tag is None else tag.strip('"')
