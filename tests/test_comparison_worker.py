"""Comparisons by real workers on a tiny model: the same numbers from one worker, from two, and after a kill."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import (
    ComparisonRequest,
    ComparisonResult,
    EvaluationRequest,
    FinetuneRequest,
    GradientsRequest,
)

from tests.workplace import Workplace, numbered, worker_process

ROWS = 16
PATIENCE = 300.0  # seconds
TRAINING: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "device_batch_size": 2, "learning_rate": 1e-2, "max_length": 64,
    "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("frozen")


def place_at(folder: Path, model: Path) -> Workplace:
    """A store with a pool, a task and their features at one checkpoint."""
    folder.mkdir(exist_ok=True)
    place = Workplace.at(folder, model=model, lease=1.5)
    place.pool(numbered(range(ROWS)), name="pool")
    place.task(2)
    checkpoint = place.checkpoint().id
    for owner in ({"dataset": "pool", "kinds": ["sgd"]}, {"task": "target"}):
        place.done(GradientsRequest.model_validate({**owner, "checkpoints": [checkpoint], "dims": [32]}))
    return place


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return place_at(tmp_path, model)


def request(place: Workplace, **changes: Any) -> ComparisonRequest:
    values = {
        "dataset": "pool", "tasks": ["target"], "k": 4, "train": True, "model": str(place.model), "repeats": 2,
        "bootstrap_samples": 50, "contestants": [{"method": "influence"}, {"method": "bm25"}, {"method": "random"}],
    }  # fmt: skip
    return ComparisonRequest.model_validate({**values, **TRAINING, **changes})


def trainings(place: Workplace) -> dict[str, int]:
    """The trainings that are stored, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in place.context.trainings.root.glob("training_*")}


def numbers_of(result: ComparisonResult) -> list[Any]:
    """What a comparison found, without what it took and what its checkpoints are called."""
    rows = [(row.contestant, row.selection, row.draws, row.rows, row.origins, row.loss) for row in result.rows]
    return [result.tasks, rows, result.pairs, result.against, result.trainings, result.tokens]


def test_losses_are_those_of_fine_tunes_on_the_selections_and_of_the_base_model(place: Workplace) -> None:
    result = ComparisonResult.model_validate(place.done(request(place, split="test")))
    assert result.trainings == 1 + 3 * 2
    influence = result.rows[0]
    assert influence.loss is not None
    evaluated = []
    rows = sorted(row.row for row in place.context.answers.rows(influence.selection))
    chosen = place.pool([numbered(range(ROWS))[row] for row in rows])
    for seed in range(2):
        asked = {"dataset": chosen.id, "model": str(place.model), "seed": seed, **TRAINING}
        tuned = place.done(FinetuneRequest.model_validate(asked))
        measured = EvaluationRequest(checkpoint=tuned["checkpoints"][-1], tasks=["target"])
        rows_of = place.done(measured)["rows"]
        evaluated.append(next(row["loss"] for row in rows_of if row["subtask"] is None and row["model"] == "tuned"))
        base = next(row["loss"] for row in rows_of if row["subtask"] is None and row["model"] == "base")
    assert influence.loss.by_seed == pytest.approx(evaluated, rel=1e-6)  # as many rows in each subtask
    assert result.tasks[0].base_loss == pytest.approx(base, rel=1e-6)
    assert influence.cost.scoring_seconds is not None
    assert influence.cost.scoring_seconds > 0
    assert influence.cost.choosing_seconds is not None
    assert {source.kind for source in influence.cost.rests_on} == {"gradients"}
    assert all(source.seconds for source in influence.cost.rests_on)


def test_two_workers_find_what_one_finds(tmp_path: Path, model: Path) -> None:
    alone = place_at(tmp_path / "alone", model)
    first = ComparisonResult.model_validate(alone.done(request(alone)))
    both = place_at(tmp_path / "both", model)
    job = both.start(request(both))
    with worker_process(both), worker_process(both):
        deadline = time.monotonic() + PATIENCE
        while both.job(job.id).status not in {"succeeded", "failed"}:
            assert time.monotonic() < deadline, both.job(job.id)
            time.sleep(0.1)
    done = both.job(job.id)
    assert done.result is not None, done.error
    second = ComparisonResult.model_validate(done.result.model_dump())
    for ours, theirs in zip(second.rows, first.rows, strict=True):
        assert ours.loss is not None
        assert theirs.loss is not None
        np.testing.assert_allclose(ours.loss.by_seed, theirs.loss.by_seed, rtol=1e-5)  # two thread counts
    assert [one[:5] for one in numbers_of(second)[1]] == [one[:5] for one in numbers_of(first)[1]]
    assert second.pairs == first.pairs


@pytest.mark.slow
def test_a_killed_worker_loses_one_shard(place: Workplace) -> None:
    job = place.start(request(place, epochs=8))
    deadline = time.monotonic() + PATIENCE
    with worker_process(place) as process:
        while len(trainings(place)) < 2:
            assert time.monotonic() < deadline, "no training was done"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    written = trainings(place)
    while place.job(job.id).status != "succeeded":
        assert time.monotonic() < deadline, place.job(job.id)
        place.work()
        time.sleep(0.1)
    assert len(trainings(place)) == 1 + 3 * 2
    assert written.items() <= trainings(place).items()


def test_scores_that_are_known_are_not_computed_again(place: Workplace) -> None:
    first = ComparisonResult.model_validate(place.done(request(place)))
    again = ComparisonResult.model_validate(place.done(request(place, k=5)))
    assert [row.cost.scoring_seconds for row in again.rows] == [row.cost.scoring_seconds for row in first.rows]
    scoring = place.context.jobs.page(kind="scoring", limit=10).data
    assert len(scoring) == 2  # influence and BM25


def test_scores_that_cannot_be_computed_fail_the_comparison_in_words(tmp_path: Path, model: Path) -> None:
    place = place_at(tmp_path, model)
    place.task(2, name="mute", prompt="!", completion="?")
    job = place.start(request(place, tasks=["mute"], contestants=[{"method": "bm25"}], train=False, **untrained()))
    place.work()
    error = place.job(job.id).error
    assert error is not None
    assert "has a word" in error.detail


def untrained() -> dict[str, Any]:
    """What undoes the settings of a training."""
    fields = ComparisonRequest.model_fields
    return {name: fields[name].default for name in (*TRAINING, "model", "repeats", "bootstrap_samples")}
