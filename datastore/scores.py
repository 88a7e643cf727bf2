"""Scores of a pool for any number of tasks: the feature store streamed once, and what came out kept.

The linear part of the aggregate is folded into the queries first (datastore/influence.py), all tasks' queries are
multiplied in one float32 product, and a block of rows is widened, multiplied and dropped while it is in the cache.
Scores are kept per segment of the pool: a grown pool scores its new segment only.
Memory beside the mapped files, with c checkpoints, m reference rows, q queries (subtasks for `less`, one a task for
`avg`, reference rows for `max` and `min`) and n rows in the pool, in bytes:

    8·c·q·dim + 4·m·dim + 8 MiB + 8·1,024·q + (16·c + 14·tasks)·n

MMLU (57 × 5) at 4 checkpoints of 8,192 dims: 33 MiB and 78 bytes a row of the pool.
The order in which sgemm sums depends on a row's place in its block: two passes over other segments agree within 1e-6.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import Aggregate
from numpy.typing import NDArray

from datastore.dtypes import decode, widened
from datastore.durable import place, sweep, unfinished, write_file
from datastore.errors import Damaged
from datastore.identity import content_id
from datastore.influence import (
    Floats,
    Subtasks,
    TaskScores,
    checkpoint_weights,
    everywhere,
    masked,
    queries,
    reduce,
    usable_rows,
)
from datastore.segments import Rows
from datastore.shards import CHUNK_ROWS

log = logging.getLogger(__name__)

SCORES_VERSION = 1
"""Counted up when the arithmetic changes, so that old results are not found again."""
BLOCK_BYTES = 8 << 20
"""Float32 bytes of the rows that are multiplied at once: about what a core's caches hold."""
_ARRAYS = ("score", "subtask", "valid")
_HALF_EXPONENT = np.float32(2.0**112)


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
        self._queries: dict[Aggregate, tuple[list[Floats], Subtasks]] = {}
        self._usable, self.notes = usable_rows([view.valid for view in views], self._labels, self.subtasks)
        """`notes` say which rows and subtasks are left out, and why."""

    def queries(self, how: Aggregate) -> tuple[list[Floats], Subtasks]:
        """What a pool's rows are multiplied with at each checkpoint, (q, dim) each, and the queries' subtasks (q,)."""
        if how not in self._queries:
            labels = self._labels[self._usable]
            folded = [queries(_unit_rows(view, self._usable), labels, how) for view in self.views]
            self._queries[how] = [rows for rows, _ in folded], folded[0][1]
        return self._queries[how]


def score(
    pool: Sequence[Rows],
    targets: Sequence[Target],
    *,
    weights: Sequence[float],
    aggregate: Aggregate,
    cache: ScoreCache,
    on_rows: Callable[[int], None] | None = None,
) -> list[TaskScores]:
    """The scores of every row of the pool (one view per checkpoint) for each task, taken from the cache where known.

    `weights` are the checkpoints' learning rates. `on_rows` hears how many rows are done. A row without a feature at
    some checkpoint has no score. Raises `Damaged` where stored bytes are missing or do not match their checksum.
    """
    parts: list[list[TaskScores]] = [[] for _ in targets]
    plan = _Plan(pool, targets, checkpoint_weights(weights), aggregate)
    for start, stop in plan.pieces:
        keys = [plan.key(target, start, stop) for target in targets]
        found = {number: kept for number, key in enumerate(keys) if (kept := cache.get(key)) is not None}
        missing = [number for number in range(len(targets)) if number not in found]
        if missing:
            fresh = plan.compute([targets[number] for number in missing], start, stop, on_rows)
            for number, result in zip(missing, fresh, strict=True):
                cache.put(keys[number], result, made_from=plan.content(targets[number], start, stop))
                found[number] = result
        for number, part in enumerate(parts):
            part.append(found[number])
        if on_rows is not None:
            on_rows(stop)
    return [concatenated(part) for part in parts]


