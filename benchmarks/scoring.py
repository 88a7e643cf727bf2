"""What an answer costs: MMLU's 57 subtasks over a large pool, beside a plain read of its bytes and LESS's matching.

    python -m benchmarks.scoring --rows 200000 --rounds 5 --json scoring.json

A store with a run of one checkpoint is made in a new folder under `--folder` and removed at the end: features of
made-up rows with a few strong common directions, as float16 and in `--dtype`, 24 KiB a row. It lies in the memory's
cache of files when it is read, so that the software is measured and not the disk. In each round everything is done
once, one after the other; a ratio is that of two medians. `--target-check` is for CPUs that have 8-bit dot products.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import torch
from gradstore.types import FeatureDtype, GradientsRequest
from numpy.typing import NDArray

from benchmarks.sampling import sampled
from datastore import scores
from datastore.dtypes import decode
from datastore.parameters import Query
from datastore.products import NUMPY, Kernel
from datastore.scores import ScoreCache, Target
from datastore.segments import FeatureView
from datastore.shards import CHUNK_ROWS
from tests.processes import ServiceProcess
from tests.stores import Store
from worker.models import use_cpu_threads
from worker.products import TorchKernel, has_integer_products, one_thread_each

MMLU = {f"subject {number}": 5 for number in range(57)}
NINE_OTHERS = (27, 9, 1, 1, 1, 1, 1, 1, 1)
"""Subtasks of the tasks beside MMLU: BBH, TyDiQA, and such as GSM8K that have one."""
ASKED_AGAIN = 200
"""Times that a known selection is asked for."""
GROWTH = 0.01
TARGETS = {"first answer": 1.15, "ten tasks": 1.3, "grown by 1 %": 0.03}


@dataclass(frozen=True)
class Line:
    """Something that was measured."""

    name: str
    seconds: float
    """Median of the rounds."""
    ratio: float | None = None
    """To what `of` names."""
    of: str = ""


class Pool:
    """A filled store and the questions that are put to it."""

    def __init__(self, folder: Path, rows: int, dim: int, dtype: FeatureDtype) -> None:
        self.store = Store.at(folder / "store")
        self.dtype = dtype
        self._dim = dim
        self._folder = folder
        self._caches = count()
        self.store.checkpoint(0)
        self.store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="warm-up")
        self.store.pool(rows, name="pool")
        grown = rows + max(1, round(rows * GROWTH))
        self.store.pool(grown, name="grown")
        self.store.task(MMLU, folder=folder / "mmlu", name="mmlu")
        for number, subtasks in enumerate(NINE_OTHERS):
            names = {f"subtask {each}": 5 for each in range(subtasks)}
            self.store.task(names, folder=folder / f"task{number}", name=f"task{number}")
        for kept in dict.fromkeys(("float16", dtype)):
            self._compute({"dataset": "pool"}, kept)
        self._compute({"dataset": "grown"}, dtype)
        for task in ("mmlu", *self.others):
            self._compute({"task": task}, dtype)

    @property
    def others(self) -> list[str]:
        return [f"task{number}" for number in range(len(NINE_OTHERS))]

    def files(self) -> list[Path]:
        """The float16 chunks of the pool."""
        (segment,) = (name for name, _ in self.views("pool", "float16")[0].names)
        return sorted((self.store.store.root / segment / "data.zarr" / "features").glob("c.*"))

    def views(self, dataset: str, dtype: FeatureDtype) -> list[FeatureView]:
        sets = self.store.features.complete(datasets=[self.store.catalog.dataset(dataset).id])
        return [self.store.features.view(next(each for each in sets if each.dtype == dtype))]

    def target(self, task: str) -> Target:
        _, sources = self.store.recipes.resolve(self._query([task]), path="/select")
        ((id, sets),) = sources.tasks.items()
        subtasks = [row.subtask for row in self.store.tasks.validation(id)]
        return Target([self.store.features.view(each) for each in sets], subtasks)

    def score(self, tasks: Sequence[str], kernel: Kernel, *, dataset: str = "pool", cache: ScoreCache) -> None:
        """Answer from the features, as a job's shards do one after the other."""
        targets = [self.target(task) for task in tasks]
        with one_thread_each():
            scores.score(
                self.views(dataset, self.dtype), targets, weights=[1.0], aggregate="less", cache=cache, kernel=kernel
            )

    def new_cache(self) -> ScoreCache:
        return ScoreCache(self._folder / f"scores{next(self._caches)}")

    def _query(self, tasks: Sequence[str]) -> Query:
        return Query(tasks=tasks, datasets=["pool"], dtype=self.dtype, pct=0.05)

    def _compute(self, owner: dict[str, str], dtype: FeatureDtype) -> None:
        body = {**owner, "run": "warm-up", "dims": [self._dim], "dtype": dtype}
        self.store.features.start(GradientsRequest.model_validate(body))
        self.store.work(_features)


def _features(_checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Rows with 16 common directions: a thousand of them, and for each chunk a turn of these."""
    rng = np.random.default_rng(dim)
    directions = rng.standard_normal((16, dim), np.float32)
    rows = rng.standard_normal((CHUNK_ROWS, 16), np.float32) @ directions + rng.standard_normal(
        (CHUNK_ROWS, dim), np.float32
    )
    return np.roll(rows, start // CHUNK_ROWS, axis=0)[: stop - start]


def read(files: Sequence[Path]) -> None:
    """Read the files' bytes into one buffer, one after the other."""
    buffer = bytearray(files[0].stat().st_size)
    for path in files:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)


