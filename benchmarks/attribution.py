"""How fast and how completely an index answers an attribution, beside reading every row.

    python -m benchmarks.attribution --file pool.jsonl --rows 1000000 --dtype int8 --folder /large --json out.json

Rows are resampled from real features (benchmarks/spectrum.py), the questions are real rows that no row is made from.
They go through the code that the service uses, in a new folder under `--folder` that is removed at the end: dim bytes a
row at int8, twice that at float16, and 128 for the index. The truth is the exact search of every row. A search is timed
after the question's gradient, both ends at once, from the memory's cache of files as far as it holds them; beside the
seconds of the clock stand those of the processor, which a busy machine does not change.

    python -m benchmarks.attribution --features real.npz --rows 1000000 --coordinates

does without the store: rows are made as their principal coordinates, and the score of what is left of a row, whose
direction is random, is drawn from the normal distribution that it has. It measures candidates, recall and the scan at a
size whose features the disk does not hold, and neither the build nor the exact scores. A million rows take about a
minute of one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from gradstore.types import FeatureDtype
from numpy.typing import NDArray

from benchmarks.spectrum import RealFeatures, Resampled, real_features
from datastore.gradients import Block, FeatureStore
from datastore.index import CANDIDATES, RECALL_AT, Index, Indexes
from datastore.search import Ends, Pool, exact
from datastore.shards import CHUNK_ROWS

T = TypeVar("T")

BLOCK = 50_000  # rows made at once where only their coordinates are


@dataclass(frozen=True)
class Timed:
    """A line of the result."""

    name: str
    seconds: float
    cpu_seconds: float
    ratio: float | None = None
    """Of a search by the index: to the exact search of one question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--file", type=Path, help="JSONL whose rows the features are resampled from")
    parser.add_argument("--features", type=Path, help=".npz of pool and queries made by --save, instead of --file")
    parser.add_argument("--save", type=Path, help="where the real features are kept for --features")
    parser.add_argument("--real-rows", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--coordinates", action="store_true", help="without a store: candidates, recall and scan only")
    parser.add_argument(
        "--index",
        nargs="+",
        default=["128:SQ8", "256:SQ8"],
        help="with --coordinates: directions, index and parameters, like 128:IVF1024,SQ8:nprobe=64",
    )
    parser.add_argument("--json", type=Path, default=None, help="file for the times: name, seconds, ratio")
    options = parser.parse_args()
    real = _real(options)
    if options.coordinates:
        scan(real, rows=options.rows, kinds=options.index)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lines = measure(Path(folder), real, rows=options.rows, dtype=options.dtype)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))


def _real(options: argparse.Namespace) -> RealFeatures:
    if options.features is not None:
        kept = np.load(options.features, allow_pickle=False)
        return RealFeatures(pool=kept["pool"], queries=kept["queries"][: options.questions])
    found = real_features(options.file, rows=options.real_rows, queries=options.questions, dim=options.dim)
    if options.save is not None:
        np.savez(options.save, pool=found.pool, queries=found.queries)
    return found


def measure(folder: Path, real: RealFeatures, *, rows: int, dtype: FeatureDtype) -> list[Timed]:
    """Fill a store with rows like the real ones, index it, and search it."""
    resampled = Resampled(real.pool)
    shares = np.cumsum(resampled.spectrum)
    print(
        f"{rows:,} rows × {real.pool.shape[1]:,} {dtype}, resampled from {len(real.pool):,}; variance in the first "
        + ", ".join(f"{n}: {shares[min(n, len(shares)) - 1]:.1%}" for n in (16, 64, 256))
        + f"; {os.cpu_count()} cores\n\n| what | seconds | of the processor | |\n|---|---|---|---|"
    )
    store = FeatureStore(folder / "features")
    filled, line = _timed("rows made and written", lambda: _fill(store, resampled, rows, real.pool.shape[1], dtype))
    _print(line)
    view = store.view(filled)
    pool = Pool([view], [1.0], view.valid)
    asked = real.queries[:, None].astype(np.float64)
    indexes = Indexes(folder / "indexes")
    index, built = _timed("index built and measured", lambda: indexes.build(pool, asked[:0]))
    _print(built, f"{index.bytes / 1e6:,.0f} MB, {index.measured.candidates:,} candidates, "
           f"recall {index.measured.recall:.3f} by its own measure")  # fmt: skip
    true, exactly = _timed(f"exact search, {len(asked)} questions", lambda: exact(pool, asked, RECALL_AT))
    _print(exactly)
    _, alone = _timed("exact search, 1 question", lambda: exact(pool, asked[:1], RECALL_AT))
    _print(alone)
    found, searched = _searches(index, pool, asked, alone)
    _print(searched, f"recall@{RECALL_AT} {recall(found, true):.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\npeak resident memory of all of it {peak:.1f} GB, mapped files included")
    return [line, built, exactly, alone, searched]


