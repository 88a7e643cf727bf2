"""Every error of the API is a problem that names the place and says what to do."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from gradstore import types
from gradstore.types import Problem

from service.protocol import MAX_HEAD_BYTES
from tests.serving import Service, form_files, jsonl, peft_files, problem_of, without_catalog

NOUNS = [
    "datasets",
    "tasks",
    "checkpoints",
    "runs",
    "gradients",
    "conversions",
    "selections",
    "finetunes",
    "evaluations",
    "validations",
    "predictors",
    "cascades",
]
POSTS = [
    "/runs",
    "/gradients",
    "/conversions",
    "/finetunes",
    "/evaluations",
    "/validations",
    "/predictors",
    "/cascades",
]
PREDICTOR: dict[str, Any] = {"dataset": "d", "task": "t"}
VALIDATION: dict[str, Any] = {"dataset": "d", "task": "t", "model": "o/m"}
FORMS = ["/datasets", "/tasks", "/checkpoints"]


@pytest.mark.parametrize("noun", [*NOUNS, "jobs"])
def test_an_unknown_name_is_not_found(shared_service: Service, noun: str) -> None:
    problem = problem_of(shared_service.http.get(f"/{noun}/nothing"), 404)
    assert problem.type == "not-found"
    assert "nothing" in problem.detail
    assert "GET /" in problem.detail


@pytest.mark.parametrize("noun", NOUNS)
def test_what_is_not_there_is_neither_renamed_nor_deleted(shared_service: Service, noun: str) -> None:
    problem_of(shared_service.http.patch(f"/{noun}/nothing", json={"name": "new"}), 404)
    problem_of(shared_service.http.delete(f"/{noun}/nothing"), 404)


@pytest.mark.parametrize(
    "path",
    [
        "/datasets/nothing/content", "/checkpoints/nothing/content", "/selections/nothing/content",
        "/finetunes/nothing/content", "/jobs/nothing/events",
    ],
)  # fmt: skip
def test_contents_of_nothing_are_not_found(shared_service: Service, path: str) -> None:
    problem_of(shared_service.http.get(path), 404)


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_a_job_that_is_not_there_is_neither_cancelled_nor_retried(shared_service: Service, verb: str) -> None:
    problem_of(shared_service.http.post(f"/jobs/nothing/{verb}"), 404)


def test_an_unknown_path_is_not_found(shared_service: Service) -> None:
    assert "GET /openapi.json" in problem_of(shared_service.http.get("/nowhere"), 404).detail


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/jobs", "GET, HEAD"),
        ("/datasets", "GET, HEAD, POST"),
        ("/datasets/pool", "DELETE, GET, HEAD, PATCH"),
        ("/jobs/any/cancel", "POST"),
        ("/openapi.json", "GET, HEAD"),
        ("/dashboard/", "GET, HEAD"),
    ],
)
def test_a_method_that_a_path_lacks_is_refused_with_all_that_it_has(
    shared_service: Service, path: str, methods: str
) -> None:
    answer = shared_service.http.put(path)
    assert f"it has {methods}" in problem_of(answer, 405).detail
    assert answer.headers["allow"] == methods


@pytest.mark.parametrize("path", [*POSTS, *FORMS[1:]])
@pytest.mark.parametrize("body", [b"{", b'{"model": NaN', b"\xff\xfe{}", b""])
def test_a_body_that_is_not_json_is_refused(shared_service: Service, path: str, body: bytes) -> None:
    answer = shared_service.http.post(path, content=body, headers={"Content-Type": "application/json"})
    if body:
        assert problem_of(answer, 400).type == "bad-request"
    else:
        assert answer.status_code in {415, 422}
        problem_of(answer, answer.status_code)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", ["[]", "1", "null", '"text"'])
def test_json_of_the_wrong_shape_is_invalid(shared_service: Service, path: str, body: str) -> None:
    problem_of(shared_service.http.post(path, content=body, headers={"Content-Type": "application/json"}), 422)


@pytest.mark.parametrize("path", POSTS)
def test_another_media_type_is_unsupported(shared_service: Service, path: str) -> None:
    answer = shared_service.http.post(path, content=b"a,b", headers={"Content-Type": "text/csv"})
    assert "application/json, not text/csv" in problem_of(answer, 415).detail


@pytest.mark.parametrize("path", FORMS)
def test_a_form_route_asks_for_a_form(shared_service: Service, path: str) -> None:
    assert "multipart/form-data" in problem_of(shared_service.http.post(path), 415).detail
    answer = shared_service.http.post(path, content=b"a,b", headers={"Content-Type": "text/csv"})
    assert "multipart/form-data" in problem_of(answer, 415).detail


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("/runs", {"checkpoints": []}, "/checkpoints"),
        ("/runs", {"checkpoints": ["a"], "surprise": 1}, "/surprise"),
        ("/runs", {"checkpoints": [1]}, "/checkpoints/0"),
        ("/runs", {"checkpoints": ["a"], "name": "a/b"}, "/name"),
        ("/gradients", {"dataset": "d", "run": "r", "dims": [0]}, "/dims/0"),
        ("/gradients", {"dataset": "d", "run": "r", "kinds": ["hessian"]}, "/kinds/0"),
        ("/gradients", {"dataset": "d", "run": "r", "token_budget": 2**30 + 1}, "/token_budget"),
        ("/gradients", {"dataset": "d", "run": "r", "weights": []}, "/weights"),
        ("/gradients", {"dataset": "d", "run": "r", "a~b/c": 1}, "/a~0b~1c"),
        ("/gradients", {"dataset": "d", "task": "t", "run": "r"}, ""),
        ("/gradients", {"dataset": "d"}, ""),
        ("/conversions", {"dataset": "d", "dtype": "int3"}, "/dtype"),
        ("/conversions", {"dataset": "d"}, "/dtype"),
        ("/conversions", {"dtype": "int8"}, ""),
        ("/finetunes", {"dataset": "d"}, "/model"),
        ("/finetunes", {"dataset": "d", "model": "o/m", "epochs": "many"}, "/epochs"),
        ("/finetunes", {"dataset": "d", "model": "o/m", "lora": {"r": 0}}, "/lora/r"),
        ("/finetunes", {"dataset": "d", "model": "o/m", "lora": {"targets": ["q_proj", 1]}}, "/lora/targets/1"),
        ("/finetunes", {"dataset": "d", "model": "o/m", "fraction": 5}, "/fraction"),
        ("/evaluations", {"model": "o/m", "tasks": []}, "/tasks"),
        ("/evaluations", {"model": "o/m", "checkpoint": "c", "tasks": ["t"]}, ""),
        ("/validations", {"dataset": "d", "task": "t"}, "/model"),
        ("/validations", VALIDATION | {"subsets": 2}, "/subsets"),
        ("/validations", VALIDATION | {"fraction": 50}, "/fraction"),
        ("/validations", VALIDATION | {"scores": []}, "/scores"),
        ("/validations", VALIDATION | {"scores": [{}, {"kind": "hessian"}]}, "/scores/1/kind"),
        ("/validations", VALIDATION | {"scores": [{"control": "random", "dim": 8}]}, "/scores/0"),
        ("/validations", VALIDATION | {"k": 1}, ""),
        ("/validations", VALIDATION | {"subsets": 10_000, "repeats": 3}, ""),
        ("/validations", VALIDATION | {"fraction": 1}, ""),
        ("/validations", VALIDATION | {"kind": "leave-top-k-out"}, ""),
        ("/validations", VALIDATION | {"kind": "leave-top-k-out", "k": 1, "repeats": 1}, ""),
        ("/validations", VALIDATION | {"split": "test"}, ""),
        ("/predictors", {"dataset": "d"}, "/task"),
        ("/predictors", PREDICTOR | {"fraction": 10}, "/fraction"),
        ("/predictors", PREDICTOR | {"fraction": 0.1, "rows": 100}, ""),
        ("/predictors", PREDICTOR | {"features": []}, "/features"),
        ("/predictors", PREDICTOR | {"features": ["hidden", "hidden"]}, ""),
        ("/predictors", PREDICTOR | {"features": ["colour"]}, "/features/0"),
        ("/predictors", PREDICTOR | {"encoder": "ck"}, ""),
        ("/predictors", PREDICTOR | {"model": "kernel", "levels": 3}, ""),
        ("/predictors", PREDICTOR | {"levels": 1}, "/levels"),
        ("/predictors", PREDICTOR | {"run": "r", "checkpoints": ["c"]}, ""),
        ("/cascades", PREDICTOR, "/budget"),
        ("/cascades", PREDICTOR | {"budget": 20}, "/budget"),
        ("/cascades", PREDICTOR | {"budget": 0.2, "rounds": 0}, "/rounds"),
        ("/cascades", PREDICTOR | {"budget": 0.2, "levels": 3}, "/levels"),
        ("/tasks", {"name": "t", "kind": 1, "path": "/"}, "/kind"),
        ("/tasks", {"name": "t", "kind": "jsonl"}, "/path"),
        ("/checkpoints", {"path": "/", "learning_rate": 0}, "/learning_rate"),
        ("/checkpoints", {"path": "/", "step": 10**30}, "/step"),
    ],
)
def test_an_invalid_field_is_pointed_at(shared_service: Service, path: str, body: dict[str, Any], pointer: str) -> None:
    problem = problem_of(shared_service.http.post(path, json=body), 422)
    assert problem.type == "invalid-input"
    assert pointer in [item.pointer for item in problem.errors]
    assert problem.total_errors == len(problem.errors)


def test_a_percentage_is_told_its_fraction(shared_service: Service) -> None:
    body = {"dataset": "d", "model": "o/m", "fraction": 5}
    assert "5 % is 0.05" in problem_of(shared_service.http.post("/finetunes", json=body), 422).detail


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(shared_service: Service, value: str) -> None:
    body = f'{{"dataset": "d", "model": "o/m", "learning_rate": {value}, "fraction": {value}}}'
    answer = shared_service.http.post("/finetunes", content=body, headers={"Content-Type": "application/json"})
    assert {item.pointer for item in problem_of(answer, 422).errors} == {"/learning_rate", "/fraction"}


@pytest.mark.parametrize("noun", [*NOUNS, "jobs"])
@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=ten", "limt=5"], ids=["none", "too many", "a word", "a typing error"]
)
def test_a_wrong_page_is_refused(shared_service: Service, noun: str, query: str) -> None:
    problem = problem_of(shared_service.http.get(f"/{noun}?{query}"), 422)
    assert problem.errors[0].parameter == query.partition("=")[0]


@pytest.mark.parametrize("noun", [*NOUNS, "jobs"])
def test_a_page_after_nothing_is_not_found(shared_service: Service, noun: str) -> None:
    problem_of(shared_service.http.get(f"/{noun}?after=nothing"), 404)


@pytest.mark.parametrize("query", ["kind=cooking", "status=lost"])
def test_jobs_are_filtered_by_what_there_is(shared_service: Service, query: str) -> None:
    assert problem_of(shared_service.http.get(f"/jobs?{query}"), 422).errors[0].parameter == query.partition("=")[0]


@pytest.mark.parametrize("noun", NOUNS)
@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "a/b"}, {"name": 1}, {"name": "n", "id": "x"}])
def test_a_wrong_name_is_refused(shared_service: Service, noun: str, body: dict[str, Any]) -> None:
    problem_of(shared_service.http.patch(f"/{noun}/nothing", json=body), 422)


REFUSED_NAMES = {
    "a/b": "a name has no slash",
    "a\\b": "a name has no slash",
    "a\nb": "line break or other control character",
    "a\x85b": "line break or other control character",
    "a\u2028b": "line break or other control character",
    ".": "'.' is no name",
    "..": "'..' is no name",
    " ": "neither begins nor ends with a space",
    " a": "neither begins nor ends with a space",
    "a\u3000": "neither begins nor ends with a space",
    "ds_0123456789abcdef01234567": "looks like an id",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_a_refused_name_is_told_what_names_are_made_of(shared_service: Service, name: str) -> None:
    problem = problem_of(shared_service.http.patch("/datasets/nothing", json={"name": name}), 422)
    assert problem.detail.startswith("/name: ")
    assert REFUSED_NAMES[name] in problem.detail
    uploaded = problem_of(shared_service.upload(jsonl(1), name=name), 422)
    assert uploaded.errors[0].parameter == "name"
    assert REFUSED_NAMES[name] in uploaded.detail


@pytest.mark.parametrize("name", ["...", "mmlu 5-shot", "تجربة", "run_1", "ds_beef", "a%2e", "?#"])
def test_what_a_name_may_be_it_can_be_asked_for_by(shared_service: Service, name: str) -> None:
    made = shared_service.pool(3)["id"]
    assert shared_service.http.patch(f"/datasets/{made}", json={"name": name}).status_code == 200
    assert shared_service.http.get(f"/datasets/{quote(name, safe='')}").json()["id"] == made


@pytest.mark.parametrize("reference", ["a%00b", "%0a", "x" * 300])
def test_a_name_that_nothing_can_have_is_refused(shared_service: Service, reference: str) -> None:
    problem_of(shared_service.http.get(f"/datasets/{reference}"), 422)


@pytest.mark.parametrize(
    "body",
    [
        {"dataset": "nothing", "run": "nothing"},
        {"task": "nothing", "checkpoints": ["nothing"]},
    ],
)
def test_gradients_of_nothing_are_not_found(shared_service: Service, body: dict[str, Any]) -> None:
    problem_of(shared_service.http.post("/gradients", json=body), 404)
    problem_of(shared_service.http.post("/gradients", json=body | {"dry_run": True}), 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/finetunes", {"dataset": "nothing", "model": "o/m"}),
        ("/finetunes", {"selection": "nothing", "model": "o/m"}),
        ("/evaluations", {"model": "o/m", "tasks": ["nothing"]}),
        ("/runs", {"checkpoints": ["nothing"]}),
        ("/validations", {"dataset": "nothing", "task": "t", "model": "o/m"}),
        ("/predictors", {"dataset": "nothing", "task": "t"}),
        ("/cascades", {"dataset": "nothing", "task": "t", "budget": 0.2}),
    ],
)
def test_what_a_request_names_must_exist(shared_service: Service, path: str, body: dict[str, Any]) -> None:
    assert "'nothing'" in problem_of(shared_service.http.post(path, json=body), 404).detail


@pytest.mark.parametrize(
    "model",
    ["../secrets", "/etc", "a/b/c", "gpt2", "..", "org/..", "org/../x", "", "org/na me", "C:\\models", "o/m\x00"],
)
def test_a_model_is_a_hub_id_or_a_folder_inside_an_allowed_root(service: Service, model: str) -> None:
    service.pool(name="pool")
    problem = problem_of(service.http.post("/finetunes", json={"dataset": "pool", "model": model}), 422)
    assert [item.pointer for item in problem.errors] == ["/model"]


@pytest.mark.parametrize("path", ["/tasks", "/checkpoints"])
def test_a_server_path_outside_the_allowed_roots_is_refused(service: Service, path: str) -> None:
    body = {"path": "/etc"} | ({"name": "t", "kind": "jsonl"} if path == "/tasks" else {})
    assert problem_of(service.http.post(path, json=body), 422).type == "path-not-allowed"


def test_an_unforeseen_error_keeps_its_insides_to_the_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    @service.app.post("/broken")
    def broken() -> None:
        raise RuntimeError("an inner secret")

    with caplog.at_level(logging.ERROR):
        answer = service.http.post("/broken")
    problem = problem_of(answer, 500)
    assert problem.instance is not None
    assert problem.instance in problem.detail
    assert "secret" not in answer.text
    logged = next(record for record in caplog.records if record.message == "unexpected error")
    assert vars(logged)["request"] == problem.instance
    assert logged.exc_info is not None
    assert "an inner secret" in str(logged.exc_info[1])


def test_a_dataset_whose_files_are_lost_is_no_secret_either(service: Service) -> None:
    id = service.pool(name="pool")["id"]
    service.backend.datasets.content(id).unlink()
    answer = service.http.get("/datasets/pool/content")
    problem_of(answer, answer.status_code)
    assert str(service.backend.settings.data) not in answer.text


def test_a_full_disk_is_told(service: Service) -> None:
    @service.app.post("/full")
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert "free some space" in problem_of(service.http.post("/full"), 507).detail


def test_a_catalog_that_does_not_answer_is_told(service: Service) -> None:
    with without_catalog(service):
        answer = service.http.get("/datasets")
        assert "try again" in problem_of(answer, 503).detail
        assert answer.headers["retry-after"] == "5"


def test_bad_rows_come_with_their_lines(shared_service: Service) -> None:
    problem = problem_of(shared_service.upload(jsonl(1) + b"{}\n" + b"[]\n"), 422)
    assert problem.type == "invalid-dataset"
    assert [item.line for item in problem.errors] == [2, 3]
    assert problem.total_errors == 2


UNBOUNDED = {"targets", "kind", "source"}
"""Texts that no column of the catalog holds: they are compared, or kept in a record without a limit."""


def strings(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas of the texts that a field may be or hold."""
    if schema.get("type") == "string" and not schema.keys() & {"enum", "const"}:
        yield schema
    for part in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else [])):
        yield from strings(part)


