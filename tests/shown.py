"""A store worth looking at: a pool of four origins, three tasks, trainings, measurements, and jobs in every state.

The features are made-up numbers with a direction for each origin, so that tasks prefer origins as real ones do; all of
it is the same on every run. `large` is a store of many rows and few dims.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradstore.types import (
    AnnotationRequest,
    ComparisonRequest,
    Dataset,
    EmbeddingRequest,
    EstimatesRequest,
    EstimateValidationRequest,
    Problem,
    ProjectorRequest,
    StreamRequest,
    Task,
)
from numpy.typing import NDArray
from safetensors.numpy import save

from datastore.catalog import Catalog, utc_now
from datastore.dataset_files import DatasetWriter
from datastore.identity import content_id
from datastore.leases import NewShard
from datastore.rows import Example
from datastore.schema import AdapterRow
from datastore.settings import Settings
from datastore.store import open_store
from datastore.taxonomies import CODS, record
from datastore.trainings import Measured
from tests.stores import Numbers, Store, request
from worker.context import Context
from worker.jobs import run

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
PREFIXES = {"finetune": "ft", "evaluation": "eval", "predictor": "pred", "cascade": "casc", "generation": "gen"}


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
    _merge(store, tasks[0])
    _comparison(store)
    _generation(store)
    _predictors(store)
    _estimates(store)
    _abilities(store, folder / "streams")
    _choice(store, tasks[0])
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
    job, _ = store.features.start(request(**{"run": "warmup", "dims": [DIM], **what}))
    store.work(numbers)
    result = store.jobs.get(job.id)
    assert result.status == "succeeded"


def _done(store: Store, kind: Any, name: str | None, asked: dict[str, Any], units: int, result: dict[str, Any]) -> str:
    id = content_id(PREFIXES[kind], asked)
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
    asked = {"finetune": name, "tasks": [task.name], "name": name}
    _measured(store, name, asked, task, better=better)


def _merge(store: Store, task: Task) -> None:
    asked = {"adapters": ["arc", "gsm8k"], "combine": "cat", "tasks": [task.name]}
    _measured(store, None, asked, task, better=0.01, unparsed=2)


def _measured(
    store: Store, name: str | None, asked: dict[str, Any], task: Task, *, better: float, unparsed: int = 0
) -> None:
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
            row |= {"examples": 4 if number else 16, "loss": loss, "value": value}
            row |= {"unparsed": 0 if model == "base" else unparsed}
            row |= {"loss_interval": around(loss, 0.06), "interval": around(value, 0.04)}
            rows.append(row)
    _done(store, "evaluation", name, asked, 2 * len(rows), {"rows": rows, "seconds": 12.4})


def _generation(store: Store) -> None:
    """What a mixture of four experts has answered, and where the tokens of the answer went."""
    tokens = [" lever", " is", " a", " bar", "."]
    random = np.random.default_rng(11)

    def module(layer: int, name: str) -> dict[str, Any]:
        experts = [random.permutation(4)[:2].tolist() for _ in tokens]
        weights = [
            [round(float(larger), 4), round(1 - float(larger), 4)] for larger in random.uniform(0.5, 1, len(tokens))
        ]
        gates = [[0.6, 0.4] for _ in tokens]
        path = f"model.layers.{layer}.self_attn.{name}"
        return {"module": path, "layer": layer, "experts": experts, "weights": weights, "sub_routers": gates}

    modules = [module(layer, name) for layer in range(4) for name in ("q_proj", "v_proj")]
    loads = [
        {"layer": layer, "load": load, "balance": 1.02}
        for layer, load in enumerate(
            [[0.2, 0.3, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1], [0, 0.5, 0.5, 0]]
        )
    ]
    answer = {"text": "A lever is a bar.", "prompt_tokens": 6, "tokens": 5}
    answer["trace"] = {"first": 6, "tokens": tokens, "modules": modules}
    result = {"checkpoint": "ck_0", "data": [answer], "loads": loads, "seconds": 2.4}
    asked = {"checkpoint": "ck_0", "prompts": ["What is a lever?"], "trace": True, "name": "levers"}
    _done(store, "generation", "levers", asked, 1, result)


def around(middle: float, width: float) -> dict[str, float]:
    """An interval."""
    return {"low": middle - width, "high": middle + width}


def _comparison(store: Store) -> None:
    """Five ways to select for two tasks, with losses that are lower the more rows are of the origin that helps."""
    ways = [
        {"label": "influence, less", "method": "influence"},
        {"label": "influence, avg", "method": "influence", "aggregate": "avg"},
        {"label": "influence, k-center", "method": "influence", "strategy": "k-center"},
        {"label": "bm25", "method": "bm25"},
        {"label": "random", "method": "random"},
    ]
    asked = {
        "dataset": "tulu-sample", "tasks": ["mmlu", "gsm8k"], "pct": 0.05, "contestants": ways, "name": "five ways",
        "train": True, "model": MODEL, "revision": "0" * 40, "repeats": 3,
    }  # fmt: skip
    job, _ = store.comparisons.start(ComparisonRequest.model_validate(asked))
    helps = {row: text["dataset"] in {"flan_v2", "cot"} for row, text in enumerate(texts(ROWS))}
    while (claim := store.jobs.claim("test", kinds=["comparison"])) is not None:
        if "choose" in claim.payload:
            recipe = store.comparisons.recipe(claim.plan, claim.payload)
            sources = store.recipes.sources(recipe)
            store.scoring.start(recipe, sources)
            store.score()
            chosen = store.answers.select(recipe, sources, store.scoring.known(recipe, sources) or [], limit=0)
            assert store.comparisons.finish_selection(claim, chosen.id, 0.04)
            continue
        training = store.comparisons.training(claim.plan, claim.payload)
        rows = len(store.tasks.validation(training.task))
        noise = np.random.default_rng([training.recipe.seed, len(training.rows)]).normal(scale=0.05, size=rows)
        learnt = 0.6 * sum(helps[row] for row in training.rows) / max(len(training.rows), 1)
        losses = (1.6 + 0.1 * np.sin(np.arange(rows)) - learnt + noise).tolist()
        store.trainings.put(training, Measured(losses, rows=len(training.rows), tokens=5120, seconds=11.5))
        assert store.comparisons.finish_training(claim, training.key)
    assert store.jobs.get(job.id).status == "succeeded"


def _report(random: np.random.Generator, r2: float, *, skill: float) -> dict[str, Any]:
    budgets = [0.05, 0.1, 0.2, 0.3, 0.5]
    recalls = [{"budget": budget, "recall": float(budget ** (1 - skill))} for budget in budgets]
    spearman = float(np.sqrt(max(r2, 0)) + 0.01 * random.normal())
    return {"r2": r2, "spearman": spearman, "recalls": recalls, "accuracy": None, "confusion": None}


def _predictors(store: Store) -> None:
    """A predictor of scores, one of levels, and a cascade of three stages."""
    random = np.random.default_rng(11)
    asked = {"dataset": "tulu-sample", "task": "mmlu", "features": ["output", "text", "words"], "fraction": 0.1}
    controls = [
        {"control": name, "report": _report(random, r2, skill=skill)}
        for name, r2, skill in (
            ("random-features", -0.02, 0.02),
            ("label-shuffle", -0.04, 0.0),
            ("length-only", 0.08, 0.25),
        )
    ]
    predictions = np.linspace(-0.02, 0.07, 10)
    bins = [
        {"rows": 57, "predicted": float(each), "true": float(0.9 * each + 0.004), "low": float(each - 0.02),
         "high": float(each + 0.025)}
        for each in predictions
    ]  # fmt: skip
    tried = [
        {"model": "ridge", "settings": {"alpha": 10.0}, "score": 0.71},
        {"model": "boosting", "settings": {"learning_rate": 0.1, "leaves": 15.0}, "score": 0.66},
    ]
    result = {
        "rows": ROWS, "predicted_rows": ROWS, "sample_rows": 64, "columns": 2081, "model": "ridge",
        "settings": {"alpha": 10.0}, "models": tried, "tested_on": "outside", "tested_rows": 576,
        "report": _report(random, 0.72, skill=0.93), "calibration": bins, "borders": [], "controls": controls,
        "seconds": 8.25,
    }  # fmt: skip
    _done(store, "predictor", "from a tenth", {**asked, "name": "from a tenth"}, ROWS, result)
    confusion = [[131, 41, 20], [44, 102, 46], [17, 49, 126]]
    levels = {
        "accuracy": 0.623, "confusion": confusion, "r2": None, "spearman": 0.64,
        "recalls": _report(random, 0.4, skill=0.7)["recalls"],
    }  # fmt: skip
    own = {"report": levels, "borders": [0.004, 0.031], "controls": [], "models": [{**tried[0], "score": 0.61}]}
    _done(store, "predictor", "three levels", {**asked, "levels": 3, "name": "three levels"}, ROWS, {**result, **own})
    stages = [
        {"part": "ds_0", "gradients": "grad_0", "rows": 64, "r2": None, "model": None, "threshold": None,
         "predicted": None, "true": 0.018},
        {"part": "ds_1", "gradients": "grad_1", "rows": 32, "r2": 0.68, "model": "ridge", "threshold": 0.052,
         "predicted": 0.061, "true": 0.058},
        {"part": "ds_2", "gradients": "grad_2", "rows": 32, "r2": 0.73, "model": "ridge", "threshold": 0.047,
         "predicted": 0.05, "true": 0.049},
    ]  # fmt: skip
    found = {"rows": ROWS, "computed_rows": 128, "scored_rows": 128, "saved_rows": 512, "saved_tokens": 98304}
    wanted = {"dataset": "tulu-sample", "task": "mmlu", "budget": 0.2, "name": "a fifth"}
    _done(store, "cascade", "a fifth", wanted, 128, {**found, "stages": stages, "seconds": 73.5})


def _estimates(store: Store) -> None:
    """Estimates of 60 subsets of twelve groups, a search over the same, and ten trainings beside the first."""
    own = {"kinds": ["logodds"], "dtype": "float32", "checkpoints": ["ck_0"], "run": None}
    _gradients(store, _pool_numbers(), **own, dataset="tulu-sample", name="log-odds of the pool")
    _gradients(store, _task_numbers("mmlu"), **own, task="mmlu", name="log-odds of mmlu")
    labels = {row["id"]: f"{row['dataset']} {'abc'[number % 3]}" for number, row in enumerate(texts(ROWS))}
    asked = {
        "dataset": "tulu-sample", "tasks": ["mmlu"], "checkpoint": "ck_0", "group_by": "label", "labels": labels,
        "abs_scale": 1.0,
    }  # fmt: skip
    for more in ({"name": "sixty parts", "count": 60}, {"name": "step by step", "search": "stepwise"}):
        job, _ = store.estimates.start(EstimatesRequest.model_validate({**asked, **more}))
        while (claim := store.jobs.claim("test", kinds=["estimates"])) is not None:
            assert store.estimates.finish(claim, store.estimates.work(claim))
        assert store.jobs.get(job.id).status == "succeeded"
    wanted = {"estimates": "sixty parts", "model": MODEL, "revision": "0" * 40, "subsets": 10, "name": "ten trainings"}
    job, _ = store.estimate_validations.start(EstimateValidationRequest.model_validate(wanted))
    subsets = store.estimates.subsets("sixty parts", after=0, limit=60).data
    rows = len(store.tasks.validation(store.catalog.task("mmlu").id))
    while (claim := store.jobs.claim("test", kinds=["estimate-validation"])) is not None:
        training = store.estimate_validations.training(claim.plan, claim.payload)
        estimate = subsets[claim.payload["subset"]].estimates[-1].loss or 0.0
        noise = np.random.default_rng([3, claim.payload["subset"]]).normal(scale=0.02, size=rows)
        losses = (0.2 + 1.1 * estimate + noise).tolist()
        store.trainings.put(training, Measured(losses, rows=320, tokens=41_000, seconds=38.0))
        assert store.estimate_validations.finish(claim, training.key)
    assert store.jobs.get(job.id).status == "succeeded"


def _abilities(store: Store, folder: Path) -> None:
    """A stream and labels of the pool, a projector that a worker has trained on them, and the pool placed by it."""
    names, pool = list(SHARES), list(texts(ROWS))
    random = np.random.default_rng(5)
    labels = np.array([names.index(row["dataset"]) for row in pool])
    rows = (2 * np.eye(len(names), DIM)[labels] + random.normal(size=(ROWS, DIM))).astype(np.float32)
    rows[3] = 0
    folder.mkdir()
    np.save(folder / "rows.npy", np.delete(rows, [7, 8], axis=0))
    (folder / "ids.json").write_text(json.dumps([row["id"] for number, row in enumerate(pool) if number not in (7, 8)]))
    store.streams.upload(StreamRequest(dataset="tulu-sample", name="of the pool"), folder)
    store.annotations.start(AnnotationRequest(dataset="tulu-sample", by="origin", name="origins"))
    record(store.catalog, CODS, name="cods")
    config = {"width": 16, "blocks": 1, "dim": 8, "heads": 2, "epochs": 15, "adjustment_epochs": 5, "batch_size": 16}
    asked = {
        "streams": {"gradients": "of the pool"},
        "annotations": "origins",
        "config": config,
        "name": "origins told",
    }
    store.projectors.start(ProjectorRequest.model_validate(asked))
    context = Context.open(store.settings, torch.device("cpu"))
    for kind in ("projector", "embedding"):
        claim = store.jobs.claim("test", kinds=[kind])
        assert claim is not None
        assert run(claim, context) == "succeeded", store.jobs.get(claim.job).error
        if kind == "projector":
            placed = {"projector": "origins told", "streams": asked["streams"], "name": "the pool placed"}
            store.embeddings.start(EmbeddingRequest.model_validate(placed))


def _choice(store: Store, task: Task) -> None:
    """A bank of six adapters, and four of them as candidates for a task, of which two were chosen."""
    random = np.random.default_rng(11)
    shared = random.standard_normal((4, 8), np.float32)
    ids = []
    for number, name in enumerate(("arc", "gsm8k", "wizard", "camel", "boolq", "piqa")):
        store.checkpoint(10 + number, model=MODEL)
        files = store.settings.checkpoints / f"ck_{10 + number}" / "adapter"
        files.mkdir(parents=True)
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{stem}.lora_A.weight": shared + random.standard_normal((4, 8), np.float32),
            f"{stem}.lora_B.weight": random.standard_normal((8, 4), np.float32) + (number % 2),
        }
        content = save(tensors)
        (files / "adapter_model.safetensors").write_bytes(content)
        row = AdapterRow(
            id=content_id("ad", name), name=None, created_at=utc_now(), checkpoint_id=f"ck_{10 + number}", brought=True,
            rank=4, alpha=8.0, scaling=2.0, modules=1, sha256=hashlib.sha256(content).hexdigest(),
            trained_on=f"{name}, rows of its own",
        )  # fmt: skip
        ids.append(store.catalog.add_adapter(row, targets=["q_proj"], name=name)[0].id)
    shots = len(store.tasks.validation(task.id))
    plan = {
        "task": task.id, "rows": None, "shots": shots, "shots_sha256": "0" * 64, "adapters": sorted(ids),
        "model": MODEL, "revision": None, "candidates": 4, "size": 2,
         "similarity": "cosine_ab", "template": "tulu", "max_length": 2048,
        "max_new_tokens": 256, "precision": "bfloat16",
    }  # fmt: skip
    asked = {"task": task.id, "candidates": 4, "size": 2, "name": "two of six"}
    shard = NewShard({"adapters": plan["adapters"]}, units=2 * shots * len(ids))
    id = content_id("choice", plan)
    store.jobs.create(
        id=id, kind="adapter-choice", name="two of six", request=asked, plan=plan, shards=[shard], uses=ids
    )
    for number, adapter in enumerate(ids):
        losses = (0.7 + 0.1 * number + 0.2 * random.random(shots)).tolist()
        store.adapter_choices.keep(
            plan, adapter, losses, (random.random(shots) < 0.8 - 0.1 * number).astype(float).tolist()
        )
    claim = store.jobs.claim("test", kinds=["adapter-choice"])
    assert claim is not None
    assert store.adapter_choices.finish(claim, len(ids), 41.0)


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
