"""Zips that are made while they are sent: nothing is written, nothing is held in memory.

With a fixed date, and a folder in the order of its names, so the same content gives the same bytes. Weights do not
compress and are stored; text is compressed at the fastest level, to about a third.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from datastore.outflow import Outflow

READ = 1 << 20  # bytes at a time
DATE = (1980, 1, 1, 0, 0, 0)


def stream(folder: Path) -> Iterator[bytes]:
    """The zip of everything in a folder, piece by piece."""
    out = Outflow()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), DATE)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size  # decides whether the entry needs ZIP64
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while piece := source.read(READ):
                    target.write(piece)
                    yield out.take()
    yield out.take()


def stream_files(files: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[bytes]:
    """The zip of files whose content is made at this moment, each by its name and its pieces."""
    out = Outflow()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, pieces in files:
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as target:  # how long it gets is not known
                for piece in pieces:
                    target.write(piece)
                    yield out.take()
    yield out.take()
