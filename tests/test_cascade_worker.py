"""Predictors and cascades by real workers on a tiny model: one that works alone, and one that is killed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import CascadeRequest, CascadeResult, GradientsRequest, PredictorRequest, PredictorResult

from datastore.parameters import Query
from tests.workplace import Workplace, numbered, worker_process
from worker.jobs import run

ROWS = 60
SHARED: dict[str, Any] = {"dataset": "pool", "task": "target", "model": "ridge", "features": ["hidden", "text"]}


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    """A store with a pool, a task, and the task's gradients at one checkpoint."""
    place = Workplace.at(tmp_path, model=model, lease=1.5)
    place.pool(numbered(range(ROWS)), name="pool")
    place.task(2)
    place.done(gradients(place, task="target"))
    return place


def gradients(place: Workplace, **changes: Any) -> GradientsRequest:
    checkpoint = place.context.catalog.checkpoints(limit=1).data or [place.checkpoint()]
    values = {"checkpoints": [checkpoint[0].id], "kinds": ["sgd"], "dims": [32], "dtype": "float32"}
    return GradientsRequest.model_validate({**values, **changes})


def cascade(place: Workplace, **changes: Any) -> CascadeRequest:
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    values = {"checkpoints": [checkpoint], "kind": "sgd", "budget": 0.5, "aggregate": "max"}
    return CascadeRequest.model_validate({**SHARED, **values, **changes})


def selected(place: Workplace, **query: Any) -> list[tuple[int, float]]:
    context = place.context
    asked = Query(tasks=["target"], datasets=["pool"], k=ROWS, **query)
    recipe, sources = context.recipes.resolve(asked, path="/select")
    if context.scoring.known(recipe, sources) is None:
        context.scoring.start(recipe, sources)
        place.work()
    scores = context.scoring.known(recipe, sources)
    assert scores is not None
    return [(row.row, row.score) for row in context.answers.select(recipe, sources, scores, limit=ROWS).data]


def test_a_worker_alone_does_a_whole_cascade_and_its_scores_are_the_true_ones(place: Workplace) -> None:
    job, _ = place.context.cascades.start(cascade(place))
    claim = place.context.jobs.claim(place.context.owner, kinds=["cascade"])
    assert claim is not None
    assert run(claim, place.context) == "succeeded"
    found = place.job(job.id)
    assert found.result is not None
    result = CascadeResult.model_validate(found.result.model_dump())
    assert [stage.rows for stage in result.stages] == [15, 8, 7]
    assert result.saved_tokens is not None
    assert result.saved_tokens > 0
    mine = dict(selected(place, method="cascade", budget=0.5))
    assert len(mine) == 30
    place.done(gradients(place, dataset="pool"))
    truth = dict(selected(place, aggregate="max"))
    assert len(truth) == ROWS
    assert mine == {row: pytest.approx(truth[row], abs=1e-5) for row in mine}


def test_a_predictor_learns_from_stored_gradients_and_hidden_states(place: Workplace) -> None:
    place.done(gradients(place, dataset="pool", kinds=["sgd", "hidden"]))
    job, _ = place.context.predictors.start(PredictorRequest.model_validate({**SHARED, "rows": 30, "aggregate": "max"}))
    place.work()
    done = place.job(job.id)
    assert done.status == "succeeded", done.error
    assert done.result is not None
    result = PredictorResult.model_validate(done.result.model_dump())
    assert (result.tested_on, result.tested_rows, len(result.controls)) == ("outside", 30, 3)
    rows = selected(place, method="predicted", by=job.id)
    assert len(rows) == ROWS
    assert np.all(np.diff([score for _, score in rows]) <= 0)


def test_a_job_that_is_cancelled_while_a_cascade_needs_it_ends_the_cascade_with_its_name(place: Workplace) -> None:
    job, _ = place.context.cascades.start(cascade(place))
    claim = place.context.jobs.claim(place.context.owner, kinds=["cascade"])
    hidden, _ = place.context.features.start(gradients(place, dataset="pool", kinds=["hidden"], template="tulu"))
    held = place.context.jobs.claim("another", kinds=["gradients"])
    assert claim is not None
    assert held is not None
    canceller = threading.Timer(0.3, place.another().context.jobs.cancel, [hidden.id])
    canceller.start()
    assert run(claim, place.context) == "failed"
    canceller.join()
    error = place.job(job.id).error
    assert error is not None
    assert f"{hidden.id}, which this job needs, was cancelled" in error.detail


@pytest.mark.slow
def test_two_workers_in_processes_of_their_own_share_a_cascade(place: Workplace) -> None:
    job, _ = place.context.cascades.start(cascade(place))
    with worker_process(place), worker_process(place):
        deadline = time.monotonic() + 120
        while not place.job(job.id).finished and time.monotonic() < deadline:
            time.sleep(0.2)
    assert place.job(job.id).status == "succeeded", place.job(job.id).error