def cached(
    pool: Sequence[Rows],
    targets: Sequence[Target],
    *,
    weights: Sequence[float],
    aggregate: Aggregate,
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
    aggregate: Aggregate

    def __post_init__(self) -> None:
        views = [*self.pool, *(view for target in self.targets for view in target.views)]
        if len({view.rows for view in self.pool}) != 1 or len({view.dim for view in views}) != 1:
            raise ValueError("the views of a pool share their rows, and all views their dim")
        if {len(self.pool), *(len(target.views) for target in self.targets)} != {len(self.weights)}:
            raise ValueError(f"there are {len(self.weights)} weights: one view per checkpoint goes with each")

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Ranges of rows between the segments' borders of all checkpoints."""
        borders = {0}
        for view in self.pool:
            borders.update(np.cumsum([rows for _, rows in view.names]).tolist())
        return list(pairwise(sorted(borders)))

    def content(self, target: Target, start: int, stop: int) -> dict[str, Any]:
        """All that the scores of a piece depend on."""
        return {
            "version": SCORES_VERSION,
            "rows": [_place_of(view, start, stop) for view in self.pool],
            "target": target.key,
            "target_segments": [name for view in target.views for name, _ in view.names],
            "weights": list(self.weights),
            "aggregate": self.aggregate,
        }

    def key(self, target: Target, start: int, stop: int) -> str:
        """Name of the scores of a piece."""
        return content_id("score", self.content(target, start, stop))

    def compute(
        self, targets: Sequence[Target], start: int, stop: int, on_rows: Callable[[int], None] | None
    ) -> list[TaskScores]:
        """The scores of rows `start:stop`, all targets in one pass over all checkpoints."""
        asked = [target.queries(self.aggregate) for target in targets]
        by_task = [rows for rows, _ in asked]
        stacked = by_task[0] if len(targets) == 1 else [np.concatenate(rows) for rows in zip(*by_task, strict=True)]
        ends = np.cumsum([0, *(len(labels) for _, labels in asked)]).tolist()
        valid = everywhere([view.valid[start:stop] for view in self.pool])
        results = [(np.empty(stop - start, np.float32), np.empty(stop - start, np.int16)) for _ in targets]
        for first, influences in _influences(self.pool, stacked, self.weights, start, stop):
            rows = slice(first - start, first - start + len(influences))
            for (scores, subtasks), (_, labels), (low, high) in zip(results, asked, pairwise(ends), strict=True):
                scores[rows], subtasks[rows] = reduce(influences[:, low:high], labels, self.aggregate)
            if on_rows is not None:
                on_rows(first + len(influences))
        if not all(np.isfinite(scores[valid]).all() for scores, _ in results):
            raise Damaged(f"features of {_place_of(self.pool[0], start, stop)} are not finite: compute them again")
        return [masked(scores, subtasks, valid) for scores, subtasks in results]


def _influences(
    pool: Sequence[Rows], asked: Sequence[Floats], weights: Sequence[float], start: int, stop: int
) -> Iterator[tuple[int, Floats]]:
    """Weighted influences (n, q) of at most a chunk of rows after the other, with their first row."""
    step = max(1, BLOCK_BYTES // (4 * pool[0].dim))
    scratch = np.empty((min(step, CHUNK_ROWS), pool[0].dim), np.float32)
    kernels = [_Products(*parts, scratch) for parts in zip(pool, asked, weights, strict=True)]
    edges = sorted({edge for view in pool for edge in view.edges if start < edge < stop} | {start, stop})
    for first, last in pairwise(edges):
        total = np.zeros((last - first, len(asked[0])), np.float32)
        for kernel in kernels:
            kernel.add(total, first, last)
        yield first, total


class _Products:
    """Products of one checkpoint's rows with the queries, in float32 (another kernel fits behind the same two calls).

    Float16 rows are widened by moving their bits (`dtypes.widened`); the factor of 2^112 that is missing then is the
    queries' (they are at most 1). Three passes over a block in the cache, 11 GB/s on a core where numpy's own
    conversion gives 1.5, and not a bit different.
    """

    def __init__(self, view: Rows, asked: Floats, weight: float, scratch: Floats) -> None:
        self._view = view
        self._half = view.dtype == "float16"
        self._asked = asked * (np.float32(weight) * (_HALF_EXPONENT if self._half else np.float32(1)))
        self._scratch = scratch
        lengths = view.lengths
        self._factors = np.divide(1, lengths, out=np.zeros_like(lengths), where=view.valid)[:, None]

    def add(self, total: Floats, first: int, last: int) -> None:
        """Add the cosines of rows `first:last`, times the checkpoint's weight, to `total` (n, q)."""
        stored = self._view.stored(first, last, check=True)
        for start in range(0, last - first, len(self._scratch)):
            rows = stored[start : start + len(self._scratch)]
            wide = self._widened(rows)
            product = wide @ self._asked.T
            product *= self._factors[first + start : first + start + len(rows)]
            total[start : start + len(rows)] += product

    def _widened(self, rows: NDArray[Any]) -> Floats:
        wide = self._scratch[: len(rows)]
        if self._half:
            return widened(rows, out=wide)
        return decode(rows, self._view.dtype, self._view.dim, out=wide)


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


def _place_of(view: Rows, start: int, stop: int) -> list[Any]:
    """Segment, first and last row of a range that lies within one segment."""
    first = 0
    for name, rows in view.names:
        if first <= start and stop <= first + rows:
            return [name, start - first, stop - first]
        first += rows
    raise IndexError(f"rows {start}:{stop} do not lie in one segment of {view.names}")


class ScoreCache:
    """Scores under the hash of all that they depend on: three .npy files and a manifest each, never a pickle."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> TaskScores | None:
        """The scores of this name; None where there are none, or where their bytes are damaged (they are removed)."""
        folder = self.root / key
        try:
            sums = json.loads((folder / "manifest.json").read_bytes())["sha256"]
            arrays = [_load(folder / f"{name}.npy", sums[name]) for name in _ARRAYS]
        except FileNotFoundError:
            if folder.is_dir():
                self._remove(folder)
            return None
        except (ValueError, KeyError) as error:
            log.warning("damaged scores removed", extra={"scores": key, "reason": str(error)})
            self._remove(folder)
            return None
        return TaskScores(*arrays)

    def put(self, key: str, scores: TaskScores, *, made_from: Mapping[str, Any]) -> None:
        """Keep scores; where they are kept already, nothing happens."""
        with unfinished(self._unfinished, key) as partial:
            sums = {}
            for name in _ARRAYS:
                buffer = io.BytesIO()
                np.save(buffer, getattr(scores, name), allow_pickle=False)
                write_file(partial / f"{name}.npy", buffer.getvalue())
                sums[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
            manifest = {"made_from": dict(made_from), "rows": len(scores.score), "sha256": sums}
            write_file(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
            place(partial, self.root / key)

    def delete(self, segment: str) -> int:
        """Remove the scores that a segment of a pool or a task entered into; returns how many there were."""
        users = [path.parent for path in self.root.glob("score_*/manifest.json") if segment in _segments(path)]
        for folder in users:
            self._remove(folder)
        return len(users)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep(self._unfinished, older_than=older_than)

    @property
    def _unfinished(self) -> Path:
        return self.root / "unfinished"

    def _remove(self, folder: Path) -> None:
        with unfinished(self._unfinished, folder.name) as partial:
            try:
                folder.rename(partial / folder.name)
            except FileNotFoundError:
                return
            shutil.rmtree(partial)


def _load(path: Path, sha256: str) -> NDArray[Any]:
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path} does not match its checksum")
    array: NDArray[Any] = np.load(io.BytesIO(raw), allow_pickle=False)
    return array


def _segments(manifest: Path) -> set[str]:
    try:
        content = json.loads(manifest.read_bytes())["made_from"]
    except (FileNotFoundError, ValueError, KeyError):
        return set()
    return {name for name, _, _ in content["rows"]} | set(content["target_segments"])
