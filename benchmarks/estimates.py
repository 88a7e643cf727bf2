"""What estimates cost and how well they tell what training gives: the tables of docs/gradex.md.

    .venv/bin/python -m benchmarks.estimates --speed      # regressions of many subsets at once, beside one by one
    .venv/bin/python -m benchmarks.estimates              # through the service, beside trainings of the demo's model
    .venv/bin/python -m benchmarks.estimates --noisy      # the same with groups whose answers are wrong
    .venv/bin/python -m benchmarks.estimates --exact      # beside passes of the model, in place of trainings
    .venv/bin/python -m benchmarks.estimates --real DATA  # rows of DATA/train/mixed, by source, for a task of DATA/eval

Trained and measured is what the demo trains, a small model on made-up skills: the base model is fine-tuned on the whole
pool, which gives θ*; features of its last checkpoint; a thousand subsets of half of the skills; and trainings of the
first ones. With `--noisy` the groups are 20 of 25 rows, of which 8 have other rows' answers, and subsets are 7 of them.
With `--real` the pool is the first 500 rows of a mixture of sources, and the model one that was trained on its
text; groups are its sources, or with `--clusters` clusters of the features, and subsets are half of them.
With `--data FOLDER` the store is kept, and the same command with more trainings does only the new ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from gradstore import GradientStore
from gradstore.results import EstimateValidationResult
from numpy.typing import NDArray
from rich.console import Console
from scipy.optimize import minimize

from datastore.gradex import Pool, fit, relative_rss
from datastore.prediction_reports import rank_correlation
from examples.real_input.__main__ import texts
from examples.server import folder_of, running

ROWS, DIM, GROUPS, SUBSETS = 10_000, 100, 100, 1000
ONE_BY_ONE = 10  # regressions of scipy that are timed
STRENGTHS = (1e-4, 6e-2, 1.0)
POOL_ROWS, TARGET_ROWS = 400, 10  # rows of the pool; of each skill in the task
CLEAN, NOISY, GROUP_ROWS = 12, 8, 25
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 2.5e-3,
    "epochs": 4,
    "batch_size": 8,
    "max_length": 64,
}
MEASURED = 20  # subsets with mode=exact
REAL_ROWS = 500
STEPS, WIDTH, LAYERS = 200, 96, 2  # of the model of real rows
REAL_TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
    "learning_rate": 2e-3,
    "epochs": 1,
    "batch_size": 8,
    "max_length": 192,
}
SCALES = [0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="time regressions, and train nothing")
    parser.add_argument("--data", type=Path, help="keep the store in this folder (default: a temporary one)")
    parser.add_argument("--noisy", action="store_true", help="groups of right and of wrong answers, in place of skills")
    parser.add_argument(
        "--exact", action="store_true", help="measure subsets' steps with mode=exact, and train nothing"
    )
    parser.add_argument("--real", type=Path, metavar="DATA", help="a folder of real rows in LESS's layout, for these")
    parser.add_argument("--task", choices=["gsm8k", "mmlu", "bbh", "tydiqa"], default="mmlu", help="of real rows")
    parser.add_argument("--clusters", type=int, help="group real rows by so many clusters, not by source")
    parser.add_argument("--trainings", type=int, default=20)
    parser.add_argument("--c", type=float, default=1e-4)
    parser.add_argument("--scale", type=float, default=0.1)
    arguments = parser.parse_args()
    if arguments.speed:
        _speed()
        return
    with folder_of(arguments.data, name="estimates") as folder:
        _run(folder, arguments)


def _speed() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, GROUPS, ROWS)
    rows = (0.3 * generator.normal(size=(GROUPS, DIM))[groups] + generator.normal(size=(ROWS, DIM))) / np.sqrt(DIM)
    members = np.zeros((SUBSETS, GROUPS), bool)
    for subset in members:
        subset[generator.choice(GROUPS, GROUPS // 2, replace=False)] = True
    print(f"| C | {SUBSETS:,} at once, CPU time | steps | L-BFGS, one by one (from {ONE_BY_ONE}) |")
    print("|---|---|---|---|")
    for c in STRENGTHS:
        began = time.process_time()
        found = fit(Pool.of(rows, groups, count=GROUPS), members, c=c)
        together = time.process_time() - began
        began = time.process_time()
        for subset in members[:ONE_BY_ONE]:
            _alone(rows[subset[groups]], c)
        alone = (time.process_time() - began) / ONE_BY_ONE * SUBSETS
        print(f"| {c:g} | {together:.1f} s | {found.steps} | {alone:.0f} s |", flush=True)


def _alone(rows: NDArray[np.float64], c: float) -> None:
    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = rows @ weights
        value = 0.5 * weights @ weights + c * np.logaddexp(0, -margins).sum()
        return float(value), weights - c * ((1 / (1 + np.exp(margins))) @ rows)

    minimize(objective, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 1e-15})


@dataclass(frozen=True)
class World:
    """What is trained on and measured, and which rows go together."""

    base: Path
    pool: Path
    task: Path
    kind: str
    """Of the task's files."""
    training: dict[str, Any]
    groups: dict[str, Any]
    """How estimates are asked to group the rows."""
    halves: bool = False
    """Whether there are so few groups that subsets are all of their halves."""


