"""What strangers and careless users send: every route is locked, no address is fetched, nothing leads outside."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from pydantic import SecretStr
from safetensors.numpy import save

from datastore.keys import Keys
from service.middleware import SECURITY_HEADERS
from tests.hub import Hub
from tests.serving import Service, form_files, peft_files, problem_of, serving

ADDRESSES = [
    "http://169.254.169.254/latest/meta-data", "https://evil.example/org/model", "file:///etc/passwd", "//evil/x",
    "s3://bucket/key", "git+ssh://evil.example/x", "org/model@http://evil.example", "hf://org/model", "http:/evil",
    "\\\\evil.example\\x", "org/model?x=http://evil.example", "org/model#x", "org/%2e%2e",
]  # fmt: skip


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a key, and a client that has it."""
    with serving(tmp_path_factory.mktemp("locked") / "store", api_key=SecretStr("open sesame")) as service:
        yield service


@pytest.fixture
def rooted(tmp_path: Path) -> Iterator[Service]:
    """A service with an allowed folder, `root`, beside which there is another, `outside`."""
    for name in ("root", "outside"):
        (tmp_path / name).mkdir()
    with serving(tmp_path / "store", allowed_roots=(tmp_path / "root",)) as service:
        yield service


# The door -----------------------------------------------------------------------------------------------------------


def test_every_route_is_locked_and_every_answer_has_the_security_headers(locked: Service) -> None:
    document = locked.http.get("/openapi.json").json()
    reader = Keys(locked.backend.catalog).create("reader", scope="read").key
    answers = []
    with httpx.Client(base_url=locked.url) as stranger:
        for path, operations in document["paths"].items():
            place = re.sub(r"\{\w+\}", "any", path)
            for method in (*operations, "head", "options", "put"):
                answer = stranger.request(method, place)
                assert answer.status_code == 401, (method, path)
                answers.append(answer)
            for method in set(operations) - {"get"}:
                answer = stranger.request(method, place, headers={"Authorization": f"Bearer {reader}"})
                assert problem_of(answer, 403).type == "not-allowed", (method, path)
                answers.append(answer)
        for path in ("/openapi.json", "/docs", "/redoc", "/nowhere", "/dashboards", "/%2e%2e/x"):
            answers.append(stranger.get(path))
            assert answers[-1].status_code == 401, path
        for path in ("/", "/dashboard", "/dashboard/", "/dashboard/api.js", "/dashboard/nowhere"):
            answers.append(stranger.get(path))
            assert answers[-1].status_code in {200, 307, 404}, path
        for path in ("/dashboard/%2e%2e/%2e%2e/app.py", "/dashboard/..%2f..%2fapp.py", "/dashboard//etc/passwd"):
            answers.append(stranger.get(path))
            assert answers[-1].status_code == 404, path
    answers += [locked.http.get(path) for path in ("/health", "/datasets", "/metrics", "/openapi.json", "/nowhere")]
    assert len(answers) > 200
    for answer in answers:
        for name, value in SECURITY_HEADERS.items():
            own = name == "Content-Security-Policy" and answer.request.url.path.startswith("/dashboard")
            assert name in answer.headers if own else answer.headers[name] == value, (answer.request.url, name)


@pytest.mark.parametrize("host", ["[::1", "a]b"])
def test_a_host_that_is_none_is_refused(shared_service: Service, host: str) -> None:
    assert shared_service.http.get("/health", headers={"Host": host}).status_code in {400, 403}


@pytest.mark.parametrize("origin", ["http://[::1", "http://a]b"])
def test_an_origin_that_is_none_is_refused(shared_service: Service, origin: str) -> None:
    problem_of(shared_service.http.get("/health", headers={"Origin": origin}), 403)


# No address that a user sends is fetched ------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_is_taken_for_a_model(rooted: Service, hub: Hub, address: str) -> None:
    rooted.pool(name="pool")
    rooted.task("target")
    asked = list(hub.asked)
    wanted = {
        "/finetunes": {"dataset": "pool", "model": address},
        "/evaluations": {"tasks": ["target"], "model": address},
        "/validations": {"dataset": "pool", "task": "target", "model": address},
        "/checkpoints": {"model": address, "learning_rate": 1e-4},
    }
    for path, body in wanted.items():
        assert problem_of(rooted.http.post(path, json=body), 422).type == "path-not-allowed", path
    files = peft_files(0)
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": address}
    files["adapter_config.json"] = json.dumps(config).encode()
    for fields, refused in (({}, "invalid-checkpoint"), ({"model": address}, "path-not-allowed")):
        answer = rooted.http.post("/checkpoints", data={"learning_rate": "1e-4", **fields}, files=form_files(files))
        assert problem_of(answer, 422).type == refused
    assert hub.asked == asked


