"""A folder as a zip that is made while it is sent: nothing is written, nothing is held in memory.

Stored without compression (weights do not compress), in the order of names and with a fixed date, so the same files
give the same bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

READ = 1 << 20  # bytes at a time
DATE = (1980, 1, 1, 0, 0, 0)


class _Forward(io.RawIOBase):
    """A file that can only be written on, and is emptied as it goes."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]  # any buffer
        self._waiting += piece
        return len(piece)

    def take(self) -> bytes:
        taken = bytes(self._waiting)
        self._waiting.clear()
        return taken


def stream(folder: Path) -> Iterator[bytes]:
    """The zip of everything in a folder, piece by piece."""
    out = _Forward()
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
