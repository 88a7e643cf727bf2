"""What the store holds: how many things of each noun, and the bytes that its parts take on the disk.

Bytes are counted by walking the folders, so that the answer is what the disk says and not what the catalog
believes; a hard link counts where it is met.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import cast

from gradstore.types import JobKind, Usage
from sqlalchemy import func, select

from datastore.catalog import Catalog
from datastore.leases import collection
from datastore.schema import CheckpointRow, DatasetRow, JobRow, RunRow, SelectionRow, TaskRow
from datastore.settings import Settings

NOUNS = {
    "datasets": DatasetRow,
    "tasks": TaskRow,
    "checkpoints": CheckpointRow,
    "runs": RunRow,
    "selections": SelectionRow,
}
PARTS = (
    *("datasets", "tasks", "checkpoints", "features", "features-cache", "scores", "selections", "ngrams"),
    *("indexes", "questions", "trainings", "imports", "work"),
)
"""Folders of the store; what is beside them counts as `other`."""


def usage(catalog: Catalog, settings: Settings) -> Usage:
    """The store's contents and its bytes."""
    with catalog.reading() as session:
        counts = {noun: session.scalar(select(func.count()).select_from(row)) or 0 for noun, row in NOUNS.items()}
        kinds = session.execute(select(JobRow.kind, func.count()).group_by(JobRow.kind))
        jobs = {collection(cast("JobKind", kind)).removeprefix("/"): number for kind, number in kinds}
        counts |= {noun: number for noun, number in jobs.items() if noun != "jobs"}  # scoring has no noun of its own
    sizes = Counter(dict.fromkeys((*PARTS, "other"), 0))
    for entry in os.scandir(settings.data):
        part = entry.name if entry.name in PARTS else "other"
        sizes[part] += bytes_below(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else _size(entry)
    return Usage(counts=counts, bytes=dict(sizes), free_bytes=shutil.disk_usage(settings.data).free)


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder, without what links lead to; what vanishes in the meantime counts nothing."""
    total, folders = 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += _size(entry)
        except FileNotFoundError:
            continue
    return total


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
