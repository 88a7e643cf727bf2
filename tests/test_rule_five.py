"""Same input, same bytes (design, rule 5): nothing about how features are computed changes one.

The work is the workers' own (worker/jobs.py over a real catalog): in this process, and in processes of its own where
something has to die. Two promises are tested: bits where the batch plan is one, else 1e-5 of a feature's length before
it is stored and one step of the stored type after.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore import GradientStore
from gradstore.types import FinetuneRequest, GradientsRequest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import select

from datastore.schema import ChunkRow, ShardRow
from datastore.segments import FeatureView
from tests.processes import ServiceProcess, wait_for
from tests.stores import Store
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, worker_process

Floats = NDArray[np.float32]
KINDS: tuple[dict[str, Any], ...] = (
    {"kinds": ["sgd"]}, {"kinds": ["adam"]}, {"kinds": ["adam"], "adam": "exact", "reduction": "sum"},
    {"kinds": ["hidden"]},
)  # fmt: skip
FEW = 24
MANY = 2500  # rows: three shards of 1,024
SLOWLY = 128  # padded tokens a batch: one or two rows, so that a job of many rows takes seconds


def row(number: int) -> dict[str, Any]:
    """A row of a length of its own; one in ten has nothing to learn from within 96 tokens."""
    if number % 10 == 7:
        return {"prompt": "and so on " * 40, "completion": f"The end of {number}."}
    question, answer = f"Add {number} and {number + 1}", f"The answer is {2 * number + 1}. "
    return {"prompt": question + " please" * (number % 11), "completion": answer * (1 + number % 3)}


PATIENCE = 300.0  # seconds that a job may take on a busy machine


@dataclass(frozen=True)
class Trained:
    """A store with a checkpoint in it that has the moments of real steps."""

    place: Workplace
    checkpoint: str

    def copy(self, folder: Path, **settings: Any) -> Workplace:
        """A store of its own with the same checkpoint, and no features."""
        shutil.copytree(self.place.context.settings.data, folder / "store")
        return Workplace.at(folder, model=self.place.model, **settings)

    def start(self, place: Workplace, numbers: Sequence[int], **changes: Any) -> str:
        """Begin to compute the features of these rows; returns the job."""
        dataset = place.pool([row(number) for number in numbers])
        values = {"dataset": dataset.id, "checkpoints": [self.checkpoint], "dims": [64], "dtype": "float32"}
        return place.start(GradientsRequest.model_validate(values | changes)).id

    def compute(self, place: Workplace, numbers: Sequence[int], **changes: Any) -> FeatureView:
        """The features of these rows, computed in this process."""
        job = self.start(place, numbers, **changes)
        place.work()
        return result_of(place, job)


def result_of(place: Workplace, job: str) -> FeatureView:
    """The features that a job has left."""
    done = place.job(job)
    assert done.status == "succeeded", done.error
    assert done.result is not None
    [found] = done.result.model_dump()["feature_sets"]
    return place.context.store.view(place.context.features.segments(found["id"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model = save_tiny_model(tmp_path_factory.mktemp("models") / "base", hidden_size=16, intermediate_size=16)
    place = Workplace.at(tmp_path_factory.mktemp("trained"), model=model)
    request = FinetuneRequest.model_validate({
        "dataset": place.pool([row(number) for number in range(100, 124)]).id, "model": str(model), "epochs": 2,
        "batch_size": 4, "device_batch_size": 2, "learning_rate": 1e-2, "max_length": 96, "lora": {"r": 2, "alpha": 4},
    })  # fmt: skip
    result = place.done(request)
    assert result["steps"] >= 10
    return Trained(place, result["checkpoints"][-1])


def assert_nearly(found: Floats, expected: Floats) -> None:
    """Before storage: within 1e-5 of each row's length."""
    lengths = np.linalg.norm(expected, axis=1)
    np.testing.assert_array_equal(lengths == 0, np.linalg.norm(found, axis=1) == 0)
    assert (np.linalg.norm(found - expected, axis=1) <= 1e-5 * lengths).all()


def assert_within_a_step(found: FeatureView, expected: FeatureView) -> None:
    """After storage: no number is further off than one step of its stored type.

    Next to zero a float16 has steps below the error that is allowed before storage; there that error counts.
    """
    steps = []
    for view in (found, expected):
        stored = view.stored(0, view.rows)
        steps.append(np.spacing(np.abs(stored)).astype(np.float32) * view.scales[:, None])
    error = 1e-5 * np.linalg.norm(all_of(expected), axis=1, keepdims=True)
    assert (np.abs(all_of(found) - all_of(expected)) <= np.maximum(np.maximum(*steps), error)).all()


