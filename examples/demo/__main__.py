"""`make demo`: pool and target in, the best 5 % out, and a model that is better for it; over three seeds.

Everything goes through the real service, started here with an embedded worker on a free port, and the Python client.
Exits with 1 unless, over the seeds, training on the selected 5 % gives a lower target loss than training on a random
5 %, and the share of the target's skill among the selected rows is at least three times its share in the pool.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from gradstore import GradientStore
from gradstore.types import EvaluationRow, FinetuneResult
from rich.console import Console
from rich.table import Table

from examples.demo.skills import SKILLS, pool, target
from examples.server import folder_of, running

TARGET = "mirror"
POOL_ROWS, VALIDATION_ROWS, TEST_ROWS = 2000, 20, 200
PCT = 0.05
SEEDS = (0, 1, 2)
OTHER_DRAW = 100
"""Added to the seed for the random 5 %, so that it is another draw than the warm-up's."""
DIM = 1024
ENRICHMENT = 3.0
"""How many times the pool's share of the right skill the selection must have."""
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 2.5e-3,
    "epochs": 4,
    "batch_size": 8,
    "max_length": 64,
}

console = Console(stderr=True, highlight=False)


@dataclass
class Outcome:
    """What one seed gave."""

    share: float
    """Share of the target's skill among the selected rows."""
    pool_share: float
    rows: dict[str, int] = field(default_factory=dict)
    measured: dict[str, EvaluationRow] = field(default_factory=dict)
    """Training data → the target's loss and accuracy after training on it; `base` is the model before."""


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--data", type=Path, help="keep the store in this folder (default: a temporary one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    began = time.monotonic()
    with folder_of(arguments.data, name="demo") as folder:
        outcomes = _run(folder, arguments.seeds)
    return _report(outcomes, seconds=time.monotonic() - began)


def _run(folder: Path, seeds: Sequence[int]) -> list[Outcome]:
    from examples.demo import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it

    model.use_one_thread()
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        outcomes = []
        for seed in seeds:
            console.rule(f"seed {seed}")
            base = folder / f"base-{seed}"
            _say("making a small base model that has seen all skills and masters none")
            model.build(base, seed=seed)
            outcomes.append(_flow(store, base, folder, seed))
    return outcomes


def _flow(store: GradientStore, base: Path, folder: Path, seed: int) -> Outcome:
    """The main job: warm-up, gradients, selection, and three trainings to compare."""
    pool_file = _write(folder / f"pool-{seed}.jsonl", pool(POOL_ROWS, seed=seed))
    _say(
        f"uploading a pool of {POOL_ROWS:,} rows of {len(SKILLS)} skills, and {VALIDATION_ROWS} examples of '{TARGET}'"
    )
    dataset = store.datasets.upload(pool_file, name=f"pool-{seed}")
    task = store.tasks.upload(_task_folder(folder, seed), kind="jsonl", name=f"{TARGET}-{seed}")

    _say("fine-tuning on a random 5 % of the pool, as the warm-up")
    run = _train(store, base, dataset=dataset.id, fraction=PCT, seed=seed).run
    _say("computing the projected gradient of every example at every checkpoint")
    features: dict[str, Any] = {"run": run, "dims": [DIM]}
    store.gradients.wait(store.gradients.create(dataset=dataset.id, **features), progress=True)
    store.gradients.wait(store.gradients.create(task=task.id, **features), progress=True)
    selection = store.select(task=task.id, dataset=dataset.id, run=run, pct=PCT)
    share = selection.origins.get(TARGET, 0) / selection.count
    outcome = Outcome(share=share, pool_share=selection.pool_origins[TARGET] / dataset.rows)
    _say(f"selected {selection.count} rows, of which {share:.0%} are '{TARGET}'")

    training: dict[str, dict[str, Any]] = {
        "selected 5 %": {"selection": selection.id, "seed": seed},
        "random 5 %": {"dataset": dataset.id, "rows": selection.count, "seed": seed + OTHER_DRAW},
        "all rows": {"dataset": dataset.id, "seed": seed},
    }
    for label, data in training.items():
        _say(f"fine-tuning on {label}, and evaluating")
        trained = _train(store, base, **data)
        outcome.rows[label] = trained.rows
        baseline = "base" not in outcome.measured
        job = store.evaluations.create(checkpoint=trained.checkpoints[-1], tasks=[task.id], baseline=baseline)
        for row in store.evaluations.wait(job, progress=True).result.rows:
            if row.subtask is None:
                outcome.measured["base" if row.model == "base" else label] = row
    return outcome


def _train(store: GradientStore, base: Path, **data: Any) -> FinetuneResult:
    job = store.finetunes.create(model=str(base), **TRAINING, **data)
    return store.finetunes.wait(job, progress=True).result


def _task_folder(folder: Path, seed: int) -> Path:
    files = folder / f"task-{seed}"
    files.mkdir(exist_ok=True)
    _write(files / "validation.jsonl", target(TARGET, VALIDATION_ROWS, seed=2 * seed + 1))
    _write(files / "test.jsonl", target(TARGET, TEST_ROWS, seed=2 * seed + 2))
    return files


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _say(text: str) -> None:
    console.print(f"  {text}")


def _report(outcomes: Sequence[Outcome], *, seconds: float) -> int:
    """Print what came out; returns 0 where the selection has proven itself, else 1."""
    output = Console(highlight=False, width=96, soft_wrap=True)
    share, pool_share = (mean(getattr(outcome, name) for outcome in outcomes) for name in ("share", "pool_share"))
    table = Table(title=f"target '{TARGET}' after training, mean over {len(outcomes)} seeds (each seed in brackets)")
    for column in ("trained on", "rows", "target loss", "exact answers"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    losses = {}
    for label in ("base", *outcomes[0].rows):
        measured = [outcome.measured[label] for outcome in outcomes]
        losses[label] = mean(row.loss or 0.0 for row in measured)
        rows = f"{outcomes[0].rows[label]:,}" if label in outcomes[0].rows else "–"
        each_loss = ", ".join(f"{row.loss:.3f}" for row in measured)
        each_value = ", ".join(f"{row.value:.0%}" for row in measured)
        value = mean(row.value or 0.0 for row in measured)
        table.add_row(label, rows, f"{losses[label]:.3f} ({each_loss})", f"{value:.1%} ({each_value})")
    output.print(table)
    output.print(
        f"share of '{TARGET}' in the selected 5 %: {share:.1%}; in the pool: {pool_share:.1%} "
        f"({share / pool_share:.1f} times)"
    )
    enriched = share >= ENRICHMENT * pool_share
    better = losses["selected 5 %"] < losses["random 5 %"]
    verdict = "the selection is worth it" if enriched and better else "the selection has NOT proven itself"
    output.print(f"{verdict} ({seconds:.0f} s)")
    return 0 if enriched and better else 1


if __name__ == "__main__":
    sys.exit(main())
