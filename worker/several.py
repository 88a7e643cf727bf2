"""Several workers from one command: a process for each, kept running, that share this machine's cores.

They share nothing else: the leases in the catalog decide who does which shard, as between machines.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Collection, Sequence

from gradstore.types import JobKind

from datastore.processes import USAGE, KeptProcess, environment
from datastore.settings import Settings
from worker.devices import threads
from worker.monitoring import next_port
from worker.queues import queue_of

log = logging.getLogger(__name__)

LOOK_INTERVAL = 0.2  # seconds between two looks whether all have ended
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")  # of numpy's products, and of the tokenizers


def supervise(settings: Settings, devices: Sequence[str], *, kinds: Collection[JobKind], once: bool) -> int:
    """Keep a worker running for each device until asked to stop; with `once`, until all of them have left.

    The signals that ask must be blocked. Returns the exit status: 1 where a worker that was started once has failed, 2
    where none can do what it was told.
    """
    share = threads(settings.threads, len(devices))
    workers = [
        KeptProcess(
            "worker.command",
            [f"--queues={','.join(map(queue_of, kinds))}", *(["--once"] if once else [])],
            name=f"worker {number} on {device}",
            environment=_environment(settings, device, share, number),
            once=once,
        )
        for number, device in enumerate(devices, 1)
    ]
    log.info("workers start", extra={"workers": len(workers), "devices": list(devices), "threads": share})
    for worker in workers:
        worker.start()
    while not all(worker.over for worker in workers):
        if signal.sigtimedwait(STOP_SIGNALS, LOOK_INTERVAL) is not None:
            break
    for worker in workers:
        worker.ask_to_stop()
    for worker in workers:
        worker.stop()
    if all(worker.status == USAGE for worker in workers):
        return USAGE
    return 1 if once and any(worker.status for worker in workers) else 0


def _environment(settings: Settings, device: str, share: int, number: int) -> dict[str, str]:
    listen = next_port(settings.metrics_listen, number - 1)
    own = settings.model_copy(update={"device": device, "threads": share, "concurrency": 1, "metrics_listen": listen})
    return {**dict.fromkeys(THREAD_VARIABLES, str(share)), **environment(own)}
