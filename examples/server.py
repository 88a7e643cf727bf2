"""`gradstore serve` on a free port, for as long as it is needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore import GradientStore
from gradstore.errors import ConnectionFailed

PATIENCE = 60.0  # seconds to come up


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
