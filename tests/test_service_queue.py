"""The doorbell: both queues keep the same promises, and a lost broker costs nothing but time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from service.queue import TASK, CeleryQueue, PollingQueue, Queue, queue_of
from tests.services import RedisServer, free_port
from tests.serving import serving


@pytest.fixture(params=["polling", pytest.param("celery", marks=pytest.mark.services)])
def queue(request: pytest.FixtureRequest) -> Iterator[Queue]:
    """Every kind of queue, in order."""
    if request.param == "polling":
        yield PollingQueue()
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        yield CeleryQueue(server.url)


def test_a_queue_in_order_is_alive_and_rings(queue: Queue) -> None:
    assert queue.alive()
    queue.ring("ft_1", "finetune")


def test_the_settings_choose_the_queue() -> None:
    assert isinstance(queue_of(""), PollingQueue)
    assert isinstance(queue_of("redis://127.0.0.1:1/0"), CeleryQueue)


@pytest.mark.services
def test_a_started_job_rings_with_its_kind(redis_server: RedisServer, tmp_path: Path) -> None:
    with serving(tmp_path, broker=redis_server.url) as service:
        assert service.http.get("/health").json()["dispatch"]
        service.pool(name="pool")
        service.finetune(dataset="pool")
    with redis.Redis.from_url(redis_server.url) as connection:
        message = json.loads(connection.lindex("celery", 0))
        waiting = connection.llen("celery")
    assert waiting == 1
    assert message["headers"]["task"] == TASK
    assert message["content-type"] == "application/json"
    assert json.loads(message["headers"]["argsrepr"].replace("'", '"')) == ["finetune"]


@pytest.mark.services
def test_a_broker_that_dies_is_logged_and_the_job_starts(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, broker=redis_server.url) as service:
        service.pool(name="pool")
        service.finetune(dataset="pool")
        redis_server.kill()
        with caplog.at_level(logging.WARNING, logger="service.queue"):
            job = service.finetune(dataset="pool", seed=1)
        assert job["status"] == "queued"
        assert [vars(record)["job"] for record in caplog.records] == [job["id"]]
        health = service.http.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["dispatch"]) == (200, "degraded", False)
        redis_server.start()
        assert service.http.get("/health").json()["dispatch"]


def test_a_broker_that_was_never_there_does_not_hold_a_request_up() -> None:
    queue = CeleryQueue(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    queue.ring("ft_1", "finetune")
    assert not queue.alive()
    assert time.monotonic() - began < 10
