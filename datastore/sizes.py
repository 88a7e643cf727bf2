"""How many bytes files take, and how many more the store can, for whatever is to say so."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from datastore.settings import Settings

NO_END = 2**53 - 1
"""The largest number that every reader of JSON takes."""


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, without what links lead to; what has gone counts nothing.

    A file counts as often as it is met: twice under two hard links.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return _below(str(path)) if stat.S_ISDIR(found.st_mode) else found.st_size


def free_bytes(settings: Settings) -> int:
    """Bytes that the store can still take: those of the disk; of a bucket, which has no end, the most there may be."""
    if settings.store:
        return NO_END
    settings.data.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(settings.data).free


def _below(folder: str) -> int:
    total, folders = 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += _of_entry(entry)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return total


def _of_entry(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
