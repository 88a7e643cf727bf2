"""What a stored dtype costs a selection, and what it saves: on the gradients of real rows, through the store itself.

    python -m benchmarks.dtypes DATA --json out.json

DATA holds `train/mixed/mixed_4000.jsonl`, the pool, and `targets/*.jsonl`, the tasks. A small model is trained on the
pool's text, then an adapter on some of its rows; as LESS has it, the pool's gradients go through Adam's map and the
tasks' do not. Every map projects the same gradients to every dim, every dtype stores them, and what is compared is

* top 5 %: of the rows that a task's scores put into the first 5 % where features are float32, how many are there; the
  mean over the tasks, and the lowest. A second column: of those by the unprojected gradients.
* Pearson: the correlation of the cosines of all pool rows and task rows with the unprojected ones.
* seconds: scoring `--scored` rows for one task from a warm store with the worker's kernel, the least of three.

Before that, how fast blocks of each dtype are decoded by one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, get_args

import numpy as np
import torch
from gradstore.types import FeatureDtype
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model

from benchmarks.workload import TARGETS, Workload, trainable, trained
from datastore.dtypes import decode, encode
from datastore.gradients import Block, FeatureStore
from datastore.influence import influence, normalise
from datastore.rows import Example
from datastore.scores import ScoreCache, Target, score
from datastore.segments import FeatureView, array_formats
from datastore.shapes import example
from datastore.shards import CHUNK_ROWS
from examples.real_input import model as small
from worker.batches import Encoded
from worker.directions import Kind, Moments
from worker.gradients import GradientEngine
from worker.models import load_model, load_tokenizer
from worker.products import TorchKernel
from worker.projection import ProjectionName, make_projection
from worker.reading import read

DTYPES: Final[tuple[FeatureDtype, ...]] = get_args(FeatureDtype)
TASKS = {"mmlu": "mmlu_dev_285", "gsm8k": "gsm8k_val_30", "tydiqa": "tydiqa_oneshot_9"}
RANK = 16
WARM_UP = 200  # rows: 5 % of the pool, as LESS has it
PCT = 0.05
TOKENS_OF_A_ROW = 192
TOKENS = 4096  # of a batch
AT_ONCE = 64  # examples projected together

KERNEL = TorchKernel(torch.device("cpu"))

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Gradients:
    """Unprojected gradients of the pool and of each task, parameter after parameter."""

    pool: Floats
    """(n, p), after Adam's map."""
    tasks: Mapping[str, Floats]
    subtasks: Mapping[str, list[str]]
    """Of each row of a task."""
    shapes: list[tuple[str, torch.Size]]

    def projected(self, name: ProjectionName, dim: int) -> tuple[Floats, dict[str, Floats]]:
        """Pool and tasks through one map: (n, dim) each."""
        return self._map(self.pool, name, dim), {task: self._map(rows, name, dim) for task, rows in self.tasks.items()}

    def _map(self, flat: Floats, name: ProjectionName, dim: int) -> Floats:
        projection = make_projection(name, dims=[dim], parameters=self.shapes, seed=0, device=torch.device("cpu"))
        sizes = [shape.numel() for _, shape in self.shapes]
        parts = []
        for start in range(0, len(flat), AT_ONCE):
            some = torch.from_numpy(flat[start : start + AT_ONCE].copy())
            named = zip([each for each, _ in self.shapes], some.split_with_sizes(sizes, dim=1), strict=True)
            parts.append(projection.project(named, examples=len(some))[dim].numpy())
        return np.concatenate(parts)


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    projection: ProjectionName
    dim: int
    dtype: FeatureDtype
    bytes_per_row: int
    top: float
    """Share of float32's first 5 % that is found, the mean over the tasks."""
    lowest_top: float
    top_unprojected: float
    """The same of the unprojected gradients' first 5 %."""
    pearson: float
    seconds: float
    rate: float
    """Rows scored per second."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    print("| dtype | decoded, 10⁹ numbers/s |\n|---|---|")
    for dtype in DTYPES:
        print(f"| {dtype} | {decoding_speed(dtype):.1f} |", flush=True)
    with TemporaryDirectory(prefix="gradstore-dtypes-") as temporary:
        gradients = make_gradients(
            options.data, options.base or Path(temporary) / "base", steps=options.steps, rows=options.rows
        )
        tasks = ", ".join(f"{name} {len(rows)}" for name, rows in gradients.tasks.items())
        print(f"\n{len(gradients.pool):,} rows of the pool, {gradients.pool.shape[1]:,} parameters; {tasks}")
        print(f"{options.scored:,} rows scored, {os.cpu_count()} cores\n")
        print("| map | dim | dtype | bytes a row | top 5 % (lowest) | of the unprojected | Pearson | s | rows/s |")
        print("|---|---|---|---|---|---|---|---|---|")
        lines = []
        for line in measure(gradients, options.map or ["blocks"], options.dim or [8192], options.scored, temporary):
            lines.append(line)
            print(
                f"| {line.projection} | {line.dim:,} | {line.dtype} | {line.bytes_per_row:,} "
                f"| {line.top:.3f} ({line.lowest_top:.3f}) | {line.top_unprojected:.3f} | {line.pearson:.4f} "
                f"| {line.seconds:.3g} | {line.rate:,.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.dtypes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the pool")
    parser.add_argument("--steps", type=int, default=100, help="steps that the small model is trained")
    parser.add_argument("--base", type=Path, help="folder to keep the small model in, or that has it")
    parser.add_argument("--dim", type=int, action="append", help="may be repeated; 8192 by default")
    parser.add_argument("--map", action="append", help="may be repeated; blocks by default")
    parser.add_argument("--scored", type=int, default=20 * CHUNK_ROWS, help="rows that the scoring is timed with")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the lines of the table to this file")
    return parser.parse_args(arguments)


def decoding_speed(dtype: FeatureDtype, *, rows: int = 256, dim: int = 8192) -> float:
    """Billions of numbers decoded per second, the best of ten blocks."""
    stored, _ = encode(np.random.default_rng(0).standard_normal((rows, dim), np.float32), dtype)
    out = np.empty((rows, dim), np.float32)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        decode(stored, dtype, dim, out=out)
        best = min(best, time.perf_counter() - begin)
    return rows * dim / best / 1e9


def make_gradients(data: Path, base: Path, *, steps: int, rows: int) -> Gradients:
    """Gradients of the first `rows` of the pool and of all rows of the tasks, at a checkpoint after a warm-up."""
    pool = _examples(data / "train" / "mixed" / "mixed_4000.jsonl")
    if not base.is_dir():
        small.build(base, [_text(each) for each, _ in pool], seed=0, steps=steps)
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(str(base)), lora)
    tokenizer = load_tokenizer(str(base))

    def encoded(examples: Sequence[Example]) -> tuple[list[Encoded], list[int]]:
        found = read(examples, tokenizer=tokenizer, template="tulu", max_length=TOKENS_OF_A_ROW, check=lambda: None)
        return found.encoded, found.positions

    warm_up, _ = encoded([each for each, _ in pool[-WARM_UP:]])
    untrained = Workload(model, warm_up, Moments({}, {}, 0), 0, torch.device("cpu"))
    moments = trained(untrained, warm_up)
    chosen, _ = encoded([each for each, _ in pool[:rows]])
    tasks, subtasks = {}, {}
    for name, file in TASKS.items():
        examples = _examples(data / "targets" / f"{file}.jsonl")
        found, positions = encoded([each for each, _ in examples])
        tasks[name] = _flat(untrained, moments, found, Kind("sgd"))
        subtasks[name] = [examples[position][1] for position in positions]
    shapes = [(name, parameter.shape) for name, parameter in trainable(model).items()]
    return Gradients(_flat(untrained, moments, chosen, Kind("adam")), tasks, subtasks, shapes)


def _examples(file: Path) -> list[tuple[Example, str]]:
    """The rows of a file with their subtasks."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [
        (example({key: row[key] for key in row if key != "subtask"}, file=file.name)[0], row.get("subtask", ""))
        for row in rows
    ]


