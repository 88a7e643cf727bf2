"""Texts as n-grams: what two texts have in common is counted in runs of n words (datastore/words.py).

An n-gram is known by a 64-bit hash of its words; two different ones share a hash once in some 10^19 pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

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


@dataclass(frozen=True)
class Ngrams:
    """The runs of one number of words in several texts, text by text and in order."""

    hashes: Hashes
    """Of each run (m,)."""
    text: NDArray[np.int64]
    """Which text it is in (m,)."""
    place: NDArray[np.int64]
    """Its first word there (m,)."""


def ngrams(found: Sequence[str], n: int) -> Hashes:
    """The hash of every run of `n` words, in order (m − n + 1,); none where there are fewer words."""
    return dict(_rolled(_hashes(found), n))[n]


def ngrams_in(texts: Sequence[Sequence[str]], sizes: Collection[int]) -> dict[int, Ngrams]:
    """The runs of several numbers of words in some texts: a run is in one text.

    All are hashed together, each from the shorter ones, and for a text of 92 words that takes a twentieth of the time
    that it takes by itself.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    text = np.repeat(np.arange(len(texts)), lengths)
    place = np.arange(len(text)) - (np.cumsum(lengths) - lengths)[text]
    left = lengths[text] - place
    found = {}
    for size, hashes in _rolled(_hashes(chain.from_iterable(texts)), max(sizes, default=0)):
        if size in sizes:
            whole = np.flatnonzero(left[: len(hashes)] >= size)
            found[size] = Ngrams(hashes[whole], text[whole], place[whole])
    return found


def _hashes(found: Iterable[str]) -> Hashes:
    return np.fromiter(map(_kept.__getitem__, found), np.uint64)


def _rolled(each: Hashes, most: int) -> Iterator[tuple[int, Hashes]]:
    """Runs of 1 to `most` words, by the hashes of the words."""
    total = each
    for size in range(1, most + 1):
        if size > 1:
            total = total[:-1] * np.uint64(_FACTOR)
            total += each[size - 1 :]
        yield size, total


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
