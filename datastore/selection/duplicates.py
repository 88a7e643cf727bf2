"""Near-duplicates: a row is passed over where one that was taken before is too much like it.

By features: their cosine, weighted over checkpoints as the scores are, exceeds τ. By text: the share of 5-word runs
that both have in all that either has (Jaccard; Lee et al., Deduplicating Training Data Makes Language Models Better,
arXiv 2107.06499, compare 5-grams) is at least τ. Both are exact, look at the rows that are met only, and cost memory
for the rows that were taken only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datastore.errors import InvalidInput
from datastore.influence import Floats
from datastore.selection.rules import refused
from datastore.selection.words import Hashes, ngrams
from datastore.words import words

SHINGLE_WORDS = 5
SAMPLE = 64  # rows, the first of a walk, that tell which runs of words are frequent
FREQUENT = 8
BLOCK_BYTES = 32 << 20
"""Float32 bytes of the rows that are read and compared together."""
BLOCK_ROWS = 1024
"""The most of them: they are multiplied with each other, too."""
KEPT_BYTES = 256 << 20
"""Float32 bytes of the rows taken that are kept whole."""
MOST_BYTES = 1 << 30
"""Of what is kept of the rows that are asked for; more are refused."""
MOST_PRODUCTS = 2.5e12
"""Multiplications of rows that are asked for with each other: about a minute of two cores."""
SPARING = 0.6
"""Every s-th number is kept for s ≤ 0.6 / (1 − τ): the bound then exceeds τ where the cosine is above about 0.4."""


class TextDuplicates:
    """Rows by their runs of words.

    In any order of all elements, two sets with a Jaccard of at least τ share one among the first |x| − ⌈τ·|x|⌉ + 1 of
    each ("prefix filtering": Bayardo, Ma and Srikant, Scaling Up All Pairs Similarity Search, 2007): only rows that do
    are compared. Runs that many of the rows `first` have, as those of a system prompt, stand last: else all rows that
    have the prompt would be compared with each other (1,200 rows with 300 words in common and 120 of their own, at τ =
    0.75: 27 s of CPU, and 1.2 with this).
    """

    def __init__(self, text: Callable[[int], str], tau: float, *, first: Iterable[int] = ()) -> None:
        self._text = text
        self._tau = tau
        self._frequent = _frequent([shingles(text(row)) for row in first])
        self._taken: list[Hashes] = []
        self._by_shingle: dict[int, list[int]] = defaultdict(list)

    def keep(self, row: int) -> bool:
        """Take the row unless one like it was taken."""
        found = shingles(self._text(row))
        rare_first = found[np.argsort(np.isin(found, self._frequent), kind="stable")]
        prefix = rare_first[: len(found) - ceil(self._tau * len(found) - 1e-9) + 1].tolist()
        near = {other for shingle in prefix for other in self._by_shingle.get(shingle, ())}
        if any(jaccard(found, self._taken[other]) >= self._tau for other in near):
            return False
        for shingle in prefix:
            self._by_shingle[shingle].append(len(self._taken))
        self._taken.append(found)
        return True


def _frequent(sample: Sequence[Hashes]) -> Hashes:
    """The runs that more than one in `FREQUENT` of some texts has."""
    if not sample:
        return np.zeros(0, np.uint64)
    found, counts = np.unique(np.concatenate(sample), return_counts=True)
    return found[counts > max(1, len(sample) // FREQUENT)]


def shingles(text: str) -> Hashes:
    """The different runs of 5 words of a text, or the whole of one that is shorter, sorted; of no words a single 0."""
    found = words(text)
    return np.unique(ngrams(found, min(SHINGLE_WORDS, len(found)))) if found else np.zeros(1, np.uint64)


def jaccard(one: Hashes, other: Hashes) -> float:
    """What both have of what either has; neither is empty."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


