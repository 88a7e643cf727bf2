"""Workers woken through a real redis: a message is a doorbell, and what waits is done whether it rings or not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradstore.types import GradientsRequest
from sqlalchemy import select

from datastore.schema import ShardRow
from service.queue import CeleryQueue
from tests.processes import wait_for
from tests.services import RedisServer
from tests.workplace import Workplace, numbered, worker_process

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace.at(tmp_path)


def start(place: Workplace, *, first: int, rows: int = 6) -> str:
    """Start a gradients job of rows that no other has."""
    dataset = place.pool(numbered(range(first, first + rows)))
    return place.start(GradientsRequest(dataset=dataset.id, checkpoints=[place.checkpoint().id], dims=[16])).id


def test_jobs_are_done_when_it_rings_when_it_rings_twice_and_when_the_ring_is_lost(
    place: Workplace, redis: RedisServer
) -> None:
    queue = CeleryQueue(redis.url)
    assert queue.alive()
    rung, twice, unheard = (start(place, first=100 * number) for number in range(3))
    with worker_process(place, GRADSTORE_BROKER=redis.url) as process:
        queue.ring(rung, "gradients")
        for _ in range(2):
            queue.ring(twice, "gradients")
        wait_for(lambda: all(place.job(job).status == "succeeded" for job in (rung, twice, unheard)))
        lost = start(place, first=1000)  # and nobody rings
        wait_for(lambda: place.job(lost).status == "succeeded")
        idle = start(place, first=2000)
        queue.ring(idle, "gradients")
        wait_for(lambda: place.job(idle).status == "succeeded")
        wait_for(lambda: [each.job for each in place.context.jobs.workers()] == [None])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert place.context.jobs.workers() == []
    log = (place.folder / "worker.log").read_text()
    assert "woken_by=ring" in log
    assert "woken_by=look" in log
    assert {attempt for job in (rung, twice, unheard, lost, idle) for attempt in attempts(place, job)} == {1}


def test_a_broker_that_is_killed_and_comes_back_loses_no_job(place: Workplace, redis: RedisServer) -> None:
    queue = CeleryQueue(redis.url)
    with worker_process(place, GRADSTORE_BROKER=redis.url):
        before = start(place, first=0)
        queue.ring(before, "gradients")
        wait_for(lambda: place.job(before).status == "succeeded")
        redis.kill()
        assert not queue.alive()
        during = start(place, first=100)
        queue.ring(during, "gradients")  # logged, and the request that rang succeeds
        redis.start()
        wait_for(lambda: place.job(during).status == "succeeded")


def attempts(place: Workplace, job: str) -> list[int]:
    """How often each shard of a job was claimed."""
    with place.context.catalog.reading() as session:
        return list(session.scalars(select(ShardRow.attempt).where(ShardRow.job_id == job)))
