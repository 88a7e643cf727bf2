"""Scores of a pool for any number of tasks: the feature store streamed once, and what came out kept.

The linear part of the aggregate is folded into the queries first (datastore/influence.py), all tasks' queries are
multiplied in one product, and a block of rows is decoded, multiplied and dropped while it is in the cache
(datastore/products.py). Scores are kept in pieces of the pool's segments: workers share a large pool's pieces, and a
grown pool scores its new segment only.
Memory beside the mapped files, with c checkpoints, m reference rows, q queries (subtasks for `less`, one a task for
`avg`, reference rows for the others) and n rows in the piece, at most 65,536, in bytes:

    12·c·q·dim + 4·m·dim + threads · (8 MiB·c + 12·1,024·q) + (16·c + 14·tasks)·n

and 7 bytes a task for each row of the pool where it is answered. MMLU (57 × 5) at 4 checkpoints of 8,192 dims and two
threads: 105 MiB.
The order in which a product sums depends on a row's place in its block: two passes over other segments, and two
kernels, agree within 1e-6 of a score.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import Aggregate
from numpy.typing import NDArray

from datastore.array_files import read_arrays, write_arrays
from datastore.depot import LOCAL, Depot, evict
from datastore.durable import sweep, unfinished
from datastore.errors import Damaged
from datastore.identity import content_id
from datastore.influence import (
    Floats,
    Mask,
    Subtasks,
    TaskScores,
    checkpoint_weights,
    everywhere,
    masked,
    queries,
    reduce,
    usable_rows,
)
from datastore.nearness import Around, Doubles
from datastore.products import NUMPY, Kernel, Products
from datastore.segments import VALID, Rows, ranges
from datastore.shards import CHUNK_ROWS

log = logging.getLogger(__name__)

SCORES_VERSION = 1
"""Counted up when the arithmetic changes, so that old results are not found again."""
PIECE_ROWS = 64 * CHUNK_ROWS
"""Rows that are scored, kept and found again together: about a second of work, or 0.5 GB of int8 at 8,192 dims."""
AHEAD = 4
"""Blocks that wait for each thread: with one, a thread that is done waits until somebody looks at its result."""
_ARRAYS = ("score", "subtask", "valid")
How = Aggregate | Around
"""How a row's cosines with a task's rows become its score: by an aggregate, or a rule that looks at all at once."""


class Target:
    """A task's reference rows, one view per checkpoint, and the subtask of each row."""

    def __init__(self, views: Sequence[Rows], subtasks: Sequence[str]) -> None:
        if any(view.rows != len(subtasks) for view in views):
            raise ValueError(f"{len(subtasks)} subtasks for {[view.rows for view in views]} reference rows")
        self.views = tuple(views)
        self.subtasks = tuple(dict.fromkeys(subtasks))
        """Names of the subtasks, in order of appearance: the numbers in the scores count these."""
        numbers = {name: number for number, name in enumerate(self.subtasks)}
        self._labels: Subtasks = np.array([numbers[name] for name in subtasks], np.int16)
        self.key = content_id("target", {"rows": [view.names for view in views], "subtasks": list(subtasks)})
        self._queries: dict[How, tuple[list[Floats], Subtasks]] = {}
        self._usable, self.notes = usable_rows([view.valid for view in views], self._labels, self.subtasks)
        """`notes` say which rows and subtasks are left out, and why."""

    def queries(self, how: How) -> tuple[list[Floats], Subtasks]:
        """What a pool's rows are multiplied with at each checkpoint, (q, dim) each, and the queries' subtasks (q,)."""
        if how not in self._queries:
            labels = self._labels[self._usable]
            kept: Aggregate = "max" if isinstance(how, Around) else how
            folded = [queries(_unit_rows(view, self._usable), labels, kept) for view in self.views]
            self._queries[how] = [rows for rows, _ in folded], folded[0][1]
        return self._queries[how]


def score(
    pool: Sequence[Rows],
    targets: Sequence[Target],
    *,
    weights: Sequence[float],
    aggregate: How,
    cache: ScoreCache,
    kernel: Kernel = NUMPY,
    on_rows: Callable[[int], None] | None = None,
) -> list[TaskScores]:
    """The scores of every row of the pool (one view per checkpoint) for each task, taken from the cache where known.

    `weights` are the checkpoints' learning rates. `on_rows` hears how many rows are done. A row without a feature at
    some checkpoint has no score. Raises `Damaged` where stored bytes are missing or do not match their checksum.
    """
    plan = _Plan(pool, targets, checkpoint_weights(weights), aggregate)
    asked = _Questions(plan, kernel)
    parts = [plan.score(start, stop, cache, asked, on_rows) for start, stop in plan.pieces]
    return [concatenated(part) for part in zip(*parts, strict=True)]


