"""GET /select and /scores over HTTP: refused with what to send, answered in the form asked for, read back."""

from __future__ import annotations

import io
import json
import re
import shlex
import threading
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from gradstore.cli import app
from numpy.typing import NDArray
from safetensors.numpy import load
from typer.testing import CliRunner

from datastore.errors import Damaged
from datastore.store import OpenStore
from tests.serving import Service, problem_of
from tests.stores import Store

DIM = 16


def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Features that turn away from those of the task's three rows, the further the later: the first rows are best."""
    angles = np.maximum(np.arange(start, stop) - 2, 0) / 50
    features = np.zeros((stop - start, dim), np.float32)
    features[:, 0], features[:, 1] = np.cos(angles), np.sin(angles)
    return features


def work(service: Service) -> None:
    """Do the gradients shards that wait."""
    Store(**{part.name: getattr(service.backend, part.name) for part in fields(OpenStore)}).work(numbers)


@pytest.fixture
def ready(service: Service) -> Service:
    """A service with the features of a pool of 40 rows and of a task."""
    service.pool(40, name="pool")
    service.task("target")
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    for owner in ({"dataset": "pool", "kinds": ["sgd"]}, {"task": "target"}):
        answer = service.http.post("/gradients", json={"run": "run", "dims": [DIM], **owner})
        assert answer.status_code == 202, answer.text
    work(service)
    return service


def select(service: Service, **params: Any) -> Any:
    answer = service.http.get("/select", params={"task": "target", "pct": 0.05, **params})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_best_rows_are_selected_and_read_back(ready: Service) -> None:
    selection = select(ready)
    assert (selection["count"], selection["pool"], len(selection["data"])) == (2, 40, 2)
    assert [row["row"] for row in selection["data"]] == [0, 1]
    assert ready.http.get(f"/selections/{selection['id']}").json() == selection
    assert select(ready)["id"] == selection["id"]
    named = ready.http.patch(f"/selections/{selection['id']}", json={"name": "best"}).json()
    assert named["id"] == ready.http.get("/selections/best").json()["id"] == selection["id"]
    assert [one["id"] for one in ready.http.get("/selections").json()["data"]] == [selection["id"]]


def test_rows_are_told_page_by_page_in_every_form_once_they_are_there(ready: Service) -> None:
    body = {"dataset": "pool", "run": "run", "kinds": ["sgd", "sign"], "dims": [DIM]}
    job = ready.http.post("/gradients", json=body).json()
    where = f"/gradients/{job['id']}/rows"
    assert "is queued" in problem_of(ready.http.get(where), 409).detail
    work(ready)
    several = problem_of(ready.http.get(where), 409)
    assert several.type == "ambiguous"
    urls = [item.detail for item in several.errors]
    assert [ready.http.get(url).status_code for url in urls] == [200, 200]
    problem_of(ready.http.get(f"{where}?feature_set=feat_9"), 404)
    page = ready.http.get(f"{urls[1]}&after=38&limit=3").json()
    assert page["feature_set"]["kind"] == "sign"
    row = {"norm": 1.0, "raw_norm": 2.0, "loss": 1.0, "logodds": None, "tokens": 1, "reason": None}
    assert (page["data"], page["has_more"]) == ([{"row": 38, **row}, {"row": 39, **row}], False)
    for after in (40, 10**30):
        assert ready.http.get(f"{urls[1]}&after={after}").json()["data"] == []
    columns = load(ready.http.get(f"{urls[0]}&format=safetensors").content)
    assert columns.keys() == {"norm", "raw_norm", "loss", "tokens", "reason"}
    assert (columns["norm"] == 1).all()
    assert columns["reason"].dtype == np.uint8
    forms = {"npy": "x-npy", "safetensors": "x-safetensors", "parquet": "vnd.apache.parquet"}
    for name, media_type in ((name, f"application/{kind}") for name, kind in forms.items()):
        asked = ready.http.get(f"{urls[0]}&format={name}")
        assert asked.headers["content-type"] == media_type
        assert asked.content == ready.http.get(urls[0], headers={"Accept": media_type}).content


