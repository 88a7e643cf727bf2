"""Models by hub id: which commit is meant is found out when asked, recorded, and what fails is said in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

import datastore.hub
from datastore.errors import HubUnreachable, InvalidInput
from tests.hub import Hub
from tests.serving import Service, form_files, peft_files, problem_of, serving
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered


@pytest.fixture
def place(service: Service, tmp_path: Path) -> Workplace:
    """A worker over the service's store."""
    return Workplace.at(tmp_path)


def test_a_model_of_the_hub_is_trained_and_measured_at_the_commit_that_its_name_meant(
    service: Service, place: Workplace, hub: Hub, tmp_path: Path
) -> None:
    model = "org/trained"
    commit = hub.publish(model, save_tiny_model(tmp_path / "first"))
    place.pool(numbered(range(6)), name="pool")
    place.task(name="target")
    body = {
        "dataset": "pool", "model": model, "epochs": 1, "batch_size": 2, "device_batch_size": 2, "max_length": 64,
        "lora": {"r": 2, "alpha": 4, "targets": ["q_proj"]}, "name": "tuned",
    }  # fmt: skip
    first = service.http.post("/finetunes", json=body).json()
    evaluation = {"model": model, "tasks": ["target"], "max_new_tokens": 2, "bootstrap_samples": 10}
    of_base = service.http.post("/evaluations", json=evaluation).json()

    hub.publish(model, save_tiny_model(tmp_path / "second", seed=1))  # before the worker has begun
    assert place.work() == ["succeeded", "succeeded"]
    assert not any(path.endswith("/resolve/main/model.safetensors") for path in hub.asked)
    result = service.http.get("/finetunes/tuned").json()["result"]
    run = service.http.get(f"/runs/{result['run']}").json()
    assert (run["model"], run["revision"]) == (model, commit)
    assert [checkpoint["revision"] for checkpoint in run["checkpoints"]] == [commit]

    asked = {"dataset": "pool", "run": run["id"], "dims": [16], "kinds": ["sgd"]}
    assert service.http.post("/gradients", json=asked).status_code == 202
    service.http.post("/evaluations", json=evaluation | {"model": None, "finetune": "tuned"})
    assert place.work() == ["succeeded", "succeeded"]
    rows = {
        row["model"]: row["loss"]
        for job in service.http.get("/evaluations").json()["data"]
        for row in job["result"]["rows"]
        if row["subtask"] is None
    }
    before = service.http.get(f"/evaluations/{of_base['id']}").json()["result"]["rows"]
    assert rows["base"] == next(row["loss"] for row in before if row["subtask"] is None), "the same weights as before"

    later = service.http.post("/finetunes", json=body | {"name": "later"}).json()
    assert later["id"] != first["id"], "main has moved"
    assert service.http.post("/evaluations", json=evaluation).json()["id"] != of_base["id"]
    pinned = service.http.post("/finetunes", json=body | {"name": None, "revision": commit})
    assert (pinned.status_code, pinned.json()["id"]) == (200, first["id"])


def test_a_branch_means_its_commit(service: Service, hub: Hub) -> None:
    service.pool(name="pool")
    commit = hub.publish("org/branched", {"config.json": b"{}"}, branch="v2")
    job = service.finetune(dataset="pool", model="org/branched", revision="v2")
    assert service.claim().plan["revision"] == commit
    assert service.finetune(dataset="pool", model="org/branched", revision=commit)["id"] == job["id"]


def test_a_registered_adapter_records_the_commit_of_its_base_model(service: Service, hub: Hub) -> None:
    first = hub.publish("org/base-of-adapter", {"config.json": b"{}"})
    one = service.checkpoint(model="org/base-of-adapter")
    assert one["revision"] == first
    second = hub.publish("org/base-of-adapter", {"config.json": b'{"new": 1}'})
    other = service.checkpoint(model="org/base-of-adapter")
    assert (other["revision"], other["id"] != one["id"]) == (second, True)
    assert service.checkpoint(model="org/base-of-adapter", revision=first)["id"] == one["id"]


def test_a_commit_is_not_asked_for(hub: Hub) -> None:
    hub.asked.clear()
    assert datastore.hub.commit("org/unknown", "0" * 40) == "0" * 40
    assert hub.asked == []


