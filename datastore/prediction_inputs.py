"""What influence is predicted from: a row of numbers for each row of a pool, without a gradient.

Stored hidden states and embeddings are read a block at a time; the rest, a few hundred numbers a row, is made once.
Memory, in bytes, of n rows: 4·n·(columns that are not stored), and for `words` 12 for each different word or pair of
words of each row, while they are weighted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gradstore.types import PredictorInput
from numpy.typing import NDArray

from datastore.datasets import Datasets
from datastore.features import Features
from datastore.influence import Floats, Mask, everywhere, normalise, queries
from datastore.segments import Rows
from datastore.selection.words import text_of
from datastore.tasks import Tasks
from datastore.text_statistics import lengths, statistics

BLOCK_ROWS = 4096
WORDS_HASHED = 1 << 18
"""Columns that words and pairs of words are hashed to: of 4,000 rows one in a hundred shares its column."""
DIRECTIONS = 32
"""Principal directions of the weighted words."""
STORED: tuple[PredictorInput, ...] = ("output", "hidden", "rds", "embedding")
"""Inputs that are feature sets of the kind of their name."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a pool's rows."""

    stored: Sequence[Rows]
    """Features that go in as they are."""
    directions: Sequence[Rows] = field(kw_only=True, default=())
    """Features of which the direction goes in, as rows of length one."""
    dense: Floats
    """All other columns (n, c)."""
    valid: Mask
    """Rows that have all of them (n,)."""
    tokens: NDArray[np.int32] | None = None
    """Supervised tokens of each row, where a model has counted them (n,)."""

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return int(self.dense.shape[1]) + sum(view.dim + 1 for view in (*self.directions, *self.stored))

    def of(self, rows: NDArray[np.int64]) -> Floats:
        """The inputs of some rows, in ascending order: (m, columns). Beside a stored row goes the log of its length."""
        parts = [self.dense[rows]]
        for view in (*self.directions, *self.stored):
            found = view.take(rows) * view.scales[rows, None]
            length = np.log1p(np.linalg.norm(found, axis=1, keepdims=True))
            parts += [normalise(found) if view in self.directions else found, length]
        return np.concatenate(parts, axis=1, dtype=np.float32)


@dataclass(frozen=True)
class Gathering:
    """Gathers the inputs that a plan names."""

    features: Features
    datasets: Datasets
    tasks: Tasks
    _texts: dict[str, Floats] = field(default_factory=dict)

    def gather(self, plan: dict[str, Any]) -> Inputs:
        """The inputs of a plan: `inputs` (their names), `dataset`, `task`, and the feature sets `pool_inputs` and
        `task_inputs` by kind. Raises `Conflict` where one has been deleted.
        """
        wanted = plan["inputs"]
        pool = {kind: self.features.views([id])[0] for kind, id in plan["pool_inputs"].items()}
        rows = plan["pool_rows"]
        dense: list[Floats] = [np.zeros((rows, 0), np.float32)]
        if "similarity" in wanted:
            subtasks = [row.subtask for row in self.tasks.validation(plan["task"])]
            for kind, id in plan["task_inputs"].items():
                dense.append(similarity(pool[kind], self.features.views([id])[0], subtasks))
        if "loss" in wanted:
            view = next(view for kind, view in pool.items() if kind != "embedding")
            dense.append(np.stack([_finite(view.losses), np.log1p(np.maximum(_finite(view.tokens), 0))], axis=1))
        dense += [self._of_texts(plan["dataset"], name) for name in ("text", "words") if name in wanted]
        if "origin" in wanted:
            origins = self.datasets.origins(plan["dataset"])
            dense.append(np.eye(len(origins.names), dtype=np.float32)[origins.codes])
        return Inputs(
            stored=[pool[kind] for kind in STORED if kind in wanted and kind != "output"],
            directions=[pool[kind] for kind in ("output",) if kind in wanted],
            dense=np.concatenate(dense, axis=1, dtype=np.float32),
            tokens=next((view.tokens for kind, view in pool.items() if kind != "embedding"), None),
            valid=everywhere([np.ones(rows, bool), *(view.valid for view in pool.values())]),
        )

    def lengths(self, dataset: str) -> Floats:
        """The lengths alone, for a control (n, 2)."""
        return lengths(self._of_texts(dataset, "text"))

    def _of_texts(self, dataset: str, name: str) -> Floats:
        key = f"{dataset} {name}"
        if key not in self._texts:
            self._texts.clear()
            examples = self.datasets.examples(dataset)
            self._texts[key] = statistics(examples) if name == "text" else words(text_of(each) for each in examples)
        return self._texts[key]


def similarity(pool: Rows, task: Rows, subtasks: Sequence[str]) -> Floats:
    """The cosines of a pool's rows with the mean of each subtask of a task, and the mean, the largest and the smallest
    of those with its rows (n, subtasks + 3).
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(subtasks))}
    usable = task.valid
    labels = np.array([numbers[name] for name in subtasks], np.int16)[usable]
    target = normalise(task.features(0, task.rows)[usable])
    means, _ = queries(target, labels, "less")
    found = []
    for start in range(0, pool.rows, BLOCK_ROWS):
        rows = pool.features(start, min(start + BLOCK_ROWS, pool.rows))
        unit = normalise(np.nan_to_num(rows))
        single = unit @ target.T
        found.append(np.c_[unit @ means.T, single.mean(axis=1), single.max(axis=1), single.min(axis=1)])
    return np.concatenate(found).astype(np.float32)


def words(texts: Iterable[str]) -> Floats:
    """Weighted words and pairs of words of each text (tf-idf, sublinear) in their principal directions (n, ≤ 32)."""
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415 - a second, and workers alone need it
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer  # noqa: PLC0415

    hashed = HashingVectorizer(n_features=WORDS_HASHED, ngram_range=(1, 2), alternate_sign=False, norm=None)
    counts = hashed.transform(texts)
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    most = min(DIRECTIONS, weighted.shape[0] - 1)
    if most < 1 or not weighted.nnz:
        return np.zeros((weighted.shape[0], 0), np.float32)
    return np.asarray(TruncatedSVD(most, random_state=0).fit_transform(weighted), np.float32)


def _finite(values: NDArray[Any]) -> Floats:
    return np.nan_to_num(np.asarray(values, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
