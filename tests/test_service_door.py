"""Who may come in, and what every answer carries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from tests.processes import wait_for
from tests.serving import Service, jsonl, problem_of, serving

PATHS = ["/health", "/ready", "/datasets", "/metrics", "/openapi.json", "/nowhere"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with an API key, and a client that has it."""
    with serving(tmp_path_factory.mktemp("locked") / "store", api_key=SecretStr("open sesame")) as service:
        yield service


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic open sesame", "open sesame"])
def test_without_its_key_nothing_is_answered(locked: Service, path: str, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    answer = httpx.get(locked.url + path, headers=headers)
    assert problem_of(answer, 401).type == "not-authenticated"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_its_key_everything_is_answered(locked: Service) -> None:
    assert locked.http.get("/health").status_code == 200
    assert locked.upload(jsonl(1)).status_code == 201
    problem_of(locked.http.get("/nowhere"), 404)


def test_an_upload_without_the_key_is_refused_with_an_answer(locked: Service) -> None:
    problem_of(httpx.post(f"{locked.url}/datasets", files={"file": ("a", jsonl(100_000))}), 401)


def test_with_a_key_the_server_may_have_any_name(locked: Service) -> None:
    assert locked.http.get("/health", headers={"Host": "gradstore.example"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]", "10.0.0.1"])
def test_without_a_key_a_foreign_name_is_refused(shared_service: Service, host: str) -> None:
    problem = problem_of(shared_service.http.get("/health", headers={"Host": host}), 403)
    assert problem.type == "not-allowed"


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1", "127.8.8.8:1", "[::1]:8000"])
def test_without_a_key_this_machines_names_are_answered(shared_service: Service, host: str) -> None:
    assert shared_service.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_without_a_key_a_foreign_web_page_is_refused(shared_service: Service, origin: str) -> None:
    answer = shared_service.http.post("/jobs/any/cancel", headers={"Origin": origin})
    assert "web page" in problem_of(answer, 403).detail


def test_a_page_of_the_service_itself_is_answered(shared_service: Service) -> None:
    answer = shared_service.http.get("/health", headers={"Origin": shared_service.url})
    assert answer.status_code == 200


def test_every_answer_has_an_id_and_the_log_a_line(shared_service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="service.middleware"):
        answer = shared_service.http.get("/datasets", headers={"X-Request-ID": "my.id-1"})
        other = shared_service.http.get("/nowhere", headers={"X-Request-ID": "two\tlines <script>"})
        ids = {answer.headers["x-request-id"], other.headers["x-request-id"]}
        wait_for(lambda: ids <= {vars(record).get("request") for record in caplog.records})  # written after the answer
    assert answer.headers["x-request-id"] == "my.id-1"
    assert len(other.headers["x-request-id"]) == 16
    lines = {vars(record)["request"]: vars(record) for record in caplog.records if record.message == "request"}
    assert lines["my.id-1"]["status"] == 200
    assert lines[other.headers["x-request-id"]]["path"] == "/nowhere"


@pytest.mark.parametrize("path", PATHS)
def test_no_answer_is_taken_for_a_page(shared_service: Service, path: str) -> None:
    headers = shared_service.http.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-cache"
    assert "server" not in headers


def test_metrics_count_requests_by_route_and_jobs_by_state(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        service.pool(name="pool")
        service.finetune(dataset="pool")
        for name in ("one", "two"):
            service.http.get(f"/datasets/{name}")
        counted = 'gradstore_requests_total{method="GET",route="/datasets/{reference}",status="404"} 2.0'
        wait_for(lambda: counted in service.http.get("/metrics").text.splitlines())  # once the answers have left
        metrics = service.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    lines = metrics.text.splitlines()
    assert 'gradstore_jobs{kind="finetune",status="queued"} 1.0' in lines
    assert "gradstore_workers 0.0" in lines
    assert not [line for line in lines if "/datasets/one" in line]