def _run(folder: Path, arguments: argparse.Namespace) -> None:
    world = _real(folder, arguments) if arguments.real else _demo(folder, noisy=arguments.noisy)
    with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
        dataset = store.datasets.upload(world.pool, name="pool", replace=True)
        target = store.tasks.upload(world.task, kind=world.kind, name="target", replace=True).id
        console.print("θ*: a fine-tune on the whole pool")
        tuned = store.finetunes.wait(
            store.finetunes.create(model=str(world.base), dataset=dataset.id, **world.training), progress=True
        )
        checkpoint = tuned.result.checkpoints[-1]
        began = time.monotonic()
        features: dict[str, Any] = {
            "checkpoints": [checkpoint],
            "kinds": ["logodds"],
            "dims": [DIM],
            "dtype": "float32",
        }
        owners: list[dict[str, Any]] = [{"dataset": dataset.id}, {"task": target}]
        for owner in owners:
            store.gradients.wait(store.gradients.create(**owner, **features), progress=True)
        print(f"features in {time.monotonic() - began:.1f} s")
        asked: dict[str, Any] = {"dataset": dataset.id, "tasks": [target], "c": arguments.c, "scale": arguments.scale}
        asked |= {"checkpoint": checkpoint, **world.groups}
        if arguments.exact:
            _exact(store, asked)
            return
        drawn = _estimated(store, asked, _halves(list(dataset.origins)) if world.halves else {})
        console.print("trainings")
        validation = store.estimate_validations.create(
            estimates=drawn, model=str(world.base), subsets=arguments.trainings, scales=SCALES, **world.training
        )
        _report(store.estimate_validations.wait(validation, progress=True).result)


def _exact(store: GradientStore, asked: dict[str, Any]) -> None:
    """Print how the first order agrees with passes of the model at the same steps."""
    job = store.estimates.wait(store.estimates.create(**asked, mode="exact", count=MEASURED), progress=True)
    done, subsets = job.result, [subset.estimates[-1] for subset in store.estimates.subsets(job.id)]
    told = np.array([each.loss for each in subsets], np.float64)
    measured = [each.measured for each in subsets if each.measured is not None]
    true = np.array([each.loss for each in measured], np.float64)
    tokens = np.array([each.token_loss for each in measured], np.float64)
    before = np.float64(done.targets[-1].loss)
    print(f"{len(told)} subsets measured in {done.seconds:.1f} s; at the checkpoint the loss is {before:.4f}")
    print(f"mean change {(told - before).mean():.4f} by the first order, {(true - before).mean():.4f} measured")
    constant, changes = np.full_like(true, true.mean()), relative_rss(told - before, true - before)
    print(f"relative RSS of the loss {relative_rss(told, true):.2e}, of its change {changes:.2%};", end=" ")
    print(f"a constant has {relative_rss(constant, true):.2e}")
    ranks = [rank_correlation(told, other) for other in (true, tokens)]
    print(f"rank correlation with the measured loss {ranks[0]:.3f}, with the token loss {ranks[1]:.3f}")


def _estimated(store: GradientStore, asked: dict[str, Any], subsets: dict[str, Any]) -> str:
    """Have groups compared in each way, and print how; returns the estimates of single subsets."""
    for search in ("ensemble", "surrogate", "forward-scan", "stepwise", "backward"):
        given = subsets if search in ("ensemble", "surrogate") else {}
        done = store.estimates.wait(store.estimates.create(**asked, **given, search=search))
        result = done.result
        print(f"{search}: {result.subsets} estimates in {result.seconds:.2f} s; chosen {result.chosen}")
        if search == "ensemble":
            drawn = done.id
            print(f"surrogate: {result.surrogate}")
            print([(group.label, group.rows, round(group.mean or 0, 4)) for group in result.groups])
    return drawn


