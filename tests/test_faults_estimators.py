"""Predictors, cascades, estimates and projectors whose worker is killed, and whose store lies in a bucket.

What comes of a job that lost its worker in the middle is what comes of it undisturbed, in another store; what one host
made is what another host reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from gradstore.types import (
    AnnotationRequest,
    AnyJob,
    CascadeRequest,
    EmbeddingRequest,
    EstimatesRequest,
    GradientsRequest,
    PredictorRequest,
    ProjectorRequest,
    StreamRequest,
)

from tests.buckets import URL, BucketServer, leading_to
from tests.processes import PATIENCE, wait_for
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered, worker_process

ROWS = 60
LEASE = 1.5  # seconds
KINDS = ("predictor", "cascade", "estimates", "projector")
CONFIG = {"width": 16, "blocks": 1, "dim": 8, "heads": 2, "batch_size": 8, "adjustment_epochs": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    return save_tiny_model(folder, hidden_size=16, intermediate_size=16, num_hidden_layers=1)


class Lab:
    """A store with all that each of the four kinds of jobs needs."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        rows = [{**row, "id": str(n), "dataset": "abcdef"[n % 6]} for n, row in enumerate(numbered(range(ROWS)))]
        place.pool(rows, name="pool")
        place.task(2)
        self.checkpoint = place.checkpoint().id
        for kinds in (["sgd", "hidden"], ["logodds"]):
            for owner in ({"dataset": "pool"}, {"task": "target"}):
                place.done(self._computed(kinds, owner))
        job = place.start(self._computed(["sgd", "hidden"], {"dataset": "pool"}))
        assert job.result is not None
        sgd = next(each["id"] for each in job.result.model_dump()["feature_sets"] if each["kind"] == "sgd")
        stream = StreamRequest(kind="gradients", gradients=job.id, feature_set=sgd)
        self.stream = place.context.streams.start(stream)[0].id
        self.labels = place.context.annotations.start(AnnotationRequest(dataset="pool", by="origin"))[0].id

    def _computed(self, kinds: list[str], owner: dict[str, str]) -> GradientsRequest:
        asked = {"checkpoints": [self.checkpoint], "kinds": kinds, "dims": [32], "dtype": "float32"}
        return GradientsRequest.model_validate({**asked, **owner, "token_budget": 1024})

    def start(self, kind: str, *, long: bool) -> AnyJob:
        """Start a job of a kind, which is at work for some seconds if it is `long`."""
        context = self.place.context
        learnt = {"dataset": "pool", "task": "target", "checkpoints": [self.checkpoint], "features": ["hidden", "text"]}
        learnt |= {"aggregate": "max", "dim": 32, "folds": 4 if long else 2, "model": "boosting" if long else "ridge"}
        starts: dict[str, Callable[[], tuple[AnyJob, bool]]] = {
            "predictor": lambda: context.predictors.start(
                PredictorRequest.model_validate({**learnt, "rows": 40, "kind": "sgd", "controls": False})
            ),
            "cascade": lambda: context.cascades.start(
                CascadeRequest.model_validate({**learnt, "budget": 0.8, "rounds": 4, "kind": "sgd"})
            ),
            "estimates": lambda: context.estimates.start(
                EstimatesRequest(dataset="pool", tasks=["target"], count=8000 if long else 300, abs_scale=0.1)
            ),
            "projector": lambda: context.projectors.start(
                ProjectorRequest.model_validate(
                    {
                        "streams": {"gradients": self.stream},
                        "annotations": self.labels,
                        "config": {**CONFIG, "epochs": 100 if long else 2},
                    }
                )
            ),
        }
        return starts[kind]()[0]

    def is_amid(self, job: AnyJob) -> bool:
        """Whether a part of a job is done, and it goes on."""
        context = self.place.context
        now = context.jobs.get(job.id)
        assert now.status in {"queued", "running"}, f"it is over before it could be disturbed: {now.error}"
        if job.kind == "cascade":
            return context.jobs.plan(job.id)["part_0"] is not None
        if job.kind == "projector":
            return bool(context.projectors.epochs(job.id))
        if job.kind == "predictor":
            return now.status == "running"  # it is one shard
        return now.progress.done > 0

    def is_done(self, job: AnyJob) -> bool:
        """Whether a job has succeeded."""
        now = self.place.job(job.id)
        assert now.status not in {"failed", "cancelled"}, now.error
        return now.status == "succeeded"

    def result(self, job: AnyJob) -> Any:
        """What a job's result says, but for seconds."""
        found = self.place.job(job.id).result
        assert found is not None
        return {name: value for name, value in found.model_dump().items() if name != "seconds"}

    def made(self, job: AnyJob) -> dict[str, Any]:
        """The numbers that a job has left."""
        context = self.place.context
        if job.kind == "estimates":
            return {name: rows for name, rows in context.estimates.arrays(job.id).items() if name != "seconds"}
        if job.kind == "projector":
            return {"weights": np.frombuffer(context.projectors.files.weights(job.id).read_bytes(), np.uint8)}
        scores = context.predictors.predicted(job.id)
        assert scores is not None
        return {"scores": scores.score, "valid": scores.valid}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Lab:
    """A store in which a worker did a job of each kind, one after the other."""
    lab = Lab(Workplace.at(tmp_path_factory.mktemp("undisturbed"), model=model, lease=LEASE))
    jobs = [lab.start(kind, long=True) for kind in KINDS]
    with worker_process(lab.place):
        wait_for(lambda: all(map(lab.is_done, jobs)), patience=6 * PATIENCE)
    return lab


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Team]:
    """The same store, and a worker that tests kill."""
    with Team(Lab(Workplace.at(tmp_path_factory.mktemp("disturbed"), model=model, lease=LEASE))) as team:
        yield team


