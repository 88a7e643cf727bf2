"""The service's own worker: it outlives what happens to the catalog, and finishes what a killed server left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import GradientsRequest, ScoringResult
from numpy.typing import NDArray
from sqlalchemy import text

from datastore.catalog import Catalog
from datastore.leases import Claim, Jobs
from datastore.parameters import Query
from datastore.scoring import Scoring
from service.scoring import ScoringWorker
from tests.stores import Store

LEASE = 0.3  # seconds


def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    return np.random.default_rng(start).normal(size=(stop - start, dim)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in which a scoring job waits."""
    store = Store.at(tmp_path / "store")
    store.checkpoint(0)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="run")
    store.pool(20, name="pool")
    store.task({"one": 2}, folder=tmp_path / "task")
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        store.features.start(GradientsRequest.model_validate({"run": "run", "dims": [16], **owner}))
        store.work(numbers)
    store.scoring.start(*store.recipes.resolve(Query(tasks=["target"], k=1), path="/select"))
    return store


@pytest.fixture
def working(store: Store) -> Iterator[Callable[[Scoring], None]]:
    """Starts a worker on the store."""
    workers = []

    def start(scoring: Scoring) -> None:
        workers.append(ScoringWorker(Jobs(store.catalog, lease=LEASE), scoring, poll_interval=0.02))
        workers[-1].start()

    yield start
    for worker in workers:
        worker.stop()


@dataclass(frozen=True)
class CutOff(Scoring):
    """Loses the catalog in the middle of its first job."""

    def work(self, claim: Claim, on_rows: Callable[[int], None]) -> ScoringResult:
        """Hide the shards from everybody, once."""
        if claim.attempt == 1:
            _rename(self.catalog, "shards", "hidden")
        return super().work(claim, on_rows)


def test_the_worker_outlives_a_catalog_that_goes_away_in_the_middle_of_a_job(
    store: Store, working: Callable[[Scoring], None]
) -> None:
    working(CutOff(**vars(store.scoring)))
    _wait_for(lambda: _has_table(store.catalog, "hidden"))
    time.sleep(LEASE)
    _rename(store.catalog, "hidden", "shards")
    _wait_for(lambda: [job.status for job in store.jobs.page(kind="scoring", limit=2).data] == ["succeeded"])


def test_a_job_that_a_killed_server_held_is_done_without_any_other_worker(
    store: Store, working: Callable[[Scoring], None]
) -> None:
    assert Jobs(store.catalog, lease=LEASE).claim("killed", kinds=["scoring"]) is not None
    working(store.scoring)
    _wait_for(lambda: [job.status for job in store.jobs.page(kind="scoring", limit=2).data] == ["succeeded"])


def _rename(catalog: Catalog, table: str, name: str) -> None:
    with catalog.transaction() as session:
        session.execute(text(f"ALTER TABLE {table} RENAME TO {name}"))


def _has_table(catalog: Catalog, name: str) -> bool:
    with catalog.reading() as session:
        found = session.execute(text("SELECT count(*) FROM sqlite_master WHERE name = :name"), {"name": name})
        return bool(found.scalar())


def _wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
