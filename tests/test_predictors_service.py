"""Predictors that learn from a sentence encoder's embeddings, over REST with a worker over the same store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving import Service, form_files, problem_of, serving
from tests.tiny import save_tiny_encoder
from tests.workplace import numbered, tiny_adapter
from worker.context import Context
from worker.jobs import KINDS, run

ROWS, WIDTH = 60, 24
MEAN = {"Pooling": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}}
ASKED = {"dataset": "pool", "task": "target", "model": "ridge", "rows": 30, "features": ["embedding", "similarity"]}


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    """A service with a pool and a task, and the gradients of both at one checkpoint."""
    with serving(tmp_path / "store", allowed_roots=(tmp_path, model.parent)) as running:
        rows, target = (lines(numbered(range(count)), subtask="any") for count in (ROWS, 3))
        assert running.upload(rows, name="pool").is_success
        files = form_files({"validation.jsonl": target, "test.jsonl": target})
        assert running.http.post("/tasks", data={"name": "target", "kind": "jsonl"}, files=files).is_success
        tiny_adapter(model).save_pretrained(str(tmp_path / "adapter"))
        checkpoint = made(
            running, "/checkpoints", path=str(tmp_path / "adapter"), model=str(model), learning_rate=1e-4
        )["id"]
        for owner in ({"dataset": "pool"}, {"task": "target"}):
            made(running, "/gradients", **owner, checkpoints=[checkpoint], kinds=["sgd"], dims=[32], dtype="float32")
        work(running)
        yield running


def lines(rows: list[dict[str, Any]], **fields: str) -> bytes:
    return "".join(json.dumps({**row, **fields}) + "\n" for row in rows).encode()


def made(service: Service, path: str, /, **body: Any) -> dict[str, Any]:
    answer = service.http.post(path, json=body)
    assert answer.is_success, answer.text
    found: dict[str, Any] = answer.json()
    return found


def embed(service: Service, folder: Path, *, seed: int) -> str:
    """Register an encoder, and embed pool and task by it."""
    encoder: str = made(service, "/checkpoints", model=str(save_tiny_encoder(folder, modules=MEAN, seed=seed)))["id"]
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        made(service, "/gradients", **owner, checkpoints=[encoder], kinds=["embedding"])
    work(service)
    return encoder


def work(service: Service) -> None:
    """Do what waits."""
    context = Context.open(service.backend.settings, torch.device("cpu"))
    while (claim := context.jobs.claim(context.owner, kinds=KINDS)) is not None:
        assert run(claim, context) == "succeeded", context.jobs.get(claim.job).error


def test_a_predictor_learns_from_embeddings(service: Service, tmp_path: Path) -> None:
    lacking = problem_of(service.http.post("/predictors", json=ASKED), 409)
    assert "POST /checkpoints" in lacking.detail
    first = embed(service, tmp_path / "first", seed=0)
    job = made(service, "/predictors", **ASKED)
    work(service)
    done = service.http.get(f"/predictors/{job['id']}").json()
    result = done["result"]
    assert (result["columns"], result["predicted_rows"], result["tested_rows"]) == (WIDTH + 1 + 1 + 3, ROWS, 30)
    by = {"method": "predicted", "by": job["id"], "task": "target", "dataset": "pool", "k": ROWS, "limit": ROWS}
    assert len(service.http.get("/select", params=by).json()["data"]) == ROWS
    second = embed(service, tmp_path / "second", seed=1)
    several = problem_of(service.http.post("/predictors", json=ASKED), 409)
    assert several.title == "Ambiguous"
    told = "has embeddings of 2 encoders; say which one is meant (encoder), for example encoder="
    assert several.detail.endswith(told + min(first, second))
    assert made(service, "/predictors", **ASKED, encoder=first)["id"] == job["id"]
