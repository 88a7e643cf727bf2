"""Shards: which rows one worker does at a time, and the names of what it leaves behind.

A shard is a whole number of Zarr chunks, so two workers never write the same file. A segment or feature set is named by
the hash of what it was made from: asking again for the same thing finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHUNK_ROWS = 1024
"""Rows of a Zarr chunk: 16 MiB of float16 at 8,192 dims."""

ID_DIGITS = 24
"""Hex digits of an id: 96 bits, so that a thousand million things share an id with probability 1e-11."""


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


def content_id(prefix: str, content: Any) -> str:
    """`prefix` and the hash of `content` as canonical JSON (sorted keys, compact, UTF-8, no NaN).

    Numbers are hashed as JSON writes them: 1 and 1.0 are two contents.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{prefix}_{hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]}"


def segment_id(recipe: Mapping[str, Any], *, rows_hash: str, start: int, stop: int) -> str:
    """Name of the features of rows `start:stop` of the content `rows_hash`, computed by `recipe`."""
    return content_id("seg", {"recipe": dict(recipe), "rows": rows_hash, "start": start, "stop": stop})


def feature_id(recipe: Mapping[str, Any], *, rows_hash: str) -> str:
    """Name of a feature set: all rows of the content `rows_hash` by `recipe`, whatever segments they lie in."""
    return content_id("feat", {"recipe": dict(recipe), "rows": rows_hash})
