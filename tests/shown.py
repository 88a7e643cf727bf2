"""A store worth looking at: a pool of four origins, three tasks, trainings, measurements, and jobs in every state.

The features are made-up numbers with a direction for each origin, so that tasks prefer origins as real ones do; all of
it is the same on every run. `large` is a store of many rows and few dims.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import Dataset, Problem, Task
from numpy.typing import NDArray

from datastore.catalog import Catalog
from datastore.dataset_files import DatasetWriter
from datastore.identity import content_id
from datastore.leases import NewShard
from datastore.rows import Example
from datastore.settings import Settings
from datastore.store import open_store
from tests.stores import Numbers, Store, request

DIM = 24
ROWS = 640
SHARES = {"flan_v2": 0.4, "cot": 0.25, "oasst1": 0.2, "dolly": 0.15}
TASKS = {
    "mmlu": ["anatomy", "astronomy", "college_physics", "statistics"],
    "bbh": ["boolean_expressions", "date_understanding", "navigate"],
    "gsm8k": ["gsm8k"],
}
LEANINGS = {
    "mmlu": [0.8, 0.55, 0.5, 0.1],
    "bbh": [0.5, 0.9, 0.1, 0.0],
    "gsm8k": [0.1, 0.9, 0.0, 0.3],
}
"""How much a task's gradients point where those of each origin do."""
MODEL = "Qwen/Qwen3-0.6B"


def shown(folder: Path) -> Store:
    """The store of the pictures."""
    store = Store.at(folder / "store")
    pool = _pool(store)
    for number in range(2):
        store.checkpoint(number, model=MODEL)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warmup")
    _finetune(store, "warm-up on 5 %", dataset=pool.id, fraction=0.05, start=2.9, seed=1)
    _gradients(store, _pool_numbers(), dataset=pool.id, name="pool at warm-up")
    tasks = [_task(store, name, folder) for name in TASKS]
    for task in tasks:
        _gradients(store, _task_numbers(task.name), task=task.id, name=f"{task.name} at warm-up")
    for seed, name in enumerate(["selected 5 %", "random 5 %"]):
        _finetune(store, name, dataset=pool.id, rows=32, start=2.4 + 0.2 * seed, seed=2 + seed)
        _evaluation(store, name, tasks[0], better=0.06 * (1 - seed))
    _states(store, pool)
    return store


def large(folder: Path, rows: int) -> Store:
    """A store of many short rows, one checkpoint and one task; written as a worker would, in one shard."""
    settings = Settings(data=folder / "store", shard_rows=1 << 20)
    catalog = Catalog(settings.catalog_url)
    catalog.migrate()
    store = Store(**vars(open_store(settings, catalog)))
    with DatasetWriter(folder / "draft", file="pool.jsonl", base=None) as writer:
        for row in range(rows):
            example = Example(str(row), f"source{row % 5}", prompt=f"question {row}", completion="done")
            line = {
                "dataset": example.origin,
                "id": example.id,
                "prompt": example.prompt,
                "completion": example.completion,
            }
            text = json.dumps(line).encode()
            writer.add(text, canonical=text, example=example)
        found = writer.finish().manifest
    (folder / "draft").rename(store.settings.datasets / found.id)
    store.catalog.add_dataset(
        id=found.id, rows=rows, bytes=found.bytes, origins=found.origins, prefix=None, sources=[], name="large",
        replace=False,
    )  # fmt: skip
    store.checkpoint(0)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="warmup")
    _gradients(store, _random(1), dataset=found.id)
    _gradients(store, _random(2), task=_task(store, "mmlu", folder).id)
    return store


# What is in it ----------------------------------------------------------------------------------------------------


def texts(rows: int) -> Iterator[dict[str, Any]]:
    """So many rows with texts of the kind that their origins have."""
    random = np.random.default_rng(0)
    for row, origin in enumerate(random.choice(list(SHARES), rows, p=list(SHARES.values())).tolist()):
        one, other = random.integers(12, 90, 2).tolist()
        yield {"dataset": origin, "id": f"{origin}_{row}", "messages": _turns(origin, one, other)}


def _turns(origin: str, one: int, other: int) -> list[dict[str, str]]:
    told = {
        "flan_v2": [
            f"Which planet has {one % 5 + 1} of the {other} moons named here?\n\nOPTIONS:\n- Mars\n- Saturn",
            "Saturn",
        ],
        "cot": [
            f"A box holds {one} apples and {other} pears. How many pieces of fruit are in three boxes?",
            f"One box holds {one} + {other} = {one + other} pieces. "
            + f"Three boxes hold 3 × {one + other} = {3 * (one + other)}. " * (1 + one % 4)
            + f"The answer is {3 * (one + other)}.",
        ],
        "oasst1": [
            f"Can you explain in {one} words how a telescope gathers light?",
            "A telescope gathers light with a large mirror or lens and brings it to a focus. " * (1 + other % 7),
            "And why does a larger mirror help?",
            "Because it collects more light from the same star, fainter ones become visible.",
        ],
        "dolly": [f"Name {one % 7 + 2} species of fish.", "Tope, perch, trout, pike, carp, eel, bream, roach."],
    }[origin]  # fmt: skip
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(told)]


def _pool(store: Store) -> Dataset:
    lines = "".join(json.dumps(row) + "\n" for row in texts(ROWS)).encode()
    found = store.datasets.ingest(io.BytesIO(lines), filename="tulu-sample.jsonl")
    return store.catalog.add_dataset(
        id=found.id, rows=found.rows, bytes=found.bytes, origins=found.origins, prefix=None, sources=found.sources,
        name="tulu-sample", replace=False,
    )  # fmt: skip


