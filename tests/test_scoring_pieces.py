"""A large pool is scored in pieces: by several threads and workers, and only where it has not been scored before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gradstore.types import FeatureSet, ScoringResult

from datastore import scores as scoring
from datastore.influence import TaskScores
from datastore.leases import Jobs
from datastore.parameters import Query
from datastore.products import NUMPY, NumpyKernel
from datastore.scores import ScoreCache, Target, missing_pieces, score, score_piece
from datastore.segments import FeatureView
from datastore.shards import CHUNK_ROWS
from service import scoring as scorer
from service.scoring import ScoringWorker
from tests.stores import DIM, Store, numbers, request, task_numbers
from worker.products import TorchKernel, one_thread_each

ROWS = 2 * CHUNK_ROWS + 100


class ThreeThreads(NumpyKernel):
    """numpy's products, three blocks at a time."""

    threads = 3


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE_ROWS", CHUNK_ROWS)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a pool and a task that have features at both checkpoints."""
    folder = tmp_path_factory.mktemp("filled")
    store = Store.at(folder / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    store.pool(ROWS, name="pool")
    store.task({"one": 3, "two": 4}, folder=folder / "task")
    store.features.start(request(dataset="pool", dtype="float32"))
    store.work(numbers)
    store.features.start(request(task="target", dtype="float32"))
    store.work(task_numbers)
    store.catalog.close()
    return folder / "store"


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Iterator[Store]:
    """A copy of it."""
    shutil.copytree(filled, tmp_path / "store")
    store = Store.at(tmp_path / "store")
    yield store
    store.catalog.close()


def asked(store: Store, **changes: object) -> tuple[list[FeatureView], list[Target]]:
    """The pool's views and the task."""
    _, sources = store.recipes.resolve(Query(**{"tasks": ["target"], "k": 1, **changes}), path="/select")  # type: ignore[arg-type]

    def views(sets: list[FeatureSet]) -> list[FeatureView]:
        return [store.features.view(each) for each in sets]

    ((task, sets),) = sources.tasks.items()
    labels = [row.subtask for row in store.tasks.validation(task)]
    return views(next(iter(sources.datasets.values()))), [Target(views(sets), labels)]


def brute_force(rows: int) -> np.ndarray:
    """The score of every row, from the numbers themselves."""
    rates = np.array([1e-4, 1e-4 / 2])
    total = np.zeros((rows, 7))
    for weight, checkpoint in zip(rates / rates.sum(), ("ck_0", "ck_1"), strict=True):
        pool, task = numbers(checkpoint, 0, rows, DIM), task_numbers(checkpoint, 0, 7, DIM)
        pool, task = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (pool, task))
        total += weight * pool.astype(float) @ task.T.astype(float)
    return np.maximum(total[:, :3].mean(axis=1), total[:, 3:].mean(axis=1))


def kernels() -> list[object]:
    return [NUMPY, ThreeThreads(), TorchKernel(torch.device("cpu"))]


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: type(kernel).__name__)
def test_pieces_threads_and_kernels_change_no_score(store: Store, tmp_path: Path, kernel: NumpyKernel) -> None:
    views, targets = asked(store)
    with one_thread_each():
        (found,) = score(
            views, targets, weights=[2, 1], aggregate="less", cache=ScoreCache(tmp_path / "scores"), kernel=kernel
        )
    np.testing.assert_allclose(found.score, brute_force(ROWS), atol=1e-6)
    assert found.valid.all()


def test_a_piece_is_missing_until_it_is_scored(store: Store, tmp_path: Path) -> None:
    views, targets = asked(store)
    cache = ScoreCache(tmp_path / "scores")
    pieces = [(0, 1024), (1024, 2048), (2048, ROWS)]
    assert missing_pieces(views, targets, weights=[2, 1], aggregate="less", cache=cache) == pieces
    heard: list[int] = []
    score_piece(views, targets, pieces[1], weights=[2, 1], aggregate="less", cache=cache, on_rows=heard.append)
    assert heard[-1] == 2048
    assert missing_pieces(views, targets, weights=[2, 1], aggregate="less", cache=cache) == [pieces[0], pieces[2]]


