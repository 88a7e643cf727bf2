"""Progress bars, in terminals and notebooks, always on stderr.

A job's rate and remaining time are the service's own numbers: it has seen the job from its beginning.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm

from gradstore.types import Job, Progress

_JOB_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"


class JobBar(AbstractContextManager["JobBar"]):
    """The progress of one job; shows nothing when it is not `shown`."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def update(self, job: Job[Any, Any]) -> None:
        """Show the job's state."""
        if not self._shown:
            return
        progress = job.progress
        if self._bar is None:
            self._bar = tqdm(
                desc=f"{job.kind} {job.name or job.id}",
                bar_format=_JOB_FORMAT,
                dynamic_ncols=True,
                unit=progress.unit,
                total=progress.total,
            )
        self._bar.unit = progress.unit
        self._bar.total = progress.total
        self._bar.n = progress.done
        self._bar.set_postfix_str(_pace(progress) if job.status == "running" else job.status)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class BytesBar(AbstractContextManager["BytesBar"]):
    """Bytes sent or received; shows nothing when it is not `shown`."""

    def __init__(self, name: str, *, total: int | None, shown: bool, start: int = 0) -> None:
        self._bar: Any = None
        if shown:
            self._bar = tqdm(
                desc=name, total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True
            )

    def add(self, count: int) -> None:
        """Count some more bytes."""
        if self._bar is not None:
            self._bar.update(count)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _pace(progress: Progress) -> str:
    parts = []
    if progress.rate is not None:
        parts.append(f"{progress.rate:,.3g} {progress.unit}/s")
    if progress.eta_seconds is not None:
        parts.append(f"{timedelta(seconds=round(progress.eta_seconds))} left")
    return ", ".join(parts)
