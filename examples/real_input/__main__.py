"""Select the top 5 % of a real pool for GSM8K, MMLU, BBH and TyDiQA, and say from which sources they come.

    .venv/bin/python -m examples.real_input DATA

DATA holds `train/mixed/mixed_4000.jsonl` and `eval/{gsm8k,mmlu,bbh,tydiqa}` in LESS's layout. A small model is trained
on the pool's text first; the rest is the service's ordinary flow. Prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradstore import GradientStore
from gradstore.types import Selection
from rich.console import Console

from examples.server import folder_of, running

TASKS = ("gsm8k", "mmlu", "bbh", "tydiqa")
PCT = 0.05
DIM = 4096
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 1e-3,
    "epochs": 4,
    "batch_size": 16,
    "max_length": 1024,
}

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the flow and print a Markdown table for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", metavar="DATA", type=Path)
    parser.add_argument("--data", type=Path, help="keep the store in this folder (default: a temporary one)")
    arguments = parser.parse_args()
    began = time.monotonic()
    with folder_of(arguments.data, name="real") as folder:
        selections = _run(arguments.shared, folder)
    _report(selections, seconds=time.monotonic() - began)


def _run(shared: Path, folder: Path) -> dict[str, Selection]:
    pool = shared / "train" / "mixed" / "mixed_4000.jsonl"
    base = folder / "base"
    if not base.is_dir():
        from examples.real_input import model  # noqa: PLC0415 - torch takes seconds to import

        model.build(base, texts(pool), seed=0)
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        dataset = store.datasets.upload(pool, name="mixed", progress=True)
        console.print(f"warm-up on {PCT:.0%} of {dataset.rows:,} rows")
        job = store.finetunes.create(model=str(base), dataset=dataset.id, fraction=PCT, **TRAINING)
        run = store.finetunes.wait(job, progress=True).result.run
        console.print("gradients of the pool and of the tasks, at every checkpoint")
        features: dict[str, Any] = {"run": run, "dims": [DIM]}
        store.gradients.wait(store.gradients.create(dataset=dataset.id, **features), progress=True)
        selections = {}
        for kind in TASKS:
            task = store.tasks.upload(shared / "eval" / kind, kind=kind, name=kind)
            store.gradients.wait(store.gradients.create(task=task.id, **features), progress=True)
            selections[kind] = store.select(task=task.id, dataset=dataset.id, run=run, pct=PCT)
    return selections


def texts(pool: Path) -> list[str]:
    """What the rows of a pool say, each with its roles."""
    rows = [json.loads(line) for line in pool.read_text(encoding="utf-8").split("\n") if line]
    return ["".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in row["messages"]) for row in rows]


def _report(selections: Mapping[str, Selection], *, seconds: float) -> None:
    output = Console(highlight=False, soft_wrap=True)
    first = next(iter(selections.values()))
    output.print("| source | pool | " + " | ".join(selections) + " |")
    output.print("|---|---|" + "---|" * len(selections))
    total = sum(first.pool_origins.values())
    for origin, count in first.pool_origins.items():
        shares = [selection.origins.get(origin, 0) / selection.count for selection in selections.values()]
        output.print(f"| {origin} | {count / total:.1%} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    chosen = ", ".join(f"{kind} {selection.count}" for kind, selection in selections.items())
    output.print(f"\nrows chosen: {chosen}; {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
