"""BM25: how well a pool's texts match those of tasks' validation rows, word by word (Robertson and Zaragoza, 2009).

A validation row q is the query and a pool's row d the document, in Lucene's form (Kamphuis et al., ECIR 2020):

    score(d, q) = Σ ln(1 + (N − n_t + ½) / (n_t + ½)) · f_td / (f_td + k₁·(1 − b + b·|d| / mean |d|))

over the words t of q, each as often as q has it. f_td counts t in d, |d| are the words of d, n_t the rows of the pool
that have t, N all of them. k₁ = 1.2 and b = 0.75 are Lucene's.

The weight of each word in each row is bm25s's work. It is told only the words that some query has, all others being one
more word: that changes no score. A row's scores for all queries are one sparse product, and the linear part of the
aggregate is folded into the queries first: 57 subtasks instead of 285 rows (MMLU).
Memory, in bytes, of T words in the pool, E pairs of a row and a word of the queries in it, and n rows:

    4·T + 40·E + 64 MiB + 14·n·tasks
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gradstore.types import Aggregate

from datastore.errors import Conflict
from datastore.influence import NO_SUBTASK, Floats, Subtasks, TaskScores, masked, reduce
from datastore.words import words

if TYPE_CHECKING:  # imported where the work is
    from scipy.sparse import csr_matrix

K1, B = 1.2, 0.75
BM25_VERSION = 2
"""Counted up when the words of a text or their weights change: scores of two versions are never mixed."""
NO_WORDS = "no words"
QUERY_BYTES = 64 << 20  # of the queries that are multiplied at once
BLOCK_ROWS = 1024  # rows of the pool that are multiplied at once, and between two reports

OnRows = Callable[[int], None]


@dataclass(frozen=True)
class TextTarget:
    """The validation rows of a task: their texts, and the number of the subtask of each."""

    texts: Sequence[str]
    subtasks: Sequence[int]


def score(
    pool: Iterable[str], targets: Sequence[TextTarget], aggregate: Aggregate, *, on_rows: OnRows = lambda _: None
) -> list[TaskScores]:
    """The scores of every text of the pool for each task; a text without words has none.

    `on_rows` is called before each thousand rows and more, while they are read (0 to n) and while they are scored (n to
    2·n). Raises `Conflict` where a task has no validation row with a word.
    """
    vocabulary: dict[str, int] = {}
    asked = [_Queries.of(target, vocabulary) for target in targets]
    documents = _Documents(_read(pool, vocabulary, on_rows))
    documents.on_pass = lambda: on_rows(len(documents))
    valid = np.fromiter(map(len, documents), np.int64, len(documents)) > 0
    weights = _weights(documents, vocabulary)
    del documents[:]
    count = len(valid)
    results = []
    for number, queries in enumerate(asked):

        def report(done: int, before: int = number * count) -> None:
            on_rows(count + (before + done) // len(asked))

        score, subtask = _best(weights, *queries.folded(aggregate, len(vocabulary)), aggregate, report)
        results.append(masked(score, subtask, valid))
    return results


class _Documents(list["array[int]"]):  # an array has no type to index at run time
    """The words of every row as numbers; who goes through them is heard of, so that a lease can be kept."""

    on_pass: Callable[[], None] = staticmethod(lambda: None)

    def __iter__(self) -> Iterator[array[int]]:
        for start in range(0, len(self), BLOCK_ROWS):
            self.on_pass()
            yield from self[start : start + BLOCK_ROWS]


@dataclass(frozen=True)
class _Queries:
    """How often each validation row of a task has each word, and its subtask; rows without a word are left out."""

    rows: Sequence[array[int]]
    subtasks: Subtasks

    @classmethod
    def of(cls, target: TextTarget, vocabulary: dict[str, int]) -> _Queries:
        """Number the words of a task's rows, new ones on from those known."""
        rows = [
            array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]) for text in target.texts
        ]
        usable = [number for number, row in enumerate(rows) if row]
        if not usable:
            raise Conflict(
                f"none of the task's {len(rows)} validation rows has a word, so nothing can be compared: ask for "
                "another method than bm25"
            )
        return cls(
            [rows[number] for number in usable], np.array([target.subtasks[number] for number in usable], np.int16)
        )

    def folded(self, how: Aggregate, size: int) -> tuple[csr_matrix, Subtasks]:
        """What rows are multiplied with (q, size), the linear part of the aggregate taken, and the subtask of each."""
        from scipy.sparse import csr_matrix  # noqa: PLC0415 - heavy, and of this method only

        ends = np.cumsum([0, *map(len, self.rows)])
        flat = np.concatenate([np.frombuffer(row, np.int32) for row in self.rows])
        counts = csr_matrix((np.ones(len(flat), np.float32), flat, ends), shape=(len(self.rows), size))
        if how in ("max", "min"):
            return counts, self.subtasks
        groups = self.subtasks if how == "less" else np.full(len(self.rows), NO_SUBTASK, np.int16)
        present, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        means = csr_matrix((1 / sizes[group], (group, np.arange(len(group)))), shape=(len(present), len(group)))
        return (means @ counts).astype(np.float32).tocsr(), present


def _read(pool: Iterable[str], vocabulary: dict[str, int], on_rows: OnRows) -> Iterator[array[int]]:
    """The words of every row as numbers; those that no query has are one, the first free number."""
    other = len(vocabulary)
    number = vocabulary.get
    for row, text in enumerate(pool):
        if row % BLOCK_ROWS == 0:
            on_rows(row)
        yield array("i", [number(word, other) for word in words(text)])


def _weights(documents: _Documents, vocabulary: dict[str, int]) -> csr_matrix:
    """BM25's weight of each word of the queries in each row (n, words)."""
    from bm25s import BM25  # noqa: PLC0415 - heavy, and of this method only
    from scipy.sparse import csc_matrix, csr_matrix  # noqa: PLC0415

    shape = len(documents), len(vocabulary) + 1
    if not any(documents):
        return csr_matrix((len(documents), len(vocabulary)), dtype=np.float32)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # which it sets to DEBUG when it is imported
    index = BM25(k1=K1, b=B, method="lucene", csc_backend="scipy")
    index.index((documents, {**vocabulary, "": len(vocabulary)}), show_progress=False)
    found: dict[str, Any] = index.scores
    weights = csc_matrix((found["data"], found["indices"], found["indptr"]), shape=shape)
    return weights[:, :-1].tocsr()


def _best(
    weights: csr_matrix, queries: csr_matrix, subtasks: Subtasks, how: Aggregate, on_rows: OnRows
) -> tuple[Floats, Subtasks]:
    """Per row the largest (for `min` the smallest) score for the queries, and its subtask; of equals the first."""
    count, size = weights.shape
    score, subtask = np.zeros(count, np.float32), np.full(count, NO_SUBTASK, np.int16)
    step = max(1, QUERY_BYTES // (4 * max(size, 1)))
    batches = list(range(0, queries.shape[0], step))
    for batch in batches:
        part = np.ascontiguousarray(queries[batch : batch + step].toarray().T)
        for start in range(0, count, BLOCK_ROWS):
            on_rows((batch // step * count + start) // len(batches))
            rows = slice(start, start + BLOCK_ROWS)
            found, of = reduce(weights[rows] @ part, subtasks[batch : batch + step], how)
            better = found < score[rows] if how == "min" else found > score[rows]
            better |= batch == 0
            score[rows][better], subtask[rows][better] = found[better], of[better]
    on_rows(count)
    return score, subtask
