"""What Prometheus is told, read by Prometheus's own parser: by the API of its requests and the store, by workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from datastore.catalog import utc_now
from datastore.leases import NewShard
from datastore.schema import JobRow
from service import store_metrics
from tests.conftest import REPOSITORY
from tests.processes import wait_for
from tests.services import free_port
from tests.serving import Service, serving, without_catalog
from tests.workplace import Workplace, worker_process
from worker.monitoring import next_port

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Every sample by its name and labels, each of which may be there once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(service: Service, name: str, **labels: str) -> float | None:
    """A sample of the service, None where there is none."""
    answer = service.http.get("/metrics")
    assert answer.status_code == 200
    return samples(answer.text).get((name, frozenset(labels.items())))


def add_job(service: Service, id: str, *, shards: int = 2) -> None:
    """A job of shards with 100 rows each."""
    waiting = [NewShard(payload={}, units=100) for _ in range(shards)]
    service.backend.jobs.create(id=id, kind="attribution", request={"dataset": "ds_1"}, plan={}, shards=waiting)


def test_the_queue_is_as_deep_as_shards_wait(service: Service) -> None:
    add_job(service, "attr_1", shards=3)
    assert value(service, "gradstore_shards", kind="attribution", status="queued") == 3
    service.claim()
    assert value(service, "gradstore_shards", kind="attribution", status="queued") == 2
    assert value(service, "gradstore_shards", kind="attribution", status="running") == 1
    assert value(service, "gradstore_jobs", kind="attribution", status="running") == 1
    service.backend.jobs.cancel("attr_1")
    assert value(service, "gradstore_shards", kind="attribution", status="queued") is None, "nobody will do them"


def test_the_oldest_job_that_waits_tells_its_age(service: Service) -> None:
    for id, hours in (("attr_1", 1), ("attr_2", 3)):
        add_job(service, id)
        with service.backend.catalog.transaction() as session:
            ago = utc_now() - timedelta(hours=hours)
            session.execute(update(JobRow).where(JobRow.id == id).values(created_at=ago))
    age = value(service, "gradstore_oldest_waiting_seconds", kind="attribution")
    assert age == pytest.approx(3 * 3600, abs=60)
    service.backend.jobs.cancel("attr_2")
    assert value(service, "gradstore_oldest_waiting_seconds", kind="attribution") == pytest.approx(3600, abs=60)


def test_rows_are_counted_once_and_never_taken_back(service: Service) -> None:
    jobs = service.backend.jobs

    def rows() -> float | None:
        return value(service, "gradstore_done_total", kind="attribution", unit="rows")

    assert rows() is None
    add_job(service, "attr_1")
    assert rows() == 0
    first = service.claim()
    jobs.renew(first, done=40)
    assert rows() == 40
    jobs.release(first)
    assert rows() == 40, "the shard is given back, and its rows are done again"
    first = service.claim()
    jobs.renew(first, done=40)
    assert rows() == 40
    assert jobs.succeed(first)
    assert rows() == 100
    assert jobs.succeed(service.claim())
    assert rows() == 200, "what was done between the last look and the job's end"
    jobs.remove("attr_1", kind="attribution")
    assert rows() == 200
    add_job(service, "attr_2", shards=1)
    assert jobs.succeed(service.claim())
    assert rows() == 300, "a job that was not seen before it had ended"


def test_what_was_done_before_the_service_started_is_not_counted_again(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        add_job(service, "attr_1")
        assert service.backend.jobs.succeed(service.claim())
    with serving(tmp_path) as service:
        assert value(service, "gradstore_done_total", kind="attribution", unit="rows") == 0
        assert service.backend.jobs.succeed(service.claim())
        assert value(service, "gradstore_done_total", kind="attribution", unit="rows") == 100


def test_an_ended_lease_is_counted(tmp_path: Path) -> None:
    with serving(tmp_path, lease=0.3) as service:
        add_job(service, "attr_1", shards=1)
        assert value(service, "gradstore_lease_expiries_total") == 0
        service.claim()
        wait_for(lambda: value(service, "gradstore_lease_expiries_total") == 1)
        assert value(service, "gradstore_shards", kind="attribution", status="queued") == 1


def test_bytes_are_told_without_a_walk_for_every_look(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    def counted(settings: object) -> dict[str, int]:
        walks.append(time.monotonic())
        return {"features": 5000 * len(walks)}

    monkeypatch.setattr(store_metrics, "bytes_by_part", counted)
    wait_for(lambda: value(service, "gradstore_store_bytes", part="features") == 5000)
    assert value(service, "gradstore_store_bytes", part="features") == 5000
    assert len(walks) == 1
    monkeypatch.setattr(store_metrics, "WALK_INTERVAL", 0.0)
    wait_for(lambda: (value(service, "gradstore_store_bytes", part="features") or 0) > 5000)


def test_the_bytes_are_those_of_the_disk(service: Service) -> None:
    service.pool(50)
    usage = service.http.get("/usage").json()["bytes"]
    wait_for(lambda: value(service, "gradstore_store_bytes", part="datasets") == usage["datasets"] > 0)


def test_latencies_are_by_route_and_add_up(service: Service) -> None:
    for name in ("one", "two"):
        service.http.get(f"/datasets/{name}")
    labels = {"method": "GET", "route": "/datasets/{reference}"}
    wait_for(lambda: value(service, "gradstore_request_seconds_count", **labels) == 2)  # once the answers have left
    assert value(service, "gradstore_request_seconds_bucket", **labels, le="+Inf") == 2
    assert (value(service, "gradstore_request_seconds_sum", **labels) or 0) > 0


def test_workers_are_counted_with_those_at_work(service: Service) -> None:
    jobs = service.backend.jobs
    jobs.announce("host-1-a", device="cpu", job=None, flops={})
    jobs.announce("host-2-b", device="cpu", job="attr_1", flops={})
    assert value(service, "gradstore_workers") == 2
    assert value(service, "gradstore_workers_busy") == 1
    jobs.leave("host-2-b")
    assert value(service, "gradstore_workers_busy") == 0


def test_a_catalog_that_is_away_is_told_beside_what_is_known(service: Service) -> None:
    assert value(service, "gradstore_catalog_up") == 1
    with without_catalog(service):
        assert value(service, "gradstore_catalog_up") == 0
        assert value(service, "gradstore_jobs", kind="attribution", status="queued") is None
        assert (value(service, "gradstore_free_bytes") or 0) > 0


@pytest.mark.slow
def test_a_worker_shows_what_it_did_where_it_is_told_to(tmp_path: Path) -> None:
    place = Workplace.at(tmp_path)
    listen = f"127.0.0.1:{free_port()}"

    def shown() -> Samples:
        return samples(httpx.get(f"http://{listen}/metrics").text)

    def shards(outcome: str) -> tuple[str, frozenset[tuple[str, str]]]:
        return ("gradstore_worker_shards_total", frozenset({("kind", "evaluation"), ("outcome", outcome)}))

    with worker_process(place, GRADSTORE_METRICS_LISTEN=listen):
        wait_for(place.context.jobs.workers)
        assert shards("failed") not in shown()
        shard = NewShard(payload={}, units=1)
        place.context.jobs.create(id="eval_1", kind="evaluation", request={}, plan={}, shards=[shard])
        wait_for(lambda: place.job("eval_1").status == "failed")
        wait_for(lambda: shown().get(shards("failed")) == 3)
        found = shown()
        refused = subprocess.run(
            [sys.executable, "-m", "worker.command"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
            env=environment(place, listen), check=False,
        )  # fmt: skip
    assert found["gradstore_worker_shard_seconds_count", frozenset({("kind", "evaluation")})] == 3
    assert found["process_resident_memory_bytes", frozenset()] > 0
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"metrics cannot be shown at {listen}: Address already in use")


def environment(place: Workplace, listen: str) -> dict[str, str]:
    """Of a worker at a place."""
    data = str(place.context.settings.data)
    return {**os.environ, "GRADSTORE_DATA": data, "GRADSTORE_DEVICE": "cpu", "GRADSTORE_METRICS_LISTEN": listen}


def test_each_worker_of_a_machine_has_a_port_of_its_own() -> None:
    assert [next_port("0.0.0.0:9100", number) for number in range(3)] == [
        "0.0.0.0:9100",
        "0.0.0.0:9101",
        "0.0.0.0:9102",
    ]
