"""The commands of workers."""

from __future__ import annotations

from gradstore._cli.nouns import add_list, add_show, bare_group
from gradstore._cli.output import Columns, ago
from gradstore.types import Worker

GIB = 1 << 30


def _memory(worker: Worker) -> str | None:
    if worker.memory is None:
        return None
    return f"{worker.memory.used / GIB:.1f} of {worker.memory.total / GIB:.1f} GiB"


def _at(worker: Worker) -> str | None:
    return worker.job if worker.shard is None else f"{worker.job}, shard {worker.shard}"


WORKERS: Columns = {
    "id": lambda worker: worker.id,
    "device": lambda worker: worker.device,
    "memory": _memory,
    "at": _at,
    "started": lambda worker: ago(worker.started_at) if worker.started_at else None,
    "seen": lambda worker: ago(worker.seen_at),
}
workers = bare_group("workers", help="Who computes, on what, and what each is at.")
add_list(workers, "workers", WORKERS, order="by id")
add_show(workers, "workers")
