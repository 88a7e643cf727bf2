"""Texts as n-grams: what two texts have in common is counted in runs of n words (datastore/words.py).

An n-gram is known by a 64-bit hash of its words; two different ones share a hash once in some 10^19 pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from datastore.rows import Example

Hashes = NDArray[np.uint64]

_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that multiplying by it loses nothing modulo 2^64 (the golden ratio's digits)."""
KEPT_WORDS = 1 << 16  # as many as 12,000 real rows have, and a third more
LONGEST_KEPT = 64  # characters


def text_of(example: Example) -> str:
    """All that an example says: its turns, or its prompt and completion, one after the other."""
    turns = [f"{message.prefix} {message.content}" for message in example.messages]
    return " ".join(turns or [example.prompt or "", example.completion or ""])


def ngrams(found: Sequence[str], n: int) -> Hashes:
    """The hash of every run of `n` words, in order (m − n + 1,); none where there are fewer words."""
    return ngrams_of(found, [n])[n]


def ngrams_of(found: Sequence[str], sizes: Collection[int]) -> dict[int, Hashes]:
    """`ngrams` for several n at once, each from the shorter ones."""
    each = np.fromiter(map(_kept.__getitem__, found), np.uint64, len(found))
    total, hashes = each.copy(), dict[int, Hashes]()
    for size in range(1, max(sizes, default=0) + 1):
        if size > 1:
            total = total[:-1] * np.uint64(_FACTOR)
            total += each[size - 1 :]
        if size in sizes:
            hashes[size] = total
    return hashes


class _Kept(dict[str, int]):
    """The hash of each word, kept for the next time the word is met.

    Kept are at most `KEPT_WORDS` words of at most `LONGEST_KEPT` characters, and all are forgotten where there is one
    more: 8 MiB where each has 8 letters, 25 MiB where each has 64 beyond the basic plane. The 1.1 million words
    of 12,000 real rows are hashed in 0.35 s of CPU, and in 0.46 s with `lru_cache`, which keeps its words in order.
    """

    def __missing__(self, word: str) -> int:
        found = int.from_bytes(blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        if len(word) <= LONGEST_KEPT:
            if len(self) >= KEPT_WORDS:
                self.clear()
            self[word] = found
        return found


_kept = _Kept()