def test_a_selection_comes_as_rows_and_as_a_table(ready: Service) -> None:
    rows = ready.http.get("/datasets/pool/content").content.splitlines()
    params = {"task": "target", "k": "3"}
    lines = ready.http.get("/select", params=params, headers={"Accept": "application/x-ndjson"})
    assert lines.content.splitlines() == rows[:3]
    selection = lines.headers["content-location"]
    assert ready.http.get(f"{selection}/content").content == lines.content
    table = ready.http.get(f"{selection}/content", headers={"Accept": "text/csv"}).text.splitlines()
    assert table[0].startswith("file,row,")
    assert [line.split(",")[:2] for line in table[1:]] == [["pool", str(row)] for row in range(3)]


def test_a_table_has_no_cell_that_a_spreadsheet_calculates(service: Service) -> None:
    row = {"id": "=1+1", "dataset": "=HYPERLINK(A1)", "prompt": "a", "completion": "b"}
    service.upload((json.dumps(row) + "\n").encode(), name="pool")
    asked = {"dataset": "pool", "method": "random", "k": 1}
    table = service.http.get("/select", params=asked, headers={"Accept": "text/csv"}).text
    assert table.splitlines()[1].split(",")[2:4] == ["'=1+1", "'=HYPERLINK(A1)"]


def test_a_checkpoint_that_is_named_twice_is_refused(ready: Service) -> None:
    checkpoint = ready.http.get("/checkpoints").json()["data"][0]["id"]
    asked = {"task": "target", "k": 3, "checkpoint": [checkpoint, checkpoint]}
    assert problem_of(ready.http.get("/select", params=asked), 422).errors[0].parameter == "checkpoint"


@pytest.mark.parametrize("query", ["k=5&k=6", "pct=0.1&pct=0.2", "k=5&method=bm25&method=influence"])
def test_a_parameter_of_one_value_is_refused_where_it_is_given_twice(ready: Service, query: str) -> None:
    problem = problem_of(ready.http.get(f"/select?task=target&{query}"), 422)
    assert [item.parameter for item in problem.errors] == [query.rpartition("&")[2].partition("=")[0]]
    assert "takes one value, and is given 2 times" in problem.detail
    assert ready.http.get("/select?task=target&task=target&k=5&weights=a&weights=b").status_code == 409


def test_what_did_not_go_as_asked_is_told(ready: Service) -> None:
    notes = [
        ready.http.get("/select", params={"task": "target", **asked}).json()["notes"]
        for asked in (
            {"k": 50},
            {"k": 5, "exclude_ids": ["typo"]},
            {"k": 5, "strategy": "k-center", "among": 3},
            {"k": 5},
        )
    ]
    assert notes == [
        ["40 rows instead of 50: no others can be chosen"],
        ["no row has 1 of the ids to leave out, such as 'typo'"],
        ["of 5 rows instead of among=3"],
        [],
    ]


def test_every_seed_that_is_taken_parts_rows_into_clusters(ready: Service) -> None:
    for seed in (0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        assert select(ready, strategy="clusters", clusters=2, selection_seed=seed, pct=0.2)["count"] == 8


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"run": "nope"}, 404, "no run is called 'nope'"),
        ({"run": "run"}, 422, "'run' is the name of run_"),
        ({"run": "{other}"}, 422, "has not all of the recipe's checkpoints"),
        ({"method": "rds"}, 422, "method=rds does not compare features of kind=sgd"),
        ({"kind": "rds"}, 422, "method=influence does not compare features of kind=rds"),
    ],
)  # fmt: skip
def test_a_recipe_that_contradicts_itself_is_refused(
    ready: Service, change: dict[str, Any], status: int, words: str
) -> None:
    other = ready.checkpoint(1)["id"]
    run = ready.http.post("/runs", json={"checkpoints": [other], "name": "other"}).json()["id"]
    recipe = select(ready)["recipe"] | {name: value.replace("{other}", run) for name, value in change.items()}
    assert words in problem_of(ready.http.post("/selections", json={"recipe": recipe}), status).detail


