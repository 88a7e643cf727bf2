"""A job's states as server-sent events: `progress` whenever it has changed, `finished` with its last state.

The state is read from the catalog, so it does not matter which process works on the job. A client that reconnects gets
the present state first; nothing needs to be remembered for it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

from anyio.to_thread import run_sync
from gradstore.types import AnyJob

from datastore.errors import NotFound

INTERVAL = 0.25  # seconds between two looks into the catalog
KEEP_ALIVE = 15.0  # seconds of silence after which a comment is sent: proxies cut silent connections
MEDIA_TYPE = "text/event-stream"


async def job_events(look: Callable[[], AnyJob], *, stopping: threading.Event) -> AsyncIterator[bytes]:
    """The events of a job, until it is finished or the server stops."""
    yield b"retry: 1000\n\n"
    last, sent = "", time.monotonic()
    while not stopping.is_set():
        try:
            job = await run_sync(look)
        except NotFound:  # deleted while it was followed
            return
        state = job.model_dump_json()
        if job.finished:
            yield event("finished", state)
            return
        if state != last:
            last, sent = state, time.monotonic()
            yield event("progress", state)
        elif time.monotonic() - sent > KEEP_ALIVE:
            sent = time.monotonic()
            yield b": still there\n\n"
        await asyncio.sleep(INTERVAL)


def event(name: str, data: str) -> bytes:
    """An event on the wire; `data` is one line.

    >>> event("progress", "{}")
    b'event: progress\\ndata: {}\\n\\n'
    """
    return f"event: {name}\ndata: {data}\n\n".encode()
