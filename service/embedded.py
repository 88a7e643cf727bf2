"""The embedded worker: a process of its own beside the API, which so never imports torch.

It is started again when it dies, ever more slowly while it keeps dying, and it ends with the API, however that ends.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from datastore.settings import Settings

log = logging.getLogger(__name__)

MODULE = "worker.command"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a dead worker is started again
SETTLED = 60.0  # seconds after which a worker counts as working: the next pause is the first again
GRACE = 30.0  # seconds to give its shard back


class EmbeddedWorker:
    """A worker that is kept running from `start` to `stop`."""

    def __init__(self, settings: Settings, *, module: str = MODULE, arguments: Sequence[str] = ()) -> None:
        self._environment = environment(settings)
        self._module, self._arguments = module, list(arguments)
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel's leash is tied to the thread that starts the process: this one lives until the worker has ended.
        self._thread = threading.Thread(target=self._keep_running, name="embedded-worker", daemon=True)

    def start(self) -> None:
        """Start the worker, without waiting for it."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the worker to stop, wait, and kill it where it does not."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def pid(self) -> int | None:
        """The worker's process, while there is one."""
        return self._process.pid if self._process else None

    def _keep_running(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            began = time.monotonic()
            status = self._run()
            if self._stopping.is_set():
                return
            pause = FIRST_PAUSE if time.monotonic() - began > SETTLED else pause
            log.error("the embedded worker ended", extra={"status": status, "again_in_seconds": pause})
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _run(self) -> int:
        """Run the worker once, to its end or ours; returns its exit status."""
        # -P: a folder of the store, such as datasets/, must not hide a library of the same name
        command = [sys.executable, "-P", "-m", "service.leash", str(os.getpid()), self._module, *self._arguments]
        # A session of its own: Ctrl-C is for the server, which then stops the worker in order.
        self._process = subprocess.Popen(command, env=self._environment, start_new_session=True)  # noqa: S603 - ours
        try:
            while self._process.poll() is None:
                if self._stopping.wait(0.2):
                    self._process.terminate()
                    return self._wait()
            return self._process.returncode
        finally:
            self._process = None

    def _wait(self) -> int:
        process = self._process
        if process is None:
            return 0
        try:
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            log.warning("the embedded worker does not stop and is killed; its shard is done again")
            process.kill()
            return process.wait()


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment with the settings in it as they are now; a worker needs no API key."""
    values = {key: value for key, value in os.environ.items() if key != "GRADSTORE_API_KEY"}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name != "api_key":
            values[f"GRADSTORE_{name.upper()}"] = _text(value)
    return values


def _text(value: object) -> str:
    return os.pathsep.join(str(part) for part in value) if isinstance(value, tuple) else str(value)
