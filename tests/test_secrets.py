"""Secrets are nowhere: not in a log, not in an answer, not in a table, whatever fails."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import sqlalchemy
from pydantic import SecretStr, ValidationError

from datastore import redaction
from datastore.chunk_files import Bucket
from datastore.errors import BucketUnreachable, problem_of
from datastore.keys import Keys
from datastore.redaction import HIDDEN, guard, redacted
from datastore.settings import Settings
from tests.processes import ServiceProcess, wait_for
from tests.services import PostgresServer, RedisServer
from tests.serving import jsonl

SECRETS = {
    "api key": "api-key-Zx81",
    "catalog": "catalog-pass:w@rd-Zx82",
    "broker": "broker-password-Zx83",
    "access key": "AKIAACCESSKEYZX84",
    "secret access key": "secret-access-key-Zx85",
    "session token": "session-token-Zx86",
    "hub": "hf_hub-token-Zx87",
    "labeller": "labeller-key-Zx88",
}
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": SECRETS["access key"],
    "AWS_SECRET_ACCESS_KEY": SECRETS["secret access key"],
    "AWS_SESSION_TOKEN": SECRETS["session token"],
    "HF_TOKEN": SECRETS["hub"],
}
QUOTED = "catalog-pass%3Aw%40rd-Zx82"
"""The catalog's password as it stands in the URL."""


def found_in(text: str) -> list[str]:
    """Which secrets a text has."""
    return [name for name, secret in {**SECRETS, "quoted": QUOTED}.items() if secret in text]


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_no_secret_is_written_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRADSTORE_API_KEY", SECRETS["api key"])
    with ExitStack() as catalogs, RedisServer(tmp_path / "redis") as redis:
        database = catalogs.enter_context(PostgresServer()).database()
        settings = {
            "api_key": SECRETS["api key"],
            "catalog": database.replace("postgres@", f"postgres:{QUOTED}@"),
            "broker": f"redis://:{SECRETS['broker']}@127.0.0.1:{redis.port}/0",
            "store": "s3://bucket/prefix",
            "labellers": "http://127.0.0.1:9/v1",
            "labeller_keys": SECRETS["labeller"],
        }
        answers: list[str] = []
        with ServiceProcess(tmp_path / "store", allow=tmp_path, **settings) as service:
            headers = {"Authorization": f"Bearer {SECRETS['api key']}"}
            with httpx.Client(base_url=service.url, headers=headers, timeout=30) as http:

                def ask(method: str, path: str, **what: object) -> httpx.Response:
                    answer = http.request(method, path, **what)  # type: ignore[arg-type]
                    answers.append(f"{answer.headers} {answer.text}")
                    return answer

                assert ask("POST", "/datasets", files={"file": ("a.jsonl", jsonl(4))}, data={"name": "pool"}).is_success
                job = ask("POST", "/finetunes", json={"model": "org/base", "dataset": "pool"}).json()["id"]
                ask("GET", "/health")
                ask("GET", "/metrics")
                ask("GET", "/openapi.json")
                ask("GET", "/datasets", params={"what": SECRETS["api key"]})
                ask("POST", "/datasets", content=b"{", headers={"Content-Type": "application/json"})
                ask("POST", "/tasks", json={"path": "/etc", "name": "x", "kind": "jsonl"})
                ask("GET", "/datasets", headers={"Authorization": f"Bearer {SECRETS['hub']}"})
                wait_for(lambda: http.get(f"/jobs/{job}").json()["status"] == "failed")
                ask("GET", f"/jobs/{job}")
                tables = everything(database)
                assert job in tables
                redis.kill()
                ask("POST", f"/jobs/{job}/retry")
                wait_for(lambda: "the broker does not answer" in service.log)
                catalogs.close()
                assert ask("GET", "/datasets").status_code == 503
                assert ask("POST", "/jobs/any/cancel").status_code == 503
                ask("GET", "/health")
        log = service.log
    assert "the catalog does not answer" in log
    for text in (log, tables, *answers):
        assert found_in(text) == []


def everything(database: str) -> str:
    """All rows of all tables."""
    engine = sqlalchemy.create_engine(database)
    metadata = sqlalchemy.MetaData()
    metadata.reflect(engine)
    with engine.connect() as connection:
        rows = [str(row) for table in metadata.sorted_tables for row in connection.execute(table.select())]
    engine.dispose()
    return "\n".join(rows)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings whose secrets this process hides for a while."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = Settings(
        api_key=SecretStr(SECRETS["api key"]), catalog=f"postgresql+psycopg://user:{QUOTED}@host/name",
        broker=f"redis://:{SECRETS['broker']}@host/0", labellers=("http://127.0.0.1:9/v1",),
        labeller_keys=SecretStr(SECRETS["labeller"]),
    )  # fmt: skip
    handlers = {handler: handler.formatter for handler in logging.getLogger().handlers}
    known = list(redaction._known)
    guard(settings)
    yield settings
    redaction._known[:] = known
    for handler, formatter in handlers.items():
        handler.setFormatter(formatter)


@pytest.mark.parametrize("secret", [*SECRETS.values(), QUOTED], ids=[*SECRETS, "quoted"])
def test_what_others_quote_is_hidden(guarded: Settings, secret: str) -> None:
    assert redacted(f"the key <Key>{secret}</Key> is refused") == f"the key <Key>{HIDDEN}</Key> is refused"
    error = RuntimeError(f"wrong: {secret}")
    assert problem_of(error, status=500, instance=None).detail == f"wrong: {HIDDEN}"
    record = logging.LogRecord("x", logging.ERROR, "", 0, "it raised", (), (RuntimeError, error, None))
    record.reason = secret
    [*_, formatted] = [handler.format(record) for handler in logging.getLogger().handlers]
    assert "it raised" in formatted
    assert secret not in formatted


def test_a_made_key_is_hidden_wherever_it_stands(tmp_path: Path) -> None:
    from datastore.catalog import Catalog

    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    catalog.migrate()
    key = Keys(catalog).create("ann", scope="read").key
    catalog.close()
    assert redacted(f"Authorization: Bearer {key}.") == f"Authorization: Bearer {HIDDEN}."


def test_settings_show_no_secret(guarded: Settings) -> None:
    assert found_in(f"{guarded!r} {guarded}") == []
    with pytest.raises(ValidationError) as caught:
        Settings(port="broker-password-Zx83")  # type: ignore[arg-type]
    assert found_in(str(caught.value)) == []


def test_a_bucket_that_quotes_its_caller_tells_no_secret(guarded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with quoting_bucket() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        with pytest.raises(BucketUnreachable) as caught:
            Bucket("s3://bucket/prefix").below("features/")
    assert SECRETS["access key"] in str(caught.value)  # or this test shows nothing
    problem = problem_of(caught.value, status=503, instance=None)
    assert found_in(json.dumps(problem.model_dump(mode="json"))) == []


@contextmanager
def quoting_bucket() -> Iterator[str]:
    """An object store that refuses in the words of S3, which quote the request's key and signature."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            named = self.headers["Authorization"]
            body = f"<Error><Code>SignatureDoesNotMatch</Code><StringToSign>{named}</StringToSign></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
