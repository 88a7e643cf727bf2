"""Shards: which rows one worker does at a time, a whole number of Zarr chunks, so that no two ever write one file."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_ROWS = 1024
"""Rows that have a chunk's worth of everything: shards begin at their multiples, and no chunk reaches over one."""
CHUNK_BYTES = 64 << 20
"""Of a chunk of long rows: 1,024 of them have 8 MiB at 8,192 int8 and 1 GiB at 2^20, too much to check at once."""


def chunk_rows(rows: int, *, row_bytes: int) -> int:
    """Rows of a chunk of an array of `rows`: 1,024, all there are where these are fewer, or what `CHUNK_BYTES` hold.

    In the last case a power of two, so that chunks of long rows end where those of short ones do.

    >>> chunk_rows(5000, row_bytes=16384), chunk_rows(9, row_bytes=16384), chunk_rows(5000, row_bytes=1 << 21)
    (1024, 9, 32)
    """
    held = max(1, CHUNK_BYTES // row_bytes)
    return max(1, min(rows, CHUNK_ROWS, 1 << (held.bit_length() - 1)))


@dataclass(frozen=True)
class Shard:
    """Rows `start` up to `stop` of a segment."""

    number: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows there are to do."""
        return self.stop - self.start


def plan(rows: int, *, size: int = CHUNK_ROWS) -> list[Shard]:
    """Cover `rows` with shards of `size`, a multiple of `CHUNK_ROWS`; the last one takes what is left.

    >>> plan(2500, size=2048)
    [Shard(number=0, start=0, stop=2048), Shard(number=1, start=2048, stop=2500)]
    """
    if size < CHUNK_ROWS or size % CHUNK_ROWS:
        raise ValueError(f"a shard is a whole number of chunks of {CHUNK_ROWS:,} rows, not {size:,} rows")
    return [Shard(number, start, min(start + size, rows)) for number, start in enumerate(range(0, rows, size))]
