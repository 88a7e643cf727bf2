"""Uploads go to the store's disk as they arrive, within limits, and a refused one leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service import forms
from tests.serving import Service, form_files, jsonl, peft_files, problem_of, serving, task_files

BOUNDARY = "frontier"


def files_of(service: Service) -> list[Path]:
    """Everything in the store but the catalog and the empty folders."""
    data = service.backend.settings.data
    return [path for path in data.rglob("*") if path.is_file() and not path.name.startswith("catalog.")]


def form(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    """A form by hand: (headers after `form-data`, content) of every part."""
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data{head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def send(service: Service, body: bytes, path: str = "/datasets", boundary: str = BOUNDARY) -> Any:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return service.http.post(path, content=body, headers=headers)


# Datasets -----------------------------------------------------------------------------------------------------------


def test_an_uploaded_dataset_comes_back_byte_for_byte(service: Service) -> None:
    content = b"\xef\xbb\xbf" + jsonl(3).replace(b"\n", b"\r\n")
    answer = service.upload(content, name="pool")
    assert answer.status_code == 201
    assert answer.json()["created"]
    assert answer.headers["location"] == f"/datasets/{answer.json()['id']}"
    assert service.http.get("/datasets/pool/content").content.splitlines() == jsonl(3).splitlines()
    source = answer.json()["sources"][0]["sha256"]
    assert service.http.get("/datasets/pool/content", params={"source": source}).content == content


def test_the_same_rows_are_the_same_dataset(service: Service) -> None:
    first = service.pool(name="pool")
    again = service.upload(json.dumps([json.loads(line) for line in jsonl(10).splitlines()]).encode(), "other.json")
    assert again.status_code == 200
    assert not again.json()["created"]
    assert again.json()["id"] == first["id"]
    assert again.json()["name"] == "pool"
    assert len(service.http.get("/datasets/pool").json()["sources"]) == 2


def test_appended_rows_make_a_dataset_that_knows_its_prefix(service: Service) -> None:
    first = service.pool(4, name="pool")
    grown = service.upload(jsonl(2, first=4), append_to="pool").json()
    assert grown["prefix"] == first["id"]
    assert grown["rows"] == 6
    assert service.upload(jsonl(6)).json()["id"] == grown["id"]


def test_appended_rows_keep_the_uploads_of_the_rows_before_them(service: Service) -> None:
    """Also when the dataset appended to is deleted, and nothing else needs its upload."""
    service.upload(jsonl(4), "first.jsonl", name="pool")
    grown = service.upload(jsonl(2, first=4), "second.jsonl", append_to="pool").json()
    assert [source["filename"] for source in grown["sources"]] == ["first.jsonl", "second.jsonl"]
    service.http.delete("/datasets/pool")
    contents = [
        service.http.get(f"/datasets/{grown['id']}/content", params={"source": source["sha256"]}).content
        for source in grown["sources"]
    ]
    assert contents == [jsonl(4), jsonl(2, first=4)]


def test_appending_to_nothing_is_not_found(service: Service) -> None:
    problem_of(service.upload(jsonl(1), append_to="nothing"), 404)


def test_other_rows_take_a_name_only_when_told_to(service: Service) -> None:
    first = service.pool(1, name="pool")
    before = files_of(service)
    problem = problem_of(service.upload(jsonl(2), name="pool"), 409)
    assert problem.type == "name-taken"
    assert "replace=true" in problem.detail
    assert files_of(service) == before
    assert len(service.http.get("/datasets").json()["data"]) == 1
    second = service.upload(jsonl(2), name="pool", replace="true").json()
    assert service.http.get("/datasets/pool").json()["id"] == second["id"]
    assert service.http.get(f"/datasets/{first['id']}").json()["name"] is None


def test_bad_rows_are_skipped_when_told_to(service: Service) -> None:
    report = service.upload(jsonl(2) + b"{}\n", on_error="skip").json()["report"]
    assert (report["rows"], report["skipped"]) == (2, 1)
    assert report["problems"][0]["line"] == 3


def test_a_refused_dataset_leaves_nothing_behind(service: Service) -> None:
    problem_of(service.upload(jsonl(2) + b"{}\n", name="pool"), 422)
    assert files_of(service) == []
    assert service.http.get("/datasets").json()["data"] == []


def test_an_lfs_pointer_is_no_dataset(service: Service) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    assert "LFS" in problem_of(service.upload(pointer), 422).detail
    assert files_of(service) == []


def test_ranges_of_the_rows(service: Service) -> None:
    service.pool(name="pool")
    whole = jsonl(10)
    answer = service.http.get("/datasets/pool/content", headers={"Range": "bytes=10-19"})
    assert answer.status_code == 206
    assert answer.content == whole[10:20]
    assert answer.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    beyond = service.http.get("/datasets/pool/content", headers={"Range": f"bytes={len(whole)}-"})
    problem_of(beyond, 416)
    assert beyond.headers["content-range"] == f"bytes */{len(whole)}"
    problem_of(service.http.get("/datasets/pool/content", headers={"Range": "lines=1-2"}), 400)


def test_a_source_of_another_dataset_is_not_found(service: Service) -> None:
    service.pool(1, name="one")
    other = service.pool(2, name="two")["sources"][0]["sha256"]
    problem_of(service.http.get("/datasets/one/content", params={"source": other}), 404)
    problem_of(service.http.get("/datasets/one/content", params={"source": "../../catalog.sqlite3"}), 404)


def test_names_in_other_alphabets_reach_the_download(service: Service) -> None:
    service.upload(jsonl(1), "данные.jsonl", name="مجموعة 🙂")
    answer = service.http.get("/datasets/مجموعة 🙂/content")
    assert answer.status_code == 200
    assert "filename*=utf-8''" in answer.headers["content-disposition"]
    assert service.http.get("/datasets").json()["data"][0]["sources"][0]["filename"] == "данные.jsonl"


# The form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"on_error": "shrug"}, "on_error"),
        ({"name": "a/b"}, "name"),
        ({"replace": "perhaps"}, "replace"),
        ({"nmae": "pool"}, "nmae"),
    ],
)
def test_a_wrong_field_of_a_form_is_named(service: Service, fields: dict[str, str], parameter: str) -> None:
    problem = problem_of(service.upload(jsonl(1), **fields), 422)
    assert [item.parameter for item in problem.errors] == [parameter]
    assert files_of(service) == []


def test_a_form_without_its_file_says_so(service: Service) -> None:
    problem = problem_of(send(service, form(('; name="name"', b"pool"))), 422)
    assert [item.parameter for item in problem.errors] == ["file"]
    problem = problem_of(send(service, form(('; name="file"', jsonl(1)))), 422)
    assert "filename" in problem.detail


def test_two_files_where_one_is_wanted_are_refused(service: Service) -> None:
    body = form(('; name="file"; filename="a.jsonl"', jsonl(1)), ('; name="file"; filename="b.jsonl"', jsonl(2)))
    assert "not 2" in problem_of(send(service, body), 422).detail


def test_a_file_under_another_name_is_refused(service: Service) -> None:
    body = form(('; name="data"; filename="a.jsonl"', jsonl(1)))
    assert [item.parameter for item in problem_of(send(service, body), 422).errors] == ["data"]


def test_a_field_twice_is_refused(service: Service) -> None:
    body = form(('; name="file"; filename="a"', jsonl(1)), ('; name="name"', b"one"), ('; name="name"', b"two"))
    assert [item.parameter for item in problem_of(send(service, body), 422).errors] == ["name"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no form at all",
        form(('; name="file"; filename="a"', jsonl(1)), end=False),
        form(('; name="file"; filename="a"', jsonl(1)))[:-6],
        form(("", jsonl(1))),
        form(('; name="name"', b"\xff\xfe")),
    ],
    ids=["empty", "no form", "no end", "cut off", "without a name", "not UTF-8"],
)
def test_a_form_that_cannot_be_read_is_a_bad_request(service: Service, body: bytes) -> None:
    assert problem_of(send(service, body), 400).type == "unreadable"
    assert files_of(service) == []


def test_a_form_names_its_boundary(service: Service) -> None:
    answer = service.http.post("/datasets", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert "boundary" in problem_of(answer, 400).detail
    assert problem_of(send(service, b"x", boundary="b" * 5000), 400)


@pytest.mark.parametrize("name", ["../../escaped", "/etc/escaped", "a/../../escaped", "..", "C:escaped", ""])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(service: Service, name: str) -> None:
    body = form(('; name="name"', b"t"), ('; name="kind"', b"jsonl"), (f'; name="files"; filename="{name}"', jsonl(1)))
    problem_of(send(service, body, "/tasks"), 422)
    assert files_of(service) == []


def test_a_file_that_is_also_a_folder_is_refused(service: Service) -> None:
    body = form(('; name="files"; filename="a"', b"1"), ('; name="files"; filename="a/b"', b"2"))
    assert "'a/b'" in problem_of(send(service, body, "/tasks"), 422).detail
    same = form(('; name="files"; filename="a"', b"1"), ('; name="files"; filename="a"', b"2"))
    assert "two files" in problem_of(send(service, same, "/tasks"), 422).detail


def test_a_form_of_too_many_parts_is_too_large(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MAX_FILES", 3)
    many = form(*((f'; name="files"; filename="{number}"', b"") for number in range(4)))
    problem_of(send(service, many, "/tasks"), 413)
    fields = form(*((f'; name="{number}"', b"") for number in range(forms.MAX_FIELDS + 1)))
    problem_of(send(service, fields), 413)
    problem_of(send(service, form(('; name="name"', b"x" * (forms.MAX_FIELD_BYTES + 1)))), 413)


def test_a_pattern_that_takes_for_ever_holds_up_nobody(service: Service) -> None:
    row = {"prompt": "Q", "completion": "a" * 40 + "b", "pattern": "(a+)+$"}
    files = {"files": ("validation.jsonl", json.dumps(row).encode())}
    with ThreadPoolExecutor(1) as pool:
        fields: dict[str, Any] = {"data": {"name": "slow", "kind": "jsonl"}, "files": files, "timeout": 60}
        uploading = pool.submit(service.http.post, "/tasks", **fields)
        answered = 0
        while not uploading.done():
            assert service.http.get("/tasks", timeout=60).json()["data"] == []
            answered += 1
    problem = problem_of(uploading.result(), 422)
    assert "takes too long" in problem.detail
    assert problem.errors[0].line == 1
    assert answered > 3


def test_an_upload_beyond_the_limit_is_too_large(tmp_path: Path) -> None:
    with serving(tmp_path / "store", max_upload_bytes=100_000) as service:
        fits = jsonl(1000)
        assert len(fits) < 100_000
        assert service.upload(fits).status_code == 201
        before = files_of(service)
        problem = problem_of(service.upload(jsonl(3000)), 413)
        assert problem.type == "too-large"
        assert "GRADSTORE_MAX_UPLOAD_BYTES" in problem.detail
        assert files_of(service) == before


def test_an_upload_of_unsaid_length_is_stopped_at_the_limit(tmp_path: Path) -> None:
    with serving(tmp_path / "store", max_upload_bytes=100_000) as service:
        start = form(('; name="file"; filename="a.jsonl"', b""), end=False)[:-2]

        def endless() -> Iterator[bytes]:
            yield start
            for _ in range(40):
                yield jsonl(1000)

        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        problem_of(service.http.post("/datasets", content=endless(), headers=headers), 413)
        assert files_of(service) == []


def test_a_json_body_beyond_its_limit_is_too_large(service: Service) -> None:
    body = b'{"checkpoints": ["' + b"x" * (17 << 20) + b'"]}'
    answer = service.http.post("/runs", content=body, headers={"Content-Type": "application/json"})
    problem = problem_of(answer, 413)
    assert problem.type == "too-large"
    assert "16,777,216 bytes" in problem.detail
    assert "multipart/form-data" in problem.detail
    assert "GRADSTORE_MAX_UPLOAD_BYTES" not in problem.detail, "which would change nothing"


def test_who_waits_for_leave_to_send_is_refused_before_sending(tmp_path: Path) -> None:
    with serving(tmp_path / "store", max_upload_bytes=1000) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(
                f"POST /datasets HTTP/1.1\r\nHost: {host}:{port}\r\nExpect: 100-continue\r\nContent-Length: 5000\r\n"
                f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode()
            )
            assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_an_upload_that_breaks_off_leaves_nothing_behind(service: Service) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    body = form(('; name="file"; filename="a.jsonl"', jsonl(50_000)))
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /datasets HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode())
        connection.sendall(body[: len(body) // 2])
        incoming = service.backend.settings.data / "incoming"
        _eventually(lambda: any(incoming.glob("form-*")))
    _eventually(lambda: not any(incoming.glob("form-*")))
    assert service.http.get("/datasets").json()["data"] == []


def test_an_upload_is_never_held_in_memory(service: Service) -> None:
    row = json.dumps({"prompt": "p", "completion": "c" * 1_000_000}).encode() + b"\n"
    rows = 64

    def body() -> Iterator[bytes]:
        yield form(('; name="file"; filename="long.jsonl"', b""), end=False)[:-2]
        for number in range(rows):
            yield row.replace(b'"p"', f'"{number}"'.encode())
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    tracemalloc.start()
    try:
        answer = service.http.post("/datasets", content=body(), headers=headers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.json()["rows"] == rows
    assert peak < len(row) * rows / 2


def test_concurrent_uploads_of_one_dataset_make_one(service: Service) -> None:
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(service.pool(200, name="pool"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer in answers}) == 1
    assert len(service.http.get("/datasets").json()["data"]) == 1
    assert service.http.get("/datasets/pool/content").content == jsonl(200)


def test_a_dataset_that_is_uploaded_and_deleted_at_once_is_whole_or_gone(service: Service) -> None:
    id = service.pool(50)["id"]
    over = time.monotonic() + 2

    def delete() -> None:
        while time.monotonic() < over:
            assert service.http.delete(f"/datasets/{id}").status_code in {204, 404}

    deleters = [threading.Thread(target=delete) for _ in range(2)]
    for deleter in deleters:
        deleter.start()
    while time.monotonic() < over:
        assert service.upload(jsonl(50)).status_code in {200, 201, 409}
    for deleter in deleters:
        deleter.join()
    record, content = (service.http.get(f"/datasets/{id}{part}") for part in ("", "/content"))
    assert (record.status_code, content.status_code) in {(200, 200), (404, 404)}
    assert service.upload(jsonl(50)).is_success
    assert service.http.get(f"/datasets/{id}/content").content == jsonl(50)


# Tasks --------------------------------------------------------------------------------------------------------------


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_task_is_the_same_as_files_zip_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "mine"
    folder.mkdir(parents=True)
    for name, content in task_files("mine").items():
        (folder / name).write_bytes(content)
    with serving(tmp_path / "store", allowed_roots=(tmp_path / "tasks",)) as service:
        fields = {"name": "mine", "kind": "jsonl"}
        files = service.http.post("/tasks", data=fields, files=form_files(task_files("mine")))
        packed = service.http.post("/tasks", data=fields, files={"files": ("mine.zip", zipped(task_files("mine")))})
        registered = service.http.post("/tasks", json=fields | {"path": str(folder)})
    assert [answer.status_code for answer in (files, packed, registered)] == [201, 200, 200]
    assert files.json() == packed.json() == registered.json()
    assert (files.json()["validation"], files.json()["test"]) == (3, 2)


def test_a_zip_that_climbs_out_is_refused(service: Service) -> None:
    fields = {"name": "t", "kind": "jsonl"}
    answer = service.http.post("/tasks", data=fields, files={"files": ("t.zip", zipped({"../../out.jsonl": b"{}"}))})
    problem_of(answer, 422)
    assert files_of(service) == []


def test_files_that_are_no_task_are_refused(service: Service) -> None:
    answer = service.http.post("/tasks", data={"name": "t", "kind": "mmlu"}, files=form_files({"notes.txt": b"hello"}))
    assert problem_of(answer, 422).type == "invalid-task"
    assert files_of(service) == []


def test_another_task_takes_a_name_only_when_told_to(service: Service) -> None:
    service.task("target")
    fields = {"name": "target", "kind": "jsonl"}
    before = files_of(service)
    other = form_files(task_files("other"))
    assert problem_of(service.http.post("/tasks", data=fields, files=other), 409).type == "name-taken"
    assert files_of(service) == before
    assert service.http.post("/tasks", data=fields | {"replace": "true"}, files=other).status_code == 201


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_a_peft_folder(service: Service) -> None:
    checkpoint = service.checkpoint(name="mine")
    assert (checkpoint["model"], checkpoint["parameters"]) == ("org/base", 32)
    assert not checkpoint["has_moments"]
    answer = service.http.get("/checkpoints/mine/content")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.read("adapter_model.safetensors") == peft_files(0)["adapter_model.safetensors"]
        assert "adapter_config.json" in archive.namelist()
    again = service.http.get("/checkpoints/mine/content", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    assert service.http.get("/checkpoints/mine/content").content == answer.content


def test_a_checkpoint_is_the_same_as_files_zip_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "checkpoint-1"
    folder.mkdir(parents=True)
    for name, content in peft_files(0).items():
        (folder / name).write_bytes(content)
    with serving(tmp_path / "store", allowed_roots=(tmp_path / "runs",)) as service:
        files = service.http.post("/checkpoints", files=form_files(peft_files(0)))
        packed = service.http.post("/checkpoints", files={"files": ("c.zip", zipped(peft_files(0)))})
        registered = service.http.post("/checkpoints", json={"path": str(folder)})
    assert [answer.status_code for answer in (files, packed, registered)] == [201, 200, 200]
    assert files.json()["id"] == packed.json()["id"] == registered.json()["id"]


def test_an_adapter_must_not_name_a_base_model_of_the_server(service: Service) -> None:
    files = peft_files(0)
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "/etc"}
    files["adapter_config.json"] = json.dumps(config).encode()
    problem = problem_of(service.http.post("/checkpoints", files=form_files(files)), 422)
    assert problem.type == "invalid-checkpoint"
    assert "`model`" in problem.detail
    named = service.http.post("/checkpoints", data={"model": "org/base"}, files=form_files(files))
    assert named.status_code == 201


def test_a_pickled_adapter_is_refused(service: Service) -> None:
    files = peft_files(0)
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    assert problem_of(service.http.post("/checkpoints", files=form_files(files)), 422).type == "invalid-checkpoint"
    assert files_of(service) == []


def test_a_checkpoint_whose_name_is_taken_is_not_kept(service: Service) -> None:
    service.checkpoint(0, name="mine")
    before = files_of(service)
    answer = service.http.post("/checkpoints", data={"name": "mine"}, files=form_files(peft_files(1)))
    assert problem_of(answer, 409).type == "name-taken"
    assert files_of(service) == before


def test_a_source_is_named_by_its_hash(service: Service) -> None:
    content = jsonl(3)
    assert service.upload(content).json()["sources"][0]["sha256"] == hashlib.sha256(content).hexdigest()


def _eventually(true: Any) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