def scan(real: RealFeatures, *, rows: int, kinds: Sequence[str]) -> None:
    """Print what share of the truth is among so many candidates per end, by index, and what a scan takes."""
    faiss: Any = importlib.import_module("faiss")
    resampled = Resampled(real.pool)
    asked, constant, left = resampled.question(real.queries)
    rng = np.random.default_rng(1)
    scores = np.empty((len(asked), rows), np.float32)
    indexes = {kind: _index(faiss, kind) for kind in kinds}
    building = dict.fromkeys(kinds, 0.0)
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        coordinates, residuals = resampled.coordinates(start, stop)
        noise = rng.standard_normal((len(asked), stop - start), np.float32) * left[:, None] * residuals
        lengths = resampled.lengths(coordinates, residuals)
        scores[:, start:stop] = (asked @ coordinates.T + constant[:, None] + noise) / lengths
        stored = resampled.centred(coordinates, lengths)
        for kind, index in indexes.items():
            part = np.ascontiguousarray(stored[:, : index.d])
            began = time.process_time()
            if not start:
                index.train(part)
            index.add(part)
            building[kind] += time.process_time() - began
    print("| index | built, s | candidates per end | recall@100, high end | low end | scan, ms of the processor |")
    print("|---|---|---|---|---|---|")
    for kind, index in indexes.items():
        for number in CANDIDATES:
            found: list[list[float]] = [[], []]
            seconds = []
            for question, own in zip(asked, scores, strict=True):
                both = np.stack([question[: index.d], -question[: index.d]])
                (_, candidates), line = _timed("", partial(index.search, both, number))
                seconds.append(line.cpu_seconds)
                for end, sign in enumerate((-1, 1)):
                    true = np.argpartition(sign * own, RECALL_AT)[:RECALL_AT]
                    found[end].append(float(np.isin(true, candidates[end]).mean()))
            high, low = (np.mean(each) for each in found)
            took = f"{1e3 * median(seconds):.0f}"
            print(f"| {kind} | {building[kind]:.0f} | {number:,} | {high:.3f} | {low:.3f} | {took} |", flush=True)


def _index(faiss: Any, kind: str) -> Any:
    """An empty index: directions, the name that FAISS's factory knows, and how it is searched."""
    width, name, *how = kind.split(":")
    index = faiss.index_factory(int(width), name, faiss.METRIC_INNER_PRODUCT)
    for each in how:
        faiss.ParameterSpace().set_index_parameters(index, each)
    return index


def recall(found: Sequence[Ends], true: Sequence[Ends]) -> float:
    """Mean share of the true rows at both ends that are found."""
    pairs = [(getattr(a, end), getattr(b, end)) for a, b in zip(found, true, strict=True) for end in ("most", "least")]
    return float(np.mean([np.isin(b.rows, a.rows).mean() for a, b in pairs]))


def _searches(index: Index, pool: Pool, asked: NDArray[np.float64], alone: Timed) -> tuple[list[Ends], Timed]:
    """Each question by itself, after one that warms up: the median."""
    index.search(pool, asked[:1], RECALL_AT)
    found, lines = [], []
    for question in asked:
        ends, line = _timed("index, 1 question", partial(index.search, pool, question[None], RECALL_AT))
        found += ends
        lines.append(line)
    seconds = median(line.seconds for line in lines)
    cpu = median(line.cpu_seconds for line in lines)
    return found, Timed("index, 1 question (median)", seconds, cpu, ratio=seconds / alone.seconds)


def _timed(name: str, work: Callable[[], T]) -> tuple[T, Timed]:
    began, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, Timed(name, time.perf_counter() - began, time.process_time() - cpu)


def _print(line: Timed, note: str = "") -> None:
    ratio = "" if line.ratio is None else f"{line.ratio:.4f} of the exact search; "
    print(f"| {line.name} | {line.seconds:.3g} | {line.cpu_seconds:.3g} | {ratio}{note} |", flush=True)


def _fill(store: FeatureStore, resampled: Resampled, rows: int, dim: int, dtype: FeatureDtype) -> list[str]:
    """One segment of the rows."""
    store.root.mkdir(parents=True, exist_ok=True)
    store.create("seg_pool", rows=rows, dim=dim, dtype=dtype, attributes={})
    for start in range(0, rows, CHUNK_ROWS):
        features = resampled.block(start, min(start + CHUNK_ROWS, rows))
        ones: Any = np.ones(len(features), np.float32)
        block = Block(features, ones, ones, ones, ones.astype(np.int32), [None] * len(features))
        digest = store.write("seg_pool", start=start, attempt=1, block=block)
        store.publish("seg_pool", start=start, attempt=1, digest=digest)
    return ["seg_pool"]


if __name__ == "__main__":
    main()
