"""A real service on a real socket, in a thread of the test's process, and what tests ask of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from gradstore.types import JobKind, Problem

from datastore.leases import Claim
from datastore.settings import Settings
from service.app import create_app
from service.command import Server, listen
from service.dependencies import Backend
from service.queue import Queue

KINDS: tuple[JobKind, ...] = ("gradients", "finetune", "evaluation", "scoring")


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    backend: Backend
    http: httpx.Client

    def claim(self) -> Claim:
        """Take the oldest waiting shard, as a worker would."""
        claim = self.backend.jobs.claim("test", kinds=KINDS)
        assert claim is not None, "no shard waits"
        return claim

    def finish(self, result: dict[str, Any]) -> None:
        """Do the oldest waiting shard, as a worker would."""
        assert self.backend.jobs.succeed(self.claim(), result=result)

    def upload(self, rows: bytes, filename: str = "pool.jsonl", **fields: str) -> httpx.Response:
        """Upload a dataset."""
        return self.http.post("/datasets", files={"file": (filename, rows)}, data=fields)


@contextmanager
def serving(data: Path, *, queue: Queue | None = None, **settings: Any) -> Iterator[Service]:
    """Run a service over the folder `data`, without a worker."""
    chosen = Settings(data=data, port=0, embedded_worker=False, **settings)
    app = create_app(chosen, queue=queue)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=10)
    server = Server(config, app.state.backend, None)
    listener = listen(chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.url:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    key = chosen.api_key.get_secret_value() if chosen.api_key else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=server.url, headers=headers, timeout=30) as http:
            yield Service(server.url, app.state.backend, http)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service with an empty store of its own."""
    with serving(tmp_path / "store") as running:
        yield running


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that the tests of a module share: they must not depend on what is in it."""
    with serving(tmp_path_factory.mktemp("shared") / "store") as running:
        yield running


def problem_of(answer: httpx.Response, status: int) -> Problem:
    """The problem that an answer must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    assert problem.status == status
    assert problem.instance == answer.headers["x-request-id"]
    assert problem.detail
    return problem
