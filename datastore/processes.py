"""A process that is kept running: the worker beside the API, which so never imports torch, or one worker of several.

It is started again when it dies, ever more slowly while it keeps dying, unless it says that it cannot do what it was
told. It ends with the process that keeps it, however that ends.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

from datastore.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a dead worker is started again
SETTLED = 60.0  # seconds after which a worker counts as working: the next pause is the first again
GRACE = 30.0  # seconds to give its shard back
USAGE = 2
"""Exit status of a process that was told something that it cannot do, such as a GPU that is not there."""


class KeptProcess:
    """A Python module that is kept running from `start` to `stop`; with `once` it is started once."""

    def __init__(
        self, module: str, arguments: Sequence[str] = (), *, name: str, environment: dict[str, str], once: bool = False
    ) -> None:
        self._module, self._arguments = module, list(arguments)
        self._name, self._environment, self._once = name, environment, once
        self.status: int | None = None
        """How it ended last."""
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel's leash is tied to the thread that starts the process: this one lives until the process has ended.
        self._thread = threading.Thread(target=self._keep_running, name=name.replace(" ", "-"), daemon=True)

    def start(self) -> None:
        """Start the process, without waiting for it."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Have the process asked to stop, without waiting for it."""
        self._stopping.set()

    def stop(self) -> None:
        """Ask the process to stop, wait, and kill it where it does not."""
        self.ask_to_stop()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def over(self) -> bool:
        """Whether it is not kept running any more."""
        return not self._thread.is_alive()

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return self._process.pid if self._process else None

    def _keep_running(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            began = time.monotonic()
            status = self.status = self._run()
            if self._stopping.is_set() or self._once:
                return
            if status == USAGE:
                log.error(
                    f"the {self._name} cannot do what it was told, and is not started again", extra={"status": status}
                )
                return
            pause = FIRST_PAUSE if time.monotonic() - began > SETTLED else pause
            log.error(f"the {self._name} ended", extra={"status": status, "again_in_seconds": pause})
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _run(self) -> int:
        """Run the process once, to its end or ours; returns its exit status."""
        # -P: a folder of the store, such as datasets/, must not hide a library of the same name
        command = [sys.executable, "-P", "-m", "datastore.leash", str(os.getpid()), self._module, *self._arguments]
        # A session of its own: Ctrl-C is for the keeper, which then stops the process in order.
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
            log.warning(f"the {self._name} does not stop and is killed; its shard is done again")
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
    """A setting as the environment says it."""
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return (os.pathsep if all(isinstance(part, Path) for part in value) else ",").join(map(str, value))
    return str(value)
