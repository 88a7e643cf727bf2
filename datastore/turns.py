"""Whose turn it is: which of the jobs that wait a worker does a shard of.

Jobs of a higher priority first. Among those the API key that fewest other workers are at, so that nobody's jobs wait
for another's; among its jobs the one that fewest are at, so that a small job does not wait for a week-long one; then
the oldest shard. Where as many are at several keys or jobs, a worker takes the one that it has served longest ago: one
worker alone goes round.

Going to another job may mean loading another model. So a worker stays with its job for `STAY` seconds, unless one of a
higher priority waits: at 10 s a load and 60 s a stay that is at most a seventh of its time, and a new job waits for
60 s and a shard at most, beside several workers for much less.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STAY = 60.0  # seconds


@dataclass(frozen=True)
class Waiting:
    """A job with a shard that waits."""

    job: str
    priority: int
    api_key: str | None
    """Null is a key like any other: that of jobs started without one."""
    shard: int
    """Id of the first."""


@dataclass
class Turns:
    """Whom a worker has served, and when: its memory, which no other worker needs."""

    stay: float = STAY  # seconds
    _keys: dict[str | None, float] = field(default_factory=dict)
    _jobs: dict[str, float] = field(default_factory=dict)
    _job: str | None = None
    _since: float = -math.inf

    def took(self, job: str, api_key: str | None) -> None:
        """Remember that a shard of this job was taken."""
        now = time.monotonic()
        if job != self._job or self.staying is None:
            self._job, self._since = job, now
        self._keys[api_key] = self._jobs[job] = now

    @property
    def staying(self) -> str | None:
        """The job that the worker stays with; None once it has done so for long enough."""
        return self._job if time.monotonic() - self._since < self.stay else None

    def served(self, waiting: Waiting) -> tuple[float, float]:
        """When the key and the job were served last, in monotonic seconds."""
        return self._keys.get(waiting.api_key, -math.inf), self._jobs.get(waiting.job, -math.inf)


def choose(waiting: Sequence[Waiting], *, at_work: Mapping[tuple[str | None, str], int], turns: Turns) -> Waiting:
    """The job whose turn it is, of at least one; `at_work` has the other workers' shards by key and job."""
    highest = max(one.priority for one in waiting)
    urgent = [one for one in waiting if one.priority == highest]
    staying = turns.staying
    own = next((one for one in urgent if one.job == staying), None)
    if own is not None:
        return own
    of_keys: Counter[str | None] = Counter()
    for (key, _), shards in at_work.items():
        of_keys[key] += shards

    def rank(one: Waiting) -> tuple[float, ...]:
        key_served, job_served = turns.served(one)
        return of_keys[one.api_key], key_served, at_work.get((one.api_key, one.job), 0), job_served, one.shard

    return min(urgent, key=rank)
