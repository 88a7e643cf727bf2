"""Servers that tests run for real: on a free loopback port, in a folder of their own, ended by their process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import psycopg
import pytest

START_TIMEOUT = 20.0  # seconds


def require_binary(name: str) -> str:
    """Find a program; without it the test skips, or fails where GRADSTORE_REQUIRE_SERVICES=1 says it must be there."""
    packaged = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))  # Debian leaves these out of the PATH
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *packaged]))
    if path is None and os.environ.get("GRADSTORE_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{name} is not installed, and GRADSTORE_REQUIRE_SERVICES=1 requires it")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def free_port() -> int:
    """A port of the loopback address that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """A redis-server that keeps its port and its append-only file over `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self._binary = require_binary("redis-server")
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """URL of the first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, and return once it answers; a port taken in the meantime is replaced at the first start only."""
        for _ in range(1 if self.port else 5):
            port = self.port or free_port()
            if self._answers(port):
                self.port = port
                return
        raise RuntimeError(f"redis-server did not start:\n{(self._folder / 'log').read_text()}")

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Lose all data, after `kill`."""
        shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)

    def _answers(self, port: int) -> bool:
        options = {"port": port, "bind": "127.0.0.1", "dir": self._folder, "logfile": self._folder / "log"}
        options |= {"appendonly": "yes", "appendfsync": "always", "save": ""}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._process = subprocess.Popen([self._binary, *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if _pings(port):
                return True
            time.sleep(0.02)
        self.kill()
        return False

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


class PostgresServer:
    """A PostgreSQL server with a database for each that asks; its account is postgres where the tests run as root."""

    def __init__(self) -> None:
        binaries = [require_binary(name) for name in ("initdb", "postgres")]
        self._account = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # tmp_path is closed to other accounts
        if self._account is not None:
            shutil.chown(self._folder, self._account)
        self._binaries, self._data = binaries, self._folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()

    @property
    def port(self) -> int:
        """Port that it listens on, over `kill` and `start`."""
        return self._port

    def kill(self) -> None:
        """End it at once, as a power cut would: its children end when they miss it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def database(self) -> str:
        """SQLAlchemy URL of a new database."""
        name = f"test_{uuid4().hex}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/{name}"

    def __enter__(self) -> PostgresServer:
        initdb = self._binaries[0]
        made = [initdb, "-D", self._data, "-E", "UTF8", "-A", "trust", "-U", "postgres", "--no-sync"]
        subprocess.run(made, user=self._account, cwd=self._folder, stdout=subprocess.DEVNULL, check=True)
        try:
            self.start()
        except BaseException:
            self._stop()
            raise
        return self

    def start(self) -> None:
        """Start, and return once it answers; after `kill`, once the children of the one before are gone, too."""
        postgres = self._binaries[1]
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            if self._process is None or self._process.poll() is not None:
                with (self._folder / "log").open("ab") as log:
                    self._process = subprocess.Popen(
                        [postgres, "-D", self._data, "-p", str(self._port), *arguments],
                        user=self._account, cwd=self._folder, stdout=log, stderr=log,
                    )  # fmt: skip
            try:
                self._connect().close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(host="127.0.0.1", port=self._port, user="postgres", autocommit=True)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # fast: whoever is connected is cut off
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder)


def _pings(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
