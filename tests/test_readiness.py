"""Ready or not: each dependency, taken away for real, is named with its reason, and found again when it is back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import boto3
import pytest
from gradstore import GradientStore, errors
from moto.server import ThreadedMotoServer
from sqlalchemy import text

from service import readiness
from tests.services import free_port
from tests.serving import Service, problem_of, serving, without_catalog


def state(service: Service) -> dict[str, Any]:
    """The checks of a service that is ready, by name."""
    answer = service.http.get("/ready")
    assert answer.status_code == 200, answer.text
    return {check["name"]: check for check in answer.json()["checks"]}


def reason(service: Service) -> str:
    """Why a service is not ready, of which there must be one reason."""
    problem = problem_of(service.http.get("/ready"), 503)
    assert problem.type == "not-ready"
    [item] = problem.errors
    assert item.detail == problem.detail
    return problem.detail


def test_a_service_in_order_names_what_it_looked_at_and_misses_only_workers(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        checks = state(service)
        assert list(checks) == ["catalog", "store", "disk", "dispatch", "workers"]
        assert [name for name, check in checks.items() if not check["ok"]] == ["workers"]
        assert f"schema {service.backend.catalog.revisions()[1]}" in checks["catalog"]["detail"]
        assert service.http.get("/ready").json()["status"] == "degraded"
        service.backend.jobs.announce("worker-1", device="cpu", job=None, flops={"float32": 1e11})
        ready = service.http.get("/ready").json()
    assert ready["status"] == "ok"
    assert [(worker["id"], worker["flops"]) for worker in ready["workers"]] == [("worker-1", {"float32": 1e11})]
    assert ready["free_bytes"] > 0


def test_a_catalog_that_is_gone_is_named_and_the_service_still_lives(service: Service) -> None:
    with without_catalog(service):
        assert reason(service).startswith("catalog: it does not answer")
        assert service.http.get("/health").json()["status"] == "ok"


def test_a_catalog_of_another_version_is_named_with_both(service: Service) -> None:
    _, newest = service.backend.catalog.revisions()
    with service.backend.catalog.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    assert f"schema 0999 and this version works with {newest}" in reason(service)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with serving(tmp_path / "store", catalog=f"sqlite:///{tmp_path / 'catalog.sqlite3'}") as service:
        folder = service.backend.settings.data
        kept = shutil.move(folder, tmp_path / "elsewhere")
        (tmp_path / "store").touch()  # permissions would not stop root
        problem = problem_of(service.http.get("/ready"), 503)
        assert {item.detail.partition(":")[0] for item in problem.errors} >= {"store"}
        folder.unlink()
        shutil.move(kept, folder)
        assert state(service)["store"]["ok"]


def test_a_disk_that_is_nearly_full_is_named(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LEAST_FREE_BYTES", 1 << 60)
    assert reason(service).startswith("disk: ")
    assert "free some space" in reason(service)


@pytest.mark.services
def test_a_bucket_is_reached_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    endpoint = f"http://127.0.0.1:{port}"
    variables = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with serving(tmp_path, store="s3://rows/prefix") as service:
        assert "s3://rows/prefix cannot be reached" in reason(service)
        server.start()
        try:
            assert "there is no such bucket" in reason(service)
            boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="rows")
            assert state(service)["bucket"]["ok"]
        finally:
            server.stop()


def test_the_client_raises_with_the_reasons(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with GradientStore(service.url, retries=0) as store:
        assert store.health().version == store.ready().version
        monkeypatch.setattr(readiness, "LEAST_FREE_BYTES", 1 << 60)
        with pytest.raises(errors.Unavailable, match=r"disk: .* free some space"):
            store.ready()
