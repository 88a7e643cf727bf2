"""`gradstore serve` on a free port, and a folder for its store, for as long as they are needed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from gradstore import GradientStore
from gradstore.errors import ConnectionFailed

PATIENCE = 60.0  # seconds to come up


@contextmanager
def folder_of(kept: Path | None, *, name: str) -> Iterator[Path]:
    """The folder that is to be kept, made where there is none, or else one that is removed at the end."""
    folder = (kept or Path(mkdtemp(prefix=f"gradstore-{name}-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(data: Path, *, allow: Path) -> Iterator[str]:
    """Start the service with its embedded worker, and stop it at the end; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("gradstore")), "serve", "--port", str(port)]
    command += ["--data", str(data), "--allow", str(allow), "--device", "cpu"]
    data.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADSTORE_")}
    with (data / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment | {"GRADSTORE_THREADS": "1"})  # noqa: S603
        try:
            _wait(url, process, data / "server.log")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    with GradientStore(url, retries=0) as store:
        while True:
            try:
                store.health()
            except ConnectionFailed:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start:\n{log.read_text()[-2000:]}") from None
                time.sleep(0.1)
            else:
                return
