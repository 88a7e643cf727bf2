"""The rows of a pool that have the highest and the lowest influence on a question, found exactly.

With unit rows, S[z, v] = Σ_i w_i ⟨φ_i(z), φ_i(v)⟩ over the checkpoints i (LESS, arXiv 2402.04333, section 4), and no
aggregate: a question is one row. Candidates are chosen in float32, by streaming the store once or by an index
(datastore/index.py); their scores are then computed anew in float64 from the stored rows, and decide the order. A score
that is reported has no rounding but the store's own; of rows with equal scores the first comes first.

A pass over the store takes as long as decoding and multiplying it does, and 4·n bytes for each question asked at once
(`SCORES_BYTES` in all), beside two blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from datastore.errors import Damaged
from datastore.influence import Floats, Mask
from datastore.segments import BLOCK_BYTES, Rows

SCORES_BYTES = 256 << 20
"""Of the scores of all rows for the questions that are asked in one pass."""
ROUNDING = 1e-5
"""What a float32 score of unit rows may be off by, with room to spare: rows this near to the last one are looked at."""

FEW = 8
"""Times k: so many candidates are scored in float64 at once."""

Places = NDArray[np.int64]
Real = TypeVar("Real", bound=np.floating[Any])


@dataclass(frozen=True)
class Pool:
    """A pool's rows: one view per checkpoint, the checkpoints' weights, and which rows may be found."""

    views: Sequence[Rows]
    weights: Sequence[float]
    wanted: Mask
    """(n,); rows without a feature at some checkpoint are never among them."""

    def __post_init__(self) -> None:
        if len(self.views) != len(self.weights) or {view.rows for view in self.views} != {len(self.wanted)}:
            raise ValueError("a pool has one weight per view, and all views have the rows of the mask")

    @property
    def rows(self) -> int:
        """Rows of the pool, found or not."""
        return len(self.wanted)


@dataclass(frozen=True)
class Extreme:
    """The rows at one end, the most extreme first."""

    rows: Places
    """(m,) positions in the pool."""
    parts: NDArray[np.float64]
    """(m, checkpoints) w_i ⟨φ_i(z), φ_i(v)⟩; their sum is the score."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """(m,)"""
        found: NDArray[np.float64] = self.parts.sum(axis=1)
        return found


@dataclass(frozen=True)
class Ends:
    """What is found for one question."""

    most: Extreme
    least: Extreme


def exact(
    pool: Pool, asked: NDArray[np.floating], k: int, *, on_rows: Callable[[int], None] | None = None
) -> list[Ends]:
    """The k rows with the highest and the k with the lowest scores for each question, from a pass over all rows.

    `asked`: unit rows (questions, checkpoints, dim). `on_rows` hears how many rows of a pass are done. Raises `Damaged`
    where stored bytes are missing or do not match their checksum.
    """
    at_once = max(1, SCORES_BYTES // (4 * max(1, pool.rows)))
    found = []
    for first in range(0, len(asked), at_once):
        part = asked[first : first + at_once]
        scores = all_scores(pool, part, on_rows=on_rows)
        for question, row in zip(part, scores, strict=True):
            found.append(best_of(pool, question, extremes(row, pool.wanted, k), k))
    return found


def all_scores(pool: Pool, asked: NDArray[np.floating], *, on_rows: Callable[[int], None] | None = None) -> Floats:
    """The score of every row for every question, in float32 (questions, n); of rows without a feature 0."""
    scores = np.zeros((len(asked), pool.rows), np.float32)
    weighted = [
        np.ascontiguousarray(asked[:, number] * weight, np.float32) for number, weight in enumerate(pool.weights)
    ]
    for start, stop, begins in blocks(pool):
        for view, queries in zip(pool.views, weighted, strict=True):
            scores[:, start:stop] += queries @ directions(view, start, stop, check=begins).T
        if on_rows is not None:
            on_rows(stop)
    if not all(np.isfinite(row[pool.wanted]).all() for row in scores):
        raise Damaged(f"features of {pool.views[0].names[0][0]} are not finite: compute them again")
    return scores


def extremes(scores: Floats, wanted: Mask, k: int) -> Places:
    """Rows that may be among the k highest or lowest of these float32 scores (n,), in order of rows."""
    rows = np.flatnonzero(wanted)
    if len(rows) <= 2 * k:
        return rows
    values = scores[rows]
    ordered = np.partition(values, (k - 1, len(values) - k))
    near = (values <= ordered[k - 1] + ROUNDING) | (values >= ordered[len(values) - k] - ROUNDING)
    found: Places = rows[near]
    return found


def best_of(pool: Pool, question: NDArray[np.floating], candidates: Places, k: int) -> Ends:
    """The k highest and the k lowest of the candidates (rows in ascending order) by their exact scores.

    `question`: unit rows (checkpoints, dim). Of many, those that may be among them are found in float32 first.
    """
    if len(candidates) > FEW * k:
        coarse = _coarse_scores(pool, question, candidates)
        candidates = candidates[extremes(coarse, np.ones(len(candidates), bool), k)]
    parts = exact_parts(pool, question, candidates)
    scores = parts.sum(axis=1)
    highest = np.argsort(-scores, kind="stable")[:k]
    lowest = np.argsort(scores, kind="stable")[:k]
    return Ends(*(Extreme(candidates[chosen], parts[chosen]) for chosen in (highest, lowest)))


def _coarse_scores(pool: Pool, question: NDArray[np.floating], rows: Places) -> Floats:
    """The scores of some rows (ascending) for one question, in float32 (rows,)."""
    scores = np.zeros(len(rows), np.float32)
    for number, (view, weight) in enumerate(zip(pool.views, pool.weights, strict=True)):
        asked = (question[number] * weight).astype(np.float32)
        for places, taken in view.taken_blocks(rows):
            scores[places] += _along(taken, asked)
    return scores


def exact_parts(pool: Pool, question: NDArray[np.floating], rows: Places) -> NDArray[np.float64]:
    """w_i ⟨φ_i(z), φ_i(v)⟩ of some rows (ascending) and one question, in float64: (rows, checkpoints)."""
    parts = np.empty((len(rows), len(pool.views)), np.float64)
    for number, (view, weight) in enumerate(zip(pool.views, pool.weights, strict=True)):
        asked = question[number].astype(np.float64)
        for places, taken in view.taken_blocks(rows):
            parts[places, number] = weight * _along(taken.astype(np.float64), asked)
    return parts


def _along(rows: NDArray[Real], question: NDArray[Real]) -> NDArray[Real]:
    """Products of a question (dim,) with rows (n, dim), each divided by its length; 0 where that is 0. (n,)"""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return np.asarray(rows @ question / np.where(lengths > 0, lengths, 1), rows.dtype)


def directions(view: Rows, start: int, stop: int, *, check: bool = False) -> Floats:
    """Rows `start:stop` divided by their length, in float32; a row without a feature is zeros. (n, dim)"""
    rows = view.decoded(start, stop, check=check)
    lengths: Floats = view.part("lengths", start, stop)[:, None]
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def blocks(pool: Pool) -> Iterator[tuple[int, int, bool]]:
    """Ranges of rows that lie in one chunk at every checkpoint, and whose float32 numbers fit a core's caches; and
    whether a range is the first of its chunk.
    """
    step = max(1, BLOCK_BYTES // (4 * pool.views[0].dim))
    edges = sorted({edge for view in pool.views for edge in view.edges} | {0, pool.rows})
    for first, last in pairwise(edges):
        for start in range(first, last, step):
            yield start, min(start + step, last), start == first
