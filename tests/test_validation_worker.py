"""Validations by real workers on a tiny model: what is trained is what a fine-tune trains, and kills lose little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import EvaluationRequest, FinetuneRequest, GradientsRequest, ValidationRequest, ValidationResult
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered, worker_process
from worker.jobs import run, tidy

ROWS = 16
PATIENCE = 300.0  # seconds
TRAINING: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "device_batch_size": 2, "learning_rate": 1e-2, "max_length": 64,
    "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("frozen")


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    """A store with a pool, a task and their features at one checkpoint."""
    place = Workplace.at(tmp_path, model=model, lease=1.5)
    place.pool(numbered(range(ROWS)), name="pool")
    place.task(2)
    checkpoint = place.checkpoint().id
    for owner in ({"dataset": "pool", "kinds": ["sgd"]}, {"task": "target"}):
        place.done(GradientsRequest.model_validate({**owner, "checkpoints": [checkpoint], "dims": [32]}))
    return place


def request(place: Workplace, **changes: Any) -> ValidationRequest:
    values = {"dataset": "pool", "task": "target", "model": str(place.model), "subsets": 4, "bootstrap_samples": 50}
    return ValidationRequest.model_validate({**values, **TRAINING, **changes})


def trainings(place: Workplace) -> dict[str, int]:
    """The trainings that are stored, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in place.context.validations.trainings.root.glob("training_*")}


def test_the_losses_of_a_training_are_those_of_a_fine_tune_on_the_same_rows(place: Workplace) -> None:
    asked = request(place, split="test", targets="subtasks", fraction=0.25)
    place.done(asked)
    validations = place.context.validations
    plan = validations.plan(asked).settings
    training = validations.training(plan, {"subset": 1, "repeat": 0})
    measured = validations.trainings.get(training.key)
    assert measured is not None
    assert measured.rows == len(training.rows) == ROWS // 4
    chosen = place.pool([numbered(range(ROWS))[row] for row in training.rows], name="chosen")
    tuned = FinetuneRequest.model_validate({"dataset": chosen.id, "model": str(place.model), **TRAINING})
    result = place.done(tuned)
    assert measured.tokens == result["tokens"] * 2
    ours = EvaluationRequest(checkpoint=result["checkpoints"][-1], tasks=["target"], baseline=False)
    rows = place.done(ours)["rows"]
    split = place.context.tasks.test(training.task)
    for row in rows[:-1]:
        mine = [loss for loss, one in zip(measured.losses, split, strict=True) if one.subtask == row["subtask"]]
        assert np.mean(mine) == pytest.approx(row["loss"], rel=1e-6)


def test_a_validation_leaves_no_checkpoint_and_no_files_but_its_losses(place: Workplace) -> None:
    data = place.context.settings.data

    def files() -> set[Path]:
        return {path for path in data.rglob("*") if path.is_file() and not path.name.startswith("catalog.")}

    before, checkpoints = files(), place.context.catalog.checkpoints(limit=100).data
    result = ValidationResult.model_validate(place.done(request(place)))
    assert {path.parent.name for path in files() - before} == {"trainings"}
    assert len(files() - before) == 4 == result.trainings
    assert place.context.catalog.checkpoints(limit=100).data == checkpoints


def test_the_same_trainings_give_the_same_losses_and_are_done_once(place: Workplace, tmp_path: Path) -> None:
    first = place.done(request(place))
    written = trainings(place)
    second = place.done(request(place, targets="subtasks", scores=[{}, {"control": "random"}]))
    assert trainings(place) == written
    assert second["seconds"] == first["seconds"]
    kept = {name: place.context.validations.trainings.get(Path(name).stem) for name in written}
    place.context.validations.trainings.delete(Path(name).stem for name in written)
    place.done(request(place, seed=0, targets="subtasks"))
    for name, one in kept.items():
        again = place.context.validations.trainings.get(Path(name).stem)
        assert one is not None
        assert again is None or again.losses == one.losses


def test_leaving_out_the_best_rows_trains_on_the_others(place: Workplace) -> None:
    asked = request(place, kind="leave-top-k-out", k=4, repeats=2, split="test")
    result = ValidationResult.model_validate(place.done(asked))
    assert result.trainings == 2 + 2
    assert result.rows == ROWS - 4
    [scores] = result.scores
    assert len(scores.points) == 2
    assert scores.value == pytest.approx(np.mean([point.loss - (point.random_loss or 0) for point in scores.points]))
    assert [target.row for target in scores.targets] == list(range(4))


def test_a_killed_worker_loses_one_training(place: Workplace) -> None:
    job = place.start(request(place, subsets=6, epochs=8))
    with worker_process(place) as process:
        deadline = time.monotonic() + PATIENCE
        while len(trainings(place)) < 2:
            assert time.monotonic() < deadline, "no training was done"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    written = trainings(place)
    assert 2 <= len(written) < 6
    while place.job(job.id).status != "succeeded":
        assert time.monotonic() < deadline, place.job(job.id)
        place.work()
        time.sleep(0.1)
    assert len(trainings(place)) == 6
    assert written.items() <= trainings(place).items()
    done = place.job(job.id)
    assert done.progress.done == 6
    assert done.result is not None


def test_a_cancelled_training_ends_between_two_steps(place: Workplace) -> None:
    job = place.start(request(place, epochs=1000))
    claim = place.claim()
    place.context.jobs.cancel(job.id)
    began = time.monotonic()
    assert run(claim, place.context) == "stopped"
    assert time.monotonic() - began < PATIENCE / 2
    assert not trainings(place)


def test_a_training_that_diverges_fails_the_job_in_words(place: Workplace) -> None:
    broken = save_tiny_model(place.folder / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    job = place.start(request(place, model=str(broken)))
    assert "failed" in place.work()
    error = place.job(job.id).error
    assert error is not None
    assert error.status == 422
    assert "lower learning_rate" in error.detail


def test_what_a_killed_worker_left_half_written_is_removed(place: Workplace) -> None:
    root = place.context.validations.trainings.root
    root.mkdir(parents=True)
    old, new = root / ".training_1.aa", root / ".training_2.bb"
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, 0))
    tidy(place.context)
    assert [path.name for path in root.iterdir()] == [new.name]
