"""What the store costs on this machine: writing, reading and scoring one segment, and renewing leases.

    python -m benchmarks.store --rows 20480 --dim 8192 --rounds 5

Everything goes through the code that the service uses, in a new folder under `--folder` that is removed at the end; it
takes twice the segment's bytes for a moment. A segment just written lies in the memory's cache of files: reading
measures the software and not the disk. What is printed is the smallest and the largest of the rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import zarr
from gradstore.types import Aggregate
from numpy.typing import NDArray

from datastore import scores
from datastore.catalog import Catalog
from datastore.gradients import Block, FeatureStore
from datastore.leases import Jobs, NewShard
from datastore.scores import ScoreCache, Target
from datastore.segments import Segment
from datastore.shards import CHUNK_ROWS

SUBTASKS, PER_SUBTASK = 57, 5  # MMLU's validation rows
POOL, TASK = "seg_pool", "seg_task"
RANDOM_ROWS = 256
RENEWALS = 100


@dataclass(frozen=True)
class Measured:
    """Something done once per round."""

    what: str
    seconds: Sequence[float]
    units: float
    """How much was done in a round."""
    unit: str

    def line(self) -> str:
        rates = sorted(self.units / seconds for seconds in self.seconds)
        seconds = f"{_number(min(self.seconds))}–{_number(max(self.seconds))}"
        return f"| {self.what} | {seconds} | {_number(rates[0])}–{_number(rates[-1])} {self.unit}/s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20 * CHUNK_ROWS, help="rows of the segment")
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the store is made; by default a temporary one")
    parser.add_argument("--catalog", default="", help="SQLAlchemy URL of an empty catalog; by default SQLite there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = list(measure(Path(folder), options.rows, options.dim, options.rounds, catalog=options.catalog))
    size = options.rows * options.dim * 2 / 1e9
    print(f"{options.rows:,} rows × {options.dim:,} float16 ({size:.2f} GB), {os.cpu_count()} cores\n")
    print("| what | seconds | rate |\n|---|---|---|")
    for row in table:
        print(row.line())


def measure(folder: Path, rows: int, dim: int, rounds: int, *, catalog: str = "") -> Iterator[Measured]:
    """Fill a store in the folder, and measure it."""
    store = FeatureStore(folder / "features")
    yield from _writing(store, rows, dim)
    _fill(store, TASK, SUBTASKS * PER_SUBTASK, dim)
    size = rows * dim * 2 / 1e9
    repeat = partial(_repeat, rounds=rounds)
    pool = store.open(POOL)
    array = zarr.open_group(store.root / POOL / "data.zarr", mode="r")["features"]
    assert isinstance(array, zarr.Array)
    yield Measured("reading the chunk files into a buffer", repeat(partial(_read_files, store.root / POOL)), size, "GB")
    yield Measured("reading all rows in place", repeat(partial(_scan, pool)), size, "GB")
    yield Measured("comparing all checksums", repeat(partial(_check, pool)), size, "GB")
    yield Measured("reading all rows with zarr", repeat(lambda: array[:]), size, "GB")
    chosen = np.sort(np.random.default_rng(0).choice(rows, RANDOM_ROWS, replace=False))
    yield Measured(f"{RANDOM_ROWS} random rows", repeat(partial(_random_rows, pool, chosen)), RANDOM_ROWS, "rows")
    yield Measured(f"{RANDOM_ROWS} random rows with zarr", repeat(lambda: array.oindex[chosen]), RANDOM_ROWS, "rows")
    aggregates: list[tuple[Aggregate, str]] = [
        ("less", f"{SUBTASKS} subtasks"),
        ("max", f"{SUBTASKS * PER_SUBTASK} rows"),
    ]
    for aggregate, queries in aggregates:
        fresh, again = _scoring(store, folder / "scores", aggregate)
        yield Measured(f"scores, `{aggregate}`, {queries}", repeat(fresh), rows, "rows")
        yield Measured("the same scores from the cache", repeat(again), rows, "rows")
    renew = _renewing(Catalog(catalog or f"sqlite:///{folder / 'catalog.sqlite3'}"))
    yield Measured(f"{RENEWALS} renewals of a lease", repeat(renew), RENEWALS, "renewals")


def _repeat(work: Callable[[], object], *, rounds: int) -> list[float]:
    """Seconds of each round."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def _writing(store: FeatureStore, rows: int, dim: int) -> Iterator[Measured]:
    seconds = _fill(store, POOL, rows, dim)
    chunk = min(rows, CHUNK_ROWS) * dim * 2 / 1e9
    yield Measured("writing a chunk, flushed to the disk", [write for write, _ in seconds], chunk, "GB")
    yield Measured("publishing it", [publish for _, publish in seconds], chunk, "GB")


def _fill(store: FeatureStore, segment: str, rows: int, dim: int) -> list[tuple[float, float]]:
    """Make a segment of random rows; the seconds that writing and publishing each chunk took."""
    store.create(segment, rows=rows, dim=dim, dtype="float16", attributes={})
    features = np.random.default_rng(rows).standard_normal((min(rows, CHUNK_ROWS), dim), np.float32)
    found = []
    for start in range(0, rows, CHUNK_ROWS):
        block = _block(np.roll(features, start // CHUNK_ROWS, axis=1)[: rows - start])
        began = time.perf_counter()
        digest = store.write(segment, start=start, attempt=1, block=block)
        written = time.perf_counter()
        store.publish(segment, start=start, attempt=1, digest=digest)
        found.append((written - began, time.perf_counter() - written))
    return found


def _block(features: NDArray[np.float32]) -> Block:
    ones = np.ones(len(features), np.float32)
    return Block(features, ones, ones, ones, np.ones(len(features), np.int32), [None] * len(features))


def _read_files(segment: Path) -> None:
    files = sorted((segment / "data.zarr" / "features").glob("c.*"))
    buffer = bytearray(files[0].stat().st_size)
    for path in files:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)


def _scan(pool: Segment) -> int:
    return sum(int(block.view(np.uint64).max()) for _, block in pool.blocks())


def _check(pool: Segment) -> None:
    for _ in pool.blocks(check=True):
        pass


def _random_rows(pool: Segment, chosen: NDArray[np.int64]) -> NDArray[np.float16]:
    return np.concatenate([pool.stored(row, row + 1) for row in chosen.tolist()])


def _scoring(
    store: FeatureStore, folder: Path, aggregate: Aggregate
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Scores computed into a new cache, and found in the last one."""
    subtasks = [str(row // PER_SUBTASK) for row in range(SUBTASKS * PER_SUBTASK)]
    number = count()

    def score(cache: ScoreCache) -> object:
        target = Target([store.open(TASK)], subtasks)
        return scores.score([store.open(POOL)], [target], weights=[1.0], aggregate=aggregate, cache=cache)

    caches = [ScoreCache(folder / f"{aggregate}-none")]

    def fresh() -> object:
        caches[0] = ScoreCache(folder / f"{aggregate}-{next(number)}")
        return score(caches[0])

    return fresh, lambda: score(caches[0])


def _renewing(catalog: Catalog) -> Callable[[], object]:
    catalog.migrate()
    jobs = Jobs(catalog, lease=3600)
    jobs.create(id="ft_1", kind="finetune", request={}, plan={}, shards=[NewShard({}, RENEWALS)])
    claim = jobs.claim("worker", kinds=["finetune"])
    assert claim is not None
    return lambda: [jobs.renew(claim, done=done) for done in range(RENEWALS)]


def _number(value: float) -> str:
    """Two or three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


if __name__ == "__main__":
    main()
