"""What a worker does, as it is asked for: by the plural nouns under which jobs are started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import typer
from gradstore.types import JobKind

from datastore.leases import queues

QUEUES: Final[Mapping[str, JobKind]] = queues()


def kinds_of(queues: str) -> list[JobKind]:
    """The kinds of jobs in queues that are named with commas. Raises typer.BadParameter for one that does not exist.

    >>> kinds_of("gradients,finetunes")
    ['gradients', 'finetune']
    """
    names = queues.split(",")
    unknown = next((name for name in names if name not in QUEUES), None)
    if unknown is not None:
        raise typer.BadParameter(f"{unknown!r} is no queue; there are {', '.join(QUEUES)}, several of them with commas")
    return [QUEUES[name] for name in dict.fromkeys(names)]


def queue_of(kind: JobKind) -> str:
    """The queue of a kind of jobs."""
    return next(name for name, own in QUEUES.items() if own == kind)