@pytest.mark.parametrize(
    ("model", "revision", "pointer", "detail"),
    [
        ("org/nowhere", None, "/model", "no model 'org/nowhere'"),
        ("org/gated", None, "/model", "accept them on its page"),
        ("org/base", "no-such-branch", "/revision", "no branch, tag or commit 'no-such-branch'"),
        ("org/pictures", None, "/model", "no config.json"),
    ],
)
def test_what_the_hub_refuses_is_refused_in_words(
    service: Service, hub: Hub, model: str, revision: str | None, pointer: str, detail: str
) -> None:
    hub.publish("org/gated", {"config.json": b"{}"}, gated=True)
    hub.publish("org/pictures", {"picture.png": b""})
    service.pool(name="pool")
    service.task("target")
    named = {"model": model, "revision": revision}
    for path, body in (("/finetunes", {"dataset": "pool"}), ("/evaluations", {"tasks": ["target"]})):
        problem = problem_of(service.http.post(path, json=body | named), 422)
        assert detail in problem.detail
        assert [item.pointer for item in problem.errors] == [pointer]
    fields = {name: value for name, value in named.items() if value is not None}
    refused = service.http.post("/checkpoints", data=fields, files=form_files(peft_files(0)))
    assert detail in problem_of(refused, 422).detail


def test_a_token_opens_a_gated_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.publish("org/gated", {"config.json": b"{}"}, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    assert datastore.hub.commit("org/gated", None) == commit


def test_a_token_that_the_hub_does_not_know_is_named(hub: Hub) -> None:
    with hub.answering(403), pytest.raises(InvalidInput, match="refuses this server's HF_TOKEN"):
        datastore.hub.commit("org/base", None)


@pytest.mark.parametrize("status", [0, 500, 429])
def test_a_hub_that_does_not_answer_is_said_to_be_away(service: Service, hub: Hub, status: int) -> None:
    service.pool(name="pool")
    with hub.answering(status):
        answer = service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base"})
    problem = problem_of(answer, 503)
    assert problem.type == "hub-unreachable"
    assert "send the commit's 40 digits" in problem.detail


def test_a_slow_hub_is_not_waited_for_long(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datastore.hub, "TIMEOUT", 0.1)
    with hub.waiting(1.0), pytest.raises(HubUnreachable):
        datastore.hub.commit("org/base", None)


def download(hub: Hub, model: str) -> str:
    """Have a model on this machine as a worker leaves it, and return its commit."""
    from huggingface_hub import hf_hub_download

    commit = hub.publish(model, {"config.json": b'{"of": "then"}'})
    hf_hub_download(model, "config.json")
    hub.publish(model, {"config.json": b'{"of": "now"}'})
    return commit


def test_without_the_hub_a_branch_means_what_was_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = download(hub, "org/kept")
    assert datastore.hub.commit("org/kept", None) != commit
    with hub.answering(0):
        assert datastore.hub.commit("org/kept", None) == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert datastore.hub.commit("org/kept", "main") == commit
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set"):
        datastore.hub.commit("org/base", None)
    assert hub.asked == []


def test_what_training_a_model_would_cost_is_told_before_it_is_downloaded(
    service: Service, hub: Hub, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    commit = hub.publish("org/not-here", folder)
    service.pool(name="pool")
    service.backend.jobs.announce("one", device="cpu", job=None, flops={"float32": 1e9})
    body = {"dataset": "pool", "model": "org/not-here", "dry_run": True}
    cost = service.http.post("/finetunes", json=body).json()
    with serving(tmp_path / "other", allowed_roots=(tmp_path,)) as other:
        other.pool(name="pool")
        other.backend.jobs.announce("one", device="cpu", job=None, flops={"float32": 1e9})
        here = other.http.post("/finetunes", json=body | {"model": str(folder)}).json()
    assert cost["basis"] == "estimated"
    assert cost | {"free_bytes": 0} == here | {"free_bytes": 0}
    folder = Path(constants.HF_HUB_CACHE, "models--org--not-here", "snapshots", commit)
    assert not (folder / "model.safetensors").exists()
    checkpoint = service.checkpoint(model="org/not-here")["id"]
    asked = {"dataset": "pool", "checkpoints": [checkpoint], "kinds": ["sgd"], "dims": [16], "dry_run": True}
    assert service.http.post("/gradients", json=asked).json()["seconds"] > 0


def test_a_model_without_safetensors_has_no_size(service: Service, hub: Hub) -> None:
    service.pool(name="pool")
    service.backend.jobs.announce("one", device="cpu", job=None, flops={"float32": 1e9})
    answer = service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base", "dry_run": True})
    assert answer.status_code == 200
    assert (answer.json()["seconds"], answer.json()["memory_bytes"]) == (None, None)