def _text(row: Example) -> str:
    return "".join(f"<|{turn.role}|>\n{turn.content}\n" for turn in row.messages)


def _flat(workload: Workload, moments: Moments, rows: Sequence[Encoded], kind: Kind) -> Floats:
    """Unprojected gradients of those rows that have one."""
    engine = GradientEngine(
        workload.model, kinds=[kind], moments=moments, projection="none", dims=[workload.parameters]
    )
    return engine.features(rows, pad_id=0, token_budget=TOKENS)[kind].by_dim[workload.parameters]


def measure(
    gradients: Gradients, maps: Sequence[ProjectionName], dims: Sequence[int], scored: int, folder: str
) -> Iterator[Line]:
    """A line for each map, dim and dtype."""
    exact_best = {name: best(exact_scores(gradients, name)) for name in TASKS}
    exact = np.concatenate([influence(gradients.pool, rows) for rows in gradients.tasks.values()], axis=1)
    for name in maps:
        for dim in dims:
            pool, tasks = gradients.projected(name, dim)
            wanted: dict[str, set[int]] = {}
            for dtype in sorted(DTYPES, key=lambda each: each != "float32"):
                with TemporaryDirectory(dir=folder) as place:
                    room = _Room(Path(place), dtype)
                    view = room.view("pool", pool)
                    targets = {task: Target([room.view(task, tasks[task])], gradients.subtasks[task]) for task in TASKS}
                    found = {task: best(room.scores(view, target)) for task, target in targets.items()}
                    wanted = wanted or found
                    shares = [len(found[task] & wanted[task]) / len(wanted[task]) for task in TASKS]
                    cosines = [
                        influence(view.features(0, view.rows), target.views[0].features(0, len(tasks[task])))
                        for task, target in targets.items()
                    ]
                    seconds = room.seconds(pool, targets["mmlu"], scored)
                    yield Line(
                        projection=name,
                        dim=dim,
                        dtype=dtype,
                        bytes_per_row=_bytes_per_row(dim, dtype),
                        top=sum(shares) / len(shares),
                        lowest_top=min(shares),
                        top_unprojected=sum(len(found[task] & exact_best[task]) / len(found[task]) for task in TASKS)
                        / len(TASKS),
                        pearson=float(np.corrcoef(np.concatenate(cosines, axis=1).ravel(), exact.ravel())[0, 1]),
                        seconds=seconds,
                        rate=scored / seconds,
                    )


