"""A process that is kept running: started again when it dies, told to stop, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from datastore import processes
from datastore.processes import USAGE, KeptProcess, environment
from datastore.settings import Settings
from tests.conftest import REPOSITORY
from tests.processes import alive, wait_for
from tests.services import free_port

STAND_IN = ("http.server", ["--bind", "127.0.0.1", "0"])
"""A program that runs until it is told to stop, in place of a worker."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[KeptProcess]:
    """A stand-in that is kept running."""
    kept = KeptProcess(*STAND_IN, name="worker", environment=environment(Settings(data=tmp_path)))
    kept.start()
    wait_for(lambda: kept.pid is not None)
    yield kept
    kept.stop()


def test_a_worker_that_dies_is_started_again(worker: KeptProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: worker.pid not in {None, first})


def test_a_worker_that_keeps_dying_is_started_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "FIRST_PAUSE", 0.05)
    worker = KeptProcess("no_such_module", name="worker", environment=environment(Settings(data=tmp_path)))
    worker.start()
    wait_for(lambda: len(caplog.records) >= 3)
    worker.stop()
    assert [vars(record)["again_in_seconds"] for record in caplog.records][:3] == [0.05, 0.1, 0.2]


def test_a_worker_that_cannot_do_what_it_was_told_is_not_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = ("http.server", ["--no-such-option"])
    worker = KeptProcess(*told, name="worker", environment=environment(Settings(data=tmp_path)))
    worker.start()
    wait_for(lambda: worker.over)
    assert worker.status == USAGE
    (line,) = caplog.messages
    assert "cannot do what it was told" in line


def test_a_worker_is_told_to_stop(worker: KeptProcess) -> None:
    pid = worker.pid
    assert pid is not None
    worker.stop()
    assert worker.pid is None
    assert not alive(pid)


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    ready = tmp_path / "ready"
    deaf = f"import signal, time, pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch()"
    (tmp_path / "deaf.py").write_text(f"{deaf}; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    worker = KeptProcess("deaf", name="worker", environment=environment(Settings(data=tmp_path)))
    worker.start()
    wait_for(ready.exists)
    pid = worker.pid
    assert pid is not None
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10
    assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel ends a child with its parent")
def test_a_killed_keeper_takes_its_worker_with_it(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from datastore.processes import USAGE, KeptProcess, environment
from datastore.settings import Settings
worker = KeptProcess(*{STAND_IN!r}, name="worker", environment=environment(Settings(data=Path({str(tmp_path)!r}))))
worker.start()
while worker.pid is None:
    time.sleep(0.01)
print(worker.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(lambda: b"http.server" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not alive(child))


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
