"""The service as its users run it: `gradstore serve` with its worker, in processes that tests may kill by their id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from gradstore import GradientStore
from gradstore.errors import ConnectionFailed

from tests.services import free_port

PATIENCE = 90.0  # seconds: a worker imports torch, on a machine that may be busy


class ServiceProcess:
    """`gradstore serve` on one port over one store: started, killed and started again as a test needs it."""

    def __init__(self, folder: Path, *options: str, allow: Path, **settings: object) -> None:
        """`folder` is the store's; `settings` are GRADSTORE_… variables by their names in lower case."""
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [str(Path(sys.executable).with_name("gradstore")), "serve", "--data", str(folder)]
        self._command = [*command, "--port", self.url.rpartition(":")[2], "--allow", str(allow), *options]
        given = {"device": "cpu", "threads": 1, "poll_interval": 0.02, **settings}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADSTORE_")}
        self._environment |= {f"GRADSTORE_{name.upper()}": str(value) for name, value in given.items()}
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> str:
        """What service and worker have written, over all their starts."""
        return (self.folder / "server.log").read_text()

    def client(self) -> GradientStore:
        """A client of this service."""
        return GradientStore(self.url)

    def start(self) -> None:
        """Start the service, and return when it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        wait_for(self._answers)

    def kill(self) -> None:
        """End the service at once, as a power cut would; the kernel then tells its worker to leave."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask the service to stop, and wait until it and its worker have."""
        self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        """Process id of the service."""
        assert self._process is not None
        return self._process.pid

    def worker(self) -> int:
        """Process id of the one worker that is there, as soon as there is one."""
        with self.client() as store:
            wait_for(lambda: len(self._workers(store)) == 1)
            return self._workers(store)[0]

    def _workers(self, store: GradientStore) -> list[int]:
        """The announced workers that run: a worker's name is its host, its process id and a random number."""
        names = (worker.id.rsplit("-", 2) for worker in store.ready().workers)
        return [pid for pid in (int(name[1]) for name in names) if alive(pid)]

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the service did not start:\n{self.log[-2000:]}"
        with GradientStore(self.url, retries=0) as store:
            try:
                return store.health().status == "ok"
            except ConnectionFailed:
                return False

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None

    def __enter__(self) -> ServiceProcess:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def end_process(process: subprocess.Popen[bytes], *, patience: float = 30.0) -> None:
    """Ask a process to end, and end it where it does not; nothing happens where it has ended."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], *, patience: float = PATIENCE) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