def score_piece(
    pool: Sequence[Rows],
    targets: Sequence[Target],
    piece: tuple[int, int],
    *,
    weights: Sequence[float],
    aggregate: How,
    cache: ScoreCache,
    kernel: Kernel = NUMPY,
    on_rows: Callable[[int], None] | None = None,
) -> None:
    """Have the scores of one of the pool's `pieces` in the cache; `on_rows` hears which row of the pool is reached."""
    plan = _Plan(pool, targets, checkpoint_weights(weights), aggregate)
    plan.score(*piece, cache, _Questions(plan, kernel), on_rows)


def missing_pieces(
    pool: Sequence[Rows],
    targets: Sequence[Target],
    *,
    weights: Sequence[float],
    aggregate: How,
    cache: ScoreCache,
) -> list[tuple[int, int]]:
    """The ranges of rows whose scores are not all in the cache: each can be computed by another worker."""
    plan = _Plan(pool, targets, checkpoint_weights(weights), aggregate)
    return [
        (start, stop)
        for start, stop in plan.pieces
        if any(cache.get(plan.key(target, start, stop)) is None for target in targets)
    ]


def cached(
    pool: Sequence[Rows],
    targets: Sequence[Target],
    *,
    weights: Sequence[float],
    aggregate: How,
    cache: ScoreCache,
) -> list[TaskScores] | None:
    """What `score` would answer, if all of it is in the cache; else None, without reading a feature."""
    plan = _Plan(pool, targets, checkpoint_weights(weights), aggregate)
    answers = []
    for target in targets:
        parts = [cache.get(plan.key(target, start, stop)) for start, stop in plan.pieces]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        answers.append(concatenated(known))
    return answers


def concatenated(parts: Sequence[TaskScores]) -> TaskScores:
    """Scores of several segments or pools, one after the other."""
    return TaskScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS))


@dataclass(frozen=True)
class _Plan:
    """What is scored, and in which pieces: rows that lie in one segment at every checkpoint."""

    pool: Sequence[Rows]
    targets: Sequence[Target]
    weights: Sequence[float]
    aggregate: How

    def __post_init__(self) -> None:
        views = [*self.pool, *(view for target in self.targets for view in target.views)]
        if len({view.rows for view in self.pool}) != 1 or len({view.dim for view in views}) != 1:
            raise ValueError("the views of a pool share their rows, and all views their dim")
        if {len(self.pool), *(len(target.views) for target in self.targets)} != {len(self.weights)}:
            raise ValueError(f"there are {len(self.weights)} weights: one view per checkpoint goes with each")

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Ranges of at most `PIECE_ROWS` rows between the segments' borders of all checkpoints."""
        return ranges(self.pool, most=PIECE_ROWS)

    def score(
        self, start: int, stop: int, cache: ScoreCache, asked: _Questions, on_rows: Callable[[int], None] | None
    ) -> list[TaskScores]:
        """The scores of a piece for each task; what was not in the cache is, after this."""
        keys = [self.key(target, start, stop) for target in self.targets]
        found = {number: kept for number, key in enumerate(keys) if (kept := cache.get(key)) is not None}
        missing = [number for number in range(len(keys)) if number not in found]
        if missing:
            fresh = self.compute(asked.of(missing), start, stop, on_rows)
            for number, result in zip(missing, fresh, strict=True):
                cache.put(keys[number], result, made_from=self.content(self.targets[number], start, stop))
                found[number] = result
        if on_rows is not None:
            on_rows(stop)
        return [found[number] for number in range(len(keys))]

    def content(self, target: Target, start: int, stop: int) -> dict[str, Any]:
        """All that the scores of a piece depend on."""
        return {
            "version": SCORES_VERSION,
            "rows": [view.place(start, stop) for view in self.pool],
            "target": target.key,
            "target_segments": [name for view in target.views for name, _ in view.names],
            "weights": list(self.weights),
            "aggregate": self.aggregate.said() if isinstance(self.aggregate, Around) else self.aggregate,
        }

    def key(self, target: Target, start: int, stop: int) -> str:
        """Name of the scores of a piece."""
        return content_id("score", self.content(target, start, stop))

    def compute(
        self, question: _Question, start: int, stop: int, on_rows: Callable[[int], None] | None
    ) -> list[TaskScores]:
        """The scores of rows `start:stop`, all targets of the question in one pass over all checkpoints."""
        valid = everywhere([view.part("reason", start, stop) == VALID for view in self.pool])
        results = [(np.empty(stop - start, np.float32), np.empty(stop - start, np.int16)) for _ in question.labels]
        influences = _Influences(self.pool, question, start, stop, valid)

        def reach(edges: tuple[int, int]) -> int:
            """Score the rows between two edges; results of different threads lie beside each other."""
            block, rows = influences.of(*edges), slice(edges[0] - start, edges[1] - start)
            parts = zip(results, question.labels, pairwise(question.ends), question.grams, strict=True)
            for (scores, subtasks), labels, (low, high), gram in parts:
                scores[rows], subtasks[rows] = _reduced(block[:, low:high], labels, self.aggregate, gram)
            return edges[1]

        for reached in _in_threads(reach, influences.blocks, question.kernel):
            if on_rows is not None:
                on_rows(reached)
        if not all(np.isfinite(scores[valid]).all() for scores, _ in results):
            raise Damaged(f"features of {self.pool[0].place(start, stop)} are not finite: compute them again")
        return [masked(scores, subtasks, valid) for scores, subtasks in results]