def _task(store: Store, name: str, folder: Path) -> Task:
    home = folder / name
    home.mkdir(parents=True)
    for split, count in (("validation", 5), ("test", 4)):
        rows = [
            {"prompt": f"{subtask.replace('_', ' ').capitalize()}, question {number + 1}: which statement is right?",
             "completion": "The second one.", "subtask": subtask}
            for subtask in TASKS[name]
            for number in range(count)
        ]  # fmt: skip
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = store.tasks.store("jsonl", home)
    return store.catalog.add_task(
        id=stored.id, name=name, kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
    )


def _directions() -> NDArray[np.float32]:
    """A direction for each origin (4, DIM)."""
    return np.random.default_rng(7).normal(size=(len(SHARES), DIM)).astype(np.float32)


def _pool_numbers() -> Numbers:
    place = {name: number for number, name in enumerate(SHARES)}
    origins = np.array([place[row["dataset"]] for row in texts(ROWS)])

    def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        noise = np.random.default_rng(int(checkpoint[-1])).normal(size=(ROWS, dim))
        return (0.3 * _directions()[origins[start:stop]] + noise[start:stop]).astype(np.float32)

    return numbers


def _task_numbers(task: str) -> Numbers:
    def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        noise = np.random.default_rng([int(checkpoint[-1]), len(task)]).normal(size=(stop, dim))
        return (np.array(LEANINGS[task]) @ _directions() + 1.3 * noise[start:stop]).astype(np.float32)

    return numbers


def _random(seed: int) -> Numbers:
    def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        return np.random.default_rng([seed, start]).normal(size=(stop - start, dim)).astype(np.float32)

    return numbers


def _gradients(store: Store, numbers: Numbers, **what: object) -> None:
    job, _ = store.features.start(request(run="warmup", dims=[DIM], **what))
    store.work(numbers)
    result = store.jobs.get(job.id)
    assert result.status == "succeeded"


def _done(store: Store, kind: Any, name: str, asked: dict[str, Any], units: int, result: dict[str, Any]) -> str:
    id = content_id({"finetune": "ft", "evaluation": "eval"}[kind], asked)
    store.jobs.create(id=id, kind=kind, name=name, request=asked, plan={}, shards=[NewShard(payload={}, units=units)])
    claim = store.jobs.claim("test", kinds=[kind])
    assert claim is not None
    assert store.jobs.succeed(claim, result=result)
    return id


def _finetune(store: Store, name: str, *, start: float, seed: int, **what: Any) -> None:
    steps, random = 40, np.random.default_rng(seed)
    losses = 0.6 + (start - 0.6) * np.exp(-np.arange(1, steps + 1) / 12) + random.normal(scale=0.03, size=steps)
    curve = [
        {"step": step, "epoch": step / 10, "loss": float(loss), "learning_rate": 2e-5 * (1 - step / (steps + 1))}
        for step, loss in enumerate(losses.tolist(), start=1)
    ]
    result = {
        "run": "run_1", "checkpoints": ["ck_0", "ck_1"], "rows": 32, "skipped_rows": 0, "steps": steps, "tokens": 8214,
        "precision": "float32", "loss_curve": curve, "seconds": 41.5 + seed,
    }  # fmt: skip
    _done(store, "finetune", name, {"model": MODEL, "epochs": 4, "seed": seed, "name": name, **what}, steps, result)


def _evaluation(store: Store, name: str, task: Task, *, better: float) -> None:
    rows = []
    for model, gain in (("base", 0.0), ("tuned", 0.03 + better)):
        for number, subtask in enumerate([None, *(subtask.name for subtask in task.subtasks)]):
            value, loss = 0.31 + 0.02 * number + gain, 1.42 - 0.03 * number - 2 * gain
            row: dict[str, Any] = {
                "model": model,
                "task": task.id,
                "task_name": task.name,
                "subtask": subtask,
                "metric": "choice",
            }
            row |= {"examples": 4 if number else 16, "unparsed": 0, "loss": loss, "value": value}
            row |= {"loss_interval": around(loss, 0.06), "interval": around(value, 0.04)}
            rows.append(row)
    asked = {"finetune": name, "tasks": [task.name], "name": name}
    _done(store, "evaluation", name, asked, 2 * len(rows), {"rows": rows, "seconds": 12.4})


def around(middle: float, width: float) -> dict[str, float]:
    """An interval."""
    return {"low": middle - width, "high": middle + width}


def _states(store: Store, pool: Dataset) -> None:
    """A job that failed, one that was cancelled, one at work, and one that waits."""

    def create(name: str, units: int) -> str:
        asked = {"dataset": pool.id, "run": "warmup", "name": name}
        id = content_id("grad", asked)
        shard = NewShard(payload={}, units=units)
        store.jobs.create(id=id, kind="gradients", name=name, request=asked, plan={}, shards=[shard])
        return id

    create("pool, 4,096 tokens a row", ROWS)
    claim = store.jobs.claim("gpu-1-4711", kinds=["gradients"])
    assert claim is not None
    detail = "row 112 has 5,310 tokens and the model has positions for 4,096: ask for a smaller max_length"
    problem = Problem(type="conflict", title="Conflict", status=409, detail=detail, instance="4f0b61c2a9d3")
    assert store.jobs.fail(claim, problem, permanent=True)
    store.jobs.cancel(create("pool at dim 65,536", ROWS))
    create("pool at dim 16,384", ROWS)
    claim = store.jobs.claim("gpu-1-4711", kinds=["gradients"])
    assert claim is not None
    assert store.jobs.renew(claim, done=416)
    create("pool, signs", ROWS)
