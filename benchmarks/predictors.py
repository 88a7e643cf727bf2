"""How well influence is predicted, and what a cascade finds with gradients for a part of a pool: docs/predictors.md.

    .venv/bin/python -m benchmarks.predictors DATA                     # rows of DATA/train/mixed/mixed_4000.jsonl
    .venv/bin/python -m benchmarks.predictors DATA --tasks gsm8k mmlu --budgets 0.1 0.2 --json

A small language model is trained on the pool's text, warmed up, and the true influence of every row computed; all
through the service, started here with one worker on one thread. What is learnt is held against this truth on the rows
outside the sample. With `--data FOLDER` the store is kept, and what it has is not computed again. `--replays 10` spends
each budget ten more times with other seeds, by the cascades' own steps, on gradients that are there already.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gradstore import GradientStore
from gradstore.types import CascadeRequest, CascadeResult, PredictorRequest, PredictorResult
from numpy.typing import NDArray
from rich.console import Console

from datastore.cascades import first_rows, learn, next_rows
from datastore.catalog import Catalog
from datastore.influence import Mask, masked
from datastore.prediction_inputs import Gathering
from datastore.prediction_reports import BEST, best
from datastore.predictors import stored_kinds
from datastore.settings import Settings
from datastore.store import OpenStore, open_store
from examples.server import folder_of, running

TASKS = ("gsm8k", "mmlu", "bbh", "tydiqa")
DIM = 8192
FEATURES = ("hidden", "rds", "similarity", "loss", "text", "words")
BUDGETS = (0.1, 0.2, 0.3, 0.5)
WIDTH, LAYERS, HEADS = 128, 3, 4
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 1e-3,
    "epochs": 2,
    "batch_size": 16,
    "max_length": 512,
}
WARM_UP = 0.05

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Measure, and print a Markdown table, or a JSON object for each line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", metavar="DATA", type=Path, help="a folder of real rows in LESS's layout")
    parser.add_argument("--data", type=Path, help="keep the store in this folder (default: a temporary one)")
    parser.add_argument("--rows", type=int, default=4000, help="of the pool, its first")
    parser.add_argument("--epochs", type=int, default=2, help="of the warm-up, each of which is a checkpoint")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["gsm8k", "mmlu", "bbh"])
    parser.add_argument("--aggregates", nargs="+", choices=["less", "avg", "max", "min"], default=["less"])
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="of the cascades")
    parser.add_argument("--model", default="auto", help="what predicts")
    parser.add_argument("--features", nargs="+", default=list(FEATURES), help="what it predicts from")
    parser.add_argument("--rounds", type=int, default=2, help="of the cascades")
    parser.add_argument("--sample-share", type=float, default=0.5, help="of the cascades")
    parser.add_argument("--encoder", help="a sentence encoder, a folder or of the hub, for the feature `embedding`")
    parser.add_argument("--replays", type=int, default=0, help="how often to spend each budget with other seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with folder_of(arguments.data, name="predictors") as folder:
        _report(_run(folder, arguments), as_json=arguments.json)


def _run(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pool = arguments.shared / "train" / "mixed" / "mixed_4000.jsonl"
    base = folder / "base"
    if not base.is_dir():
        _build(base, pool)
    first = folder / "pool.jsonl"
    first.write_text("\n".join(pool.read_text(encoding="utf-8").split("\n")[: arguments.rows]), encoding="utf-8")
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        whole = store.datasets.upload(pool, name="mixed", replace=True).id
        dataset = store.datasets.upload(first, name="pool", replace=True).id
        learnt_from = PredictorRequest(dataset=dataset, task="any", features=arguments.features)
        cheap = [kind for kind in stored_kinds(learnt_from) if kind != "embedding"]
        console.print(f"warm-up on {WARM_UP:.0%} of the pool, and gradients of {arguments.rows:,} rows of it")
        training = {**TRAINING, "epochs": arguments.epochs}
        warm_up = store.finetunes.create(model=str(base), dataset=whole, fraction=WARM_UP, **training)
        run = store.finetunes.wait(warm_up, progress=True).result.run
        last = {"checkpoints": [store.runs.get(run).checkpoints[-1].id], "kinds": cheap}
        owners: list[dict[str, Any]] = [{"dataset": dataset}, *({"task": task} for task in arguments.tasks)]
        for wanted in (
            {"dataset": dataset, "run": run, "kinds": ["adam"]},
            *({"task": _task(store, arguments.shared, task), "run": run, "kinds": ["sgd"]} for task in arguments.tasks),
            *({**owner, **last} for owner in owners if cheap),
        ):
            store.gradients.wait(store.gradients.create(**wanted, dims=[DIM]), progress=True)
        if arguments.encoder:
            _embed(store, _within(folder, arguments.encoder), owners)
        opened = open_store(settings := Settings(data=folder / "store"), Catalog(settings.catalog_url))
        for task in arguments.tasks:
            for aggregate in arguments.aggregates:
                asked = {"dataset": dataset, "task": task, "run": run, "dim": DIM, "aggregate": aggregate}
                yield from _measured(store, opened, asked, arguments)


def _measured(
    store: GradientStore, opened: OpenStore, asked: dict[str, Any], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A predictor learnt from a tenth of the pool, its controls, and a cascade of each budget."""
    about = {"task": asked["task"], "aggregate": asked["aggregate"]}
    learning = {"features": arguments.features, "model": arguments.model, "predictor_seed": arguments.seed}
    spending = {"rounds": arguments.rounds, "sample_share": arguments.sample_share}
    job = store.predictors.create(**asked, **learning, fraction=0.1)
    yield from ({**about, **line} for line in _of_predictor(store.predictors.wait(job, progress=True).result))
    question = {name: value for name, value in asked.items() if name != "dataset"}
    truth = _scores(store, dataset=asked["dataset"], kind="adam", **question)
    for budget in arguments.budgets:
        cascade = store.cascades.create(**asked, **learning, **spending, budget=budget)
        done = store.cascades.wait(cascade, progress=True)
        computed = _scores(store, dataset=asked["dataset"], task=asked["task"], method="cascade", by=done.id)
        yield {**about, **_of_cascade(store, asked["dataset"], done.result, truth, computed, budget)}
        wanted = {**asked, **learning, **spending, "budget": budget}
        seeds = range(arguments.seed + 1, arguments.seed + 1 + arguments.replays)
        found = [_replayed(opened, {**wanted, "predictor_seed": seed}) for seed in seeds]
        if found:
            yield {**about, **_of_replays(found, budget)}


