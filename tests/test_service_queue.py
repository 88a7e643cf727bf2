"""The doorbell: both queues keep the same promises, and a lost broker costs nothing but time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from datastore.doorbell import REQUEST_HEADER, TASK
from service.queue import CeleryQueue, PollingQueue, Queue, queue_of
from tests.services import RedisServer, free_port
from tests.serving import Service, serving


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


def dispatch(service: Service) -> dict[str, Any]:
    """What the service says of its broker; it is ready in any case."""
    answer = service.http.get("/ready")
    assert answer.status_code == 200
    [found] = [check for check in answer.json()["checks"] if check["name"] == "dispatch"]
    return dict(found)


@pytest.mark.services
def test_a_started_job_rings_with_its_kind(redis_server: RedisServer, tmp_path: Path) -> None:
    with serving(tmp_path, broker=redis_server.url) as service:
        assert dispatch(service)["ok"]
        service.pool(name="pool")
        service.http.headers["X-Request-ID"] = "started-by-me"
        service.finetune(dataset="pool")
    with redis.Redis.from_url(redis_server.url) as connection:
        message = json.loads(connection.lindex("celery", 0))
        waiting = connection.llen("celery")
    assert waiting == 1
    assert message["headers"]["task"] == TASK
    assert message["content-type"] == "application/json"
    assert message["headers"][REQUEST_HEADER] == "started-by-me"
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
        assert not dispatch(service)["ok"]
        redis_server.start()
        assert dispatch(service)["ok"]


def test_a_broker_that_was_never_there_does_not_hold_a_request_up() -> None:
    queue = CeleryQueue(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    queue.ring("ft_1", "finetune")
    assert not queue.alive()
    assert time.monotonic() - began < 10
