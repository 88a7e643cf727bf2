"""What all nouns have: pages, names, deletion, entity tags."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from service import zips
from tests.serving import Service, jsonl, problem_of


def make(service: Service, noun: str, number: int, **fields: str) -> dict[str, Any]:
    """The `number`-th thing of a kind."""
    if noun == "datasets":
        return service.pool(number + 1, **fields)
    if noun == "tasks":
        return service.task(**{"name": f"task {number}"} | fields)
    if noun in {"checkpoints", "adapters"}:
        return (service.checkpoint if noun == "checkpoints" else service.adapter)(number, **fields)
    if noun == "runs":
        checkpoint = service.checkpoint(number)["id"]
        made: dict[str, Any] = service.http.post("/runs", json={"checkpoints": [checkpoint]} | fields).json()
        return made
    if noun == "finetunes":
        service.upload(jsonl(2), name="pool")
        return service.finetune(dataset="pool", seed=number, **fields)
    service.task("target")
    body = {"model": "org/base", "tasks": ["target"], "seed": number}
    job: dict[str, Any] = service.http.post("/evaluations", json=body | fields).json()
    return job


NOUNS = ["datasets", "tasks", "checkpoints", "adapters", "runs", "finetunes", "evaluations"]


@pytest.mark.parametrize("noun", NOUNS)
def test_pages_cover_a_list_once_newest_first(service: Service, noun: str) -> None:
    made = [make(service, noun, number)["id"] for number in range(5)]
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = service.http.get(f"/{noun}", params={"limit": "2", **after}).json()
        found += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["id"]}
    assert found == made[::-1]


@pytest.mark.parametrize("noun", NOUNS)
def test_a_name_is_as_good_as_an_id(service: Service, noun: str) -> None:
    made = make(service, noun, 0, name="mine")
    by_name = service.http.get(f"/{noun}/mine")
    assert by_name.json() == service.http.get(f"/{noun}/{made['id']}").json()
    assert by_name.json()["name"] == "mine"
    assert service.http.patch(f"/{noun}/mine", json={"name": "yours"}).json()["name"] == "yours"
    problem_of(service.http.get(f"/{noun}/mine"), 404)


@pytest.mark.parametrize("noun", NOUNS)
def test_a_name_belongs_to_one(service: Service, noun: str) -> None:
    make(service, noun, 0, name="mine")
    other = make(service, noun, 1, name="other")["id"]
    problem = problem_of(service.http.patch(f"/{noun}/{other}", json={"name": "mine"}), 409)
    assert problem.type == "name-taken"
    assert service.http.get(f"/{noun}/{other}").json()["name"] == "other"


@pytest.mark.parametrize("noun", [noun for noun in NOUNS if noun != "tasks"])
def test_a_name_can_be_taken_away(service: Service, noun: str) -> None:
    made = make(service, noun, 0, name="mine")["id"]
    assert service.http.patch(f"/{noun}/mine", json={"name": None}).json()["name"] is None
    assert service.http.get(f"/{noun}/{made}").json()["name"] is None


def test_a_task_keeps_a_name(service: Service) -> None:
    service.task("target")
    problem_of(service.http.patch("/tasks/target", json={"name": None}), 409)


@pytest.mark.parametrize("noun", ["datasets", "tasks", "checkpoints", "adapters", "runs"])
def test_what_nothing_needs_is_deleted(service: Service, noun: str) -> None:
    made = make(service, noun, 0)["id"]
    answer = service.http.delete(f"/{noun}/{made}")
    assert (answer.status_code, answer.content) == (204, b"")
    problem_of(service.http.get(f"/{noun}/{made}"), 404)
    assert make(service, noun, 0)["id"] == made


def test_deleted_rows_leave_no_files(service: Service) -> None:
    service.pool(name="pool")
    service.task("target")
    service.checkpoint(name="mine")
    service.adapter(1, name="mine")
    for path in ("/datasets/pool", "/tasks/target", "/checkpoints/mine", "/adapters/mine"):
        assert service.http.delete(path).status_code == 204
    data = service.backend.settings.data
    assert [path for path in data.rglob("*") if path.is_file() and not path.name.startswith("catalog.")] == []


def test_an_upload_that_two_datasets_share_stays_with_the_other(service: Service) -> None:
    content = jsonl(2)
    first = service.upload(content, name="first").json()
    service.pool(3, name="base")
    second = service.upload(content, append_to="base", name="second").json()
    assert service.http.delete("/datasets/first").status_code == 204
    source = first["sources"][0]["sha256"]
    assert source in [one["sha256"] for one in second["sources"]]
    assert service.http.get("/datasets/second/content", params={"source": source}).content == content


def test_a_dataset_whose_files_are_lost_can_be_deleted(service: Service) -> None:
    id = service.pool(name="pool")["id"]
    shutil.rmtree(service.backend.settings.datasets / id)
    assert service.http.delete("/datasets/pool").status_code == 204
    assert service.pool(name="pool")["id"] == id
    assert service.http.get("/datasets/pool/content").content == jsonl(10)


def test_a_dataset_in_use_says_by_whom(service: Service) -> None:
    service.pool(name="pool")
    job = service.finetune(dataset="pool")["id"]
    problem = problem_of(service.http.delete("/datasets/pool"), 409)
    assert problem.type == "in-use"
    assert job in problem.detail


def test_a_run_groups_checkpoints_in_order(service: Service) -> None:
    ids = [service.checkpoint(number)["id"] for number in range(3)][::-1]
    made = service.http.post("/runs", json={"checkpoints": ids, "name": "mine"})
    assert made.status_code == 201
    assert [checkpoint["id"] for checkpoint in made.json()["checkpoints"]] == ids
    assert service.http.post("/runs", json={"checkpoints": ids}).status_code == 200
    problem_of(service.http.post("/runs", json={"checkpoints": [ids[0], ids[0]]}), 422)
    problem_of(service.http.delete(f"/checkpoints/{ids[0]}"), 409)
    assert service.http.delete("/runs/mine").status_code == 204
    assert service.http.delete(f"/checkpoints/{ids[0]}").status_code == 204


def test_a_run_has_one_base_model(service: Service) -> None:
    found = [service.checkpoint(0), service.checkpoint(1, model="org/other")]
    ids = [checkpoint["id"] for checkpoint in found]
    detail = problem_of(service.http.post("/runs", json={"checkpoints": ids}), 409).detail
    told = [f"{one['id']} was trained on {one['model']} at revision {one['revision']}" for one in found]
    assert detail == f"the checkpoints of a run share one base model; {', '.join(sorted(told))}: make a run of each"


@pytest.mark.parametrize("path", ["/datasets", "/datasets/pool", "/datasets/pool/content"])
def test_what_has_not_changed_is_not_sent_again(service: Service, path: str) -> None:
    service.pool(name="pool")
    tag = service.http.get(path).headers["etag"]
    for header in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        answer = service.http.get(path, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert service.http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_changed_answer_has_another_tag(service: Service) -> None:
    service.pool(1, name="pool")
    tag = service.http.get("/datasets/pool").headers["etag"]
    service.http.patch("/datasets/pool", json={"name": "pond"})
    assert service.http.get("/datasets/pond", headers={"If-None-Match": tag}).status_code == 200


def test_a_range_goes_on_only_where_nothing_has_changed(service: Service) -> None:
    service.pool(name="pool")
    tag = service.http.get("/datasets/pool/content").headers["etag"]
    headers = {"Range": "bytes=5-", "If-Range": tag}
    assert service.http.get("/datasets/pool/content", headers=headers).status_code == 206
    assert service.http.get("/datasets/pool/content", headers=headers | {"If-Range": '"other"'}).status_code == 200


def test_head_is_answered_as_get_without_a_body(service: Service) -> None:
    made = {noun: make(service, noun, 0)["id"] for noun in ("datasets", "tasks", "checkpoints", "runs", "finetunes")}
    made["jobs"] = made["finetunes"]
    for path, operations in service.http.get("/openapi.json").json()["paths"].items():
        if "get" not in operations or path.endswith("/events"):
            continue
        address = path.replace("{reference}", made.get(path.split("/")[1], "nothing")).replace("{selection}", "nothing")
        got, asked = service.http.get(address), service.http.head(address)
        assert asked.status_code == got.status_code, path
        assert not asked.content
        for name in ("content-type", "content-disposition"):
            assert asked.headers.get(name) == got.headers.get(name), (path, name)


def test_head_of_a_download_says_how_long_it_is_and_reads_nothing(service: Service) -> None:
    dataset = service.pool(5)["id"]
    content = service.http.get(f"/datasets/{dataset}/content").content
    asked = service.http.head(f"/datasets/{dataset}/content")
    assert (asked.headers["content-length"], asked.content) == (str(len(content)), b"")
    assert asked.headers["etag"] == f'"{dataset}"'
    checkpoint = service.checkpoint()["id"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zips, "READ", "nothing")  # a file that is read with it fails
        asked = service.http.head(f"/checkpoints/{checkpoint}/content")
    assert asked.status_code == 200
    assert "content-length" not in asked.headers, "a zip is made while it is sent"


def test_head_of_a_jobs_events_does_not_wait_for_its_end(service: Service) -> None:
    service.pool(2, name="pool")
    job = service.finetune(dataset="pool")["id"]
    asked = service.http.head(f"/jobs/{job}/events", timeout=5)
    assert (asked.status_code, asked.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


@pytest.mark.parametrize(
    ("collection", "noun"),
    [
        *[(noun, noun.removesuffix("s")) for noun in (*NOUNS, "selections", "conversions", "imports")],
        *[(noun, noun.removesuffix("s")) for noun in ("validations", "attributions", "jobs", "workers")],
        ("gradients", "gradients job"),
    ],
)
def test_what_is_not_there_is_said_to_be_none_of_its_noun_and_where_to_look(
    service: Service, collection: str, noun: str
) -> None:
    detail = problem_of(service.http.get(f"/{collection}/gradients"), 404).detail
    assert detail == f"no {noun} is called 'gradients'; GET /{collection} lists what there is"
    assert service.http.get(f"/{collection}").status_code == 200


def test_a_name_of_two_nouns_is_looked_for_in_both_and_the_message_says_so(service: Service) -> None:
    service.pool(3, name="pool")
    query = {"method": "random", "dataset": "pool", "pct": 1, "exclude": "nothing"}
    detail = problem_of(service.http.get("/select", params=query), 404).detail
    assert detail == (
        "no dataset or selection is called 'nothing'; GET /datasets and GET /selections list what there is"
    )
