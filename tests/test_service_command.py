"""`gradstore serve` as a process: ready, stopped, refused; and the worker that it keeps running."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from datastore.settings import Settings
from service.command import listen
from tests.conftest import REPOSITORY

SERVE = "import typer; from service.command import serve; typer.run(serve)"


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


def test_an_allowed_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, said = refused("--data", str(tmp_path / "store"), "--allow", str(tmp_path / "nope"))
    assert code == 2
    assert "nope" in said
    assert not (tmp_path / "store").exists()


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


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_does_not_wait_for_the_last_ones_acknowledgement(host: str) -> None:
    async def no_delay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen(Settings(host=host, port=0))
        address = listener.getsockname()[:2]
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*address)
            writer.close()
            return await asyncio.wait_for(found, 10)

    assert asyncio.run(no_delay())