class FeatureDuplicates:
    """Rows by their features, as `PoolFeatures.unit` gives them.

    Rows are compared a block at a time: those that a walk is going to meet next (`ahead`) are read together, and
    multiplied in one product with what was taken. Where `rows` rows of d numbers would take more than 256 MiB, only
    every s-th number of those that were taken is kept, a₀, and by Cauchy and Schwarz ⟨a, b⟩ ≤ ⟨a₀, b₀⟩ + ‖a₁‖·‖b₁‖
    for the numbers a₁ that are not: rows for which this exceeds τ are read again and compared in full. The nearer τ is
    to 1 the fewer numbers are enough, down to an eighth. Memory: 4·rows·d/s bytes, at most `MOST_BYTES`, and two blocks
    of 32 MiB. Where the walk passes over most of what was read, as one with quotas may, blocks become as small as what
    it meets of them. `keep` raises `InvalidInput` where so many rows are too many to be compared, and where so many had
    to be passed over that it comes to as much.
    """

    def __init__(
        self,
        features: Callable[[Sequence[int]], Floats],
        tau: float,
        ahead: Iterator[int],
        rows: int,
        *,
        parameter: Literal["dedupe", "tau"] = "dedupe",
    ) -> None:
        self._features = features
        self._parameter = parameter  # which says the threshold
        self._tau = tau
        self._ahead = ahead
        self._wanted = rows
        self._step, self._size = 1, 0  # every so many numbers are kept, rows of a block: known once a row was read
        self._most = 0
        self._products = 0.0  # multiplications so far
        self._met: set[int] = set()
        self._taken: list[int] = []
        self._heads = np.empty((0, 0), np.float32)
        """What is kept of the rows taken, in the first places of (rows, d/s)."""
        self._rests = np.empty(rows, np.float32)
        self._block = _Block([], np.empty((0, 0), np.float32), [])

    def keep(self, row: int) -> bool:
        """Take the row unless one like it was taken."""
        if row not in self._block.places:
            self._look_ahead(row)
        self._met.add(row)
        self._block.asked += 1
        block, place = self._block, self._block.places[row]
        near = block.near[place]
        if len(near) and self._step == 1:
            return False
        if len(near) and (self._features([self._taken[other] for other in near]) @ block.rows[place] > self._tau).any():
            return False
        if block.taken and (block.cosines[place, block.taken] > self._tau).any():
            return False
        head = block.rows[place, :: self._step]
        self._heads[len(self._taken)] = head
        self._rests[len(self._taken)] = _rest(head[None])[0]
        block.taken.append(place)
        self._taken.append(row)
        return True

    def _look_ahead(self, row: int) -> None:
        """Read this row and those that are going to be met next, and find what they might be like."""
        if not self._size:
            dim = self._features([row]).shape[1]
            self._most = self._size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * dim)))
            self._step = _step(self._tau, kept=4 * self._wanted * dim)
            kept = -(-dim // self._step)
            self._check(kept)
            self._heads = np.empty((self._wanted, kept), np.float32)  # of which the system gives what is written to
        elif self._block.asked < len(self._block.rows) // 2:  # a walk that passes over what it was thought to meet
            self._size = max(1, 2 * self._block.asked)
        else:
            self._size = min(self._most, 2 * self._size)
        others = (other for other in self._ahead if other not in self._met and other != row)
        rows = [row, *islice(others, self._size - 1)]
        features = self._features(rows)
        near: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(rows)
        taken = len(self._taken)
        self._count(len(rows) * taken * self._heads.shape[1])
        if taken:
            heads = features[:, :: self._step]
            bounds = heads @ self._heads[:taken].T
            if self._step > 1:
                bounds += _rest(heads)[:, None] * self._rests[:taken]
            slack = 1e-5 if self._step > 1 else 0
            near = [np.flatnonzero(bound > self._tau - slack) for bound in bounds]
        self._block = _Block(rows, features, near)

    def _count(self, products: int) -> None:
        """Refuse to go on where rows are passed over without end."""
        self._products += products
        if self._products > MOST_PRODUCTS:
            detail = (
                f"of {len(self._met):,} rows met {len(self._taken):,} could be taken, and {self._wanted:,} are wanted"
            )
            raise self._refused(detail)

    def _check(self, kept: int) -> None:
        """Refuse to compare so many rows, of which so many numbers each are kept."""
        most = min(MOST_BYTES // (4 * kept), int((2 * MOST_PRODUCTS / kept) ** 0.5))
        if self._wanted > most:
            asked = f"and {self._wanted:,} are asked for"
            raise self._refused(f"at most {most:,} rows of these features are compared with each other, {asked}")

    def _refused(self, detail: str) -> InvalidInput:
        others = ", or for dedupe_by=text" if self._parameter == "dedupe" else ", or for tau=1, which compares none"
        return refused(
            self._parameter, f"{detail}: ask for fewer (k, pct), for a {self._parameter} nearer to 1{others}"
        )


def _step(tau: float, *, kept: int) -> int:
    """Every how many numbers are kept of rows that take so many bytes."""
    enough = [step for step in (1, 2, 4, 8) if step == 1 or step <= SPARING / max(1 - tau, 1e-9)]
    return next((step for step in enough if kept <= KEPT_BYTES * step), enough[-1])


class _Block:
    """Rows that were read together."""

    def __init__(self, rows: Sequence[int], features: Floats, near: Sequence[NDArray[np.int64]]) -> None:
        self.places = {row: place for place, row in enumerate(rows)}
        self.rows = features
        self.cosines = features @ features.T
        self.near = near
        """The rows taken before that each might be like, by their number among those."""
        self.taken: list[int] = []
        self.asked = 0
        """How many of them were met."""


def _rest(heads: Floats) -> Floats:
    """The length of what is left of unit rows beside these of their numbers (n,)."""
    lengths: Floats = np.sqrt(np.clip(1 - np.square(heads).sum(axis=1), 0, 1))
    return lengths