def best(scores: Floats) -> set[int]:
    """The rows of the first 5 %."""
    return set(np.argsort(-scores, kind="stable")[: int(PCT * len(scores))].tolist())


def exact_scores(gradients: Gradients, task: str) -> Floats:
    """Scores from unprojected gradients: the largest mean cosine with the rows of a subtask."""
    unit, names = normalise(gradients.tasks[task]), np.array(gradients.subtasks[task])
    means = np.stack([unit[names == name].mean(axis=0) for name in dict.fromkeys(names.tolist())])
    found: Floats = (normalise(gradients.pool) @ means.T).max(axis=1)
    return found


class _Room:
    """A store whose features have one dtype."""

    def __init__(self, folder: Path, dtype: FeatureDtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._store = FeatureStore(folder / "features")

    def view(self, name: str, features: Floats, *, rows: int | None = None) -> FeatureView:
        """A stored segment of the features, over and over again until there are so many rows."""
        rows = rows or len(features)
        self._store.create(f"seg_{name}", rows=rows, dim=features.shape[1], dtype=self._dtype, attributes={})
        for start in range(0, rows, CHUNK_ROWS):
            part = features[np.arange(start, min(start + CHUNK_ROWS, rows)) % len(features)]
            ones = np.ones(len(part), np.float32)
            block = Block(part, ones, ones, ones, ones.astype(np.int32), [None] * len(part))
            digest = self._store.write(f"seg_{name}", start=start, attempt=1, block=block)
            self._store.publish(f"seg_{name}", start=start, attempt=1, digest=digest)
        return self._store.view([f"seg_{name}"])

    def scores(self, view: FeatureView, target: Target, *, turn: int = 0) -> Floats:
        """The scores of all rows, from no cache."""
        cache = ScoreCache(self._folder / f"scores-{turn}")
        (found,) = score([view], [target], weights=[1.0], aggregate="less", cache=cache, kernel=KERNEL)
        return found.score

    def seconds(self, pool: Floats, target: Target, rows: int) -> float:
        """What scoring takes, the least of three."""
        view = self.view("scored", pool, rows=rows)
        times = []
        for turn in (1, 2, 3):
            begin = time.perf_counter()
            self.scores(view, target, turn=turn)
            times.append(time.perf_counter() - begin)
        return min(times)


def _bytes_per_row(dim: int, dtype: FeatureDtype) -> int:
    formats = array_formats(CHUNK_ROWS, dim=dim, dtype=dtype).values()
    return sum(each.dtype.itemsize * (each.width or 1) for each in formats)


if __name__ == "__main__":
    sys.exit(main())
