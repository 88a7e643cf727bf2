"""How long the catalog's functions take their callers: each call's seconds, by the function's name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from datastore.leases import Jobs

T = TypeVar("T")
Seconds = dict[str, list[float]]

WRITES = ("claim", "renew", "succeed", "published", "announce")
LOOKS = ("waiting", "wanted", "upcoming", "unpublished", "sweep")
"""Those that take the catalog's lock only where there is something to write."""


CPU = " CPU"
"""What follows a function's name where not its time is counted but what of it the caller's core was at work."""


class TimedJobs(Jobs):
    """The jobs of a catalog, with a clock at every call that workers make."""

    seconds: Seconds = defaultdict(list)  # noqa: RUF012 - of all of a process


def _timed(name: str, call: Callable[..., T]) -> Callable[..., T]:
    @wraps(call)
    def measured(*arguments: Any, **options: Any) -> T:
        began, computed = time.perf_counter(), time.thread_time()
        try:
            return call(*arguments, **options)
        finally:
            TimedJobs.seconds[name].append(time.perf_counter() - began)
            TimedJobs.seconds[name + CPU].append(time.thread_time() - computed)

    return measured


for _name in (*WRITES, *LOOKS):
    setattr(TimedJobs, _name, _timed(_name, getattr(Jobs, _name)))


def together(found: Iterable[Mapping[str, Sequence[float]]]) -> Seconds:
    """The seconds of several processes as one."""
    all_seconds: Seconds = defaultdict(list)
    for own in found:
        for name, seconds in own.items():
            all_seconds[name] += seconds
    return all_seconds


def table(seconds: Mapping[str, Sequence[float]], *, names: Iterable[str], elapsed: float) -> list[str]:
    """A line for each function: calls a second, milliseconds of the half and of 99 % of the calls, and the mean of what
    the caller computed in one, which other work on the machine does not change.
    """
    lines = ["| call | a second | p50 ms | p99 ms | CPU ms |", "|---|---|---|---|---|"]
    for name in names:
        if len(own := seconds.get(name, ())) > 0:
            half, most = np.percentile(own, [50, 99]) * 1e3
            computed = f"{np.mean(seconds[name + CPU]) * 1e3:,.1f}" if name + CPU in seconds else "–"
            lines.append(f"| {name} | {len(own) / elapsed:,.1f} | {half:,.1f} | {most:,.1f} | {computed} |")
    return lines