def test_a_percentage_is_told_its_fraction(ready: Service) -> None:
    problem = problem_of(ready.http.get("/select", params={"task": "target", "pct": 5}), 422)
    assert [(item.parameter, "5 % is 0.05" in item.detail) for item in problem.errors] == [("pct", True)]


@pytest.mark.parametrize(
    "query", ["task=target", "task=target&pct=0.1&k=3", "pct=0.1", "task=target&pct=nan", "task=target&pct=0.1&dims=16"]
)
def test_a_question_that_cannot_be_answered_is_refused(ready: Service, query: str) -> None:
    problem_of(ready.http.get(f"/select?{query}"), 422)


def test_missing_features_are_answered_with_the_post_that_computes_them(service: Service) -> None:
    service.pool(name="pool")
    service.task("target")
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    problem = problem_of(service.http.get("/select", params={"task": "target", "pct": 0.5, "dataset": "pool"}), 409)
    assert problem.type == "gradients-missing"
    method, path, body = problem.errors[0].detail.split(" ", 2)
    assert json.loads(body)["kinds"] == ["sgd"], "the checkpoint has no moments, of which adam would be"
    assert service.http.request(method, path, json=json.loads(body)).is_success


def test_several_candidates_are_listed_with_urls_that_answer(ready: Service) -> None:
    for owner in ({"dataset": "pool", "kinds": ["sgd"]}, {"task": "target"}):
        ready.http.post("/gradients", json={"run": "run", "dims": [2 * DIM], **owner})
    work(ready)
    problem = problem_of(ready.http.get("/select", params={"task": "target", "pct": 0.05}), 409)
    assert problem.type == "ambiguous"
    urls = [item.detail for item in problem.errors]
    assert len(urls) == 2
    assert {urlsplit(url).netloc for url in urls} == {urlsplit(ready.url).netloc}
    assert {ready.http.get(url).json()["recipe"]["dim"] for url in urls} == {DIM, 2 * DIM}
    assert select(ready, dim=DIM)["recipe"]["dim"] == DIM


def test_scores_that_are_not_ready_are_a_job_to_follow(ready: Service) -> None:
    ready.backend.scorer.stop()  # so that nobody computes them meanwhile
    answer = ready.http.get("/select", params={"task": "target", "pct": 0.05, "wait": 0})
    assert answer.status_code == 202
    job = ready.http.get(answer.headers["location"]).json()
    assert (job["kind"], job["status"]) == ("scoring", "queued")
    claim = ready.claim()
    ready.backend.scoring.work(claim, lambda _: None)
    assert ready.backend.jobs.succeed(claim)
    assert select(ready, wait=0)["count"] == 2


def test_a_server_that_stops_does_not_wait_for_scores(ready: Service) -> None:
    ready.backend.scorer.stop()  # so that there will be none
    threading.Timer(0.3, ready.backend.stopping.set).start()
    params: dict[str, str | float] = {"task": "target", "pct": 0.05, "wait": 30}
    assert ready.http.get("/select", params=params, timeout=15).status_code == 202