def _halves(groups: list[str]) -> dict[str, Any]:
    """All halves of a few groups, in a random order: drawn, they would come many times."""
    found = [list(each) for each in combinations(sorted(groups), len(groups) // 2)]
    return {"subsets": [found[number] for number in np.random.default_rng(0).permutation(len(found))]}


def _report(result: EstimateValidationResult) -> None:
    print(f"\n{len(result.subsets)} trainings of {result.training_seconds:.1f} s, {result.estimate_seconds:.4f} s an")
    print(f"estimate: {result.speedup:,.0f} times as long; a line has {result.line_rss:.4f},", end=" ")
    print(f"a constant {result.constant_rss:.4f}\n")
    print("| scale | relative RSS | mean ratio | rank correlation |")
    print("|---|---|---|---|")
    for each in [result.own, *result.scales]:
        print(f"| {each.scale:g} | {each.relative_rss:.4f} | {each.mean_ratio:.4f} | {each.spearman:.3f} |")
    print(f"\ninterval of the rank correlation {result.spearman_low:.3f} to {result.spearman_high:.3f}")
    rows, losses = (np.array([getattr(each, name) for each in result.subsets]) for name in ("rows", "loss"))
    print(f"of losses with the number of rows {rank_correlation(losses, rows):.3f}, of {rows.min()} to {rows.max()}")
    for subset in result.subsets:
        print(f"{subset.subset}: {subset.estimate:.4f} {subset.loss:.4f} {subset.rows} rows")


def _real(folder: Path, arguments: argparse.Namespace) -> World:
    """A model that was trained on the text of a mixture of real sources, some of its rows, and a benchmark's."""
    from examples.demo.model import use_one_thread  # noqa: PLC0415 - torch takes seconds to import
    from examples.real_input import model  # noqa: PLC0415 - with it

    mixed, base, pool = arguments.real / "train" / "mixed" / "mixed_4000.jsonl", folder / "base", folder / "pool.jsonl"
    if not base.is_dir():
        use_one_thread()
        model.build(base, texts(mixed), seed=0, steps=STEPS, width=WIDTH, layers=LAYERS)
    pool.write_text("\n".join(mixed.read_text(encoding="utf-8").split("\n")[:REAL_ROWS]), encoding="utf-8")
    groups = {"group_by": "cluster", "clusters": arguments.clusters} if arguments.clusters else {}
    return World(
        base, pool, arguments.real / "eval" / arguments.task, arguments.task, REAL_TRAINING, groups, halves=not groups
    )


def _demo(folder: Path, *, noisy: bool) -> World:
    """The demo's base model, its pool, and a task with rows of each skill."""
    from examples.demo import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it
    from examples.demo.skills import SKILLS, pool, target  # noqa: PLC0415 - with it

    base, files = folder / "base", folder / "task"
    if not base.is_dir():
        model.use_one_thread()
        model.build(base, seed=0)
    files.mkdir(exist_ok=True)
    rows = [{**row, "metric": "none"} for skill in SKILLS for row in target(skill, TARGET_ROWS, seed=0)]
    (files / "validation.jsonl").write_text("".join(_lines(rows)), encoding="utf-8")
    made = list(pool(CLEAN * GROUP_ROWS + NOISY * GROUP_ROWS if noisy else POOL_ROWS, seed=0))
    (folder / "pool.jsonl").write_text("".join(_lines(_with_noise(made) if noisy else made)), encoding="utf-8")
    groups = {"fraction": 0.35} if noisy else {}
    return World(base, folder / "pool.jsonl", files, "jsonl", TRAINING, groups)


def _with_noise(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows in groups, the last of which have each the answer of the row before."""
    for number, row in enumerate(rows):
        group = number // GROUP_ROWS
        noisy = group >= CLEAN
        question, answer = row["messages"]
        said = rows[number - 1]["messages"][1] if noisy else answer
        yield {**row, "dataset": f"{'noisy' if noisy else 'clean'} {group:02}", "messages": [question, said]}


def _lines(rows: Any) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