@pytest.mark.parametrize(
    "model",
    [*types.Request.__subclasses__()],
    ids=lambda model: model.__name__,
)
def test_every_text_of_a_request_has_a_longest(model: type[types.Request]) -> None:
    for name, schema in model.model_json_schema()["properties"].items():
        unbounded = [one for one in strings(schema) if "maxLength" not in one]
        assert not unbounded or name in UNBOUNDED, name


def test_what_is_too_long_is_refused(shared_service: Service) -> None:
    long = "x" * 5000
    for path, body in (
        ("/finetunes", {"dataset": "pool", "model": long}),
        ("/finetunes", {"dataset": long, "model": "org/base"}),
        ("/evaluations", {"model": "org/base", "revision": long, "tasks": ["t"]}),
        ("/checkpoints", {"path": long}),
    ):
        problem = problem_of(shared_service.http.post(path, json=body), 422)
        assert "at most" in problem.detail
    for fields in ({"model": long}, {"revision": long}):
        answer = shared_service.http.post("/checkpoints", data=fields, files=form_files(peft_files(0)))
        assert [item.parameter for item in problem_of(answer, 422).errors] == list(fields)


@pytest.mark.parametrize(
    "sent",
    [
        b"this is not HTTP\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nno colon here\r\n\r\n",
        b"GET /health?" + b"a" * MAX_HEAD_BYTES,
    ],
)
def test_what_is_no_http_is_answered_with_a_problem(shared_service: Service, sent: bytes) -> None:
    address = httpx.URL(shared_service.url)
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(sent)
        answer = HTTPResponse(connection)
        answer.begin()
        problem = Problem.model_validate_json(answer.read())
    assert answer.status == problem.status == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == problem.instance
    assert "several requests" in problem.detail


def test_a_query_of_a_thousand_long_names_is_read(shared_service: Service) -> None:
    query = "&".join(f"checkpoint={number:0>255}" for number in range(1000))  # httpx sends no more than 64 KiB
    with closing(HTTPConnection(httpx.URL(shared_service.url).netloc.decode(), timeout=30)) as connection:
        connection.request("GET", f"/scores?task=target&{query}")
        assert connection.getresponse().status == 404


def test_what_concerns_no_parameter_names_none_and_too_few_are_counted(shared_service: Service) -> None:
    refused = problem_of(shared_service.http.get("/select?task=target"), 422)
    assert refused.errors[0].parameter is None
    assert refused.detail.startswith("say how much to select")
    few = problem_of(shared_service.http.get("/overlaps?task=target&pct=0.1"), 422)
    assert few.detail == "task: at least 2 needed, and 1 given"
