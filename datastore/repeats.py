"""Rows that repeat an earlier row's id or text, found by 64-bit keys.

Sorting the keys at the end costs 8 bytes per row and key where a set would cost about 100 while reading. Two different
texts share a key once in some 10⁵ pools of 10⁷ rows, and all that comes of it is a wrong remark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from datastore.rows import Example

NO_ID = 0  # the key of a missing id, which repeats nothing


@dataclass(frozen=True)
class Repeat:
    """A row and the first rows with its id and with its text (None where there is no earlier one), from 0."""

    row: int
    same_id: int | None
    same_text: int | None


def keys(example: Example) -> tuple[int, int]:
    """Keys of the id within its origin, and of the text."""
    turns = [part for message in example.messages for part in (message.role, message.content)]
    texts = turns or [example.prompt or "", example.completion or ""]
    if example.id is None:
        return NO_ID, _key(texts)
    return _key([example.origin, example.id]) or 1, _key(texts)


def repeats(keys: np.ndarray, *, start: int, limit: int) -> tuple[int, list[Repeat]]:
    """How many rows from `start` on repeat an earlier row, and the first `limit` of these; `keys` is (rows, 2)."""
    position = np.arange(len(keys))
    ids, texts = (_first(keys[:, column]) for column in (0, 1))
    ids = np.where(keys[:, 0] == NO_ID, position, ids)
    repeated = np.flatnonzero((ids < position) | (texts < position))
    repeated = repeated[repeated >= start]
    return len(repeated), [
        Repeat(
            row=int(row),
            same_id=int(ids[row]) if ids[row] < row else None,
            same_text=int(texts[row]) if texts[row] < row else None,
        )
        for row in repeated[:limit]
    ]


def _first(keys: np.ndarray) -> np.ndarray:
    """For every row the first row with its key."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[group])


def _key(texts: Sequence[str]) -> int:
    return int.from_bytes(blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")
