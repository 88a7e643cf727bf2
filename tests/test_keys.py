"""API keys: made and revoked on the server, scopes, limits, what jobs and the audit log record of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradstore import GradientStore, errors
from gradstore.types import CreatedApiKey, KeyScope
from pydantic import SecretStr

from datastore.audit import Audit
from datastore.catalog import Catalog, utc_now
from datastore.errors import Conflict, InvalidInput, NotFound
from datastore.keys import Keys
from datastore.schema import ApiKeyRow, AuditRow, JobRow
from service.access import Bucket
from tests.conftest import REPOSITORY
from tests.processes import wait_for
from tests.serving import Service, jsonl, problem_of, serving
from tests.test_service_command import refused, served

ADMIN = "the administrator's own key"
PATIENCE = 10.0  # seconds until a key that was made or revoked elsewhere is noticed: it takes one, on a machine at rest


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Service]:
    """A service with a key in its environment, and a client that has it."""
    with serving(tmp_path / "store", api_key=SecretStr(ADMIN)) as service:
        yield service


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """An empty catalog."""
    opened = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    opened.migrate()
    yield opened
    opened.close()


@contextmanager
def caller(service: Service, key: str | None) -> Iterator[httpx.Client]:
    """A client with a key, or with none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=service.url, headers=headers, timeout=30) as http:
        yield http


def made(service: Service, name: str, scope: KeyScope, **limits: int) -> CreatedApiKey:
    """A new key."""
    return Keys(service.backend.catalog).create(name, scope=scope, **limits)


