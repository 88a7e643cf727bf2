"""Estimates over HTTP, by the client and on the command line: begun, read, selected by, validated, deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from gradstore import GradientStore
from gradstore.cli import app
from gradstore.errors import Conflict, Invalid
from numpy.typing import NDArray
from typer.testing import CliRunner

from datastore.store import OpenStore
from datastore.trainings import Measured
from tests.hub import Hub
from tests.serving import Service, problem_of
from tests.stores import Store

DIM = 16
ROWS = 24


def numbers(_: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Every third row leads another way than the others."""
    rows = [np.random.default_rng(row).normal(size=dim) + (-1 if row % 3 == 2 else 1) for row in range(start, stop)]
    return np.array(rows, np.float32)


def leading(_: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """All rows lead the way of two thirds of the pool's."""
    return np.array([np.random.default_rng([row, 1]).normal(1, 1, dim) for row in range(start, stop)], np.float32)


def in_store(service: Service) -> Store:
    return Store(**{part.name: getattr(service.backend, part.name) for part in fields(OpenStore)})


def work(service: Service) -> None:
    """Do the estimates that wait, as a worker would."""
    backend = service.backend
    while (claim := backend.jobs.claim("test", kinds=["estimates"])) is not None:
        assert backend.estimates.finish(claim, backend.estimates.work(claim))


@pytest.fixture
def ready(service: Service, hub: Hub) -> Service:
    """A service with log-odds features of a pool with numbered ids, and of a task."""
    hub.publish("org/base", {"config.json": b"{}"})
    rows = [{"id": str(row), "prompt": f"question {row}", "completion": "yes"} for row in range(ROWS)]
    service.upload("".join(json.dumps(row) + "\n" for row in rows).encode(), name="pool")
    service.task("target")
    checkpoint = service.checkpoint()["id"]
    for owner, found in (({"dataset": "pool"}, numbers), ({"task": "target"}, leading)):
        body = {"checkpoints": [checkpoint], "kinds": ["logodds"], "dims": [DIM], "dtype": "float32", **owner}
        assert service.http.post("/gradients", json=body).status_code == 202
        in_store(service).work(found)
    return service


BODY: dict[str, Any] = {
    "dataset": "pool", "tasks": ["target"], "group_by": "label",
    "labels": {str(row): "abc"[row % 3] for row in range(ROWS)}, "count": 30, "fraction": 0.7, "abs_scale": 1.0,
    "name": "mine",
}  # fmt: skip


@pytest.fixture
def store(ready: Service) -> Iterator[GradientStore]:
    with GradientStore(ready.url) as client:
        yield client


def test_estimates_are_begun_found_again_read_and_deleted(ready: Service) -> None:
    answer = ready.http.post("/estimates", json=BODY)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["id"].partition("_")[0], job["kind"], answer.headers["Location"]) == (
        "est", "estimates", f"/jobs/{job['id']}",
    )  # fmt: skip
    assert job["progress"]["total"] == 30
    assert "once it has succeeded" in problem_of(ready.http.get("/estimates/mine/subsets"), 409).detail
    work(ready)
    result = ready.http.get("/estimates/mine").json()["result"]
    assert [(group["label"], group["rows"]) for group in result["groups"]] == [("a", 8), ("b", 8), ("c", 8)]
    scores = [group["score"] for group in result["groups"]]
    assert min(scores[:2]) > scores[2]
    page = ready.http.get("/estimates/mine/subsets", params={"limit": 4, "after": 27}).json()
    assert [subset["subset"] for subset in page["data"]] == [27, 28, 29]
    assert not page["has_more"]
    assert ready.http.post("/estimates", json=BODY).json()["id"] == job["id"]
    assert [one["id"] for one in ready.http.get("/estimates").json()["data"]] == [job["id"]]
    assert job["id"] in problem_of(ready.http.delete("/tasks/target"), 409).detail
    for features in ready.http.get("/gradients").json()["data"]:
        assert job["id"] in problem_of(ready.http.delete(f"/gradients/{features['id']}"), 409).detail
    assert "DELETE /estimates/" in problem_of(ready.http.delete(f"/jobs/{job['id']}"), 409).detail
    assert ready.http.delete("/estimates/mine").status_code == 204
    assert job["id"] not in problem_of(ready.http.delete("/tasks/target"), 409).detail  # its features are left


