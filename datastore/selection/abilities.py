"""Scores of rows by their places in an ability space, and the order in which a task's rows want them (method=cods).

The published code of CODS ends before this: how a projector's embeddings choose rows is our own design. References are
a task's validation rows. A row x is scored, with unit embeddings u and probabilities p of the capabilities, by

    nearest      mean of the largest min(q, references) cosines ⟨u_x, u_r⟩  + β·cos(p_x, mean_r p_r)
    prototype    the cosine of u_x and mean_r u_r                           + β·cos(p_x, mean_r p_r)
    capability   mean of ⟨v_x, b̂_k⟩ over the capabilities k that are asked for

A block of rows is multiplied at a time: memory is 4·`BLOCK`·m bytes for m references, beside the answers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from datastore.influence import NO_SUBTASK, Floats, Mask, Subtasks, TaskScores, masked, normalise
from datastore.selection.tasks import Walk
from datastore.selection.top import ranking, top

BLOCK = 8192
"""Rows whose cosines are computed at a time."""
REFERENCES_AT_ONCE = 32
"""References whose cosines with all rows are held at a time, 4 bytes each."""
FIRST_ROWS = 256
"""Rows that a reference ranks before it needs more."""


@dataclass(frozen=True)
class Places:
    """Where the rows of a pool or a task are; what stands at a row without a place means nothing."""

    embedding: Floats
    """Unit rows u (n, dim)."""
    probabilities: Floats
    """(n, capabilities)"""
    similarities: Floats
    """⟨v, b̂_k⟩ (n, capabilities)."""
    present: Mask
    """Which rows have a place (n,)."""

    def __getitem__(self, rows: NDArray[np.intp] | Mask) -> Places:
        return Places(self.embedding[rows], self.probabilities[rows], self.similarities[rows], self.present[rows])


def joined(places: Sequence[Places]) -> Places:
    """The places of several pools, one after the other."""
    names = ("embedding", "probabilities", "similarities", "present")
    return Places(*(np.concatenate([getattr(each, name) for each in places]) for name in names))


def nearest(pool: Places, references: Places, subtasks: Subtasks, *, neighbours: int, beta: float) -> TaskScores:
    """Scores by the nearest references, all of which have a place, and the subtask of the very nearest."""
    count = min(neighbours, len(references.embedding))
    score, closest = np.empty(len(pool.present), np.float32), np.empty(len(pool.present), np.int64)
    for start in range(0, len(score), BLOCK):
        block = slice(start, start + BLOCK)
        cosines = pool.embedding[block] @ references.embedding.T
        closest[block] = cosines.argmax(axis=1)
        score[block] = np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)
    return masked(score + _agreement(pool, references, beta), subtasks[closest], pool.present)


def prototype(pool: Places, references: Places, *, beta: float) -> TaskScores:
    """Scores by the mean of the references, all of which have a place; no subtask gives them."""
    centre = normalise(references.embedding.mean(axis=0, dtype=np.float64, keepdims=True))
    score = (pool.embedding @ centre.T)[:, 0] + _agreement(pool, references, beta)
    return masked(score, np.full(len(score), NO_SUBTASK, np.int16), pool.present)


def capability(pool: Places, asked: Sequence[int]) -> TaskScores:
    """Scores by base vectors, named by their numbers; no subtask gives them."""
    score = pool.similarities[:, list(asked)].mean(axis=1, dtype=np.float64)
    return masked(score, np.full(len(score), NO_SUBTASK, np.int16), pool.present)


def _agreement(pool: Places, references: Places, beta: float) -> Floats | np.float32:
    """β·cos of the capabilities' probabilities with the references' mean (n,)."""
    if not beta:
        return np.float32(0)
    wanted = normalise(references.probabilities.mean(axis=0, dtype=np.float64, keepdims=True))
    agreement: Floats = np.float32(beta) * (normalise(pool.probabilities) @ wanted.T)[:, 0]
    return agreement


def closest(pool: Floats, references: Floats) -> Floats:
    """The largest cosine of each row with a reference, from unit rows (n, dim) and (m, dim): (n,)."""
    blocks = [(pool[start : start + BLOCK] @ references.T).max(axis=1) for start in range(0, len(pool), BLOCK)]
    return np.concatenate([*blocks, np.empty(0, np.float32)])


@dataclass(frozen=True)
class References:
    """The rows of tasks that a pool's rows are compared with, in the order of their turns."""

    pool: Floats
    """Unit embeddings of the pool (n, dim); what stands at a row without a place means nothing."""
    embedding: Floats
    """Of the references (m, dim)."""
    task: NDArray[np.int16]
    """Number of the task that each is of (m,)."""
    subtask: Subtasks
    """Number of its subtask there (m,)."""
    closest: Floats | None
    """The largest cosine of each row of the pool with a reference (n,); None where rows are not compared with these."""

    def walk(self, among: Mask) -> Walk:
        """Each reference in turn takes its nearest row: (row, number of the reference)."""
        return by_reference(self.pool, self.embedding, among)


def turns(subtasks: Sequence[Hashable]) -> list[int]:
    """The order in which references choose: the first of each subtask, then the second of each, and so on.

    A task's rows lie subtask by subtask: where fewer rows are chosen than there are references, no subtask goes without
    while another is served twice.

    >>> turns([0, 0, 0, 1, 2, 2])
    [0, 3, 4, 1, 5, 2]
    """
    groups: dict[Hashable, list[int]] = {}
    for row, subtask in enumerate(subtasks):
        groups.setdefault(subtask, []).append(row)
    return [row for turn in zip_longest(*groups.values()) for row in turn if row is not None]


def by_reference(embedding: Floats, references: Floats, among: Mask) -> Walk:
    """Each reference in turn takes its nearest row that none has met: (row, number of the reference).

    Of n rows, k are taken by m references that get ⌈k/m⌉ each, give or take one; a reference whose row is refused goes
    on to its next. Equally near rows come in the order of the pool. Memory: 4·n·32 bytes while references rank, and the
    first `FIRST_ROWS` rows of each; one that needs more ranks all.
    """
    met = bytearray(len(among))
    firsts = _firsts(embedding, references, among)
    lines = [_line(embedding, reference, first, among, met) for reference, first in firsts]
    turn = 0
    while lines:
        for row in lines[turn]:
            met[row] = True
            if (yield row, turn):
                break
        else:
            return  # who has met all rows has met everybody's: each has the same candidates
        turn = (turn + 1) % len(lines)


def _firsts(embedding: Floats, references: Floats, among: Mask) -> Iterator[tuple[Floats, NDArray[np.int64]]]:
    """Each reference and its nearest rows."""
    for start in range(0, len(references), REFERENCES_AT_ONCE):
        part = references[start : start + REFERENCES_AT_ONCE]
        for reference, cosines in zip(part, part @ embedding.T, strict=True):
            yield reference, top(cosines, among, FIRST_ROWS)


def _line(embedding: Floats, reference: Floats, first: NDArray[np.int64], among: Mask, met: bytearray) -> Iterator[int]:
    """A reference's rows, the nearest first, that nobody has met when it comes to them."""
    for row in first.tolist():
        if not met[row]:
            yield row
    if np.count_nonzero(among) > len(first):
        left = among.copy()
        left[first] = False
        for row in ranking(embedding @ reference, left).tolist():
            if not met[row]:
                yield row


# What there is ----------------------------------------------------------------------------------------------------


def called_for(probabilities: Floats) -> NDArray[np.int64]:
    """How many rows call for each capability, by a probability over 0.5 (capabilities,)."""
    counts: NDArray[np.int64] = (probabilities > 0.5).sum(axis=0)
    return counts
