"""How well scores predict training, by kind, projection, dims and preconditioning: the table of docs/validation.md.

    .venv/bin/python -m benchmarks.validation                  # the demo's model and skills, made on the spot
    .venv/bin/python -m benchmarks.validation --real DATA      # rows of DATA/train/mixed/mixed_4000.jsonl, task gsm8k
    .venv/bin/python -m benchmarks.validation --cost           # what TrackStar's preconditioning costs

Everything goes through the service, started here with one worker on one thread. With `--data FOLDER` the store is kept,
and the same command with other scores, or more subsets, does only the trainings that are new.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gradstore import GradientStore
from gradstore.results import ValidationResult
from gradstore.types import Interval
from rich.console import Console

from datastore.influence import Floats
from datastore.preconditioning import inverse_root, second_moment
from examples.server import folder_of, running

POOL_ROWS, TARGET_ROWS = 400, 3  # rows of the pool; of each skill in the task
SUBSETS = 64
WARM_UP = 0.25
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 2.5e-3,
    "epochs": 4,
    "batch_size": 8,
    "max_length": 64,
}
REAL: dict[str, Any] = {**TRAINING, "learning_rate": 1e-3, "max_length": 256}
KINDS = ("adam", "sgd", "sign")
DIMS = (256, 1024, 4096)
DTYPES = ("float16", "bfloat16", "int8", "int4", "binary")
PROJECTIONS = ("blocks", "sjlt", "fft", "rademacher")
COST_DIMS, COST_ROWS = (256, 1024, 2048), 4096
DIM = 1024
"""Dims at which projections are compared."""

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the validations and print a Markdown table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", metavar="DATA", type=Path, help="a folder of real rows in LESS's layout")
    parser.add_argument("--data", type=Path, help="keep the store in this folder (default: a temporary one)")
    parser.add_argument("--subsets", type=int, default=SUBSETS)
    parser.add_argument("--repeats", type=int, default=3, help="trainings without the best rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="time the preconditioning, and train nothing")
    arguments = parser.parse_args()
    if arguments.cost:
        _cost()
        return
    began = time.monotonic()
    with folder_of(arguments.data, name="validation") as folder:
        _run(folder, arguments)
    console.print(f"{time.monotonic() - began:.0f} s in all")


def _run(folder: Path, arguments: argparse.Namespace) -> None:
    make = _real if arguments.real else _demo
    base, pool, task, training = make(folder, arguments)
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        dataset = store.datasets.upload(pool, name="pool", replace=True).id
        target = store.tasks.upload(task, kind="gsm8k" if arguments.real else "jsonl", name="target", replace=True).id
        console.print(f"warm-up on {WARM_UP:.0%} of the pool, and gradients of each kind and projection")
        job = store.finetunes.create(
            model=str(base), dataset=dataset, fraction=WARM_UP, seed=arguments.seed, **training
        )
        run = store.finetunes.wait(job, progress=True).result.run
        parameters = store.checkpoints.get(store.runs.get(run).checkpoints[0].id).parameters
        scores = list(_scores(parameters))
        _gradients(store, {"run": run}, dataset, target, scores)
        asked: dict[str, Any] = {"dataset": dataset, "task": target, "model": str(base), **training}
        asked |= {"seed": arguments.seed, "scores": [*scores, {"control": "random"}]}
        console.print("trainings on random halves of the pool")
        lds = store.validations.create(**asked, subsets=arguments.subsets)
        found = store.validations.wait(lds, progress=True)
        _report(found.result, f"LDS over {arguments.subsets} random halves")
        few = [score for score in scores if score["label"] in {"adam", "adam, trackstar"}]
        asked["scores"] = [*few, {"control": "random"}]
        console.print("trainings without the best rows")
        left = store.validations.create(**asked, kind="leave-top-k-out", pct=0.1, repeats=arguments.repeats)
        _report(
            store.validations.wait(left, progress=True).result, "loss without the best 10 % less without random 10 %"
        )


def _scores(parameters: int) -> Iterable[dict[str, Any]]:
    """What is compared, the first with all others."""
    plain = {"projection": "blocks", "dim": DIM, "dtype": "float32"}
    for kind in KINDS:
        yield {"label": kind, "kind": kind, **plain}
    for projection in PROJECTIONS[1:]:
        yield {"label": f"adam, {projection}", "kind": "adam", **plain, "projection": projection}
    for dim in DIMS:
        if dim != DIM:
            yield {"label": f"adam, {dim} dims", "kind": "adam", **plain, "dim": dim}
    exact = {"dtype": "float32", "projection": "none", "dim": parameters}
    yield {"label": "adam, not projected", "kind": "adam", **exact}
    for dtype in DTYPES:
        yield {"label": f"adam, {dtype}", "kind": "adam", **plain, "dtype": dtype}
    for kind in ("hidden", "rds"):
        yield {"label": kind, "kind": kind, "dtype": "float32"}
    for kind in ("adam", "sgd"):
        for dim in (256, DIM):
            name = kind if dim == DIM else f"{kind}, {dim} dims"
            yield {"label": f"{name}, trackstar", "kind": kind, **plain, "dim": dim, "precondition": "trackstar"}


def _gradients(
    store: GradientStore, run: dict[str, Any], dataset: str, task: str, scores: Sequence[dict[str, Any]]
) -> None:
    """Compute the features that the scores are made of."""
    for projection, dtype in sorted({(score.get("projection", "blocks"), score["dtype"]) for score in scores}):
        mine = [score for score in scores if (score.get("projection", "blocks"), score["dtype"]) == (projection, dtype)]
        dims = sorted({score["dim"] for score in mine if "dim" in score})
        shared: dict[str, Any] = {**run, "projection": projection, "dtype": dtype, "dims": dims}
        hidden = sorted({score["kind"] for score in mine} & {"hidden", "rds"})
        owners: list[dict[str, Any]] = [
            {"dataset": dataset, "kinds": sorted({score["kind"] for score in mine})},
            {"task": task, "kinds": ["sgd", *hidden]},
        ]
        for owner in owners:
            store.gradients.wait(store.gradients.create(**owner, **shared), progress=True)


def _demo(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path, Path, dict[str, Any]]:
    """The demo's base model, its pool, and a task with a few rows of each skill."""
    from examples.demo import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it
    from examples.demo.skills import SKILLS, pool, target  # noqa: PLC0415 - with it

    base, seed = folder / "base", arguments.seed
    if not base.is_dir():
        model.use_one_thread()
        model.build(base, seed=seed)
    rows = [row for skill in SKILLS for row in target(skill, TARGET_ROWS, seed=seed)]
    return base, _write(folder / "pool.jsonl", pool(POOL_ROWS, seed=seed)), _task(folder, rows), TRAINING