def test_a_dry_run_counts_subsets_and_trainings_and_starts_nothing(ready: Service, store: GradientStore) -> None:
    found = store.estimates.estimate(**BODY)
    assert (found.rows, found.groups, found.subsets, found.reused_subsets, found.targets) == (ROWS, 3, 30, 0, 1)
    sets = {each.id: each for each in ready.backend.features.complete(datasets=ready.backend.catalog.pools())}
    assert [id in sets for id in found.feature_sets] == [True, False]
    assert found.read_bytes == sum(ready.backend.features.get(id).bytes for id in found.feature_sets)
    assert found.seconds is None
    searched = store.estimates.estimate(**{**BODY, "count": None, "search": "stepwise"})
    assert searched.subsets == 6
    assert list(store.estimates.list()) == []
    store.estimates.create(**BODY)
    work(ready)
    again = store.estimates.estimate(**BODY | {"search": "surrogate"})
    assert (again.reused_subsets, again.seconds, again.basis) == (30, 0, "measured")
    with pytest.raises(Conflict, match="POST /gradients"):
        store.estimates.estimate(**BODY | {"dim": 8})
    of = store.estimate_validations.estimate(estimates="mine", model="org/base", subsets=3, epochs=2)
    assert (of.trainings, of.reused_trainings, of.rows) == (3, 0, 16)
    assert list(store.estimate_validations.list()) == []
    with pytest.raises(Invalid, match="3 of them different"):
        store.estimate_validations.estimate(estimates="mine", model="org/base", subsets=4)
    store.estimate_validations.create(estimates="mine", model="org/base", subsets=3, epochs=2)
    validations = ready.backend.estimate_validations
    claim = ready.backend.jobs.claim("test", kinds=["estimate-validation"])
    assert claim is not None
    training = validations.training(claim.plan, claim.payload)
    validations.trainings.put(training, Measured([1.0] * 3, rows=16, tokens=9, seconds=1.0))
    assert store.estimate_validations.estimate(
        estimates="mine", model="org/base", subsets=3, epochs=2
    ) == of.model_copy(update={"reused_trainings": 1, "tokens": 2 * of.tokens // 3})


def test_what_is_missing_or_ambiguous_is_told(ready: Service) -> None:
    missing = problem_of(ready.http.post("/estimates", json=BODY | {"dim": 8}), 409)
    assert (missing.type, "POST /gradients" in missing.detail) == ("gradients-missing", True)
    wrong = problem_of(ready.http.post("/estimates", json=BODY | {"subsets": [["z"]], "count": None}), 422)
    assert [error.pointer for error in wrong.errors] == ["/subsets/0"]
    problem_of(ready.http.get("/select", params={"method": "gradex", "task": "target", "k": 3}), 409)


def test_what_is_measured_is_bounded_and_a_shard_is_a_subset(ready: Service) -> None:
    exact = {**BODY, "mode": "exact"}
    job = ready.http.post("/estimates", json=exact | {"count": None}).json()
    assert (job["status"], job["progress"]["total"]) == ("queued", 20)
    assert len(ready.backend.jobs.payloads(job["id"])) == 20
    for changes, detail in (
        ({"count": 201}, "at most 200"),
        ({"search": "stepwise", "count": None}, "search=stepwise"),
    ):
        assert detail in str(problem_of(ready.http.post("/estimates", json=exact | changes), 422).errors)


def test_groups_of_an_annotation_are_asked_for_by_its_name(ready: Service) -> None:
    labels = [{"id": str(row), "category": ["Captioning" if row % 3 else "OCR"]} for row in range(ROWS)]
    file = "".join(json.dumps(label) + "\n" for label in labels).encode()
    fields = {"dataset": "pool", "name": "skills"}
    assert ready.http.post("/annotations", data=fields, files={"file": ("labels.jsonl", file)}).status_code == 200
    body = {**BODY, "labels": None, "group_by": "annotation", "annotations": "skills"}
    assert ready.http.post("/estimates", json=body).status_code == 202
    work(ready)
    groups = ready.http.get("/estimates/mine").json()["result"]["groups"]
    assert [(group["label"], group["rows"]) for group in groups] == [("OCR", 8), ("Captioning", 16)]
    more = {**body, "annotations": "nothing", "name": None}
    problem_of(ready.http.post("/estimates", json=more), 404)


def test_a_selection_takes_rows_by_their_groups(ready: Service) -> None:
    ready.http.post("/estimates", json=BODY)
    work(ready)
    asked = {"method": "gradex", "task": "target", "pct": 0.5, "limit": 100}
    selection = ready.http.get("/select", params=asked).json()
    assert selection["recipe"]["by"].startswith("est_")
    assert selection["count"] == 12
    assert all(row["row"] % 3 != 2 for row in selection["data"])
    scores = ready.http.get("/scores", params={"method": "gradex", "task": "target", "by": "mine", "limit": 6}).json()
    assert len({row["score"] for row in scores["data"]}) == 3
    again = ready.http.post("/selections", json={"recipe": selection["recipe"]}).json()
    assert again["id"] == selection["id"]
    problem_of(ready.http.delete("/estimates/mine"), 409)


def test_the_client_iterates_over_subsets_and_validates(ready: Service, store: GradientStore) -> None:
    job = store.estimates.create(**BODY)
    with pytest.raises(Conflict):
        list(store.estimates.subsets(job.id))
    work(ready)
    done = store.estimates.wait("mine")
    assert list(done.result.to_pandas()["label"]) == ["a", "b", "c"]
    subsets = list(store.estimates.subsets("mine"))
    assert [subset.subset for subset in subsets] == list(range(30))
    asked = store.estimate_validations.create(estimates="mine", model="org/base", subsets=3, scales=[0.5, 1.0])
    validations = ready.backend.estimate_validations
    for _ in range(3):
        claim = ready.backend.jobs.claim("test", kinds=["estimate-validation"])
        assert claim is not None
        training = validations.training(claim.plan, claim.payload)
        losses = [subset.loss or 0.0 for subset in subsets[claim.payload["subset"]].estimates[-1:]] * 3
        if validations.trainings.get(training.key) is None:
            validations.trainings.put(training, Measured(losses, rows=8, tokens=9, seconds=1.0))
        assert validations.finish(claim, training.key)
    result = store.estimate_validations.wait(asked).result
    assert result.own.relative_rss == pytest.approx(0, abs=1e-12)
    assert (result.best.scale, len(result.to_pandas())) == (1.0, 3)
    trained = [subsets[one.subset].groups for one in result.subsets]
    assert sorted(trained) == [[0, 1], [0, 2], [1, 2]]  # of thirty, drawn from three: none is trained on twice
    with pytest.raises(Invalid, match="30 subsets, 3 of them different"):
        store.estimate_validations.create(estimates="mine", model="org/base", subsets=4)
    assert [one.id for one in store.estimate_validations.list()] == [asked.id]
    assert store.estimate_validations.get(asked.id).id.startswith("estv_")
    with pytest.raises(Conflict):
        store.estimates.delete("mine")
    store.estimate_validations.delete(asked.id)
    store.estimates.delete("mine")


def test_a_validation_of_estimates_for_several_tasks_asks_which_one_is_meant(ready: Service) -> None:
    ready.task("other")
    body = {"checkpoints": [ready.http.get("/checkpoints").json()["data"][0]["id"]], "kinds": ["logodds"]}
    body |= {"dims": [DIM], "dtype": "float32", "task": "other"}
    assert ready.http.post("/gradients", json=body).status_code == 202
    in_store(ready).work(leading)
    assert ready.http.post("/estimates", json={**BODY, "tasks": ["target", "other"]}).status_code == 202
    work(ready)
    ids = [ready.http.get(f"/tasks/{name}").json()["id"] for name in ("target", "other")]
    asked = {"estimates": "mine", "model": "org/base", "subsets": 3, "dry_run": True}
    told = problem_of(ready.http.post("/estimates/validations", json=asked), 409)
    assert told.type == "ambiguous"
    assert "2 tasks; say which one is meant (task)" in told.detail
    assert sorted(each.detail.partition("task=")[2] for each in told.errors) == sorted(ids)
    for named in (*ids, "other"):
        assert ready.http.post("/estimates/validations", json={**asked, "task": named}).status_code == 200


def test_the_command_line_prints_groups_subsets_and_what_a_search_has_chosen(ready: Service, tmp_path: Path) -> None:
    labels, subsets = tmp_path / "labels.csv", tmp_path / "subsets.json"
    labels.write_text("".join(f"{row},{'abc'[row % 3]}\n" for row in range(ROWS)))
    subsets.write_text('[["a"], ["c", "b"]]')
    of = f"--dataset pool --task target --group-by label --labels {labels} --abs-scale 1".split()
    environment = {"GRADSTORE_URL": ready.url}

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["estimates", *words], env=environment)

    assert run("create", *of, "--subsets", str(subsets), "--name", "two").exit_code == 0
    assert run("create", *of, "--search", "stepwise", "--name", "best").exit_code == 0
    work(ready)
    shown = run("show", "two")
    assert {line.split()[1] for line in shown.stdout.splitlines()[1:]} == {"a", "b", "c"}
    assert shown.stdout.splitlines()[1].split()[1] == "a"
    listed = run("rows", "two")
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [["0", "0", "8"], ["1", "1", "2"]]
    searched = run("show", "best")
    assert "chosen: 0 1" in searched.stderr or "chosen: 0," in searched.stderr or "chosen: 1," in searched.stderr
    labels.write_text("one\n")
    refused = run("create", *of)
    assert refused.exit_code == 2
    assert "line 1 has not two values" in refused.stderr
