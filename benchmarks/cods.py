"""How well an ability space tells capabilities apart, and what is chosen by it: the tables of docs/cods.md.

    .venv/bin/python -m benchmarks.cods                  # planted capabilities in 5,000 rows of 8,192 numbers
    .venv/bin/python -m benchmarks.cods --real DATA      # rows of DATA/train/mixed, their sources as capabilities

The first trains the published network in this process and needs no service. The second goes through the service: a
small model is made on the spot, half of the rows are labelled with their source, and what is chosen is chosen from the
other half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from gradstore import GradientStore
from gradstore.types import AbilityStrategy, CapabilityScore, ProjectorConfig, SelectedRow
from rich.console import Console

from datastore.multilabel import label_scores
from datastore.selection import abilities
from datastore.selection.top import top
from examples.server import folder_of, running

ROWS, COLUMNS, EXPERTS, CAPABILITIES = 5000, 8192, 7, 13
PLANTED = 0.25
"""Length of a capability's direction in a gradient, beside noise of length 1."""
POOL_ROWS = 1200
STEPS = 60
"""Of the small model's own training."""
CHOSEN = 0.05
"""Part of the pool."""
DIM = 1024
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 1e-3,
    "epochs": 1,
    "batch_size": 8,
    "max_length": 192,
}

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Train and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", metavar="DATA", type=Path, help="a folder of real rows in LESS's layout")
    parser.add_argument("--rows", type=int, help=f"by default {ROWS:,}, and {POOL_ROWS:,} real ones")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.real is None:
        _planted(arguments.rows or ROWS, seed=arguments.seed)
        return
    began = time.monotonic()
    with folder_of(None, name="cods") as folder:
        _real(folder, arguments.real, rows=arguments.rows or POOL_ROWS, seed=arguments.seed)
    console.print(f"{time.monotonic() - began:.0f} s in all")


def _planted(rows: int, *, seed: int) -> None:
    """One to three capabilities a row, each with a direction of its own in the gradient and a lean in the routing."""
    from worker.ability_training import Streams, fit  # noqa: PLC0415 - torch takes seconds to import

    rng = np.random.default_rng(seed)
    labels = np.zeros((rows, CAPABILITIES), bool)
    for row, count in enumerate(rng.integers(1, 4, size=rows)):
        labels[row, rng.choice(CAPABILITIES, count, replace=False)] = True
    directions = rng.standard_normal((CAPABILITIES, COLUMNS), np.float32) / np.sqrt(COLUMNS)
    noise = rng.standard_normal((rows, COLUMNS), np.float32) / np.sqrt(COLUMNS)
    gradients = (PLANTED * labels.astype(np.float32) @ directions + noise).astype(np.float32)
    routing = np.zeros((rows, EXPERTS), np.float32)
    routing[np.arange(rows), labels.argmax(axis=1) % EXPERTS] = 1
    streams = Streams(gradients, routing)
    began, cpu = time.monotonic(), time.process_time()
    trained = fit(streams, labels, ProjectorConfig(), seed=seed, on_epoch=console.print)
    taken, spent = time.monotonic() - began, time.process_time() - cpu
    judged = trained.split.validation
    scores = label_scores(
        trained.predicted,
        labels[judged],
        labels[trained.split.train],
        names=[f"planted {n}" for n in range(CAPABILITIES)],
    )
    last = trained.epochs[-1]
    print(f"\n{rows:,} rows of {COLUMNS:,} numbers: {taken:.0f} s, {spent:.0f} s of CPU; F1 {last.f1:.3f}, all")
    print(f"right {last.exact_match:.1%}, Gram error {last.gram_error:.3f}, temperature {last.temperature:.3f}\n")
    held = trained.projector.place(Streams(gradients[judged], routing[judged]))
    count = max(1, round(CHOSEN * len(judged)))
    parts = []
    for number in range(CAPABILITIES):
        score = abilities.capability(held, [number]).score
        chosen = top(score, held.present, count)
        parts.append((labels[judged, number].mean(), labels[judged][chosen, number].mean()))
    _table(scores, parts)


