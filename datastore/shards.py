"""Shards: which rows one worker does at a time, a whole number of Zarr chunks, so that no two ever write one file."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_ROWS = 1024
"""Rows of a Zarr chunk: 16 MiB of float16 at 8,192 dims."""


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