def all_of(view: FeatureView) -> Floats:
    return view.features(0, view.rows)


# How it is computed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[Floats]:
    """The features of the first rows for each kind, computed one row at a time."""
    place = trained.copy(tmp_path_factory.mktemp("alone"))
    return [all_of(trained.compute(place, range(FEW), token_budget=1, **kind)) for kind in KINDS]


@pytest.fixture(scope="module")
def crowded(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A store that fills with datasets of the same rows."""
    return trained.copy(tmp_path_factory.mktemp("crowded"))


@settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    numbers=st.permutations(range(FEW)),
    count=st.integers(1, FEW),
    token_budget=st.integers(1, 4096),
    kind=st.integers(0, len(KINDS) - 1),
)
def test_a_feature_depends_on_its_row_alone_and_not_on_batch_order_or_neighbours(
    trained: Trained, crowded: Workplace, alone: list[Floats],
    numbers: list[int], count: int, token_budget: int, kind: int,
) -> None:  # fmt: skip
    found = trained.compute(crowded, numbers[:count], token_budget=token_budget, **KINDS[kind])
    assert_nearly(all_of(found), alone[kind][numbers[:count]])
    assert set(found.reasons) == {place for place, number in enumerate(numbers[:count]) if number % 10 == 7}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_feature_is_within_a_step_whatever_the_batches(
    trained: Trained, tmp_path: Path, kind: dict[str, Any]
) -> None:
    views = [
        trained.compute(trained.copy(tmp_path / str(budget)), range(200), dtype="float16", token_budget=budget, **kind)
        for budget in (1, 300, 100_000)
    ]
    assert_within_a_step(views[1], views[0])
    assert_within_a_step(views[2], views[0])
    assert views[0].stored(0, 200).dtype == np.float16


def test_one_batch_plan_gives_the_same_bits_in_every_store(trained: Trained, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "other"):
        place = trained.copy(tmp_path / name)
        for kind in KINDS:
            for dtype in ("float16", "float32"):
                trained.compute(place, range(100), token_budget=700, dtype=dtype, **kind)
        digests.append(manifest(place))
    assert digests[0] == digests[1]
    assert len(digests[0]) == 2 * len(KINDS)


def manifest(place: Workplace) -> dict[tuple[str, int], str]:
    """The digest of every chunk."""
    with place.context.catalog.reading() as session:
        return {(chunk.segment_id, chunk.start): chunk.digest for chunk in session.scalars(select(ChunkRow))}


# Where it is cut, and by whom it is done ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peace(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> FeatureView:
    """The features of many rows, computed by one worker that nothing happens to."""
    place = trained.copy(tmp_path_factory.mktemp("peace"))
    return trained.compute(place, range(MANY), token_budget=SLOWLY)


@pytest.mark.slow
def test_the_size_of_shards_does_not_change_a_feature(trained: Trained, peace: FeatureView, tmp_path: Path) -> None:
    place = trained.copy(tmp_path, shard_rows=2048)
    job = trained.start(place, range(MANY), token_budget=2000)
    place.work()
    assert [stop for _, stop, _, _ in shards(place, job)] == [2048, MANY]
    found = result_of(place, job)
    assert_nearly(all_of(found), all_of(peace))
    assert found.reasons == peace.reasons
    for column in ("norms", "raw_norms", "losses"):
        np.testing.assert_allclose(getattr(found, column), getattr(peace, column), rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, peace.tokens)


@pytest.mark.slow
def test_a_dataset_that_grew_piece_by_piece_has_the_features_of_the_whole(
    trained: Trained, peace: FeatureView, tmp_path: Path
) -> None:
    place = trained.copy(tmp_path)
    for length in (1, 1500, MANY):
        found = trained.compute(place, range(length), token_budget=2000)
    assert [rows for _, rows in found.names] == [1, 1499, 1000]
    assert_nearly(all_of(found), all_of(peace))
    assert found.reasons == peace.reasons


def shards(place: Workplace | Store, job: str) -> list[tuple[int, int, str, int]]:
    """(start, stop, status, attempts) of a job's shards."""
    catalog = place.context.catalog if isinstance(place, Workplace) else place.catalog
    query = select(ShardRow).where(ShardRow.job_id == job).order_by(ShardRow.number)
    with catalog.reading() as session:
        return [
            (shard.payload["start"], shard.payload["stop"], shard.status, shard.attempt)
            for shard in session.scalars(query)
        ]


@pytest.mark.slow
def test_two_workers_at_once_give_the_bits_of_one(trained: Trained, peace: FeatureView, tmp_path: Path) -> None:
    place = trained.copy(tmp_path)
    owners: set[str | None] = set()

    def finished(job: str) -> bool:
        with place.context.catalog.reading() as session:
            owners.update(session.scalars(select(ShardRow.owner).where(ShardRow.status == "running")))
        return place.job(job).finished

    with worker_process(place), worker_process(place):
        wait_for(lambda: len(place.context.jobs.workers()) == 2)
        job = trained.start(place, range(MANY), token_budget=SLOWLY)
        wait_for(lambda: finished(job))
    assert len(owners - {None}) == 2
    assert [attempts for *_, attempts in shards(place, job)] == [1, 1, 1]
    np.testing.assert_array_equal(all_of(result_of(place, job)), all_of(peace))


@pytest.mark.slow
def test_a_killed_worker_costs_its_shard_only_and_no_bit(trained: Trained, peace: FeatureView, tmp_path: Path) -> None:
    place = trained.copy(tmp_path, lease=3)
    job = trained.start(place, range(MANY), token_budget=SLOWLY)
    with worker_process(place) as first:
        wait_for(lambda: [status for _, _, status, _ in shards(place, job)][:2] == ["succeeded", "running"])
        time.sleep(0.3)  # into the shard, of which each takes seconds
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = manifest(place)
    assert len(before) == 1
    with worker_process(place):
        wait_for(lambda: place.job(job).finished)
    assert [attempts for *_, attempts in shards(place, job)] == [1, 2, 1]
    assert before.items() <= manifest(place).items()
    np.testing.assert_array_equal(all_of(result_of(place, job)), all_of(peace))
    assert not place.context.store.attempts()


# The whole service ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A service over a store with a checkpoint, and its client."""

    service: ServiceProcess
    store: GradientStore
    disk: Store
    dataset: str
    checkpoint: str

    def start(self) -> str:
        """Begin to compute the features of many rows; what an earlier test has computed is deleted first."""
        for job in self.store.gradients.list():
            self.store.gradients.delete(job.id)
        job = self.store.gradients.create(
            dataset=self.dataset, checkpoints=self.checkpoint, dims=64, dtype="float32", token_budget=SLOWLY
        )
        return job.id

    def wait_until_a_shard_is_finished_and_another_begun(self, job: str) -> None:
        wait_for(lambda: [status for _, _, status, _ in shards(self.disk, job)][:2] == ["succeeded", "running"])

    def features(self, job: str) -> Floats:
        """What a job has left."""
        result = self.store.gradients.wait(job, timeout=PATIENCE).result
        assert result.computed_rows == MANY
        return all_of(self.disk.store.view(self.disk.features.segments(result.feature_sets[0].id)))


@pytest.fixture(scope="module")
def served(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    place = trained.copy(folder)
    dataset = place.pool([row(number) for number in range(MANY)]).id
    data = place.context.settings.data
    with ServiceProcess(data, allow=place.model.parent, lease=3) as service, service.client() as store:
        yield Served(service, store, Store.at(data), dataset, trained.checkpoint)


@pytest.mark.slow
def test_a_service_starts_a_killed_worker_again_and_its_job_ends_with_the_same_bits(
    served: Served, peace: FeatureView
) -> None:
    worker = served.service.worker()
    job = served.start()
    served.wait_until_a_shard_is_finished_and_another_begun(job)
    os.kill(worker, signal.SIGKILL)
    np.testing.assert_array_equal(served.features(job), all_of(peace))
    assert [attempts for *_, attempts in shards(served.disk, job)] == [1, 2, 1]
    assert served.service.worker() != worker


@pytest.mark.slow
def test_a_service_that_is_killed_and_started_again_goes_on_and_whoever_waits_never_notices(
    served: Served, peace: FeatureView
) -> None:
    served.service.worker()
    job = served.start()
    waited: list[str] = []
    waiting = threading.Thread(target=lambda: waited.append(served.store.gradients.wait(job, timeout=PATIENCE).status))
    waiting.start()
    served.wait_until_a_shard_is_finished_and_another_begun(job)
    served.service.kill()
    assert served.disk.jobs.get(job).status == "running"
    served.service.start()
    waiting.join()
    assert waited == ["succeeded"]
    np.testing.assert_array_equal(served.features(job), all_of(peace))
    attempts = [attempts for *_, attempts in shards(served.disk, job)]
    assert attempts[0] == 1
    assert max(attempts) <= 2
