"""What the store holds: how many things of each noun, and the bytes that its parts take on the disk.

Bytes are counted by walking the folders, so that the answer is what the disk says and not what the catalog believes.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import cast

from gradstore.types import JobKind, Usage
from sqlalchemy import func, select

from datastore import inventory
from datastore.catalog import Catalog
from datastore.inventory import FEATURES, KINDS
from datastore.leases import collection
from datastore.schema import AdapterRow, JobRow, RunRow, Table, TaxonomyRow
from datastore.settings import Settings
from datastore.sizes import bytes_of

NOUNS: dict[str, type[Table]] = {
    **{kind.part: kind.rows[0] for kind in KINDS if kind.rows and kind.folder == kind.part and kind is not FEATURES},
    "adapters": AdapterRow,
    "runs": RunRow,
    "taxonomies": TaxonomyRow,
}
PARTS = inventory.PARTS
"""Folders of the store; what is beside them counts as `other`."""


def usage(catalog: Catalog, settings: Settings) -> Usage:
    """The store's contents and its bytes."""
    with catalog.reading() as session:
        counts = {noun: session.scalar(select(func.count()).select_from(row)) or 0 for noun, row in NOUNS.items()}
        kinds = session.execute(select(JobRow.kind, func.count()).group_by(JobRow.kind))
        jobs = {collection(cast("JobKind", kind)).removeprefix("/"): number for kind, number in kinds}
        counts |= {noun: number for noun, number in jobs.items() if noun != "jobs"}  # scoring has no noun of its own
    return Usage(counts=counts, bytes=bytes_by_part(settings), free_bytes=shutil.disk_usage(settings.data).free)


def bytes_by_part(settings: Settings) -> dict[str, int]:
    """The bytes of each part of the store, found by walking it. Raises OSError where it cannot be listed."""
    sizes = Counter(dict.fromkeys((*PARTS, "other"), 0))
    for entry in os.scandir(settings.data):
        part = entry.name if entry.name in PARTS else "other"
        sizes[part] += bytes_of(Path(entry.path))
    return dict(sizes)
