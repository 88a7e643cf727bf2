"""The ROCKET recipe as one call: shots, adapters, data, a mixture and its evaluation, with a worker beside it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gradstore import GradientStore, cli, recipes
from gradstore.types import JobKind
from typer.testing import CliRunner

from tests.serving import Service, form_files, serving
from tests.tiny import save_tiny_encoder
from tests.workplace import tiny_adapter
from worker.context import Context
from worker.jobs import run

NAMES = ("one", "two", "three")
TRAINING: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "device_batch_size": 4,
    "max_length": 64,
    "learning_rate": 1e-3,
}


def question(number: int) -> dict[str, Any]:
    text = f"Is the number {number} an even one, or is it not, said in so many words as there are here?"
    return {"prompt": text, "completion": " yes" if number % 2 == 0 else " no"}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    with serving(tmp_path / "store", allowed_roots=(tmp_path, model.parent)) as running:
        rows = [
            {"prompt": question(number)["prompt"], "completion": question(number)["completion"],
             "choices": [" yes", " no"], "answers": question(number)["completion"]}
            for number in range(6)
        ]  # fmt: skip
        files = {"validation.jsonl": lines(rows[:4]), "test.jsonl": lines(rows[4:])}
        made = running.http.post("/tasks", data={"name": "target", "kind": "jsonl"}, files=form_files(files))
        assert made.is_success, made.text
        others = [{"prompt": f"Say {word} aloud", "completion": word} for word in "abcdefghij"]
        running.upload(lines([question(2), *others, question(5)]), name="pool")
        yield running


@pytest.fixture
def worker(service: Service) -> Iterator[None]:
    """Does the shards that wait, until the test ends."""
    context = Context.open(service.backend.settings, torch.device("cpu"))
    stopping = threading.Event()

    def work() -> None:
        while not stopping.is_set():
            claim = context.jobs.claim("test", kinds=get_args(JobKind))
            if claim is None:
                stopping.wait(0.05)
            else:
                run(claim, context)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stopping.set()
    thread.join()


@pytest.mark.usefixtures("worker")
def test_the_recipe_makes_a_mixture_and_goes_on_where_it_stopped(service: Service, tmp_path: Path, model: Path) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    with GradientStore(service.url, backoff=0.01) as store:
        for seed, name in enumerate(NAMES):
            tiny_adapter(model, seed=seed).save_pretrained(str(tmp_path / name))
            store.adapters.upload(tmp_path / name, name=name, base_model=str(model))
        asked: dict[str, Any] = {
            "pool": "pool", "task": "target", "model": str(model), "encoder": str(encoder), "candidates": 3, "size": 2,
            "k": 5, "tau": 1.0, "progress": False, **TRAINING,
        }  # fmt: skip
        steps: list[str] = []

        def stop(step: str) -> None:
            steps.append(step)
            if step.startswith("[5/"):
                raise InterruptedError(step)

        with pytest.raises(InterruptedError):
            recipes.rocket(store, say=stop, **asked)
        begun = {job.id for job in store.jobs.list()}
        done = recipes.rocket(store, say=steps.append, **asked)
        assert [int(step[1]) for step in steps] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]
        jobs = {job.id for job in store.jobs.list()}
        assert jobs - begun == {done.tuned.id, done.evaluation.id if done.evaluation else None}
        assert len(done.choice.result.chosen.members) == 2
        assert done.tuned.request.experts_from == done.choice.result.chosen.members
        assert done.selection.recipe.strategy == "shots"
        rows = {row.row for row in store.selections.rows(done.selection.id)}
        assert (len(rows), rows & {0, 11}) == (5, set()), "a shot's copy and a test row's are left out"
        assert done.trained_on.rows == 4 + 5
        contents = [json.loads(line)["prompt"] for line in store.datasets.lines(done.trained_on.id)]
        assert contents[:4] == [question(number)["prompt"] for number in range(4)]
        assert done.evaluation is not None
        assert {row.model for row in done.evaluation.result.rows} == {"base", "tuned"}
        again = recipes.rocket(store, **asked)
        assert again == done
        words = [
            "rocket", "pool", "--task", "target", "--model", str(model), "--encoder", str(encoder), "--candidates", "3",
            "--size", "2", "--k", "5", "--tau", "1", "--epochs", "1", "--batch-size", "4", "--device-batch-size", "4",
            "--max-length", "64", "--learning-rate", "1e-3", "--json",
        ]  # fmt: skip
        said = CliRunner().invoke(cli.app, ["--url", service.url, *words])
        assert said.exit_code == 0, said.output
        assert json.loads(said.stdout)["tuned"]["id"] == done.tuned.id
        assert f"choice {done.choice.id}: " in said.stderr
        assert {job.id for job in store.jobs.list()} == jobs
