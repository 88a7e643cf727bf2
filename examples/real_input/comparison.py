"""Compare ways to select from a real pool, for MMLU and GSM8K, with real trainings on what each selects.

    .venv/bin/python -m examples.real_input.comparison DATA

DATA holds `train/mixed/mixed_4000.jsonl` and `eval/{mmlu,gsm8k}` in LESS's layout. A small model is trained on the
pool's text first; then come a short LoRA warm-up, the features that the methods need, and one comparison: the same
pool, tasks and number of rows, three seeds. Prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradstore import GradientStore
from gradstore.results import ComparisonResult
from gradstore.types import ComparedRow, ComparedTask, Interval
from rich.console import Console

from examples.real_input.__main__ import texts
from examples.server import folder_of, running

TASKS = ("mmlu", "gsm8k")
PCT = 0.025
REPEATS = 3
WARM_UP = 0.05
STEPS, WIDTH, LAYERS = 200, 96, 2  # of the base model: smaller than that of the selections, since thirty are trained
DIM = 2048
RECIPE: dict[str, Any] = {
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
    "learning_rate": 2e-3,
    "batch_size": 8,
    "device_batch_size": 8,
    "max_length": 192,
}
EPOCHS = 2
LOGODDS_DIM = 100
BUDGET = 0.2
"""Part of the pool whose gradients a cascade computes."""
CONTESTANTS: list[dict[str, Any]] = [
    {"label": "influence, less", "method": "influence", "kind": "adam", "aggregate": "less"},
    {"label": "influence, avg", "method": "influence", "kind": "adam", "aggregate": "avg"},
    {"label": "predicted", "method": "predicted"},
    {"label": "cascade", "method": "cascade", "budget": BUDGET},
    {"label": "gradex", "method": "gradex", "by": "sources"},
    {"label": "cods", "method": "cods", "by": "abilities"},
    {"label": "rds", "method": "rds", "checkpoints": ["base"]},
    {"label": "bm25", "method": "bm25"},
    {"label": "random", "method": "random"},
]

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the comparison and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", metavar="DATA", type=Path)
    parser.add_argument("--data", type=Path, help="keep the store in this folder (default: a temporary one)")
    arguments = parser.parse_args()
    began = time.monotonic()
    with folder_of(arguments.data, name="comparison") as folder:
        result = _run(arguments.shared, folder)
    output = Console(highlight=False, soft_wrap=True)
    for line in report(result):
        output.print(line, markup=False)
    output.print(f"\n{time.monotonic() - began:.0f} s in all")


def _run(shared: Path, folder: Path) -> ComparisonResult:
    pool = shared / "train" / "mixed" / "mixed_4000.jsonl"
    base = folder / "base"
    if not base.is_dir():
        from examples.demo.model import use_one_thread  # noqa: PLC0415 - torch takes seconds to import
        from examples.real_input import model  # noqa: PLC0415

        use_one_thread()
        model.build(base, texts(pool), seed=0, steps=STEPS, width=WIDTH, layers=LAYERS)
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        dataset = store.datasets.upload(pool, name="mixed")
        for kind in TASKS:
            store.tasks.upload(shared / "eval" / kind, kind=kind, name=kind)
        run = _features(store, base, dataset.id)
        _learnt(store, dataset.id, run)
        _estimates(store, dataset.id, run)
        _ability_space(store, dataset.id)
        console.print(f"{len(CONTESTANTS)} contestants, {len(TASKS)} tasks, {REPEATS} seeds")
        return store.compare(
            dataset=dataset.id,
            tasks=list(TASKS),
            pct=PCT,
            contestants=CONTESTANTS,
            train=True,
            model=str(base),
            repeats=REPEATS,
            epochs=EPOCHS,
            progress=True,
            **RECIPE,
        ).result


def _features(store: GradientStore, base: Path, pool: str) -> str:
    """The warm-up, whose run is returned, and the features of pool and tasks that the methods read."""
    job = store.finetunes.create(model=str(base), dataset=pool, fraction=WARM_UP, epochs=1, **RECIPE)
    run = store.finetunes.wait(job, progress=True).result.run
    plain = store.checkpoints.register(model=str(base), name="base").id
    kinds = {"dataset": ["adam", "sgd", "hidden", "rds"], "task": ["sgd", "hidden", "rds"]}
    for noun, name in (("dataset", pool), *(("task", kind) for kind in TASKS)):
        asked: list[dict[str, Any]] = [
            {"run": run, "kinds": kinds[noun], "dims": [DIM], "name": f"gradients-{name}"},
            {"run": run, "kinds": ["logodds"], "dims": [LOGODDS_DIM]},
            {"checkpoints": [plain], "kinds": ["rds"], "max_length": RECIPE["max_length"]},
        ]
        for fields in asked:
            store.gradients.wait(store.gradients.create(**{noun: name}, **fields), progress=True)
    return run


def _learnt(store: GradientStore, pool: str, run: str) -> None:
    """A predictor and a cascade for each task."""
    for kind in TASKS:
        wanted: dict[str, Any] = {"dataset": pool, "task": kind, "run": run, "dim": DIM}
        store.predictors.wait(store.predictors.create(**wanted, kind="adam"), progress=True)
        store.cascades.wait(store.cascades.create(**wanted, kind="adam", budget=BUDGET), progress=True)


def _estimates(store: GradientStore, pool: str, run: str) -> None:
    """What training on halves of the sources would give both tasks."""
    (checkpoint,) = store.runs.get(run).checkpoints
    job = store.estimates.create(dataset=pool, tasks=TASKS, checkpoint=checkpoint.id, scale=0.1, name="sources")
    store.estimates.wait(job, progress=True)


def _ability_space(store: GradientStore, pool: str) -> None:
    """A projector that knows the sources, and the places of pool and tasks in its space."""
    for name in (pool, *TASKS):
        made = store.gradients.get(f"gradients-{name}").result
        (found,) = (one for one in made.feature_sets if one.kind == "sgd")
        store.streams.wait(
            store.streams.create(
                kind="gradients", gradients=f"gradients-{name}", feature_set=found.id, name=f"stream-{name}"
            )
        )
    store.annotations.wait(store.annotations.create(dataset=pool, by="origin", name="origins"))
    streams = {"gradients": f"stream-{pool}"}
    job = store.projectors.create(streams=streams, annotations="origins", name="abilities")
    store.projectors.wait(job, progress=True)
    for name in (pool, *TASKS):
        job = store.embeddings.create(projector="abilities", streams={"gradients": f"stream-{name}"})
        store.embeddings.wait(job, progress=True)


def report(result: ComparisonResult) -> Iterator[str]:
    """The tables of a comparison as lines of Markdown."""
    for task in result.tasks:
        rows = [row for row in result.rows if row.task == task.task]
        yield from _losses(task, rows)
        yield from _shared(result, task, rows)
    yield f"{result.trainings} trainings of {rows[0].rows} rows, {result.tokens:,} tokens in {result.seconds:.0f} s"


def _losses(task: ComparedTask, rows: Sequence[ComparedRow]) -> Iterator[str]:
    base = f"{task.base_loss or 0:.3f} ({_interval(task.base_interval)})"
    yield f"\n**{task.task_name}**, {task.measured_rows} rows; loss before training {base}\n"
    yield "| contestant | most of its rows from | scoring | rests on | loss (95 %) | less random's (95 %) |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        origins = ", ".join(f"{origin} {count / row.rows:.0%}" for origin, count in list(row.origins.items())[:3])
        cost = f"{_seconds(row.cost.scoring_seconds)} | {_seconds(row.cost.rests_on_seconds)}"
        if row.loss is None:
            continue
        loss = f"{row.loss.value:.3f} ({_interval(row.loss.interval)})"
        less = "" if row.loss.difference is None else f"{row.loss.difference:+.3f} "
        less += f"({_interval(row.loss.difference_interval)})" if less else ""
        yield f"| {row.contestant} | {origins} | {cost} | {loss} | {less} |"


def _shared(result: ComparisonResult, task: ComparedTask, rows: Sequence[ComparedRow]) -> Iterator[str]:
    names = [row.contestant for row in rows]
    shares = {frozenset(pair.contestants): pair.share for pair in result.pairs if pair.task == task.task}
    yield f"\n| common rows | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for one in names:
        cells = ["" if one == other else f"{shares[frozenset({one, other})]:.0%}" for other in names]
        yield f"| {one} | {' | '.join(cells)} |"
    yield ""


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


if __name__ == "__main__":
    main()