@dataclass(frozen=True)
class _Question:
    """What rows are multiplied with: the queries of several targets side by side."""

    kernel: Kernel
    labels: Sequence[Subtasks]
    """Of each target, the subtasks of its queries."""
    ends: Sequence[int]
    """Where each target's queries begin and end, from 0 on."""
    products: Sequence[Products]
    """One per checkpoint, whose weight is in the queries."""
    grams: Sequence[Doubles]
    """Of each target, the cosines of its queries with each other, which `Around` looks at (q, q)."""


class _Questions:
    """The questions of a plan, each made ready for the kernel once for all pieces."""

    def __init__(self, plan: _Plan, kernel: Kernel) -> None:
        self._plan = plan
        self._kernel = kernel
        self._made: dict[tuple[int, ...], _Question] = {}

    def of(self, targets: Sequence[int]) -> _Question:
        """The question of these of the plan's targets."""
        key = tuple(targets)
        if key not in self._made:
            self._made[key] = self._make([self._plan.targets[number] for number in key])
        return self._made[key]

    def _make(self, targets: Sequence[Target]) -> _Question:
        asked = [target.queries(self._plan.aggregate) for target in targets]
        stacked = [np.concatenate(rows) for rows in zip(*(rows for rows, _ in asked), strict=True)]
        products = [
            self._kernel.products(rows * np.float32(weight), dtype=view.dtype)
            for view, rows, weight in zip(self._plan.pool, stacked, self._plan.weights, strict=True)
        ]
        labels = [labels for _, labels in asked]
        ends = np.cumsum([0, *map(len, labels)]).tolist()
        grams = [
            self._gram(rows) if isinstance(self._plan.aggregate, Around) else np.empty((0, 0)) for rows, _ in asked
        ]
        return _Question(self._kernel, labels, ends, products, grams)

    def _gram(self, rows: Sequence[Floats]) -> Doubles:
        """The cosines of a target's rows with each other (q, q), weighted over the checkpoints."""
        found = np.zeros((len(rows[0]), len(rows[0])))
        for unit, weight in zip(rows, self._plan.weights, strict=True):
            exact = unit.astype(np.float64)
            found += weight * (exact @ exact.T)
        return found


class _Influences:
    """Weighted influences of the rows `start:stop` of all checkpoints on the queries, a block at a time."""

    def __init__(self, pool: Sequence[Rows], question: _Question, start: int, stop: int, valid: Mask) -> None:
        self._pool = pool
        self._start = start
        self._width = question.ends[-1]
        self._products = question.products
        self._factors = [_reciprocals(view.part("lengths", start, stop), valid) for view in pool]
        edges = sorted({edge for view in pool for edge in view.edges if start < edge < stop} | {start, stop})
        self.blocks = list(pairwise(edges))
        """Ranges of rows that lie in one chunk at every checkpoint."""

    def of(self, first: int, last: int) -> Floats:
        """The influences of rows `first:last`, (n, q)."""
        total = np.zeros((last - first, self._width), np.float32)
        rows = slice(first - self._start, last - self._start)
        for view, products, factors in zip(self._pool, self._products, self._factors, strict=True):
            found = products(view.stored(first, last, check=True))
            found *= factors[rows, None]
            total += found
        return total