def _of_predictor(result: PredictorResult) -> Iterator[dict[str, Any]]:
    for name, report in [(result.model, result.report), *((each.control, each.report) for each in result.controls)]:
        found = {f"recall_at_{each.budget:g}": each.recall for each in report.recalls}
        yield {"what": name, "r2": report.r2, "spearman": report.spearman, **found}


def _of_cascade(
    store: GradientStore,
    dataset: str,
    result: CascadeResult,
    truth: NDArray[np.float64],
    computed: NDArray[np.float64],
    budget: float,
) -> dict[str, Any]:
    """Which part of the truly best rows a cascade has computed: of all, and of those outside its random sample."""
    ids = [row.id for row in store.datasets.rows(dataset)]
    drawn = {row.id for row in store.datasets.rows(result.stages[0].part)}
    outside = np.array([id not in drawn for id in ids]) & np.isfinite(truth)
    found = np.isfinite(computed)
    everywhere = best(np.nan_to_num(truth, nan=-np.inf), int(BEST * len(truth)))
    return {
        "what": f"cascade, {budget:.0%}",
        "r2": result.stages[-1].r2,
        "recall_outside": _recall(truth, outside, found),
        "recall_of_all": float(found[everywhere].mean()),
        "computed": result.computed_rows,
        "seconds": result.seconds,
    }