def test_whoever_has_heard_enough_stops_the_work(store: Store, tmp_path: Path) -> None:
    views, targets = asked(store)

    class Enough(Exception):
        pass

    def listen(_rows: int) -> None:
        raise Enough

    cache = ScoreCache(tmp_path / "scores")
    with pytest.raises(Enough):
        score(views, targets, weights=[2, 1], aggregate="less", cache=cache, kernel=ThreeThreads(), on_rows=listen)
    assert len(missing_pieces(views, targets, weights=[2, 1], aggregate="less", cache=cache)) == 3


def start(store: Store, **changes: object) -> str:
    query = Query(**{"tasks": ["target"], "k": 1, **changes})  # type: ignore[arg-type]
    return store.scoring.start(*store.recipes.resolve(query, path="/select")).id


def known(store: Store, **changes: object) -> TaskScores | None:
    query = Query(**{"tasks": ["target"], "k": 1, **changes})  # type: ignore[arg-type]
    found = store.scoring.known(*store.recipes.resolve(query, path="/select"))
    return None if found is None else found[0]


def test_a_job_has_a_shard_for_each_piece_and_many_workers_do_them(store: Store) -> None:
    job = start(store)
    claims = [store.jobs.claim(f"worker-{number}", kinds=["scoring"]) for number in range(4)]
    assert [claim.payload["start"] for claim in claims if claim] == [0, 1024, 2048]
    assert store.jobs.get(job).progress.total == 2 * ROWS  # at two checkpoints
    for claim in reversed([claim for claim in claims if claim]):
        assert known(store) is None
        store.scoring.work(claim, lambda _: None)
        assert store.jobs.succeed(claim)
    done = store.jobs.get(job)
    assert done.status == "succeeded"
    result = ScoringResult.model_validate(done.result.model_dump() if done.result else None)
    assert (result.rows, result.scores) == (ROWS, job)
    found = known(store)
    assert found is not None
    np.testing.assert_allclose(found.score, brute_force(ROWS), atol=1e-6)


def test_a_grown_pool_scores_its_new_rows_only(store: Store) -> None:
    start(store)
    store.score()
    store.pool(ROWS + 50, name="grown")
    store.features.start(request(dataset="grown", dtype="float32"))
    store.work(numbers)
    start(store, datasets=["grown"])
    claim = store.jobs.claim("worker", kinds=["scoring"])
    assert claim is not None
    assert (claim.payload["start"], claim.payload["stop"]) == (ROWS, ROWS + 50)
    store.scoring.work(claim, lambda _: None)
    assert store.jobs.succeed(claim)
    assert store.jobs.claim("worker", kinds=["scoring"]) is None
    found = known(store, datasets=["grown"])
    assert found is not None
    np.testing.assert_allclose(found.score, brute_force(ROWS + 50), atol=1e-6)


# Who does it ----------------------------------------------------------------------------------------------------------


def service_worker(store: Store) -> ScoringWorker:
    return ScoringWorker(Jobs(store.catalog), store.scoring, poll_interval=0.02)


def test_small_pieces_are_the_services_own(store: Store) -> None:
    start(store)
    store.jobs.announce("idle", device="cpu", job=None, flops={})
    claim = service_worker(store).claim()
    assert claim is not None
    assert claim.payload["start"] == 0


def test_large_pieces_are_left_to_an_idle_worker_for_a_while(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "AT_ONCE", 100)
    start(store)
    store.jobs.announce("idle", device="cpu", job=None, flops={})
    worker = service_worker(store)
    assert worker.claim() is None
    monkeypatch.setattr(scorer, "GRACE", 0.0)
    assert worker.claim() is not None


def test_large_pieces_are_left_to_workers_that_are_at_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "AT_ONCE", 100)
    monkeypatch.setattr(scorer, "GRACE", 0.0)
    store.jobs.announce("other", device="cpu", job=start(store), flops={})
    assert service_worker(store).claim() is None


@pytest.mark.parametrize("job", [None, "grad_1"], ids=["nobody", "a busy worker"])
def test_large_pieces_are_the_services_where_no_worker_is_free(
    store: Store, monkeypatch: pytest.MonkeyPatch, job: str | None
) -> None:
    monkeypatch.setattr(scorer, "AT_ONCE", 100)
    start(store)
    if job is not None:
        store.jobs.announce("busy", device="cpu", job=job, flops={})
    assert service_worker(store).claim() is not None
