"""Looks at something again and again, in a thread, while something else is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def sampled(look: Callable[[], T], *, every: float) -> Iterator[list[tuple[float, T]]]:
    """What is seen every so many seconds while the block runs: (seconds since its beginning, what `look` returns)."""
    seen: list[tuple[float, T]] = []
    over = threading.Event()
    began = time.monotonic()

    def look_on() -> None:
        while not over.wait(every):
            seen.append((time.monotonic() - began, look()))

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
