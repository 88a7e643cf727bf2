"""How well gradients of log-odds say what a step does to them, on a small model: the table of docs/logodds.md.

    .venv/bin/python -m benchmarks.first_order

The demo's base model is fine-tuned on all rows of the demo's pool, as this project fine-tunes, which gives θ*. Then for
each seed 75 % of the skills are drawn; ŵ is the one-class logistic regression on the projected gradients of their rows;
the step Pŵ is made 2 % to 10 % as long as the adapter, and taken; and the log-odds of all rows are measured before and
after it. Printed are mean and median of the squared relative error of the first order, with the gradient term and
without.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gradstore.types import LoraSettings, TrainingRecipe
from numpy.typing import NDArray
from rich.console import Console

from datastore.first_order import changes, first_order_errors
from datastore.gradex import Pool, fit
from datastore.rows import Example
from datastore.shapes import example as parsed
from examples.demo import model as demo
from examples.demo.skills import SKILLS, pool
from worker.batches import Encoded, encode, plan
from worker.directions import Kind
from worker.finetune import Trained, train
from worker.gradients import GradientEngine
from worker.losses import Inputs, run
from worker.steps import Step, unprojected
from worker.steps import length as length_of

CPU = torch.device("cpu")
DISTANCES = (0.02, 0.04, 0.06, 0.08, 0.10)  # ‖Δ‖ / ‖θ*‖ of the adapter
SHARE = 0.75  # of the skills, that ŵ is made from
TOKEN_BUDGET = 4096
RECIPE: dict[str, Any] = {"learning_rate": 2.5e-3, "epochs": 4, "batch_size": 8, "max_length": 64}

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Trial:
    """One step and what it did to one set of rows."""

    rows: str
    distance: float
    means: tuple[float, float]
    """Mean e² with and without the gradient term."""
    medians: tuple[float, float]


def main() -> None:
    """Train, take the steps, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="rows of the pool; as many again are held out")
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--c", type=float, default=1e-4, help="C of the regression")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    demo.use_one_thread()
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        demo.build(Path(folder), seed=0)
        examples = _examples(arguments.rows, seed=0)
        lora = LoraSettings(r=arguments.rank, alpha=2 * arguments.rank, dropout=0.0)
        trained = train(examples, TrainingRecipe(model=folder, lora=lora, **RECIPE), device=CPU)
    console.print(f"fine-tuned in {time.monotonic() - began:.0f} s")
    sets = {"pool": _encoded(trained, examples), "held out": _encoded(trained, _examples(arguments.rows, seed=1))}
    origins = [example.origin for example in examples]
    trials = [
        trial
        for seed in range(arguments.seeds)
        for trial in _trials(trained, sets, origins, dim=arguments.dim, c=arguments.c, seed=seed)
    ]
    _report(trials, sets.keys())
    console.print(f"{time.monotonic() - began:.0f} s in all")


def _trials(
    trained: Trained, sets: dict[str, list[Encoded]], origins: Sequence[str], *, dim: int, c: float, seed: int
) -> Iterator[Trial]:
    """Take the steps of one draw of skills, and undo each."""
    model = trained.model
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    engine = GradientEngine(model, kinds=[Kind("logodds")], projection="reference", dims=[dim], seed=seed)
    features = {}
    for name, rows in sets.items():
        (found,) = engine.features(rows, pad_id=0, token_budget=TOKEN_BUDGET).values()
        features[name] = found
    drawn = random.Random(seed).sample(list(SKILLS), int(SHARE * len(SKILLS)))  # noqa: S311 - no secret
    chosen = features["pool"].by_dim[dim][[origin in drawn for origin in origins]]
    together = Pool.of(chosen, np.zeros(len(chosen), np.int64), count=1)
    [weights] = fit(together, np.ones((1, 1), bool), c=c).weights
    step = unprojected(model, torch.from_numpy(weights), projection="reference", seed=seed, device=CPU)
    length = length_of(step)
    whole = _norm(parameters.values())
    for share in DISTANCES:
        distance = share * whole
        with _moved(parameters, step, times=distance / length):
            after = {name: _logodds(trained, rows) for name, rows in sets.items()}
        for name, found in features.items():
            expected = changes(found.by_dim[dim], weights, length=length, distance=distance)
            errors = first_order_errors(_before(found.logodds), after[name], expected)
            yield Trial(name, share, errors.mean_squares, errors.median_squares)


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.stack([each.detach().double().square().sum() for each in tensors]).sum().sqrt())


@contextmanager
def _moved(parameters: dict[str, torch.nn.Parameter], step: Step, *, times: float) -> Iterator[None]:
    """Have the parameters a step away, and then where they were, to the last bit."""
    kept = {name: each.detach().clone() for name, each in parameters.items()}
    with torch.no_grad():
        for name, each in parameters.items():
            each.add_(step[name].view_as(each), alpha=times)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, each in parameters.items():
                each.copy_(kept[name])


@torch.no_grad()
def _logodds(trained: Trained, rows: Sequence[Encoded]) -> NDArray[np.float64]:
    """Mean log-odds of each row's supervised tokens (n,), by the forward pass that gradients are made of."""
    found = np.zeros(len(rows))
    for batch in plan([len(row.input_ids) for row in rows], token_budget=TOKEN_BUDGET):
        outputs = run(trained.model, Inputs.of([rows[row] for row in batch], pad_id=0, device=CPU), logodds="exact")
        found[batch] = _before(None if outputs.logodds is None else outputs.logodds.numpy())
    return found


def _before(logodds: NDArray[np.float32] | None) -> NDArray[np.float64]:
    assert logodds is not None, "log-odds were asked for"
    return logodds.astype(np.float64)


def _examples(rows: int, *, seed: int) -> list[Example]:
    return [parsed(row, file="pool.jsonl")[0] for row in pool(rows, seed=seed)]


def _encoded(trained: Trained, examples: Sequence[Example]) -> list[Encoded]:
    return [encode(each, tokenizer=trained.tokenizer, template="tulu", max_length=64) for each in examples]


def _report(trials: Sequence[Trial], sets: Iterable[str]) -> None:
    for name in sets:
        print(
            f"\n{name}\n\n| ‖Δ‖ / ‖θ‖ | mean e² with the gradient | without | median e² with the gradient | without |"
        )
        print("|---|---|---|---|---|")
        for distance in DISTANCES:
            mine = [trial for trial in trials if (trial.rows, trial.distance) == (name, distance)]
            cells = [_cell(column) for column in zip(*(trial.means + trial.medians for trial in mine), strict=True)]
            print(f"| {distance:.2f} | {' | '.join(cells)} |")


def _cell(values: Sequence[float]) -> str:
    """Mean over the seeds, and the least and largest."""
    return f"{np.mean(values):.2e} ({min(values):.2e}–{max(values):.2e})"


if __name__ == "__main__":
    main()