def _reduced(cosines: Floats, labels: Subtasks, how: How, gram: Doubles) -> tuple[Floats, Subtasks]:
    """One score per row of a block, and the subtask that gave it: of `Around` that of the nearest row."""
    if isinstance(how, Around):
        return how.score(cosines, gram).astype(np.float32), labels[cosines.argmax(axis=1)]
    return reduce(cosines, labels, how)


def _reciprocals(lengths: Floats, valid: Mask) -> Floats:
    """What the products of a row are multiplied with for those of its direction (n,); 0 where it has no score."""
    return np.divide(1, lengths, out=np.zeros_like(lengths), where=valid)


def _in_threads(
    work: Callable[[tuple[int, int]], int], blocks: Sequence[tuple[int, int]], kernel: Kernel
) -> Iterator[int]:
    """Do the blocks in the kernel's threads and give what they return, in order; few are begun before they are due."""
    with ThreadPoolExecutor(kernel.threads, "scores", initializer=kernel.begin_thread) as threads:
        ahead: deque[Future[int]] = deque()
        try:
            for block in blocks:
                if len(ahead) > AHEAD * kernel.threads:
                    yield ahead.popleft().result()
                ahead.append(threads.submit(work, block))
            while ahead:
                yield ahead.popleft().result()
        finally:  # whoever listens may have had enough
            for waiting in ahead:
                waiting.cancel()


def _unit_rows(view: Rows, usable: NDArray[np.bool_]) -> Floats:
    """The usable rows of a view divided by their length (m, dim)."""
    rows = np.empty((int(usable.sum()), view.dim), np.float32)
    filled = 0
    for start, decoded in view.decoded_blocks(check=True):
        chosen = decoded[usable[start : start + len(decoded)]]
        rows[filled : filled + len(chosen)] = chosen
        filled += len(chosen)
    rows /= view.lengths[usable, None]
    return rows


class ScoreCache:
    """Scores under the hash of all that they depend on: three .npy files and a manifest each, never a pickle.

    A cache in the sense of `KeptFolders`: what is damaged is removed, and made again by whoever asks.
    """

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        self.root, self._depot = root, depot

    def get(self, key: str) -> TaskScores | None:
        """The scores of this name; None where there are none, or where their bytes are damaged (they are removed)."""
        folder = self.root / key
        try:
            if not self._depot.ensure(folder):
                return None
            found = read_arrays(folder)
            return TaskScores(*(found[name] for name in _ARRAYS))
        except FileNotFoundError:
            if folder.is_dir():
                self._remove(folder)
            return None
        except (ValueError, KeyError, Damaged) as error:
            log.warning("damaged scores removed", extra={"scores": key, "reason": str(error)})
            self._remove(folder)
            return None

    def put(self, key: str, scores: TaskScores, *, made_from: Mapping[str, Any]) -> None:
        """Keep scores; where they are kept already, nothing happens."""
        with unfinished(self._unfinished, key) as partial:
            arrays = {name: getattr(scores, name) for name in _ARRAYS}
            write_arrays(partial, arrays, about={"made_from": dict(made_from), "rows": len(scores.score)})
            self._depot.keep(partial, self.root / key, of=_parts(made_from))

    def delete(self, name: str) -> int:
        """Remove the scores that a segment, or the texts of a dataset or task, entered into; returns how many."""
        users = self._depot.users(self.root, "score_*", name)
        if users is None:
            users = [
                path.parent.name for path in self.root.glob("score_*/manifest.json") if name in made_of(_content(path))
            ]
        for user in users:
            self._remove(self.root / user)
        return len(users)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep(self._unfinished, older_than=older_than)

    @property
    def _unfinished(self) -> Path:
        return self.root / "unfinished"

    def _remove(self, folder: Path) -> None:
        self._depot.delete(folder)
        evict(folder)


def made_of(manifest: bytes | None) -> set[str]:
    """The segments, datasets and tasks that kept scores were made of; nothing where there is no manifest."""
    try:
        return set() if manifest is None else _parts(json.loads(manifest)["made_from"])
    except (ValueError, KeyError):
        return set()


def _content(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _parts(content: Mapping[str, Any]) -> set[str]:
    """The segments, datasets and tasks that scores were made from."""
    segments = {name for name, _, _ in content.get("rows", ())} | set(content.get("target_segments", ()))
    return segments | set(content.get("texts", ()))
