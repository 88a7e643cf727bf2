"""What choosing and mixing adapters of a bank brings on real rows, beside one adapter, static merges and Arrow.

    .venv/bin/python -m benchmarks.adapters DATA              # DATA: the folder of real rows, in LESS's layout
    .venv/bin/python -m benchmarks.adapters DATA --rows 24 --steps 20 --epochs 1 --test 3   # only to see that it runs

All of it goes through the service: a small model is made and trained on the spot on the text of seven pools, and an
adapter of it on each pool, for the bank. For each task, adapters are chosen from its shots (ROCKET's algorithm 1), and
measured on its test rows: alone, merged, routed by Arrow, and as a mixture whose experts begin as them and are trained
on the shots. Beside the mixture stands the best adapter trained on the same shots, as a mixture of one expert, which is
plain LoRA.

Tasks are ARC-Challenge, whose 50 rows with rationales are half shots and half test rows, and ScienceQA in MoLA's rows.
Rows of a pool that hold a question of a task are left out of it. Intervals are of 95 %, by bootstrap over test rows.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore import GradientStore
from gradstore.types import EvaluationRow, Interval
from rich.console import Console

from examples.server import folder_of, running

POOLS = ("cot", "dolly", "gsm8k_cot", "oasst1", "p3_t0", "scienceqa", "stanford_alpaca")
ROWS, SHORT = 600, 800  # of each pool; characters of a row
STEPS, EPOCHS = 400, 3
SHOTS, SIZE = 50, 3
"""Shots of a task at most, and adapters of a set."""
RANK = 8
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 8, "max_length": 320, "precision": "float32"}
ASKED: dict[str, Any] = {"max_length": 512, "template": "tulu"}
MERGES: dict[str, dict[str, Any]] = {
    "static merge, cat": {"combine": "cat"},
    "static merge, linear": {"combine": "linear"},
    "static merge, ties (0.2)": {"combine": "ties", "merge_density": 0.2},
    "Arrow, top 2": {"combine": "arrow", "arrow_top_k": 2},
}
LETTERS = re.compile(r"[ \n]([A-E1-5])\. ")
"""What an option of ARC begins with."""

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Target:
    """A task of the study: its files, and its shots as rows to train on."""

    name: str
    kind: str
    folder: Path
    shots: Path
    questions: frozenset[str]
    """Of all its rows, as `_bare` leaves them."""


def main() -> None:
    """Train, choose, mix, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path, help="a folder of real rows in LESS's layout")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of each pool, by default {ROWS}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the model's own training, by default {STEPS}")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of every adapter and mixture, by default {EPOCHS}")
    parser.add_argument("--test", type=int, help="test rows of a subtask at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="keep the store here, and go on from what it has")
    arguments = parser.parse_args()
    began = time.monotonic()
    with folder_of(arguments.keep, name="adapters") as folder:
        targets = [_arc(folder, arguments.data), _scienceqa(folder, arguments.data)]
        pools = _pools(folder, arguments.data, rows=arguments.rows, targets=targets)
        _model(folder / "base", pools.values(), seed=arguments.seed, steps=arguments.steps)
        with running(folder / "store", allow=folder) as url, GradientStore(url) as store:
            recipe = {**TRAINING, "epochs": arguments.epochs, "seed": arguments.seed, "model": str(folder / "base")}
            bank = {name: _adapter(store, name, pool, recipe) for name, pool in pools.items()}
            print("| task | what is measured | metric | value | 95 % | loss | 95 % |\n|---|---|---|---|---|---|---|")
            for target in targets:
                asked = {**ASKED, "max_rows": arguments.test, "seed": arguments.seed}
                for label, row in _study(store, target, bank, recipe, asked):
                    print(_line(target.name, label, row), flush=True)
    console.print(f"{time.monotonic() - began:.0f} s in all")


def _study(
    store: GradientStore, target: Target, bank: Mapping[str, str], recipe: dict[str, Any], asked: dict[str, Any]
) -> Iterator[tuple[str, EvaluationRow]]:
    """Every model on one task, the base model first."""
    task = store.tasks.upload(target.folder, kind=target.kind, name=target.name).id
    shots = store.datasets.upload(target.shots, name=f"shots of {target.name}").id
    asked = {**asked, "tasks": [task]}
    best, chosen = _chosen(store, task, bank)
    names = {adapter: name for name, adapter in bank.items()}
    console.print(f"{target.name}: chosen are {', '.join(names[one] for one in chosen)}; best alone {names[best]}")
    yield "base model", _measured(store, model=recipe["model"], **asked)
    alone = {name: _measured(store, adapter=adapter, **asked) for name, adapter in bank.items()}
    for name, row in alone.items():
        yield f"{name} alone{' (best by its shots)' if bank[name] == best else ''}", row
    for label, how in MERGES.items():
        yield label, _measured(store, adapters=chosen, **how, **asked)
    for label, experts in (("best alone, trained on the shots", [best]), ("mixture, trained on the shots", chosen)):
        yield label, _measured(store, finetune=_mixture(store, shots, experts, recipe), **asked)


def _chosen(store: GradientStore, task: str, bank: Mapping[str, str]) -> tuple[str, list[str]]:
    """The adapter with the best ranks alone, and the set that is chosen."""
    job = store.adapter_choices.create(
        task=task, shots=SHOTS, adapters=list(bank.values()), candidates=2 * SIZE, size=SIZE, max_new_tokens=16
    )
    result = store.adapter_choices.wait(job, progress=True).result
    return result.adapters[0].adapter, list(result.chosen.members)


def _adapter(store: GradientStore, name: str, pool: Path, recipe: dict[str, Any]) -> str:
    console.print(f"adapter of {name}")
    dataset = store.datasets.upload(pool, name=name).id
    lora = {"r": RANK, "alpha": 2 * RANK, "dropout": 0.0}
    job = store.finetunes.wait(store.finetunes.create(dataset=dataset, lora=lora, **recipe), progress=True)
    return store.adapters.register(finetune=job.id, name=name).id


def _mixture(store: GradientStore, shots: str, experts: Sequence[str], recipe: dict[str, Any]) -> str:
    """A fine-tune of a mixture whose experts begin as these adapters."""
    mixture = {"experts": len(experts), "top_k": min(2, len(experts)), "rank": RANK, "alpha": 2 * RANK, "dropout": 0.0}
    started = store.finetunes.create(dataset=shots, mixture=mixture, experts_from=list(experts), **recipe)
    return store.finetunes.wait(started, progress=True).id


def _measured(store: GradientStore, **asked: Any) -> EvaluationRow:
    """The whole task's row."""
    done = store.evaluations.wait(store.evaluations.create(**asked, baseline=False), progress=True)
    return next(row for row in done.result.rows if row.subtask is None)


# Files ----------------------------------------------------------------------------------------------------------------


def _arc(folder: Path, data: Path) -> Target:
    """ARC-Challenge: every other row a shot, with its rationale; judged by the most probable letter."""
    plain, reasoned = (_read(data / f"raw/kshot/{name}_50shot.json") for name in ("arc-c", "arc-c_cot"))
    rows = [
        {
            "prompt": row["instruction"],
            "completion": row["output"],
            "rationale": with_reasons["output"],
            "choices": sorted(set(LETTERS.findall(row["instruction"]))),
            "answers": [row["output"][0]],
        }
        for row, with_reasons in zip(plain, reasoned, strict=True)
    ]
    home = folder / "arc"
    _write(home / "validation.jsonl", rows[::2])
    _write(home / "test.jsonl", rows[1::2])
    shots = _write(
        folder / "arc-shots.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in rows[::2]]
    )
    questions = (LETTERS.split(row["instruction"].partition("Question: ")[2])[0] for row in plain)
    return Target("ARC-Challenge", "jsonl", home, shots, frozenset(map(_bare, questions)))


def _scienceqa(folder: Path, data: Path) -> Target:
    """ScienceQA in MoLA's rows: of the validation rows the first are the shots."""
    of_split = {split: _read(data / f"raw/scienceqa/mola_{split}.jsonl") for split in ("validation", "test")}
    of_split["validation"] = of_split["validation"][:SHOTS]
    for split, rows in of_split.items():
        _write(folder / "scienceqa" / f"{split}.jsonl", rows)
    shots = [{"prompt": row["instruction"], "completion": row["output"]} for row in of_split["validation"]]
    questions = frozenset(_bare(row["question"]) for rows in of_split.values() for row in rows)
    return Target(
        "ScienceQA", "scienceqa", folder / "scienceqa", _write(folder / "scienceqa-shots.jsonl", shots), questions
    )


def _pools(folder: Path, data: Path, *, rows: int, targets: Sequence[Target]) -> dict[str, Path]:
    """The short rows of every pool that hold no question of a task."""
    questions = frozenset().union(*(target.questions for target in targets))
    found = {}
    for name in POOLS:
        everything = _read(data / f"train/processed/{name}/{name}_data.jsonl")
        texts = [_bare(" ".join(turn["content"] for turn in row["messages"])) for row in everything]
        clean = [
            row for row, text in zip(everything, texts, strict=True) if not any(each in text for each in questions)
        ]
        short = [row for row in clean if sum(len(turn["content"]) for turn in row["messages"]) < SHORT]
        console.print(f"{name}: {len(everything) - len(clean)} rows hold a question of a task, and are left out")
        found[name] = _write(folder / f"{name}.jsonl", short[:rows])
    return found


def _model(base: Path, pools: Iterable[Path], *, seed: int, steps: int) -> None:
    if base.exists():
        return
    from examples.real_input import model  # noqa: PLC0415 - torch takes seconds to import, and --help needs none of it

    rows = [row for pool in pools for row in _read(pool)]
    texts = ["".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in row["messages"]) for row in rows]
    model.build(base, texts, seed=seed, steps=steps)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _bare(text: str) -> str:
    """A text by its letters and digits alone."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _line(task: str, label: str, row: EvaluationRow) -> str:
    def between(interval: Interval | None) -> str:
        return "" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"

    value, loss = ("" if number is None else f"{number:.3f}" for number in (row.value, row.loss))
    cells = (task, label, row.metric, value, between(row.interval), loss, between(row.loss_interval))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