def recorded(service: Service, **wanted: Any) -> list[dict[str, Any]]:
    """Entries of the audit log, as the administrator sees them."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    answer = httpx.get(f"{service.url}/audit", params={"limit": 1000, **wanted}, headers=headers)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


# At rest ----------------------------------------------------------------------------------------------------------


def test_a_key_is_nowhere_in_the_catalog(catalog: Catalog, tmp_path: Path) -> None:
    key = Keys(catalog).create("ann", scope="write").key
    assert re.fullmatch(r"gsk_[\w-]{43}", key)
    found = Keys(catalog).find(key)
    assert found is not None
    assert found.name == "ann"
    files = b"".join(path.read_bytes() for path in tmp_path.glob("catalog.sqlite3*"))
    assert b"ann" in files
    assert key.encode() not in files
    assert key.removeprefix("gsk_").encode() not in files


def test_a_key_that_differs_in_one_letter_is_none(catalog: Catalog) -> None:
    key = Keys(catalog).create("ann", scope="write").key
    other = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert [Keys(catalog).find(text) for text in (other, "", "gsk_", key + " ", key[4:], "gsk_\0")] == [None] * 6


def test_a_name_is_never_given_again(catalog: Catalog) -> None:
    keys = Keys(catalog)
    keys.create("ann", scope="read")
    keys.revoke("ann")
    with pytest.raises(Conflict, match="choose another name"):
        keys.create("ann", scope="read")
    with pytest.raises(InvalidInput, match="gradstore keys list"):
        keys.revoke("bob")


# Who may come in ----------------------------------------------------------------------------------------------------


def test_the_first_key_locks_a_server_that_was_open_and_revoking_it_does_not_open_it(service: Service) -> None:
    assert service.http.get("/datasets").status_code == 200
    key = made(service, "ann", "admin").key
    wait_for(lambda: service.http.get("/datasets").status_code == 401, patience=PATIENCE)
    with caller(service, key) as http:
        assert http.get("/datasets").status_code == 200
        Keys(service.backend.catalog).revoke("ann")
        wait_for(lambda: http.get("/datasets").status_code == 401, patience=PATIENCE)
        assert "is revoked" in problem_of(http.get("/datasets"), 401).detail
    problem_of(service.http.get("/datasets"), 401)


def test_a_server_that_starts_when_all_keys_are_revoked_is_locked(tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        made(first, "ann", "admin")
        Keys(first.backend.catalog).revoke("ann")
    with serving(tmp_path) as second:
        problem_of(second.http.get("/datasets"), 401)


def test_a_key_revoked_elsewhere_is_refused_by_every_api_process(tmp_path: Path) -> None:
    with serving(tmp_path, api_key=SecretStr(ADMIN)) as one, serving(tmp_path, api_key=SecretStr(ADMIN)) as two:
        key = made(one, "ann", "read").key
        with caller(one, key) as first, caller(two, key) as second:
            assert (first.get("/datasets").status_code, second.get("/datasets").status_code) == (200, 200)
            done = gradstore("keys", "revoke", "ann", data=tmp_path)
            assert done.returncode == 0, done.stderr
            for http in (first, second):
                wait_for(lambda http=http: http.get("/datasets").status_code == 401, patience=PATIENCE)  # type: ignore[misc]


def test_an_empty_key_in_the_environment_is_none(tmp_path: Path) -> None:
    with serving(tmp_path, api_key=SecretStr("")) as service:
        assert service.backend.settings.api_key is None
    status, message = refused("--host", "0.0.0.0", "--data", str(tmp_path / "other"), GRADSTORE_API_KEY="")  # noqa: S104
    assert status == 2
    assert "gradstore keys create" in message


def test_a_key_of_the_catalog_lets_the_server_listen_to_the_network_until_it_is_revoked(tmp_path: Path) -> None:
    key = json.loads(gradstore("keys", "create", "ann", "--scope", "read", "--json", data=tmp_path).stdout)["key"]
    with served("--no-worker", "--host", "0.0.0.0", data=tmp_path) as (_, address):  # noqa: S104
        url = address.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        assert httpx.get(f"{url}/health").status_code == 401
        assert httpx.get(f"{url}/health", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert gradstore("keys", "revoke", "ann", data=tmp_path).returncode == 0
    status, message = refused("--host", "0.0.0.0", "--data", str(tmp_path))  # noqa: S104
    assert status == 2
    assert "nobody has a key" in message


# Scopes -------------------------------------------------------------------------------------------------------------

REQUESTS: list[tuple[KeyScope, str, Callable[[httpx.Client], httpx.Response]]] = [
    ("read", "list", lambda http: http.get("/datasets")),
    ("read", "head", lambda http: http.head("/datasets")),
    ("read", "document", lambda http: http.get("/openapi.json")),
    ("read", "metrics", lambda http: http.get("/metrics")),
    ("write", "upload", lambda http: http.post("/datasets", files={"file": ("a.jsonl", jsonl(2))})),
    ("write", "start", lambda http: http.post("/finetunes", json={"model": "org/base", "dataset": "none"})),
    ("write", "rename", lambda http: http.patch("/datasets/none", json={"name": "x"})),
    ("write", "delete", lambda http: http.delete("/datasets/none")),
    ("admin", "audit", lambda http: http.get("/audit")),
]


@pytest.mark.parametrize("scope", ["read", "write", "admin"])
@pytest.mark.parametrize(("needed", "what", "send"), REQUESTS, ids=[what for _, what, _ in REQUESTS])
def test_a_key_permits_its_scope_and_those_below(
    shared: Service, scope: KeyScope, needed: KeyScope, what: str, send: Callable[[httpx.Client], httpx.Response]
) -> None:
    order = ("read", "write", "admin")
    with caller(shared, made(shared, f"{scope} {what}", scope).key) as http:
        answer = send(http)
    if order.index(scope) >= order.index(needed):
        assert answer.status_code in {200, 201, 404}
    else:
        problem = problem_of(answer, 403)
        assert f"scope '{needed}'" in problem.detail
        assert f"gradstore keys create NAME --scope {needed}" in problem.detail


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A locked service that tests share."""
    with serving(tmp_path_factory.mktemp("locked") / "store", api_key=SecretStr(ADMIN)) as service:
        yield service


