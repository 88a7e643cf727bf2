"""Removing things from the store: from where they are kept for good, and from their places."""

from __future__ import annotations

import shutil
from pathlib import Path

from datastore.dataset_files import SOURCES
from datastore.depot import Depot, evict


def forget(depot: Depot, path: Path) -> None:
    """Have a thing kept no longer, with the things that lie in its place, and remove it from there."""
    for name in depot.names(path / SOURCES, "*.json"):  # of a dataset
        depot.delete(path / SOURCES / name)
    depot.delete(path)
    evict(path)


def remove(path: Path) -> None:
    """Remove a file or folder; nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
