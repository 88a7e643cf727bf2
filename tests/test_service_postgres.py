"""The API over PostgreSQL: what SQLite forgives or forbids, and PostgreSQL does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from datastore.schema import JobRow
from tests.services import PostgresServer
from tests.serving import Service, jsonl, problem_of, serving

pytestmark = pytest.mark.services


@pytest.fixture
def service(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Service]:
    """A service whose catalog is in PostgreSQL."""
    with serving(tmp_path / "store", catalog=postgres_server.database()) as running:
        yield running


def test_a_flow_from_pool_to_evaluation(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    service.task("target")
    job = service.finetune(dataset="pool", name="warmup")["id"]
    result = service.train(tmp_path)["result"]
    answer = service.http.post("/evaluations", json={"finetune": "warmup", "tasks": ["target"]})
    assert answer.status_code == 202
    problem_of(service.http.delete(f"/finetunes/{job}"), 409)
    service.finish({"rows": [], "seconds": 1.0})
    assert service.http.delete(f"/evaluations/{answer.json()['id']}").status_code == 204
    assert service.http.delete("/finetunes/warmup").status_code == 204
    problem_of(service.http.get(f"/runs/{result['run']}"), 404)
    assert service.http.delete("/datasets/pool").status_code == 204


def test_a_name_with_a_nul_names_nothing(service: Service) -> None:
    for body in ({"dataset": "a\0b", "model": "o/m"}, {"selection": "a\0b", "model": "o/m"}):
        problem_of(service.http.post("/finetunes", json=body), 404)
    problem_of(service.http.post("/evaluations", json={"finetune": "a\0b", "tasks": ["t\0"]}), 404)
    problem_of(service.http.get("/jobs", params={"after": "a\0b"}), 404)


def test_one_upload_many_times_at_once_is_one_dataset(service: Service) -> None:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(service.upload(jsonl(500), name="pool"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {200, 201}, [answer.text for answer in answers]
    assert len(service.http.get("/datasets").json()["data"]) == 1


def test_one_job_started_many_times_at_once_is_one_job(service: Service) -> None:
    service.pool(name="pool")
    answers: list[httpx.Response] = []

    def start() -> None:
        body = {"dataset": "pool", "model": "org/base", "name": "warmup"}
        answers.append(service.http.post("/finetunes", json=body))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_who_comes_second_to_a_new_id_finds_the_firsts(service: Service) -> None:
    service.pool(name="pool")
    body = {"dataset": "pool", "model": "org/base"}
    id = service.http.post("/finetunes", json=body).json()["id"]
    with service.backend.catalog.reading() as session:
        columns = {column.key: getattr(session.get_one(JobRow, id), column.key) for column in JobRow.__table__.columns}
    service.http.post(f"/jobs/{id}/cancel")
    service.http.delete(f"/finetunes/{id}")
    answers: list[httpx.Response] = []
    second = threading.Thread(target=lambda: answers.append(service.http.post("/finetunes", json=body)))
    with service.backend.catalog.transaction() as session:
        session.add(JobRow(**columns))
        session.flush()
        second.start()
        time.sleep(0.5)  # it waits for this transaction, in which its id has been taken
        assert not answers
    second.join()
    assert (answers[0].status_code, answers[0].json()["id"]) == (202, id)


def test_one_key_many_times_at_once_is_one_answer(service: Service) -> None:
    answers: list[httpx.Response] = []

    def upload() -> None:
        files = {"file": ("a.jsonl", jsonl(500))}
        answers.append(service.http.post("/datasets", files=files, headers={"Idempotency-Key": "key"}))

    threads = [threading.Thread(target=upload) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {201}, [answer.text for answer in answers]
    assert len({answer.content for answer in answers}) == 1


def test_a_dataset_that_is_uploaded_and_deleted_at_once_is_whole_or_gone(service: Service) -> None:
    id = service.pool(50)["id"]
    over = time.monotonic() + 2

    def delete() -> None:
        while time.monotonic() < over:
            assert service.http.delete(f"/datasets/{id}").status_code in {204, 404}

    deleters = [threading.Thread(target=delete) for _ in range(2)]
    for deleter in deleters:
        deleter.start()
    while time.monotonic() < over:
        assert service.upload(jsonl(50)).status_code in {200, 201, 409}
    for deleter in deleters:
        deleter.join()
    record, content = (service.http.get(f"/datasets/{id}{part}") for part in ("", "/content"))
    assert (record.status_code, content.status_code) in {(200, 200), (404, 404)}