def test_scores_that_cannot_be_computed_are_said_and_tried_again(
    ready: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise Damaged("a chunk is damaged")

    with monkeypatch.context() as patched:
        patched.setattr("datastore.scoring.Scoring.work", broken)
        answer = ready.http.get("/select", params={"task": "target", "k": 3})
    assert answer.status_code == 409
    assert "a chunk is damaged" in answer.json()["detail"]
    assert select(ready)["count"] == 2


def test_the_whole_score_vector_in_three_forms(ready: Service) -> None:
    params = {"task": "target"}
    page = ready.http.get("/scores", params={**params, "limit": 40}).json()
    assert (page["rows"], page["has_more"]) == (40, False)
    assert ready.http.get("/scores", params={**params, "after": 2**63 - 1}).json()["data"] == []
    expected = [row["score"] for row in page["data"]]
    assert expected == sorted(expected, reverse=True)
    array = np.load(io.BytesIO(ready.http.get("/scores", params={**params, "format": "npy"}).content))
    tensors = load(ready.http.get("/scores", params={**params, "format": "safetensors"}).content)
    np.testing.assert_array_equal(tensors["score"], array)
    table = pq.read_table(io.BytesIO(ready.http.get("/scores", params={**params, "format": "parquet"}).content))
    np.testing.assert_allclose(array, expected, rtol=1e-6)
    np.testing.assert_allclose(table["score"].to_numpy(), expected, rtol=1e-6)


def test_a_selection_is_fine_tuned_on_and_then_in_use(ready: Service) -> None:
    selection = select(ready)["id"]
    job = ready.finetune(selection=selection)
    assert ready.claim().plan["row_count"] == 2
    assert job["id"] in problem_of(ready.http.delete(f"/selections/{selection}"), 409).detail
    problem_of(ready.http.delete("/datasets/pool"), 409)
    ready.http.post(f"/jobs/{job['id']}/cancel")
    assert ready.http.delete(f"/finetunes/{job['id']}").status_code == 204
    assert ready.http.delete(f"/selections/{selection}").status_code == 204


def test_a_scoring_job_can_be_deleted_and_its_scores_stay(ready: Service) -> None:
    chosen = select(ready)
    (job,) = ready.http.get("/jobs?kind=scoring").json()["data"]
    assert ready.http.delete(f"/jobs/{job['id']}").status_code == 204
    problem_of(ready.http.get(f"/jobs/{job['id']}"), 404)
    assert select(ready, pct=0.2)["data"][:2] == chosen["data"]
    assert ready.http.get("/jobs?kind=scoring").json()["data"] == [], "the scores were found"


def test_scores_whose_job_was_cancelled_wait_until_somebody_tries_it_again(ready: Service) -> None:
    ready.backend.scorer.stop()
    params: dict[str, Any] = {"task": "target", "pct": 0.05, "wait": 0}
    job = ready.http.get("/select", params=params).json()["id"]
    ready.http.post(f"/jobs/{job}/cancel")
    for path in ("/select", "/scores"):
        asked = params if path == "/select" else {"task": "target", "wait": 0}
        assert f"POST /jobs/{job}/retry" in problem_of(ready.http.get(path, params=asked), 409).detail
    assert ready.http.get(f"/jobs/{job}").json()["status"] == "cancelled"
    assert ready.http.post(f"/jobs/{job}/retry").json()["status"] == "queued"
    assert ready.http.get("/select", params=params).status_code == 202


def test_a_job_that_made_something_is_deleted_where_that_is(ready: Service) -> None:
    for job in ready.http.get("/jobs?kind=gradients").json()["data"]:
        detail = problem_of(ready.http.delete(f"/jobs/{job['id']}"), 409).detail
        assert detail.endswith(f"DELETE /gradients/{job['id']}")
    assert len(ready.http.get("/gradients").json()["data"]) == 2


def test_a_fine_tune_on_a_selection_is_estimated_from_its_own_rows(service: Service) -> None:
    rows = [{"prompt": "short" if number < 3 else "long " * 200, "completion": str(number)} for number in range(40)]
    service.upload("".join(json.dumps(row) + "\n" for row in rows).encode(), name="pool")
    service.task("target")
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    for owner in ({"dataset": "pool", "kinds": ["sgd"]}, {"task": "target"}):
        service.http.post("/gradients", json={"run": "run", "dims": [DIM], **owner})
    work(service)
    body = {"selection": select(service)["id"], "model": "org/base", "dry_run": True}
    cost = service.http.post("/finetunes", json=body).json()
    assert cost["rows"] == 2
    assert 2 <= cost["tokens"] <= 2 * 4


def test_a_recipe_alone_gives_its_selection_again(ready: Service) -> None:
    chosen = select(ready, pct=0.25, quota="pool.jsonl:0.5", dedupe=0.999, exclude_contaminated="true")
    assert ready.http.delete(f"/selections/{chosen['id']}").status_code == 204
    answer = ready.http.post("/selections", json={"recipe": chosen["recipe"]})
    assert answer.status_code == 200, answer.text
    assert {**answer.json(), "created_at": None} == {**chosen, "created_at": None}
    assert answer.headers["content-location"] == f"/selections/{chosen['id']}"
    gone = {**chosen["recipe"], "dim": 2 * DIM}
    assert problem_of(ready.http.post("/selections", json={"recipe": gone}), 409).type == "gradients-missing"
    for change, pointer in (({"pct": 5}, "/recipe/pct"), ({"pkt": 1}, "/recipe/pkt"), ({"k": 3}, "/recipe")):
        sent = {"recipe": {**chosen["recipe"], **change}}
        assert problem_of(ready.http.post("/selections", json=sent), 422).errors[0].pointer == pointer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datasets": []}, "at least 1"),
        ({"datasets": ["{pool}", "{pool}"]}, "names something twice"),
        ({"datasets": ["pool"]}, "'pool' is the name of ds_"),
        ({"tasks": ["{task}", "{task}"]}, "names something twice"),
        ({"tasks": []}, "selects for a task"),
        ({"tasks": ["\ud800"]}, "valid string"),
        ({"checkpoint_weights": [0]}, "add up to 1"),
        ({"checkpoint_weights": [-1]}, "greater than or equal to 0"),
        ({"checkpoint_weights": [0.5, 0.5]}, "a weight for each"),
        ({"checkpoints": [], "checkpoint_weights": []}, "a recipe has checkpoints"),
        ({"task_kind": None}, "no features of a task have task_kind=None and task_adam=None"),
        ({"task_kind": "sgd", "task_adam": "less"}, "no features of a task have task_kind=sgd and task_adam=less"),
        ({"k": 10**20, "pct": None}, "less than or equal"),
        ({"strategy": "clusters", "selection_seed": 0, "among": 10**20}, "less than or equal"),
        ({"dedupe": 0.9}, "dedupe_by is features or text"),
        ({"quota": {}}, "no share"),
        ({"quota": {"nobody": 0.5}}, "no row has the origin"),
        ({"quota": {"pool.jsonl": -1}}, "no fraction"),
        ({"quota": {"\ud800": 0.5}}, "no row has the origin"),
        ({"exclude": ["pool"]}, "'pool' is the name of ds_"),
        ({"exclude_ids": ["\ud800"]}, "valid string"),
    ],
)  # fmt: skip
def test_a_recipe_that_no_answer_carries_is_refused(ready: Service, change: dict[str, Any], words: str) -> None:
    recipe = select(ready)["recipe"]
    named = {"{pool}": recipe["datasets"][0], "{task}": recipe["tasks"][0]}
    said = {
        name: [named.get(item, item) if isinstance(item, str) else item for item in value]
        if isinstance(value, list)
        else value
        for name, value in change.items()
    }
    sent = json.dumps({"recipe": recipe | said}).encode()
    answer = ready.http.post("/selections", content=sent, headers={"Content-Type": "application/json"})
    problem = problem_of(answer, 422)
    assert words in " ".join([problem.detail, *(item.detail for item in problem.errors)])


