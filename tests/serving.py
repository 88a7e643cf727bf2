"""A real service on a real socket, in a thread of the test's process, and what tests ask of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from gradstore.types import JobKind, Problem
from safetensors.numpy import save
from sqlalchemy.orm import Session

from datastore.catalog import record_checkpoint, record_run
from datastore.checkpoints import run_id
from datastore.leases import Claim
from datastore.settings import Settings
from service.app import create_app
from service.command import Server, listen
from service.dependencies import Backend
from service.queue import Queue

KINDS: tuple[JobKind, ...] = (
    "gradients",
    "finetune",
    "evaluation",
    "scoring",
    "validation",
    "attribution",
    "predictor",
    "cascade",
    "comparison",
)


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    app: FastAPI
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

    def upload(self, content: bytes, filename: str = "pool.jsonl", **fields: str) -> httpx.Response:
        """Upload a dataset."""
        return self.http.post("/datasets", files={"file": (filename, content)}, data=fields)

    def pool(self, count: int = 10, **fields: str) -> dict[str, Any]:
        """A dataset of so many rows."""
        return self._made(self.upload(jsonl(count), **fields))

    def task(self, name: str = "target", *, test: int = 2) -> dict[str, Any]:
        """A task of one subtask with three validation rows."""
        fields = {"name": name, "kind": "jsonl"}
        return self._made(self.http.post("/tasks", data=fields, files=form_files(task_files(name, test=test))))

    def checkpoint(self, seed: int = 0, **fields: str) -> dict[str, Any]:
        """A checkpoint without moments."""
        fields = {"model": "org/base", "learning_rate": "1e-4"} | fields
        return self._made(self.http.post("/checkpoints", data=fields, files=form_files(peft_files(seed))))

    def adapter(self, seed: int = 0, **fields: str) -> dict[str, Any]:
        """An adapter of the bank, by its files."""
        fields = {"base_model": "org/base"} | fields
        return self._made(self.http.post("/adapters", data=fields, files=form_files(peft_files(seed))))

    def finetune(self, **fields: Any) -> dict[str, Any]:
        """A fine-tune that has not begun."""
        return self._made(self.http.post("/finetunes", json={"model": "org/base", "epochs": 2} | fields))

    def train(self, folder: Path) -> dict[str, Any]:
        """Do the oldest waiting fine-tune, as a worker would, and return it."""
        claim = self.claim()
        checkpoints = []
        for epoch in range(claim.request["epochs"]):
            home = folder / claim.job / str(epoch)
            home.mkdir(parents=True)
            for name, content in peft_files(hash((claim.job, epoch)) % 1000).items():
                (home / name).write_bytes(content)
            checkpoints.append(self.backend.checkpoints.register(home, model="org/base", learning_rate=1e-4))
        ids = [checkpoint.id for checkpoint in checkpoints]

        def record(session: Session) -> None:
            for checkpoint in checkpoints:
                record_checkpoint(session, checkpoint)
            record_run(session, id=run_id(ids), checkpoints=ids, finetune=claim.job)

        result = {
            "run": run_id(ids), "checkpoints": ids, "rows": 10, "skipped_rows": 0, "steps": 2, "tokens": 100,
            "precision": "float32", "loss_curve": [], "seconds": 4.0,
        }  # fmt: skip
        assert self.backend.jobs.succeed(claim, result=result, records=record)
        return self._made(self.http.get(f"/finetunes/{claim.job}"))

    @staticmethod
    def _made(answer: httpx.Response) -> dict[str, Any]:
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found


def jsonl(count: int, *, first: int = 0) -> bytes:
    """So many numbered rows."""
    rows = [
        {"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def task_files(text: str, *, test: int = 2) -> dict[str, bytes]:
    """The files of a task of kind jsonl."""
    splits = {"validation": 3, "test": test}
    return {
        f"{split}.jsonl": "".join(
            json.dumps({"prompt": f"{text} {split} {number}", "completion": "yes", "subtask": "only"}) + "\n"
            for number in range(rows)
        ).encode()
        for split, rows in splits.items()
        if rows
    }


def peft_files(seed: int) -> dict[str, bytes]:
    """The files of a LoRA adapter as PEFT saves them."""
    values = np.random.default_rng(seed)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": values.standard_normal((2, 8), np.float32),
        f"{stem}.lora_B.weight": values.standard_normal((8, 2), np.float32),
    }
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "base_model_name_or_path": "org/base"}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def form_files(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """Files as httpx sends several of them."""
    return [("files", (name, content)) for name, content in files.items()]


@contextmanager
def serving(data: Path, *, queue: Queue | None = None, port: int = 0, **settings: Any) -> Iterator[Service]:
    """Run a service over the folder `data`, without a worker."""
    chosen = Settings(data=data, port=port, embedded_worker=False, **settings)
    app = create_app(chosen, queue=queue)
    server = Server(app)
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
            yield Service(server.url, app, app.state.backend, http)
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


@contextmanager
def without_catalog(service: Service) -> Iterator[None]:
    """Has a service lose its SQLite catalog, for good."""
    service.backend.catalog.close()
    database = service.backend.settings.data / "catalog.sqlite3"
    for path in database.parent.glob("catalog.sqlite3*"):
        path.unlink()
    database.mkdir()
    yield
    database.rmdir()


def problem_of(answer: httpx.Response, status: int) -> Problem:
    """The problem that an answer must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    assert problem.status == status
    assert problem.instance == answer.headers["x-request-id"]
    assert problem.detail
    return problem
