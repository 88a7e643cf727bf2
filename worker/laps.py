"""How long the stages of a shard take, for the log."""

from __future__ import annotations

import time


class Laps:
    """Seconds of each stage that has ended, by its name; the first began with these laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, name: str) -> None:
        """A stage ends here."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
