"""A file that is sent while it is written, for writers that want a file: zip archives, Parquet."""

from __future__ import annotations

import io


class Outflow(io.RawIOBase):
    """A file that can only be written on, and is emptied as it goes."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._taken = 0

    def writable(self) -> bool:
        """Whether it can be written on: always."""
        return True

    def tell(self) -> int:
        """How many bytes have been written so far."""
        return self._taken + len(self._waiting)

    def write(self, data: object) -> int:
        """Take bytes in."""
        piece = bytes(data)  # type: ignore[call-overload]  # any buffer
        self._waiting += piece
        return len(piece)

    def take(self) -> bytes:
        """What has been written since the last call."""
        taken = bytes(self._waiting)
        self._waiting.clear()
        self._taken += len(taken)
        return taken
