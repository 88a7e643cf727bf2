"""Jobs over HTTP: started once, followed, cancelled, tried again, and what their nouns show of them."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradstore.types import Problem

from datastore.trainings import Measured
from service import events
from tests.hub import Hub
from tests.serving import Service, problem_of, serving
from tests.tiny import save_tiny_model

FAILURE = Problem(type="broken", title="Broken", status=500, detail="the worker could not do it")


def events_of(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


# Starting -----------------------------------------------------------------------------------------------------------


def test_a_started_job_says_where_to_look(service: Service) -> None:
    service.pool(name="pool")
    answer = service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base"})
    assert answer.status_code == 202
    assert answer.headers["retry-after"] == "1"
    job = service.http.get(answer.headers["location"]).json()
    assert job["id"] == answer.json()["id"]
    assert (job["kind"], job["status"], job["result"], job["error"]) == ("finetune", "queued", None, None)
    assert job["progress"] == {"done": 0, "total": 4, "unit": "steps", "rate": None, "eta_seconds": None}
    assert job["created_at"].endswith("Z")


def test_the_same_request_is_the_same_job(service: Service, tmp_path: Path) -> None:
    pool = service.pool(name="pool")
    first = service.finetune(dataset="pool", fraction=0.5)
    assert first["id"].startswith("ft_")
    assert service.finetune(dataset=pool["id"], fraction=0.5, name="mine")["id"] == first["id"]
    assert service.finetune(dataset=pool["id"], rows=5)["id"] == first["id"]
    assert service.finetune(dataset=pool["id"], fraction=0.5, seed=1)["id"] != first["id"]
    service.train(tmp_path)
    again = service.http.post("/finetunes", json={"model": "org/base", "epochs": 2, "dataset": "pool", "rows": 5})
    assert again.status_code == 200
    assert again.json()["status"] == "succeeded"


def test_a_finetunes_plan_holds_ids_and_its_length(service: Service, hub: Hub) -> None:
    commit = hub.publish("org/base", {"config.json": b"{}"})
    pool = service.pool(10, name="pool")
    job = service.finetune(dataset="pool", fraction=0.55, batch_size=2, device_batch_size=1, epochs=3)
    claim = service.claim()
    plan = {"model": "org/base", "revision": commit, "dataset": pool["id"], "selection": None, "row_count": 5}
    assert claim.plan == plan
    assert job["progress"]["total"] == 3 * 3


def test_more_rows_than_there_are_cannot_be_drawn(service: Service) -> None:
    service.pool(10, name="pool")
    answer = service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base", "rows": 11})
    assert [item.pointer for item in problem_of(answer, 422).errors] == ["/rows"]


def test_a_model_inside_an_allowed_root_is_named_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "models" / "empty").mkdir()
    with serving(tmp_path / "store", allowed_roots=(tmp_path / "models",)) as service:
        service.pool(name="pool")
        service.finetune(dataset="pool", model=str(tmp_path / "models" / ".." / "models" / "mine"))
        assert service.claim().plan["model"] == str(folder)
        answer = service.http.post("/finetunes", json={"dataset": "pool", "model": str(folder.parent / "empty")})
        assert "config.json" in problem_of(answer, 422).detail


# Looking ------------------------------------------------------------------------------------------------------------


def test_progress_is_seen_while_a_job_works(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    claim = service.claim()
    time.sleep(0.01)
    service.backend.jobs.renew(claim, done=1, total=4)
    progress = service.http.get(f"/jobs/{job}").json()["progress"]
    assert (progress["done"], progress["total"]) == (1, 4)
    assert progress["rate"] > 0
    assert progress["eta_seconds"] > 0
    assert service.http.get(f"/finetunes/{job}").json()["status"] == "running"


def test_events_follow_a_job_to_its_end(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    with service.http.stream("GET", f"/jobs/{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        followed = events_of(answer)
        assert next(followed)[1]["status"] == "queued"
        claim = service.claim()
        assert next(followed)[1]["status"] == "running"
        service.backend.jobs.renew(claim, done=1)
        assert next(followed) == ("progress", service.http.get(f"/jobs/{job}").json() | {"progress": _any()})
        service.backend.jobs.fail(claim, FAILURE, permanent=True)
        name, last = list(followed)[-1]
    assert (name, last["status"], last["error"]["type"]) == ("finished", "failed", "broken")


def test_events_of_a_finished_job_are_its_end(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    service.finetune(dataset="pool")
    job = service.train(tmp_path)
    with service.http.stream("GET", f"/jobs/{job['id']}/events") as answer:
        assert [(name, state["status"]) for name, state in events_of(answer)] == [("finished", "succeeded")]


def test_silent_events_are_kept_alive(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.1)
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    with service.http.stream("GET", f"/jobs/{job}/events") as answer:
        assert any(line.startswith(":") for line in answer.iter_lines())


def test_events_of_a_deleted_job_end(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    with service.http.stream("GET", f"/jobs/{job}/events") as answer:
        followed = events_of(answer)
        next(followed)
        service.backend.jobs.cancel(job)
        service.backend.jobs.remove(job, kind="finetune")
        assert len(list(followed)) <= 1


def test_events_do_not_hold_up_a_stopping_server(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        service.pool(name="pool")
        job = service.finetune(dataset="pool")["id"]
        lines: list[str] = []

        def follow() -> None:
            with httpx.Client(timeout=30) as http, http.stream("GET", f"{service.url}/jobs/{job}/events") as answer:
                lines.extend(answer.iter_lines())

        follower = threading.Thread(target=follow)
        follower.start()
        time.sleep(0.5)
        began = time.monotonic()
    follower.join()
    assert time.monotonic() - began < 5
    assert lines


def test_jobs_are_listed_by_kind_and_status(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    done = service.finetune(dataset="pool")["id"]
    service.train(tmp_path)
    waiting = service.finetune(dataset="pool", seed=1)["id"]

    def ids(**params: str) -> list[str]:
        return [job["id"] for job in service.http.get("/jobs", params=params).json()["data"]]

    assert ids() == [waiting, done]
    assert ids(status="succeeded") == [done]
    assert ids(kind="finetune", status="queued") == [waiting]
    assert ids(kind="evaluation") == []


# Cancelling and trying again ------------------------------------------------------------------------------------------


def test_a_cancelled_job_stops_and_goes_on_when_tried_again(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    claim = service.claim()
    assert service.http.post(f"/jobs/{job}/cancel").json()["status"] == "cancelled"
    assert not service.backend.jobs.renew(claim, done=1)
    service.backend.jobs.release(claim)
    answer = service.http.post(f"/jobs/{job}/retry")
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job}"
    assert answer.json()["status"] == "queued"
    assert service.claim().job == job


def test_a_failed_job_says_why_and_goes_on_when_tried_again(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    service.backend.jobs.fail(service.claim(), FAILURE, permanent=True)
    failed = service.http.get(f"/finetunes/{job}").json()
    assert (failed["status"], failed["error"]["detail"]) == ("failed", FAILURE.detail)
    again = service.http.post(f"/jobs/{job}/retry").json()
    assert (again["status"], again["error"]) == ("queued", None)


def test_only_what_runs_is_cancelled_and_only_what_stopped_is_tried_again(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    problem_of(service.http.post(f"/jobs/{job}/retry"), 409)
    service.train(tmp_path)
    problem_of(service.http.post(f"/jobs/{job}/cancel"), 409)
    problem_of(service.http.post(f"/jobs/{job}/retry"), 409)


def test_a_job_at_work_is_not_deleted(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    assert "cancel first" in problem_of(service.http.delete(f"/finetunes/{job}"), 409).detail
    service.http.post(f"/jobs/{job}/cancel")
    assert service.http.delete(f"/finetunes/{job}").status_code == 204
    problem_of(service.http.get(f"/finetunes/{job}"), 404)


# Fine-tunes ---------------------------------------------------------------------------------------------------------


def test_a_finetune_gives_a_run_whose_last_adapter_downloads(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool", name="warmup")["id"]
    problem_of(service.http.get(f"/finetunes/{job}/content"), 409)
    result = service.train(tmp_path)["result"]
    run = service.http.get(f"/runs/{result['run']}").json()
    assert [checkpoint["id"] for checkpoint in run["checkpoints"]] == result["checkpoints"]
    assert run["finetune"] == job
    adapter = service.http.get("/finetunes/warmup/content")
    assert adapter.headers["etag"] == f'"{result["checkpoints"][-1]}"'
    with zipfile.ZipFile(io.BytesIO(adapter.content)) as archive:
        assert "adapter_model.safetensors" in archive.namelist()


def test_a_deleted_finetune_takes_its_run_and_checkpoints_with_it(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    service.finetune(dataset="pool")
    job = service.train(tmp_path)
    problem_of(service.http.delete("/datasets/pool"), 409)
    problem_of(service.http.delete(f"/runs/{job['result']['run']}"), 409)
    problem_of(service.http.delete(f"/checkpoints/{job['result']['checkpoints'][0]}"), 409)
    assert service.http.delete(f"/finetunes/{job['id']}").status_code == 204
    for noun in ("finetunes", "runs", "checkpoints", "jobs"):
        assert service.http.get(f"/{noun}").json()["data"] == []
    assert not [path for path in service.backend.settings.checkpoints.rglob("*") if path.is_file()]
    assert service.http.delete("/datasets/pool").status_code == 204


def test_a_finetune_is_kept_while_its_checkpoints_are_needed(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    service.task("target")
    service.finetune(dataset="pool")
    job = service.train(tmp_path)
    gradients = service.http.post("/gradients", json={"task": "target", "run": job["result"]["run"], "dims": [16]})
    assert gradients.status_code == 202
    problem = problem_of(service.http.delete(f"/finetunes/{job['id']}"), 409)
    assert gradients.json()["id"] in problem.detail
    grouped = service.http.post("/runs", json={"checkpoints": job["result"]["checkpoints"][:1]}).json()["id"]
    service.http.post(f"/jobs/{gradients.json()['id']}/cancel")
    assert service.http.delete(f"/gradients/{gradients.json()['id']}").status_code == 204
    assert grouped in problem_of(service.http.delete(f"/finetunes/{job['id']}"), 409).detail
    assert service.http.delete(f"/runs/{grouped}").status_code == 204
    assert service.http.delete(f"/finetunes/{job['id']}").status_code == 204


def test_two_finetunes_with_the_same_checkpoints_share_their_run(service: Service, tmp_path: Path) -> None:
    service.pool(name="pool")
    first = service.finetune(dataset="pool")
    service.train(tmp_path)
    second = service.finetune(dataset="pool", warmup_ratio=0.0)
    service.finish(service.http.get(f"/finetunes/{first['id']}").json()["result"])
    assert service.http.delete(f"/finetunes/{first['id']}").status_code == 204
    kept = service.http.get(f"/finetunes/{second['id']}").json()["result"]
    assert service.http.get(f"/runs/{kept['run']}").json()["finetune"] == second["id"]
    assert service.http.get(f"/finetunes/{second['id']}/content").status_code == 200


def test_a_dry_run_estimates_and_starts_nothing(service: Service, tmp_path: Path) -> None:
    service.pool(10, name="pool")
    body = {"dataset": "pool", "model": "org/base", "epochs": 2, "dry_run": True}
    answer = service.http.post("/finetunes", json=body)
    estimate = answer.json()
    assert answer.status_code == 200
    assert (estimate["rows"], estimate["seconds"], estimate["memory_bytes"]) == (10, None, None)
    assert 5 * 10 <= estimate["tokens"] <= 10 * 10
    assert estimate["free_bytes"] > 0
    assert service.http.get("/jobs").json()["data"] == []
    service.finetune(dataset="pool")
    service.train(tmp_path)
    measured = service.http.post("/finetunes", json=body).json()
    assert measured["seconds"] == pytest.approx(estimate["tokens"] * 2 / (100 * 2 / 4.0))


# Gradients ----------------------------------------------------------------------------------------------------------


def test_gradients_are_named_listed_and_estimated(service: Service) -> None:
    service.pool(10, name="pool")
    checkpoint = service.checkpoint()["id"]
    body = {"dataset": "pool", "checkpoints": [checkpoint], "kinds": ["sgd"], "dims": [16]}
    estimate = service.http.post("/gradients", json=body | {"dry_run": True}).json()
    assert (estimate["rows"], estimate["reused_rows"]) == (10, 0)
    assert estimate["bytes"] > 10 * 16 * 2
    assert service.http.get("/gradients").json()["data"] == []
    answer = service.http.post("/gradients", json=body | {"name": "mine"})
    assert answer.status_code == 202
    assert service.http.get("/gradients/mine").json()["request"]["dims"] == [16]
    assert service.http.patch("/gradients/mine", json={"name": "yours"}).json()["name"] == "yours"
    assert service.http.get("/gradients").json()["data"][0]["id"] == answer.json()["id"]
    problem_of(service.http.delete(f"/checkpoints/{checkpoint}"), 409)


def test_a_checkpoint_is_gone_through_once(service: Service) -> None:
    service.pool(name="pool")
    checkpoint = service.checkpoint(name="mine")["id"]
    body = {"dataset": "pool", "checkpoints": ["mine", checkpoint], "kinds": ["sgd"]}
    problem = problem_of(service.http.post("/gradients", json=body), 422)
    assert [item.pointer for item in problem.errors] == ["/checkpoints"]


def test_adam_asks_for_moments(service: Service) -> None:
    service.pool(name="pool")
    body = {"dataset": "pool", "checkpoints": [service.checkpoint()["id"]], "kinds": ["adam"]}
    problem = problem_of(service.http.post("/gradients", json=body), 422)
    assert [item.pointer for item in problem.errors] == ["/kinds"]


def test_hidden_states_ask_for_a_model_whose_width_is_known(service: Service) -> None:
    service.pool(name="pool")
    body = {"dataset": "pool", "checkpoints": [service.checkpoint()["id"]], "kinds": ["hidden"]}
    problem = problem_of(service.http.post("/gradients", json=body), 422)
    assert [item.pointer for item in problem.errors] == ["/kinds"]
    assert "config.json" in problem.detail


def test_what_does_not_fit_on_the_disk_is_refused(service: Service) -> None:
    dims = [(1 << 20) - number for number in range(8)]
    row_bytes = 4 * sum(dims)
    free = service.http.get("/ready").json()["free_bytes"]
    service.pool(free // row_bytes + 100, name="pool")
    body = {"dataset": "pool", "checkpoints": [service.checkpoint()["id"]], "kinds": ["sgd"], "dtype": "float32"}
    answer = service.http.post("/gradients", json=body | {"dims": dims})
    assert problem_of(answer, 507).type == "not-enough-space"
    assert service.http.get("/gradients").json()["data"] == []


# Evaluations --------------------------------------------------------------------------------------------------------


def test_an_evaluation_measures_the_last_checkpoint_of_a_finetune(service: Service, hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish("org/base", {"config.json": b"{}"})
    service.pool(name="pool")
    task = service.task("target", test=5)
    job = service.finetune(dataset="pool", name="tuned")["id"]
    early = service.http.post("/evaluations", json={"finetune": "tuned", "tasks": ["target"]})
    assert "has succeeded" in problem_of(early, 409).detail
    checkpoints = service.train(tmp_path)["result"]["checkpoints"]
    answer = service.http.post("/evaluations", json={"finetune": "tuned", "tasks": ["target"], "max_rows": 3})
    assert answer.status_code == 202
    assert answer.json()["id"].startswith("eval_")
    assert answer.json()["progress"]["total"] == 3 * 2
    assert service.claim().plan == {
        "model": "org/base", "revision": commit, "checkpoint": checkpoints[-1], "tasks": [task["id"]],
        "template": "tulu", "max_length": 2048, "precision": "float32",
    }  # fmt: skip
    problem_of(service.http.delete("/tasks/target"), 409)
    assert answer.json()["id"] in problem_of(service.http.delete(f"/finetunes/{job}"), 409).detail


def test_the_same_evaluation_is_the_same_job(service: Service) -> None:
    service.task("target")
    checkpoint = service.checkpoint(name="mine")["id"]
    bodies = [{"checkpoint": "mine", "tasks": ["target"]}, {"checkpoint": checkpoint, "tasks": ["target"], "name": "e"}]
    ids = {service.http.post("/evaluations", json=body).json()["id"] for body in bodies}
    assert len(ids) == 1
    base = service.http.post("/evaluations", json={"model": "org/base", "tasks": ["target"]}).json()
    assert base["id"] not in ids
    assert base["progress"]["total"] == 2


def test_a_task_is_evaluated_once_and_on_its_test_rows(service: Service) -> None:
    service.task("blind", test=0)
    service.task("seen")
    blind = problem_of(service.http.post("/evaluations", json={"model": "o/m", "tasks": ["seen", "blind"]}), 422)
    assert [item.pointer for item in blind.errors] == ["/tasks/1"]
    assert "no test rows" in blind.detail
    twice = problem_of(service.http.post("/evaluations", json={"model": "o/m", "tasks": ["seen", "seen"]}), 422)
    assert "twice" in twice.detail


def test_a_revision_belongs_to_a_model(service: Service) -> None:
    service.task("target")
    service.checkpoint(name="mine")
    body = {"checkpoint": "mine", "revision": "main", "tasks": ["target"]}
    assert [item.pointer for item in problem_of(service.http.post("/evaluations", json=body), 422).errors] == [
        "/revision"
    ]


def test_an_evaluation_is_renamed_and_deleted(service: Service) -> None:
    service.task("target")
    job = service.http.post("/evaluations", json={"model": "org/base", "tasks": ["target"], "name": "first"}).json()
    assert service.http.patch("/evaluations/first", json={"name": None}).json()["name"] is None
    service.finish({"rows": [], "seconds": 1.0})
    assert service.http.get(f"/evaluations/{job['id']}").json()["result"] == {"rows": [], "seconds": 1.0}
    assert service.http.delete(f"/evaluations/{job['id']}").status_code == 204
    assert service.http.delete("/tasks/target").status_code == 204


def test_a_deleted_task_takes_its_runs_of_words_with_it(service: Service) -> None:
    service.task("target")
    runs = service.backend.answers.ngrams
    runs.of(service.http.get("/tasks/target").json()["id"], 13)
    assert len(list(runs.root.iterdir())) == 1
    assert service.http.delete("/tasks/target").status_code == 204
    assert not list(runs.root.iterdir())


def test_a_validation_is_begun_found_again_and_deleted(service: Service, hub: Hub) -> None:
    commit = hub.publish("org/base", {"config.json": b"{}"})
    service.pool(name="pool")
    service.task("target")
    body = {"dataset": "pool", "task": "target", "model": "org/base", "subsets": 3, "scores": [{"control": "random"}]}
    answer = service.http.post("/validations", json=body | {"name": "chance"})
    assert answer.status_code == 202
    job = answer.json()
    assert (job["id"].partition("_")[0], job["kind"], answer.headers["Location"]) == (
        "val", "validation", f"/jobs/{job['id']}",
    )  # fmt: skip
    assert job["progress"] == {"done": 0, "total": 3, "unit": "trainings", "rate": None, "eta_seconds": None}
    assert service.http.post("/validations", json=body).json()["id"] == job["id"]
    assert service.http.get("/validations/chance").json() == job
    assert [one["id"] for one in service.http.get("/validations").json()["data"]] == [job["id"]]
    validations = service.backend.validations
    for _ in range(3):
        claim = service.claim()
        training = validations.training(claim.plan, claim.payload)
        assert (training.recipe.revision, len(training.rows)) == (commit, 5)
        losses = [float(sum(training.rows)), 2.0, None]
        validations.trainings.put(training, Measured(losses, rows=5, tokens=9, seconds=1.0))
        assert validations.finish(claim, training.key)
    result = service.http.get("/validations/chance").json()["result"]
    assert [target["row"] for target in result["scores"][0]["targets"]] == [0, 1]
    assert result["scores"][0]["targets"][1]["value"] == 0
    assert (result["trainings"], result["left_out_targets"]) == (3, 1)
    problem_of(service.http.delete("/tasks/target"), 409)
    assert "DELETE /validations/" in problem_of(service.http.delete(f"/jobs/{job['id']}"), 409).detail
    assert service.http.delete("/validations/chance").status_code == 204
    assert service.http.delete("/tasks/target").status_code == 204


def test_a_validation_can_be_estimated(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    with serving(tmp_path / "store", allowed_roots=(tmp_path,)) as service:
        service.pool(name="pool")
        service.task("target")
        body = {"dataset": "pool", "task": "target", "model": str(model), "scores": [{"control": "random"}]}
        answer = service.http.post("/validations", json=body | {"dry_run": True})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["trainings"], found["reused_trainings"], found["rows"]) == (64, 0, 5)
        assert found["tokens"] > 64 * 5 * 4
        assert service.http.get("/jobs").json()["data"] == []
        missing = service.http.post("/validations", json=body | {"scores": [{}]})
        assert problem_of(missing, 409).type == "gradients-missing"


def test_a_comparison_is_begun_found_again_and_deleted(service: Service) -> None:
    service.pool(name="pool")
    service.task("target")
    body = {"dataset": "pool", "tasks": ["target"], "k": 2, "contestants": [{"method": "random"}, {"method": "bm25"}]}
    answer = service.http.post("/comparisons", json=body | {"name": "table"})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["id"].partition("_")[0], job["kind"], answer.headers["Location"]) == (
        "cmp", "comparison", f"/jobs/{job['id']}",
    )  # fmt: skip
    assert service.http.post("/comparisons", json=body).json()["id"] == job["id"]
    comparisons, backend = service.backend.comparisons, service.backend
    for _ in range(2):
        claim = service.claim()
        recipe = comparisons.recipe(claim.plan, claim.payload)
        sources = backend.recipes.sources(recipe)
        if backend.scoring.known(recipe, sources) is None:
            backend.scoring.methods["bm25"].work(recipe, lambda _: None)
        scores = backend.scoring.known(recipe, sources)
        assert scores is not None
        selection = backend.answers.select(recipe, sources, scores, limit=0)
        assert comparisons.finish_selection(claim, selection.id, None)
    result = service.http.get("/comparisons/table").json()["result"]
    assert [row["contestant"] for row in result["rows"]] == ["random", "bm25"]
    assert [pair["contestants"] for pair in result["pairs"]] == [["random", "bm25"]]
    problem_of(service.http.delete(f"/selections/{result['rows'][0]['selection']}"), 409)
    assert "DELETE /comparisons/" in problem_of(service.http.delete(f"/jobs/{job['id']}"), 409).detail
    assert service.http.delete("/comparisons/table").status_code == 204
    assert service.http.delete(f"/selections/{result['rows'][0]['selection']}").status_code == 204


def test_a_comparison_that_cannot_be_is_refused_with_what_to_do(service: Service) -> None:
    service.pool(name="pool")
    service.task("target")
    body = {"dataset": "pool", "tasks": ["target"], "k": 2}
    missing = problem_of(service.http.post("/comparisons", json=body | {"contestants": [{"method": "rds"}]}), 409)
    assert missing.type == "gradients-missing"
    assert missing.detail.startswith("contestant 'rds': ")
    assert "POST /gradients" in missing.detail
    ways = [{"method": "random"}, {"method": "bm25", "dim": 8}]
    refused = problem_of(service.http.post("/comparisons", json=body | {"contestants": ways}), 422)
    assert [(one.pointer, one.detail) for one in refused.errors] == [
        ("/contestants/1/dim", "method=bm25 does nothing with dim: leave it out")
    ]
    problem_of(service.http.post("/comparisons", json=body | {"dataset": "nothing"}), 404)
    unknown = problem_of(service.http.post("/comparisons", json=body | {"contestants": [{"methods": "rds"}]}), 422)
    assert unknown.errors[0].pointer == "/contestants/0/methods"


def test_a_comparison_can_be_estimated(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    with serving(tmp_path / "store", allowed_roots=(tmp_path,)) as service:
        service.pool(name="pool")
        service.task("target")
        body = {"dataset": "pool", "tasks": ["target"], "k": 2, "train": True, "model": str(model), "repeats": 3}
        answer = service.http.post("/comparisons", json=body | {"dry_run": True})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert {"bm25", "random"} <= set(found["contestants"])
        assert found["trainings"] == 1 + 3 * len(found["contestants"])
        assert (found["rows"], found["reused_trainings"]) == (2, 0)
        assert found["tokens"] > 0
        assert {"influence", "rds", "embedding"} <= {one["method"] for one in found["left_out"]}
        assert service.http.get("/jobs").json()["data"] == []


class _any:  # noqa: N801 - reads as a word in a comparison
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0