def _replayed(opened: OpenStore, wanted: dict[str, Any]) -> float:
    """What a cascade would find of the best rows outside its sample, by the truth of all rows, which is stored."""
    plan = opened.cascades.plan(CascadeRequest(**wanted))
    of_inputs = {name: value for name, value in wanted.items() if name in PredictorRequest.model_fields}
    known = opened.predictors.plan(PredictorRequest(**of_inputs, kind="adam"))
    inputs = Gathering(opened.features, opened.datasets, opened.tasks).gather(known)
    truth = opened.predictors.truth(known["truth"], known["labelled"], known["dataset"])
    computed: Mask = np.zeros(plan["pool_rows"], bool)
    computed[first_rows(plan, inputs)] = True
    drawn = computed.copy()
    for number, rows in enumerate(plan["stages"][1:], start=1):
        so_far = masked(truth.score, truth.subtask, truth.valid & computed)
        found = learn(inputs, so_far, {**plan, "seed": plan["seed"] + number})
        computed[next_rows(found, so_far, computed, inputs, rows)] = True
    return _recall(truth.score, truth.valid & ~drawn, computed)


def _recall(truth: NDArray[np.floating], among: Mask, found: Mask) -> float:
    """Which part of the truly best 5 % of some rows is found."""
    places = np.flatnonzero(among)
    return float(found[places[best(truth[places], int(BEST * len(places)))]].mean())


def _of_replays(found: Sequence[float], budget: float) -> dict[str, Any]:
    middle = {"recall_outside": float(np.mean(found)), "lowest": min(found), "highest": max(found)}
    return {"what": f"{len(found)} cascades, {budget:.0%}", "r2": None, **middle}


def _embed(store: GradientStore, encoder: str, owners: Sequence[dict[str, Any]]) -> None:
    """Embeddings of the pool and of the tasks."""
    checkpoint = store.checkpoints.register(model=encoder, name="encoder").id
    for owner in owners:
        job = store.gradients.create(**owner, checkpoints=[checkpoint], kinds=["embedding"])
        store.gradients.wait(job, progress=True)


def _within(folder: Path, encoder: str) -> str:
    """An encoder's name on the hub; or its folder, copied to where the service may read."""
    if not Path(encoder).is_dir():
        return encoder
    return str(shutil.copytree(encoder, folder / "encoder", dirs_exist_ok=True))


def _scores(store: GradientStore, **question: Any) -> NDArray[np.float64]:
    """The score of every row of the pool; NaN where there is none."""
    return np.array([np.nan if row.score is None else row.score for row in store.scores(**question)])


def _task(store: GradientStore, shared: Path, kind: str) -> str:
    return store.tasks.upload(shared / "eval" / kind, kind=kind, name=kind).id


def _build(base: Path, pool: Path) -> None:
    from examples.real_input import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it

    rows = [json.loads(line) for line in pool.read_text(encoding="utf-8").split("\n") if line]
    texts = ["".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in row["messages"]) for row in rows]
    model.WIDTH, model.LAYERS, model.HEADS = WIDTH, LAYERS, HEADS
    model.build(base, texts, seed=0)


def _report(lines: Iterator[dict[str, Any]], *, as_json: bool) -> None:
    if not as_json:
        print(
            "| task | aggregate | what | R² | rank correlation | best 5 % found |\n|---|---|---|---|---|---|",
            flush=True,
        )
    for line in lines:
        print(json.dumps(line) if as_json else _row(line), flush=True)


def _row(line: dict[str, Any]) -> str:
    cells: Sequence[Any] = (line["task"], line["aggregate"], line["what"], line["r2"], line.get("spearman"))
    found = line.get("recall_outside", line.get("recall_at_0.1"))
    return "| " + " | ".join("" if cell is None else _cell(cell) for cell in (*cells, found)) + " |"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