@pytest.mark.parametrize("change", [{"exclude": ["gone"]}, {"exclude": ["a\0b"]}, {"decontaminate": ["gone"]}])
def test_a_recipe_of_what_is_not_there_is_not_found(ready: Service, change: dict[str, Any]) -> None:
    recipe = select(ready)["recipe"]
    problem_of(ready.http.post("/selections", json={"recipe": recipe | change}), 404)


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"method": "bm25"},
        {"method": "bm25", "aggregate": "avg", "dedupe": 0.9},
        {"method": "random", "selection_seed": 3},
        {"method": "random", "task": (), "pct": 0.2},
        {"quota": ["pool.jsonl:0.5"]},
        {"quota": ["equal"], "dedupe": 0.999},
        {"exclude_ids": ["row 3", "4"], "exclude_contaminated": "true", "ngram": 5},
        {"strategy": "clusters", "clusters": 2, "among": 20},
        {"strategy": "k-center"},
        {"combine": "mean", "aggregate": "max", "kind": "sgd", "decontaminate": ["target"]},
    ],
)
def test_the_request_and_the_command_of_a_card_name_the_whole_recipe(
    ready: Service, query: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = select(ready, **query)
    told = ready.http.get(f"/selections/{chosen['id']}/provenance").json()
    method, _, url = told["request"].partition(" ")
    again = ready.http.request(method, url)
    assert again.status_code == 200, again.text
    assert again.json()["id"] == chosen["id"]
    monkeypatch.setenv("GRADSTORE_URL", ready.url)
    done = CliRunner().invoke(app, [*shlex.split(told["command"])[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["id"] == chosen["id"]


def test_a_selection_is_excluded_by_its_name(ready: Service) -> None:
    first = select(ready)
    ready.http.patch(f"/selections/{first['id']}", json={"name": "best"})
    second = select(ready, exclude="best")
    assert second["recipe"]["exclude"] == [first["id"]]
    assert not {row["row"] for row in first["data"]} & {row["row"] for row in second["data"]}
    ready.http.patch(f"/selections/{first['id']}", json={"name": "pool"})
    both = ready.http.get("/select", params={"task": "target", "k": 1, "exclude": "pool"})
    assert f"'pool' is the name of {first['recipe']['datasets'][0]} and {first['id']}" in problem_of(both, 422).detail


@pytest.mark.parametrize("left", [b"", b"PAR1 but not for long"])
def test_lost_rows_of_a_selection_are_told_and_chosen_again_when_it_is_asked_for(ready: Service, left: bytes) -> None:
    chosen = select(ready)
    path = ready.backend.answers.files.path(chosen["id"])
    path.unlink()
    if left:
        path.write_bytes(left)
    for part in ("", "/content", "/export?format=jsonl"):
        problem = problem_of(ready.http.get(f"/selections/{chosen['id']}{part}"), 500)
        assert "ask for the selection again" in problem.detail
    assert select(ready) == chosen
    assert ready.http.get(f"/selections/{chosen['id']}").json() == chosen


def test_rows_are_drawn_without_a_task(ready: Service) -> None:
    answer = ready.http.get("/select", params={"method": "random", "k": 7, "selection_seed": 3})
    assert answer.status_code == 200, answer.text
    assert (answer.status_code, answer.json()["count"], answer.json()["contamination"]) == (200, 7, None)
    problem = problem_of(ready.http.get("/select", params={"method": "random", "k": 7, "dim": 16}), 422)
    assert [item.parameter for item in problem.errors] == ["dim"]


# Weights of a model without an adapter --------------------------------------------------------------------------------


def test_a_base_model_is_registered_and_selected_from_by_the_gradients_of_its_weights(service: Service) -> None:
    service.pool(40, name="pool")
    service.task("target")
    asked = {"model": "org/base", "name": "base"}
    base = service.http.post("/checkpoints", json=asked)
    assert (base.status_code, base.json()["method"], base.json()["model"]) == (201, "none", "org/base")
    assert service.http.post("/checkpoints", json=asked).json() == base.json()
    assert "nothing is stored here" in problem_of(service.http.get("/checkpoints/base/content"), 409).detail
    weights = ["*.v_proj.weight", "*.q_proj.weight"]
    body = {"checkpoints": ["base"], "kinds": ["sgd"], "dims": [DIM], "weights": weights}
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        assert service.http.post("/gradients", json={**body, **owner}).status_code == 202
    work(service)
    service.http.post("/gradients", json={**body, "dataset": "pool", "weights": ["lm_head.weight"]})
    work(service)
    recipe = select(service, checkpoint="base", weights=weights)["recipe"]
    assert (recipe["weights"], recipe["checkpoint_weights"]) == (sorted(weights), [1.0])
    missing = service.http.get(
        "/select", params={"task": "target", "k": 1, "checkpoint": "base", "weights": "lm_head.weight"}
    )
    assert '"weights": ["lm_head.weight"]' in problem_of(missing, 409).detail
    hidden = {"task": "target", "k": 1, "kind": "hidden", "weights": weights}
    assert "have no weights" in problem_of(service.http.get("/select", params=hidden), 422).detail


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"checkpoints": ["base"]}, "/weights", r'encoder, ask for kinds=\["embedding"\]'),
        ({"checkpoints": ["base"], "weights": ["*.mlp.*"]}, "/kinds", "no Adam moments .* ask for kinds sgd or sign$"),
        ({"checkpoints": ["lora"], "kinds": ["sgd"], "weights": ["*.mlp.*"]}, "/weights", "is a LoRA adapter"),
        ({"checkpoints": ["base"], "kinds": ["sgd"], "weights": []}, "/weights", "at least 1"),
        ({"checkpoints": ["base"], "weights": ["*"], "quantisation": "nf4"}, "", "leave quantisation out"),
    ],
)  # fmt: skip
def test_gradients_of_weights_that_cannot_be_are_refused(
    shared_service: Service, body: dict[str, Any], pointer: str, words: str
) -> None:
    shared_service.pool(3, name="pool")
    shared_service.http.post("/checkpoints", json={"model": "org/base", "name": "base"})
    shared_service.checkpoint(name="lora")
    problem = problem_of(shared_service.http.post("/gradients", json={"dataset": "pool", **body}), 422)
    assert problem.errors[0].pointer == pointer
    assert re.search(words, problem.detail)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "name the path of an adapter, or a model"),
        ({"model": "org/base", "step": 3}, "has no step"),
        ({"model": "nothing here"}, "no hub id"),
    ],
)
def test_a_base_model_that_cannot_be_registered_is_refused(
    shared_service: Service, body: dict[str, Any], words: str
) -> None:
    assert words in problem_of(shared_service.http.post("/checkpoints", json=body), 422).detail


def test_words_are_compared_without_features_and_their_scores_go_with_the_texts(service: Service) -> None:
    service.pool(40, name="pool")
    service.task("target")
    selection = select(service, method="bm25")
    recipe = selection["recipe"]
    assert (recipe["method"], recipe["aggregate"], recipe["checkpoints"]) == ("bm25", "max", [])
    answer = service.http.get("/scores", params={"task": "target", "method": "bm25", "format": "npy"})
    scores = np.load(io.BytesIO(answer.content))
    assert selection["data"][0]["row"] == int(scores.argmax())
    assert [row["score"] for row in selection["data"]] == pytest.approx(sorted(scores.tolist(), reverse=True)[:2])
    assert select(service, method="bm25")["id"] == selection["id"]
    refused = service.http.get("/select", params={"task": "target", "method": "bm25", "pct": 0.1, "dim": 8})
    assert [error.parameter for error in problem_of(refused, 422).errors or []] == ["dim"]
    kept = service.backend.settings.scores
    assert len(list(kept.glob("score_*"))) == 1
    for path in (f"/selections/{selection['id']}", "/datasets/pool"):
        assert service.http.delete(path).status_code == 204
    assert not list(kept.glob("score_*"))
