"""How the cost of an answer grows with rows, dims and queries, and what it comes to where no disk here holds the store.

    python -m benchmarks.growth --rows 196608 --dims 2048 8192 --rounds 3 --json growth.json

For each of `--dims` a store of made-up rows is made in a new folder under `--folder` and removed before the next one.
Its first 65,536 rows, the first 131,072 and so on are scored for one query, for MMLU's 57 subtask means and for its 285
rows, each with an empty cache. The smallest of the rounds is printed, and seconds = rows · (bytes / rate + 2 · dim ·
queries / operations) fitted to all of them; from it follow the seconds of 100 million rows for workers that read an
object store at `--object-store` GB/s each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gradstore.types import Aggregate, FeatureDtype

from benchmarks.scoring import Pool, timed
from datastore.dtypes import STORAGE
from datastore.products import Kernel
from datastore.scores import PIECE_ROWS, score_piece
from worker.models import use_cpu_threads
from worker.products import TorchKernel, one_thread_each

QUERIES: dict[Aggregate, int] = {"avg": 1, "less": 57, "max": 285}
FAR = 100_000_000  # rows
WORKERS = (1, 16, 256)


@dataclass(frozen=True)
class Point:
    """Something that was measured."""

    rows: int
    dim: int
    queries: int
    seconds: float

    def terms(self, dtype: FeatureDtype) -> tuple[float, float]:
        """Bytes read, and operations."""
        return self.rows * row_bytes(self.dim, dtype), 2.0 * self.rows * self.dim * self.queries


@dataclass(frozen=True)
class Fit:
    """What a machine does in a second."""

    bytes: float
    operations: float

    def seconds(self, rows: int, dim: int, queries: int, *, dtype: FeatureDtype, rate: float | None = None) -> float:
        """Of one worker; `rate` is what it reads, in bytes a second, where that is less."""
        size = rows * row_bytes(dim, dtype)
        return size / min(self.bytes, rate or self.bytes) + 2 * rows * dim * queries / self.operations


def row_bytes(dim: int, dtype: FeatureDtype) -> int:
    """Bytes of a row that a score reads: its numbers, its length and its reason."""
    storage = STORAGE[dtype]
    return storage.width(dim) * storage.dtype.itemsize + 5


def measure(pool: Pool, dim: int, kernel: Kernel, rounds: int) -> Iterator[Point]:
    """Every number of rows with every number of queries."""
    rows = pool.views("pool", pool.dtype)[0].rows
    pieces = [(start, min(start + PIECE_ROWS, rows)) for start in range(0, rows, PIECE_ROWS)]
    for aggregate, queries in QUERIES.items():
        rounds_of_pieces = [list(_seconds(pool, pieces, aggregate, kernel)) for _ in range(rounds)]
        best = np.cumsum(rounds_of_pieces, axis=1).min(axis=0)
        for (_, reached), seconds in zip(pieces, best.tolist(), strict=True):
            yield Point(reached, dim, queries, seconds)


def _seconds(pool: Pool, pieces: Sequence[tuple[int, int]], aggregate: Aggregate, kernel: Kernel) -> Iterator[float]:
    """Of each piece, scored into an empty cache."""
    views, target, cache = pool.views("pool", pool.dtype), pool.target("mmlu"), pool.new_cache()
    target.queries(aggregate)
    with one_thread_each():
        for piece in pieces:
            yield timed(
                partial(
                    score_piece, views, [target], piece,
                    weights=[1.0], aggregate=aggregate, cache=cache, kernel=kernel,
                )
            )  # fmt: skip


def fit(points: Sequence[Point], dtype: FeatureDtype) -> Fit:
    """Least squares of the relative errors; where one of the two comes out below zero, it is free."""
    shares = np.array([point.terms(dtype) for point in points]) / np.array([[point.seconds] for point in points])
    per = np.linalg.lstsq(shares, np.ones(len(points)))[0]
    if (per < 0).any():
        dear = int(per.argmax())
        per = np.zeros(2)
        per[dear] = shares[:, dear].sum() / np.square(shares[:, dear]).sum()
    reading, multiplying = (1 / each if each > 0 else float("inf") for each in per.tolist())
    return Fit(reading, multiplying)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=3 * PIECE_ROWS)
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--object-store", type=float, default=1.0, help="GB/s that a worker reads from one")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the stores are made; by default a temporary one"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the points there, too")
    options = parser.parse_args()
    use_cpu_threads(options.threads or None)
    kernel = TorchKernel(torch.device("cpu"))
    points: list[Point] = []
    for dim in options.dims:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            points += measure(Pool(Path(folder), options.rows, dim, options.dtype), dim, kernel, options.rounds)
    print("| rows | dims | queries | seconds |\n|---|---|---|---|")
    for point in points:
        print(f"| {point.rows:,} | {point.dim:,} | {point.queries} | {point.seconds:.3f} |")
    found = fit(points, options.dtype)
    print(f"\n{found.bytes / 1e9:.1f} GB/s, {found.operations / 1e9:.0f} billion operations a second\n")
    print(f"| {FAR:,} rows | bytes | queries |" + "".join(f" {workers} workers |" for workers in WORKERS))
    print("|---|---|---|" + "---|" * len(WORKERS))
    for dim in options.dims:
        for queries in QUERIES.values():
            alone = found.seconds(FAR, dim, queries, dtype=options.dtype, rate=options.object_store * 1e9)
            cells = "".join(f" {alone / workers:,.0f} s |" for workers in WORKERS)
            print(f"| {dim:,} dims | {FAR * row_bytes(dim, options.dtype) / 1e9:,.0f} GB | {queries} |{cells}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=1))


if __name__ == "__main__":
    main()