def _real(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path, Path, dict[str, Any]]:
    """A small model trained on the text of a real pool, some of its rows, and GSM8K as the task."""
    from examples.real_input import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it

    lines = (arguments.real / "train/mixed/mixed_4000.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    base = folder / "base"
    if not base.is_dir():
        texts = ["".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in row["messages"]) for row in rows]
        model.build(base, texts, seed=arguments.seed)
    short = [row for row in rows if sum(len(turn["content"]) for turn in row["messages"]) < 600]
    step = max(1, len(short) // POOL_ROWS)
    pool = _write(folder / "pool.jsonl", short[::step][:POOL_ROWS])
    return base, pool, arguments.real / "eval/gsm8k", REAL


def _task(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    files = folder / "task"
    files.mkdir(exist_ok=True)
    _write(files / "validation.jsonl", [{**row, "metric": "none"} for row in rows])
    return files


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _cost() -> None:
    """CPU seconds, of all threads together, of each part of the preconditioning."""
    print(f"| dims | second moment of {COST_ROWS:,} rows | its inverse root | map of {COST_ROWS:,} rows |")
    print("|---|---|---|---|")
    for dim in COST_DIMS:
        rows = np.random.default_rng(0).standard_normal((COST_ROWS, dim), np.float32)
        moment, first = _timed(partial(second_moment, [rows]))
        root, second = _timed(partial(inverse_root, moment))
        _, third = _timed(partial(np.matmul, rows, root))
        print(f"| {dim:,} | {first:.2f} s | {second:.2f} s | {third:.2f} s |", flush=True)


def _timed(work: Callable[[], Floats]) -> tuple[Floats, float]:
    began = time.process_time()
    return work(), time.process_time() - began


def _report(result: ValidationResult, title: str) -> None:
    print(f"\n{title}: {result.trainings} trainings of {result.rows} rows, {result.seconds:.0f} s of one worker\n")
    print("| scores | value (95 %) | more than the first (95 %) |")
    print("|---|---|---|")
    for row in result.scores:
        more = "" if row.difference is None else f"{row.difference:+.3f} ({_interval(row.difference_interval)})"
        mixing = f", λ {', '.join(f'{share:.2f}' for share in row.mixing)}" if row.mixing else ""
        print(f"| {row.label}{mixing} | {row.value:.3f} ({_interval(row.interval)}) | {more} |")


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


if __name__ == "__main__":
    main()