@pytest.mark.parametrize("revision", ["../../x", "http://evil.example/x", "a//../b", "?x", "main#x", "%2e%2e"])
def test_a_revision_leads_nowhere_else(rooted: Service, hub: Hub, revision: str) -> None:
    rooted.pool(name="pool")
    asked = list(hub.asked)
    body = {"dataset": "pool", "model": "org/base", "revision": revision}
    problem_of(rooted.http.post("/finetunes", json=body), 422)
    assert hub.asked == asked


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("path", ["/tasks", "/checkpoints", "/imports"])
def test_no_address_is_taken_for_a_folder(rooted: Service, path: str, address: str) -> None:
    bodies = {
        "/tasks": {"name": "t", "kind": "jsonl"},
        "/checkpoints": {},
        "/imports": {"dataset": "pool", "checkpoint": "ck", "projection_id": "mine"},
    }
    answer = rooted.http.post(path, json={"path": address, **bodies[path]})
    assert problem_of(answer, 422).type == "path-not-allowed", answer.text


# Nothing leads outside --------------------------------------------------------------------------------------------


def test_no_link_leads_out_of_the_allowed_folders(rooted: Service, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    model = outside / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(save({"w": np.zeros(2, np.float32)}))
    (root / "linked").symlink_to(model)
    (root / "files").mkdir()
    for file in model.iterdir():
        (root / "files" / file.name).symlink_to(file)
    (root / "good").mkdir()
    for file in model.iterdir():
        (root / "good" / file.name).write_bytes(file.read_bytes())
    rooted.pool(name="pool")

    def asked(name: str) -> httpx.Response:
        return rooted.http.post("/finetunes", json={"dataset": "pool", "model": str(root / name)})

    for name in ("linked", "files", "../outside/model"):
        assert problem_of(asked(name), 422).type == "path-not-allowed", name
    assert asked("good").status_code == 202


@pytest.mark.parametrize("elsewhere", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_no_index_names_weights_elsewhere(rooted: Service, tmp_path: Path, elsewhere: str) -> None:
    weights = save({"w": np.zeros(2, np.float32)})
    index = json.dumps({"weight_map": {"w": elsewhere}}).encode()
    files = {"config.json": b"{}", "model.safetensors": weights, "model.safetensors.index.json": index}
    folder = tmp_path / "root" / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rooted.pool(name="pool")
    answers = [
        rooted.http.post("/checkpoints", data={"model": "org/base"}, files=form_files(files)),
        rooted.http.post("/checkpoints", json={"path": str(folder), "model": "org/base"}),
        rooted.http.post("/finetunes", json={"dataset": "pool", "model": str(folder)}),
    ]
    for answer in answers:
        assert "outside its folder" in problem_of(answer, 422).detail


def test_a_zip_bomb_is_refused_and_leaves_nothing_behind(rooted: Service) -> None:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("dev/a.jsonl", "w", force_zip64=True) as file,
    ):
        for _ in range(300):
            file.write(bytes(1 << 20))
    sent = {"/tasks": {"name": "t", "kind": "jsonl"}, "/checkpoints": {"model": "org/base"}}
    for path, fields in sent.items():
        answer = rooted.http.post(path, data=fields, files={"files": ("a.zip", packed.getvalue())})
        assert "unpacks to 314,572,800 bytes" in problem_of(answer, 413).detail
    left = [
        name for folder in ("incoming", "tasks", "checkpoints") for name in below(rooted.backend.settings.data / folder)
    ]
    assert left == []


def below(folder: Path) -> list[str]:
    """The files of a folder."""
    return [name for _, _, names in os.walk(folder) for name in names]


def test_no_pickle_is_opened_without_a_guard() -> None:
    opens = re.compile(r"(torch\.load|np\.load|numpy\.load|pickle\.loads?|joblib\.load|read_pickle)\([^\n]*")
    found = [
        (path.name, match[0])
        for folder in ("service", "worker", "datastore", "client/gradstore")
        for path in (Path(__file__).parent.parent / folder).rglob("*.py")
        for match in opens.finditer(path.read_text())
    ]
    assert len(found) > 5
    assert [one for one in found if "weights_only=True" not in one[1] and "allow_pickle=False" not in one[1]] == []