def _real(folder: Path, data: Path, *, rows: int, seed: int) -> None:
    base, pool, half = _files(folder, data, rows=rows, seed=seed)
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        dataset = store.datasets.upload(pool, name="pool").id
        task = store.tasks.upload(data / "eval/gsm8k", kind="gsm8k", name="gsm8k").id
        console.print("warm-up, and gradients of pool and task")
        job = store.finetunes.create(model=str(base), dataset=dataset, fraction=0.25, seed=seed, **TRAINING)
        run = store.finetunes.wait(job, progress=True).result.run
        streams = [
            {name: _stream(store, name, owner, run) for name in ("gradients", "hidden")}
            for owner in ({"dataset": dataset}, {"task": task})
        ]
        sources = sorted({json.loads(line)["dataset"] for line in pool.read_text().splitlines()})
        taxonomy = store.taxonomies.create(capabilities=[{"name": source} for source in sources]).id
        labels = store.annotations.upload(half, dataset=dataset, taxonomy=taxonomy).id
        labelled = [json.loads(line)["id"] for line in half.read_text().splitlines()]
        for names in (("gradients",), ("gradients", "hidden")):
            mine = [{name: own[name] for name in names} for own in streams]
            started = store.projectors.create(streams=mine[0], annotations=labels, seed=seed)
            done = store.projectors.wait(started, progress=True)
            for own in mine:
                store.embeddings.wait(store.embeddings.create(projector=done.id, streams=own), progress=True)
            result = done.result
            print(f"\n{' and '.join(names)}: {result.gradient_columns:,} numbers a row, {result.training_rows:,} rows")
            print(f"trained on, {result.validation_rows:,} that judge, {result.seconds:.0f} s; F1 {result.f1:.3f}\n")
            asked: dict[str, Any] = {"method": "cods", "by": done.id, "exclude_ids": labelled, "pct": CHOSEN}
            pool_parts = _parts(store, dataset, labelled)
            parts = []
            for source in result.capabilities:
                chosen = store.select(**asked, strategy="capability", capabilities=[source.name])
                share = sum(row.origin == source.name for row in chosen.data) / max(chosen.count, 1)
                parts.append((pool_parts[source.name], share))
            _table(result.capabilities, parts)
            print("\n| chosen for gsm8k by | " + " | ".join(sources) + " |")
            print("|---|" + "---|" * len(sources))
            _row("the pool", pool_parts, sources)
            strategies: tuple[AbilityStrategy, ...] = ("nearest", "prototype")
            for strategy, dedupe in product(strategies, (None, 0.999)):
                chosen = store.select(**asked, task=task, strategy=strategy, dedupe=dedupe)
                _row(f"{strategy}{f', dedupe={dedupe}' if dedupe else ''}", _share(chosen.data), sources)
                for note in chosen.notes:
                    console.print(note)
        plain: dict[str, Any] = {"exclude_ids": labelled, "pct": CHOSEN}
        similar = store.select(task=task, run=run, kind="sgd", aggregate="avg", **plain)
        _row("gradient similarity (influence, aggregate=avg)", _share(similar.data), sources)
        clustered = store.select(task=task, run=run, kind="hidden", strategy="clusters", among=rows, **plain)
        _row("clusters of hidden states", _share(clustered.data), sources)
        _row("random", _share(store.select(method="random", dataset=dataset, **plain).data), sources)


def _stream(store: GradientStore, name: str, owner: dict[str, Any], run: str) -> str:
    """A stream of a dataset or task: gradients, all of kind sgd, or hidden states."""
    checkpoint = store.runs.get(run).checkpoints[0].id
    if name == "hidden":
        return store.streams.wait(store.streams.create(kind="hidden", checkpoint=checkpoint, **owner), progress=True).id
    job = store.gradients.create(kinds=["sgd"], dims=[DIM], dtype="float32", run=run, **owner)
    gradients = store.gradients.wait(job, progress=True).id
    store.gradients.wait(store.gradients.create(kinds=["hidden"], dtype="float32", run=run, **owner), progress=True)
    return store.streams.wait(store.streams.create(kind="gradients", gradients=gradients)).id


def _files(folder: Path, data: Path, *, rows: int, seed: int) -> tuple[Path, Path, Path]:
    """A small model trained on the text of a real pool, some of its short rows, and labels of every other one."""
    from examples.real_input import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it

    lines = (data / "train/mixed/mixed_4000.jsonl").read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line]
    texts = ["".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in row["messages"]) for row in found]
    model.build(folder / "base", texts, seed=seed, steps=STEPS)
    short = [row for row in found if sum(len(turn["content"]) for turn in row["messages"]) < 600][:rows]
    labels = [{"id": row["id"], "categories": [row["dataset"]]} for row in short[::2]]
    return folder / "base", _write(folder / "pool.jsonl", short), _write(folder / "labels.jsonl", labels)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _parts(store: GradientStore, dataset: str, labelled: Sequence[str]) -> dict[str, float]:
    """The sources' parts of the rows that are not labelled."""
    everything = store.select(method="random", dataset=dataset, pct=1.0, exclude_ids=list(labelled))
    return _share(everything.data)


def _share(rows: Sequence[SelectedRow]) -> dict[str, float]:
    counts = Counter(row.origin for row in rows)
    return {origin: count / len(rows) for origin, count in counts.items()}


def _row(title: str, shares: dict[str, float], sources: Sequence[str]) -> None:
    print(f"| {title} | " + " | ".join(f"{shares.get(source, 0):.1%}" for source in sources) + " |", flush=True)


def _table(scores: Sequence[CapabilityScore], parts: Sequence[tuple[float, float]]) -> None:
    print("| capability | rows that judge | precision | recall | F1 | part of the pool | of what is chosen by it |")
    print("|---|---|---|---|---|---|---|")
    for score, (before, after) in zip(scores, parts, strict=True):
        told = " | ".join(
            "" if value is None else f"{value:.3f}" for value in (score.precision, score.recall, score.f1)
        )
        print(f"| {score.name} | {score.rows} | {told} | {before:.1%} | {after:.1%} |", flush=True)


if __name__ == "__main__":
    main()
