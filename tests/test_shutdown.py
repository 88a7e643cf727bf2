"""SIGTERM, as a supervisor sends it: the API answers what it has begun, and a worker gives its shard back unharmed."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from gradstore.types import GradientsRequest
from sqlalchemy import select

from datastore.schema import ShardRow
from tests.processes import ServiceProcess, wait_for
from tests.services import RedisServer
from tests.serving import jsonl
from tests.test_service_command import served
from tests.workplace import Workplace, numbered, worker_process

ROWS = 2500  # of batches so small that they take a worker a while


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    address = urlsplit(url)
    try:
        socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_an_upload_at_work_is_answered_while_new_connections_are_refused(tmp_path: Path) -> None:
    head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="pool.jsonl"\r\n\r\n'
    with served("--no-worker", data=tmp_path) as (process, url):

        def body() -> Iterator[bytes]:
            yield head + jsonl(500)
            wait_for(lambda: any((tmp_path / "incoming").glob("form-*")))  # the server has begun to read
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: refuses(url))
            yield jsonl(500, first=500) + b"\r\n--cut--\r\n"

        kind = {"Content-Type": "multipart/form-data; boundary=cut"}
        answer = httpx.post(f"{url}/datasets", content=body(), headers=kind, timeout=30)
        assert (answer.status_code, answer.json()["rows"]) == (201, 1000)
        assert process.wait(20) == -signal.SIGTERM
    with served("--no-worker", data=tmp_path) as (_, url):
        assert [dataset["rows"] for dataset in httpx.get(f"{url}/datasets").json()["data"]] == [1000]


def test_a_stream_of_events_ends_in_order(tmp_path: Path) -> None:
    with served("--no-worker", data=tmp_path) as (process, url):
        pool = httpx.post(f"{url}/datasets", files={"file": ("pool.jsonl", jsonl(3))}).json()["id"]
        job = httpx.post(f"{url}/finetunes", json={"dataset": pool, "model": "org/base"}).json()["id"]
        with httpx.stream("GET", f"{url}/jobs/{job}/events", timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("event")) == "event: progress"
            process.send_signal(signal.SIGTERM)
            assert all(not line.startswith("event: finished") for line in lines), "the job goes on"
        assert process.wait(20) == -signal.SIGTERM


def start(place: Workplace) -> str:
    """A job whose shards take a while."""
    dataset, checkpoint = place.pool(numbered(range(ROWS))), place.checkpoint()
    return place.start(GradientsRequest(dataset=dataset.id, checkpoints=[checkpoint.id], token_budget=64)).id


def at_work(place: Workplace, job: str) -> bool:
    """Whether a worker has done rows of the job."""
    return place.job(job).progress.done > 0


def assert_given_back(place: Workplace, job: str) -> None:
    """Its shards wait for the next worker, and leaving was no failure of theirs."""
    with place.context.catalog.reading() as session:
        shards = list(session.scalars(select(ShardRow).where(ShardRow.job_id == job)))
    assert {shard.status for shard in shards} <= {"queued", "succeeded"}
    assert "queued" in {shard.status for shard in shards}
    assert {shard.failures for shard in shards} == {0}
    assert max(shard.attempt for shard in shards) == 1
    done = sum(shard.units for shard in shards if shard.status == "succeeded")
    assert place.job(job).progress.done == done, "rows of a shard that was given back do not count"
    assert place.context.jobs.workers() == []


@pytest.mark.services
@pytest.mark.slow
def test_a_worker_of_celery_gives_its_shard_back(tmp_path: Path, redis_server: RedisServer) -> None:
    place = Workplace.at(tmp_path)
    job = start(place)
    with worker_process(place, GRADSTORE_BROKER=redis_server.url) as process:
        wait_for(lambda: at_work(place, job))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert_given_back(place, job)


@pytest.mark.slow
def test_several_workers_of_one_command_give_their_shards_back(tmp_path: Path) -> None:
    place = Workplace.at(tmp_path)
    job = start(place)
    with worker_process(place, "--concurrency", "2") as process:
        wait_for(lambda: [each.job for each in place.context.jobs.workers()] == [job, job])
        wait_for(lambda: at_work(place, job))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert_given_back(place, job)


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_has_its_worker_give_its_shard_back(tmp_path: Path) -> None:
    place = Workplace.at(tmp_path)
    job = start(place)
    with ServiceProcess(place.context.settings.data, allow=tmp_path) as service:
        wait_for(lambda: at_work(place, job))
        service.stop()
        assert "Traceback" not in service.log
    assert_given_back(place, job)