def test_the_document_says_which_scope_a_route_needs(shared: Service) -> None:
    paths = shared.http.get("/openapi.json").json()["paths"]
    scopes = {
        (path, method): operation["security"][1]["key"]
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    assert scopes.pop(("/audit", "get")) == ["admin"]
    for (path, method), scope in scopes.items():
        assert scope == (["read"] if method == "get" else ["write"]), path


def test_a_refused_upload_is_not_read_into_the_store(shared: Service) -> None:
    with caller(shared, made(shared, "looks only", "read").key) as http:
        problem_of(http.post("/datasets", files={"file": ("a.jsonl", jsonl(100_000))}), 403)
    assert not list((shared.backend.settings.data / "incoming").glob("form-*"))


# Limits -------------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_a_minutes_requests_at_once_and_then_as_they_flow_in() -> None:
    bucket = Bucket.full(60)
    assert [bucket.take() for _ in range(60)] == [0.0] * 60
    assert 0 < bucket.take() <= 1
    bucket.filled_at -= 2.5  # seconds go by
    assert [bucket.take() for _ in range(2)] == [0.0] * 2
    assert 0 < bucket.take() <= 1
    bucket.filled_at -= 3600
    assert [bucket.take() for _ in range(60)] == [0.0] * 60
    assert bucket.take() > 0


def test_who_asks_too_often_is_told_when_to_ask_again_and_others_are_not_held_up(locked: Service) -> None:
    slow, quick = made(locked, "slow", "read", requests_per_minute=3), made(locked, "quick", "read")
    with caller(locked, slow.key) as http, caller(locked, quick.key) as other:
        assert [http.get("/datasets").status_code for _ in range(3)] == [200, 200, 200]
        answer = http.get("/datasets")
        assert problem_of(answer, 429).type == "too-many-requests"
        assert 1 <= int(answer.headers["retry-after"]) <= 20
        assert "--requests-per-minute" in answer.json()["detail"]
        assert other.get("/datasets").status_code == 200
    assert all(locked.http.get("/datasets").status_code == 200 for _ in range(10))


def test_the_servers_own_limit_holds_for_keys_without_one(tmp_path: Path) -> None:
    with serving(tmp_path, api_key=SecretStr(ADMIN), requests_per_minute=2) as service:
        with caller(service, made(service, "ann", "read").key) as http:
            assert [http.get("/datasets").status_code for _ in range(3)] == [200, 200, 429]
        with caller(service, made(service, "bob", "read", requests_per_minute=5).key) as http:
            assert [http.get("/datasets").status_code for _ in range(3)] == [200, 200, 200]


def test_a_client_without_retries_is_told(locked: Service) -> None:
    key = made(locked, "ann", "read", requests_per_minute=1).key
    with GradientStore(locked.url, api_key=key, retries=0) as store:
        store.usage()
        with pytest.raises(errors.TooManyRequests, match="1 requests a minute"):
            store.usage()


def test_the_client_names_what_a_key_lacks(locked: Service) -> None:
    locked.pool(name="pool")
    with GradientStore(locked.url, api_key="gsk_wrong") as store, pytest.raises(errors.NotAuthenticated):
        store.usage()
    with (
        GradientStore(locked.url, api_key=made(locked, "ann", "read").key) as store,
        pytest.raises(errors.NotAllowed, match="scope 'write'"),
    ):
        store.datasets.delete("pool")
    with GradientStore(locked.url, api_key=ADMIN) as store:
        assert {entry.status for entry in store.audit(key="ann")} == {403}


@pytest.mark.parametrize("said", [True, False], ids=["length said", "length unsaid"])
def test_an_upload_beyond_its_keys_limit_is_too_large(locked: Service, said: bool) -> None:
    small = made(locked, "small", "write", max_upload_bytes=1000)
    form = httpx.Request("POST", locked.url, files={"file": ("a.jsonl", jsonl(1000))})
    body = form.read()
    headers = {"Content-Type": form.headers["content-type"]}

    def pieces() -> Iterator[bytes]:
        yield from (body[at : at + 4096] for at in range(0, len(body), 4096))

    with caller(locked, small.key) as http:
        answer = http.post("/datasets", content=body if said else pieces(), headers=headers)
        assert "'small'" in problem_of(answer, 413).detail
        assert http.post("/datasets", files={"file": ("a.jsonl", jsonl(2))}).status_code == 201
    assert locked.http.post("/datasets", content=body, headers=headers).status_code == 201


# What is recorded ---------------------------------------------------------------------------------------------------


def test_a_job_knows_its_key_and_its_request(locked: Service) -> None:
    locked.pool(name="pool")
    ann = made(locked, "ann", "write")
    body = {"model": "org/base", "dataset": "pool", "epochs": 2}
    with caller(locked, ann.key) as http:
        job = http.post("/finetunes", json=body, headers={"X-Request-ID": "ann-1"}).json()["id"]
    other = locked.http.post("/finetunes", json={**body, "epochs": 3}).json()["id"]
    with locked.backend.catalog.reading() as session:
        rows = {id: session.get(JobRow, id) for id in (job, other)}
        found = {id: (row.api_key, row.request_id) for id, row in rows.items() if row is not None}
    assert found[job] == (ann.id, "ann-1")
    assert found[other][0] == "environment"


def test_without_keys_a_job_has_its_request_alone(service: Service) -> None:
    service.pool(name="pool")
    answer = service.http.post("/finetunes", json={"model": "org/base", "dataset": "pool"})
    with service.backend.catalog.reading() as session:
        row = session.get(JobRow, answer.json()["id"])
        assert row is not None
        assert (row.api_key, row.request_id) == (None, answer.headers["x-request-id"])


def test_every_change_and_every_refusal_is_recorded_before_it_is_answered(locked: Service) -> None:
    ann = made(locked, "ann", "read")
    revoked = made(locked, "bob", "read")
    Keys(locked.backend.catalog).revoke("bob")
    locked.upload(jsonl(3), name="pool")
    locked.http.get("/datasets/pool")
    locked.http.delete("/datasets/pool")
    locked.http.post("/datasets", content=b"{", headers={"Content-Type": "application/json"})
    for key, method, path in (
        (ann.key, "GET", "/datasets?q=my-question"),
        (ann.key, "DELETE", "/datasets/pool"),
        (revoked.key, "GET", "/datasets"),
        ("gsk_nobodys-key", "GET", "/jobs"),
        (None, "POST", "/datasets"),
    ):
        with caller(locked, key) as http:
            http.request(method, path)
    found = recorded(locked)
    assert [(one["api_key"], one["method"], one["path"], one["status"]) for one in reversed(found)] == [
        ("environment", "POST", "/datasets", 201),
        ("environment", "DELETE", "/datasets/pool", 204),
        ("environment", "POST", "/datasets", 415),
        (ann.id, "DELETE", "/datasets/pool", 403),
        (revoked.id, "GET", "/datasets", 401),
        (None, "GET", "/jobs", 401),
        (None, "POST", "/datasets", 401),
    ]
    assert {one["client"] for one in found} == {"127.0.0.1"}
    assert recorded(locked, key="ann") == recorded(locked, key=ann.id) == [found[3]]
    assert recorded(locked, since=found[2]["at"]) == found[:3]
    after = recorded(locked, after=found[3]["id"])
    assert after == found[4:]


def test_who_knocks_all_the_time_does_not_fill_the_log(locked: Service) -> None:
    with caller(locked, "gsk_nobodys-key") as http:
        for _ in range(80):
            assert http.get("/jobs").status_code == 401
    assert 60 <= len(recorded(locked)) < 80  # and one more for each second that this takes
    locked.upload(jsonl(3))
    assert recorded(locked)[0]["status"] == 201


def test_a_request_that_fails_is_recorded_as_failed(locked: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("datastore.leases.Jobs.cancel", fail)
    problem_of(locked.http.post("/jobs/any/cancel"), 500)
    assert [(entry["path"], entry["status"]) for entry in recorded(locked)] == [("/jobs/any/cancel", 500)]


def test_old_entries_go_and_odd_paths_are_taken(catalog: Catalog) -> None:
    audit = Audit(catalog, days=30)
    for path in ("/old", "/\0new" + "x" * 5000):
        audit.record(api_key=None, client=None, request_id="1", method="GET", path=path, status=401)
    with catalog.transaction() as session:
        row = session.get(AuditRow, 1)
        assert row is not None
        row.at = utc_now() - timedelta(days=31)
    audit.sweep()
    [left] = audit.entries()
    assert left.path.startswith("/\N{REPLACEMENT CHARACTER}new")
    assert len(left.path) == 4096
    with pytest.raises(NotFound):
        audit.page(limit=1, after="audit_one")


def test_the_last_use_of_a_key_is_known(locked: Service) -> None:
    ann = made(locked, "ann", "read")
    with caller(locked, ann.key) as http:
        http.get("/datasets")
    wait_for(lambda: Keys(locked.backend.catalog).all()[0].used_at is not None)


@pytest.mark.services
def test_keys_and_the_log_are_the_same_on_postgresql(tmp_path: Path, postgres_server: Any) -> None:
    with serving(tmp_path, api_key=SecretStr(ADMIN), catalog=postgres_server.database()) as service:
        ann = made(service, "ann", "write", requests_per_minute=50)
        with caller(service, ann.key) as http:
            assert http.post("/datasets", files={"file": ("a.jsonl", jsonl(2))}).status_code == 201
            assert http.get("/nul%00/%ff").status_code == 404
            assert http.post("/nul%00/%ff").status_code == 404
        assert [entry["status"] for entry in recorded(service, key="ann")] == [404, 201]
        Keys(service.backend.catalog).revoke("ann")


# The server's commands ----------------------------------------------------------------------------------------------


def gradstore(*words: str, data: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the server over a store."""
    program = f"from datastore import administration as a; import typer; {COMMANDS[words[0]]}"
    arguments = [sys.executable, "-c", program, *words[1:], "--data", str(data)]
    return subprocess.run(
        arguments, cwd=REPOSITORY, env={**os.environ, "COLUMNS": "300"}, capture_output=True, text=True, check=False
    )


COMMANDS = {"keys": "a.keys()", "audit": "typer.run(a.audit)"}


def test_keys_are_made_listed_and_revoked_by_command(tmp_path: Path) -> None:
    done = gradstore("keys", "create", "ann", "--scope", "write", "--requests-per-minute", "10", data=tmp_path)
    [key] = done.stdout.split()
    assert "cannot be shown again" in done.stderr
    listed = gradstore("keys", "list", "--json", data=tmp_path).stdout
    assert key not in listed
    assert json.loads(listed)["scopes"] == ["read", "write"]
    assert "ann" in gradstore("keys", "list", data=tmp_path).stdout
    again = gradstore("keys", "create", "ann", "--scope", "read", data=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert "choose another name" in again.stderr
    revoked = gradstore("keys", "revoke", "ann", "--json", data=tmp_path)
    assert json.loads(revoked.stdout)["revoked_at"] is not None
    assert gradstore("keys", "revoke", "bob", data=tmp_path).returncode == 1
    assert gradstore("keys", "create", "eve", "--scope", "root", data=tmp_path).returncode == 2
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    with catalog.reading() as session:
        row = session.query(ApiKeyRow).one()
        assert (row.name, row.requests_per_minute) == ("ann", 10)
    catalog.close()


def test_the_log_is_read_by_command(tmp_path: Path) -> None:
    with serving(tmp_path, api_key=SecretStr(ADMIN)) as service:
        ann = made(service, "ann", "write")
        with caller(service, ann.key) as http:
            http.post("/datasets", files={"file": ("a.jsonl", jsonl(2))})
        service.upload(jsonl(3))
    [line] = gradstore("audit", "--key", "ann", "--json", data=tmp_path).stdout.splitlines()
    assert json.loads(line)["api_key"] == ann.id
    table = gradstore("audit", data=tmp_path).stdout
    assert len(table.splitlines()) == 3
    assert re.search(r"ann +127\.0\.0\.1 +201 +\w+ +POST /datasets", table)
    assert gradstore("audit", "--since", "2999-01-01", "--json", data=tmp_path).stdout == ""


@pytest.mark.parametrize("command", [("audit",), ("keys", "list"), ("keys", "revoke", "ann")])
def test_a_store_that_is_not_there_is_not_made_to_be_looked_at(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = gradstore(*command, data=tmp_path / "typo")
    assert done.returncode == 1
    assert "typo: name its folder with --data" in done.stderr
    assert not (tmp_path / "typo").exists()
    made = gradstore("keys", "create", "ann", "--scope", "read", data=tmp_path / "new")
    assert made.returncode == 0


def test_a_catalog_that_does_not_answer_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_CATALOG", "postgresql+psycopg://ann:secret-word@127.0.0.1:1/none")
    done = gradstore("keys", "list", data=tmp_path)
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret-word" not in done.stderr