class Team:
    """A store and one worker at a time."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.hire()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def hire(self) -> None:
        """Start a worker."""
        self.worker = self._stack.enter_context(worker_process(self.lab.place))

    def kill(self) -> None:
        """End the worker at once."""
        self.worker.kill()
        self.worker.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_killed_in_the_middle_costs_time_and_changes_nothing(
    kind: str, undisturbed: Lab, disturbed: Team
) -> None:
    theirs, mine = undisturbed.start(kind, long=True), disturbed.lab.start(kind, long=True)
    assert (theirs.id, theirs.status) == (mine.id, "succeeded")
    wait_for(lambda: disturbed.lab.is_amid(mine), patience=3 * PATIENCE)
    disturbed.kill()
    assert disturbed.lab.place.job(mine.id).status == "running"
    disturbed.hire()
    wait_for(lambda: disturbed.lab.is_done(mine), patience=3 * PATIENCE)
    rounded = 1e-5 if kind == "cascade" else 0  # the budget of its gradients' batches is found by each worker
    assert approximately(disturbed.lab.result(mine), rounded) == undisturbed.result(theirs)
    expected = undisturbed.made(theirs)
    for name, numbers in disturbed.lab.made(mine).items():
        np.testing.assert_allclose(numbers, expected[name], atol=rounded, rtol=0, err_msg=name)


def approximately(value: Any, by: float) -> Any:
    """The same in which numbers may differ by so much."""
    if isinstance(value, dict):
        return {name: approximately(inner, by) for name, inner in value.items()}
    if isinstance(value, list):
        return [approximately(inner, by) for inner in value]
    return pytest.approx(value, abs=by) if by and isinstance(value, float) else value


@pytest.fixture
def bucket(bucket_server: BucketServer) -> Iterator[BucketServer]:
    bucket_server.empty()
    with leading_to(bucket_server):
        yield bucket_server


def test_what_a_host_made_of_a_store_in_a_bucket_is_read_by_another(
    bucket: BucketServer, tmp_path: Path, model: Path
) -> None:
    assert bucket.url
    lab = Lab(Workplace.at(tmp_path / "one", model=model, store=URL))
    jobs = [lab.start(kind, long=False) for kind in KINDS]
    lab.place.work()
    assert all(map(lab.is_done, jobs))
    space = next(job.id for job in jobs if job.kind == "projector")
    placing = EmbeddingRequest.model_validate({"projector": space, "streams": {"gradients": lab.stream}})
    placed, _ = lab.place.context.embeddings.start(placing)
    lab.place.work()
    settings = {"catalog": lab.place.context.settings.catalog_url, "store": URL}
    elsewhere = object.__new__(Lab)
    elsewhere.place = Workplace.at(tmp_path / "two", model=model, **settings)
    for job in jobs:
        theirs = elsewhere.made(job)
        for name, numbers in lab.made(job).items():
            np.testing.assert_array_equal(numbers, theirs[name], err_msg=f"{job.kind} {name}")
    context = elsewhere.place.context
    assert context.embeddings.places(placed.id).present.all()
    context.embeddings.remove(placed.id)
    rooms = (context.predictors, context.cascades, context.estimates, context.projectors)
    for room, job in zip(rooms, jobs, strict=True):
        room.remove(job.id)
    fresh = Workplace.at(tmp_path / "three", model=model, **settings).context
    assert [fresh.predictors.predicted(job.id) for job in jobs[:2]] == [None, None]
    assert not fresh.projectors.files.exists(space)