def less_matching(pool: Pool) -> None:
    """LESS's own way: all rows to float32, one product with all validation rows, mean by subtask, largest."""
    (view,) = pool.views("pool", "float16")
    rows = np.concatenate([decode(stored, "float16", view.dim) for _, stored in view.blocks()])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    (reference,) = pool.target("mmlu").views
    queries = reference.decoded(0, reference.rows)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    products = torch.from_numpy(rows) @ torch.from_numpy(queries).T
    products.reshape(len(rows), len(MMLU), -1).mean(-1).max(-1)


def anonymous() -> int:
    """The process's anonymous memory, in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.partition("Anonymous:")[2].split()[0]) * 1024


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def at_the_socket(pool: Pool) -> tuple[float, list[float]]:
    """Seconds of the first answer of a server in a process of its own, and of each answer when it is known."""
    address = {"task": "mmlu", "dataset": "pool", "dtype": pool.dtype, "pct": "0.05", "wait": "30"}
    folder, threads = pool.store.settings.data, torch.get_num_threads()
    with (
        ServiceProcess(folder, "--no-worker", allow=folder, threads=threads) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):

        def ask() -> None:
            assert client.get("/select", params=address).status_code == 200

        return timed(ask), [timed(ask) for _ in range(ASKED_AGAIN)]


def measure(pool: Pool, rounds: int) -> tuple[list[Line], int]:
    """Every measurement, and the peak of anonymous memory of a first answer, in bytes."""
    kernel = TorchKernel(torch.device("cpu"))
    files = pool.files()
    seconds: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        seconds.setdefault(name, []).append(timed(work))

    with sampled(anonymous, every=0.01) as seen:  # apart: whoever looks at a process's memory holds its page faults up
        pool.score(["mmlu"], kernel, cache=pool.new_cache())
    memory = max(size for _, size in seen)
    for _ in range(rounds):
        cache = pool.new_cache()
        note("warm read, float16", lambda: read(files))
        note("first answer", lambda cache=cache: pool.score(["mmlu"], kernel, cache=cache))  # type: ignore[misc]
        note("first answer, numpy", lambda: pool.score(["mmlu"], NUMPY, cache=pool.new_cache()))
        note("again, from the cache", lambda cache=cache: pool.score(["mmlu"], kernel, cache=cache))  # type: ignore[misc]
        note("grown by 1 %", lambda cache=cache: pool.score(["mmlu"], kernel, dataset="grown", cache=cache))  # type: ignore[misc]
        note("ten tasks", lambda: pool.score(["mmlu", *pool.others], kernel, cache=pool.new_cache()))
    note("LESS's matching", lambda: less_matching(pool))
    first, known = at_the_socket(pool)
    seconds |= {"GET /select, first": [first], "GET /select, known": known}
    of = {
        "first answer": "warm read, float16",
        "first answer, numpy": "warm read, float16",
        "grown by 1 %": "first answer",
        "ten tasks": "first answer",
        "LESS's matching": "first answer",
    }
    medians = {name: median(found) for name, found in seconds.items()}
    return [
        Line(name, found, found / medians[of[name]] if name in of else None, of.get(name, ""))
        for name, found in medians.items()
    ], memory


def missed(lines: Sequence[Line], memory: int) -> list[str]:
    """The targets that were not reached."""
    ratios = {line.name: line.ratio or 0.0 for line in lines}
    found = [f"{name}: {ratios[name]:.2f}, not {most}" for name, most in TARGETS.items() if ratios[name] > most]
    faster = ratios["LESS's matching"]
    if faster < 20:
        found.append(f"LESS's matching takes {faster:.1f} times the first answer, not 20")
    again = next(line.seconds for line in lines if line.name == "GET /select, known")
    if again > 0.01:
        found.append(f"GET /select, known: {again * 1e3:.1f} ms, not 10")
    if memory > 1e9:
        found.append(f"anonymous memory: {memory / 1e9:.2f} GB, not 1")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--dtype", default="int8", help="of the features that are scored")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--folder", type=Path, default=None, help="where the store is made; by default a temporary one")
    parser.add_argument("--json", type=Path, default=None, help="write what was measured there, too")
    parser.add_argument("--target-check", action="store_true", help="end with status 1 where a target is missed")
    options = parser.parse_args()
    use_cpu_threads(options.threads or None)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        pool = Pool(Path(folder), options.rows, options.dim, options.dtype)
        lines, memory = measure(pool, options.rounds)
    products = "8-bit dot products" if has_integer_products() else "no 8-bit dot products: float32"
    print(f"{options.rows:,} rows × {options.dim:,} {options.dtype}, {torch.get_num_threads()} threads, {products}\n")
    print("| what | seconds | ratio | of |\n|---|---|---|---|")
    for line in lines:
        print(f"| {line.name} | {line.seconds:.4f} | {'' if line.ratio is None else f'{line.ratio:.3f}'} | {line.of} |")
    print(f"\npeak anonymous memory of the first answer: {memory / 1e6:.0f} MB")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    failures = missed(lines, memory)
    for failure in failures:
        print(failure)
    if failures and options.target_check:
        sys.exit(1)


if __name__ == "__main__":
    main()
