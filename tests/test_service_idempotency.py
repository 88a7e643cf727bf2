"""A POST that is sent again with its Idempotency-Key gets its first answer, and nothing is done twice."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio import move_on_after
from fastapi import Request, Response
from sqlalchemy import select, update

from datastore import catalog
from datastore.schema import IdempotencyRow
from service import idempotency
from tests.serving import Service, form_files, jsonl, peft_files, problem_of, task_files

KEY = {"Idempotency-Key": "my-key"}


def test_a_retried_post_gets_its_first_answer(service: Service) -> None:
    service.pool(name="pool")
    body = {"dataset": "pool", "model": "org/base", "epochs": 2}
    first = service.http.post("/finetunes", json=body, headers=KEY)
    service.claim()
    again = service.http.post("/finetunes", json=body, headers=KEY)
    assert again.status_code == first.status_code == 202
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(service.http.get("/jobs").json()["data"]) == 1


def test_a_key_does_not_come_back_with_another_request(service: Service) -> None:
    service.pool(name="pool")
    service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base"}, headers=KEY)
    other = service.http.post("/finetunes", json={"dataset": "pool", "model": "org/other"}, headers=KEY)
    assert "use a new key" in problem_of(other, 409).detail
    problem_of(service.http.post("/runs", json={"checkpoints": ["x"]}, headers=KEY), 409)
    assert len(service.http.get("/jobs").json()["data"]) == 1


def test_a_refused_request_gives_its_key_back(service: Service) -> None:
    body = {"dataset": "pool", "model": "org/base"}
    problem_of(service.http.post("/finetunes", json=body, headers=KEY), 404)
    service.pool(name="pool")
    assert service.http.post("/finetunes", json=body, headers=KEY).status_code == 202


def test_a_retried_upload_is_known_by_its_content_not_its_packing(service: Service) -> None:
    def upload(content: bytes) -> httpx.Response:
        # httpx draws another boundary for every form
        return service.http.post("/datasets", files={"file": ("a.jsonl", content)}, data={"name": "a"}, headers=KEY)

    first, again = upload(jsonl(3)), upload(jsonl(3))
    assert again.content == first.content
    assert again.status_code == 201
    assert "idempotent-replayed" in again.headers
    problem_of(upload(jsonl(4)), 409)


@pytest.mark.parametrize(
    ("path", "fields", "files"),
    [
        ("/tasks", {"name": "t", "kind": "jsonl"}, task_files("t")),
        ("/checkpoints", {"name": "c"}, peft_files(0)),
    ],
)
def test_tasks_and_checkpoints_honour_keys(
    service: Service, path: str, fields: dict[str, str], files: dict[str, bytes]
) -> None:
    first, again = (service.http.post(path, data=fields, files=form_files(files), headers=KEY) for _ in range(2))
    assert (again.status_code, again.content) == (201, first.content)


def test_a_retried_cancel_is_no_conflict(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    answers = [service.http.post(f"/jobs/{job}/cancel", headers=KEY) for _ in range(2)]
    assert [answer.json()["status"] for answer in answers] == ["cancelled"] * 2


def test_two_requests_with_one_key_at_once_do_it_once(service: Service) -> None:
    content = jsonl(2000)
    answers: list[httpx.Response] = []

    def upload() -> None:
        answers.append(service.http.post("/datasets", files={"file": ("a.jsonl", content)}, headers=KEY))

    threads = [threading.Thread(target=upload) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 2


def test_who_waits_too_long_for_the_first_answer_is_told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "WAIT", 0.2)
    service.pool(name="pool")
    body = {"dataset": "pool", "model": "org/base"}
    service.http.post("/finetunes", json=body, headers=KEY)
    with service.backend.catalog.transaction() as session:
        session.execute(update(IdempotencyRow).values(status=None))  # as it was before the answer
    answer = service.http.post("/finetunes", json=body, headers=KEY)
    assert "still at work" in problem_of(answer, 409).detail


def test_a_key_whose_server_died_is_free_after_a_while(service: Service) -> None:
    service.backend.catalog.reserve_key("my-key", "of a request that never answered")
    with service.backend.catalog.transaction() as session:
        long_ago = catalog.utc_now() - catalog.IDEMPOTENCY_WORK - timedelta(seconds=1)
        session.execute(update(IdempotencyRow).values(created_at=long_ago))
    assert service.http.post("/datasets", files={"file": ("a", jsonl(1))}, headers=KEY).status_code == 201


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_that_is_none_is_refused(service: Service, key: str) -> None:
    answer = service.http.post("/runs", json={"checkpoints": ["x"]}, headers={"Idempotency-Key": key})
    assert [item.parameter for item in problem_of(answer, 422).errors] == ["Idempotency-Key"]


# Whoever goes away ---------------------------------------------------------------------------------------------------


def half_taken(known: catalog.Catalog) -> list[str]:
    """Keys without an answer."""
    with known.reading() as session:
        return list(session.scalars(select(IdempotencyRow.key).where(IdempotencyRow.status.is_(None))))


def send_and_leave(service: Service, head: str, body: bytes, *, after: Callable[[], bool]) -> None:
    """Send a POST over a socket of its own, and close it before the answer comes."""
    address = httpx.URL(service.url)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        connection.sendall(f"POST {head}\r\nHost: {address.netloc.decode()}\r\n\r\n".encode() + body)
        while not after():
            time.sleep(0.01)


def test_a_client_that_goes_away_before_its_answer_gets_it_by_its_key(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.pool(name="pool")
    body = b'{"dataset": "pool", "model": "org/base"}'
    begun, go_on = threading.Event(), threading.Event()
    create = type(service.backend.jobs).create

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return create(*args, **options)

    monkeypatch.setattr(type(service.backend.jobs), "create", slow)
    head = f"/finetunes HTTP/1.1\r\nIdempotency-Key: my-key\r\nContent-Length: {len(body)}"
    send_and_leave(service, f"{head}\r\nContent-Type: application/json", body, after=begun.is_set)
    go_on.set()
    headers = KEY | {"Content-Type": "application/json"}
    answer = service.http.post("/finetunes", content=body, headers=headers)
    assert answer.status_code == 202
    assert answer.headers["idempotent-replayed"] == "true"
    assert half_taken(service.backend.catalog) == []


def test_a_client_that_goes_away_within_its_upload_leaves_no_key(service: Service, tmp_path: Path) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + jsonl(3)
    incoming = tmp_path / "store" / "incoming"
    head = "/datasets HTTP/1.1\r\nIdempotency-Key: my-key\r\nContent-Length: 1000000"
    content_type = "Content-Type: multipart/form-data; boundary=x"
    send_and_leave(service, f"{head}\r\n{content_type}", part, after=lambda: any(incoming.glob("form-*")))
    while any(incoming.glob("form-*")):
        time.sleep(0.01)
    assert half_taken(service.backend.catalog) == []
    assert service.http.post("/datasets", files={"file": ("a", jsonl(1))}, headers=KEY).status_code == 201


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
@pytest.mark.parametrize("during", ["reserve_key", "answer", "remember_answer"])
def test_a_cancelled_request_leaves_no_key_half_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, how: str
) -> None:
    known = catalog.Catalog(f"sqlite:///{tmp_path}/catalog.sqlite3")
    known.migrate()
    begun = threading.Event()
    if during != "answer":
        step = getattr(catalog.Catalog, during)

        def slow(*args: Any, **options: Any) -> Any:
            begun.set()
            time.sleep(0.3)
            return step(*args, **options)

        monkeypatch.setattr(catalog.Catalog, during, slow)

    async def answer() -> Response:
        if during == "answer":
            begun.set()
            await asyncio.sleep(10)
        return Response("{}", status_code=202)

    scope = {"type": "http", "method": "POST", "path": "/runs", "query_string": b"", "server": ("localhost", 80)}
    request = Request(scope | {"headers": [(b"idempotency-key", b"my-key")]})

    async def ask() -> None:
        with move_on_after(0.1 if how == "anyio" else 10):
            await idempotency.once(request, known, content=b"", answer=answer)

    async def main() -> None:
        task = asyncio.create_task(ask())
        while not begun.is_set():
            await asyncio.sleep(0.01)
        if how == "asyncio":
            task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert half_taken(known) == []
    known.close()
