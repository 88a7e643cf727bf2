"""Runs a Python module so that it ends with its parent: `python -m datastore.leash PARENT MODULE ARGUMENT…`.

A keeper that is killed cannot stop what it has started. On Linux the kernel does: it is asked here, in the new process
itself, since a forked copy of a process with threads may not safely run Python before it executes another program. The
request survives the execution of the module. Elsewhere a worker goes on; it is harmless, and its lease ends when it
does.

A module must hear signals that its keeper waits for, and so has blocked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> None:
    """Become the module, on the leash of the process `PARENT`."""
    parent, module, *rest = arguments
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before the kernel was asked
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *rest])  # noqa: S606 - our own interpreter and module


if __name__ == "__main__":
    main(sys.argv[1:])
