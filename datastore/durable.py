"""Files that are whole or absent: written elsewhere, flushed to the disk, then renamed into place.

A rename is atomic and costs nothing; the flushes cost 1-10 ms each on a disk, which a shard of seconds does not notice.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from datastore.errors import NotEnoughSpace
from datastore.sizes import bytes_of

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a full disk: the disk itself, a user's share of it, or the largest file that is allowed."""


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, and flush the copy to the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: a rename is lasting only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` for a file to write before it is moved or linked there; it is gone at the end.

    A killed process leaves the file behind for `sweep_files`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end; after an error, what was there stays."""
    with beside(path) as partial:
        yield partial
        partial.replace(path)


@contextmanager
def unfinished(folder: Path, label: str) -> Iterator[Path]:
    """A new folder inside `folder` to build something in; what has not been moved away at the end is removed.

    Raises `NotEnoughSpace` where the disk is full. A killed process leaves the folder behind for `sweep`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{label}.{uuid4().hex}"
    partial.mkdir()
    try:
        yield partial
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NotEnoughSpace(needed=bytes_of(partial), free=shutil.disk_usage(folder).free) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def place(partial: Path, final: Path) -> bool:
    """Rename a finished folder into place; False where something is there already."""
    sync_folder(partial)
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            return False
        raise
    sync_folder(final.parent)
    return True


def sweep(folder: Path, *, older_than: float) -> int:
    """Remove unfinished folders untouched for `older_than` seconds; returns how many there were."""
    stale = [path for path in folder.iterdir() if untouched_for(path) > older_than] if folder.is_dir() else []
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return len(stale)


def sweep_files(folder: Path, *, older_than: float) -> int:
    """Remove files that `beside` left, untouched for `older_than` seconds; returns how many there were."""
    stale = [path for path in folder.glob(".*") if untouched_for(path) > older_than]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def untouched_for(path: Path) -> float:
    """Seconds since the last modification of a file, or inside a folder; 0 where it vanishes meanwhile."""
    try:
        return time.time() - max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
    except FileNotFoundError:
        return 0.0
