"""`gradstore serve` as a process: ready, stopped, refused; and the worker that it keeps running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from datastore.settings import Settings
from service import embedded
from service.embedded import EmbeddedWorker, environment
from tests.conftest import REPOSITORY
from tests.services import free_port

SERVE = "import typer; from service.command import serve; typer.run(serve)"
STAND_IN = ("http.server", ["--bind", "127.0.0.1", "0"])
"""A program that runs until it is told to stop, in place of a worker."""


@contextmanager
def served(*arguments: str, data: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `gradstore serve` that is ready, and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "--port", "0", "--data", str(data), *arguments],
        cwd=REPOSITORY, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"ready at (\S+)", line):
                yield process, found[1]
                break
        else:
            pytest.fail(f"the server did not become ready: {process.wait()}")
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def refused(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and message of a `gradstore serve` that does not start."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE, *arguments],
        cwd=REPOSITORY, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "500", **environment}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_variable_that_cannot_be_used_is_named(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradstore", command], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "GRADSTORE_LEASE": "-1", "GRADSTORE_PORT": "many"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "GRADSTORE_LEASE: Input should be greater than 0" in done.stderr
    assert "GRADSTORE_PORT: Input should be a valid integer" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_says_where_it_is_and_stops_when_told(tmp_path: Path, number: signal.Signals) -> None:
    with served("--no-worker", data=tmp_path / "store") as (process, url):
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        process.send_signal(number)
        assert process.wait(20) == (0 if number == signal.SIGINT else -signal.SIGTERM)
    assert (tmp_path / "store" / "catalog.sqlite3").exists()


def test_options_stand_before_the_environment(tmp_path: Path) -> None:
    given = {"GRADSTORE_HOST": "203.0.113.1", "GRADSTORE_DATA": str(tmp_path / "other"), "GRADSTORE_API_KEY": "other"}
    options = ("--no-worker", "--host", "127.0.0.1", "--api-key", "mine")
    with served(*options, data=tmp_path / "store", **given) as (_, url):
        assert httpx.get(f"{url}/health").status_code == 401
        assert httpx.get(f"{url}/health", headers={"Authorization": "Bearer mine"}).status_code == 200
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gradstore.example"])  # noqa: S104 - refused
def test_nobody_listens_on_the_network_without_a_key(tmp_path: Path, host: str) -> None:
    status, message = refused("--host", host, "--data", str(tmp_path / "store"))
    assert status == 2
    assert "GRADSTORE_API_KEY" in message
    assert not (tmp_path / "store").exists()


def test_a_taken_port_is_said_in_one_line(tmp_path: Path) -> None:
    with served("--no-worker", data=tmp_path / "store") as (_, url):
        status, message = refused("--port", url.rpartition(":")[2], "--no-worker", "--data", str(tmp_path / "second"))
    assert status == 1
    assert "try another --port" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_store_that_cannot_be_there_is_said_in_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    status, message = refused("--port", "0", "--data", str(tmp_path / place))
    assert (status, message.count("\n")) == (1, 1)
    assert message.startswith(f"the store cannot be at {tmp_path / place}: ")


def test_a_wrong_setting_is_said(tmp_path: Path) -> None:
    status, message = refused("--no-worker", GRADSTORE_SHARD_ROWS="100")
    assert status == 2
    assert "GRADSTORE_SHARD_ROWS" in message


# The embedded worker ------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[EmbeddedWorker]:
    """A stand-in that is kept running."""
    kept = EmbeddedWorker(Settings(data=tmp_path), module=STAND_IN[0], arguments=STAND_IN[1])
    kept.start()
    eventually(lambda: kept.pid is not None)
    yield kept
    kept.stop()


def test_a_worker_that_dies_is_started_again(worker: EmbeddedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    eventually(lambda: worker.pid not in {None, first})


def test_a_worker_that_keeps_dying_is_started_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "FIRST_PAUSE", 0.05)
    worker = EmbeddedWorker(Settings(data=tmp_path), module="no_such_module")
    worker.start()
    eventually(lambda: len(caplog.records) >= 3)
    worker.stop()
    assert [vars(record)["again_in_seconds"] for record in caplog.records][:3] == [0.05, 0.1, 0.2]


def test_a_worker_is_told_to_stop(worker: EmbeddedWorker) -> None:
    pid = worker.pid
    assert pid is not None
    worker.stop()
    assert worker.pid is None
    assert not alive(pid)


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "GRACE", 0.5)
    ready = tmp_path / "ready"
    deaf = f"import signal, time, pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch()"
    (tmp_path / "deaf.py").write_text(f"{deaf}; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    worker = EmbeddedWorker(Settings(data=tmp_path), module="deaf")
    worker.start()
    eventually(ready.exists)
    pid = worker.pid
    assert pid is not None
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10
    assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel ends a child with its parent")
def test_a_killed_server_takes_its_worker_with_it(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from datastore.settings import Settings
from service.embedded import EmbeddedWorker
worker = EmbeddedWorker(Settings(data=Path({str(tmp_path)!r})), module={STAND_IN[0]!r}, arguments={STAND_IN[1]!r})
worker.start()
while worker.pid is None:
    time.sleep(0.01)
print(worker.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    eventually(lambda: b"http.server" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not alive(child))


def test_a_worker_gets_the_servers_settings_and_not_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        data=tmp_path,
        allowed_roots=(tmp_path / "a", tmp_path / "b"),
        lease=7.5,
        port=free_port(),
        embedded_worker=False,
        api_key=SecretStr("secret"),
        broker="redis://127.0.0.1/0",
    )
    given = environment(settings)
    assert "secret" not in given.values()
    for name in [name for name in os.environ if name.startswith("GRADSTORE_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings.model_copy(update={"api_key": None})


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for is dead."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
