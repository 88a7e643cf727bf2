"""Whether anything was committed to the catalog since somebody last looked: what was read before is then still so."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from sqlalchemy import text
from sqlalchemy.engine import Engine

FoundT = TypeVar("FoundT")


class Remembered(Generic[FoundT]):
    """What was found in a state of the catalog, to be found again until anything is committed to it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[Hashable, tuple[Hashable, FoundT]] = {}

    def get(self, key: Hashable, state: Hashable, look: Callable[[], FoundT]) -> FoundT:
        """What was found under this key in this state of the catalog, or else is found now; `look` may raise.

        At most so many are remembered, and all are forgotten where there is one more.
        """
        known = self._found.get(key)
        if known is not None and known[0] == state:
            return known[1]
        found = look()
        if len(self._found) >= self._most:
            self._found.clear()
        self._found[key] = state, found
        return found


class States(Protocol):
    """Looks at a database."""

    def now(self) -> Hashable:
        """A value that comes again only where nothing was committed in between, by whatever process or host."""
        ...

    def close(self) -> None:
        """Give back what it takes to look."""
        ...


class SqliteStates:
    """SQLite counts for each connection what others commit: this one commits nothing itself, so it sees all."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._connection: sqlite3.Connection | None = None
        self._opened: object = None
        self._lock = threading.Lock()

    def now(self) -> Hashable:
        """The connection's `data_version`, which is compared with earlier ones of this connection alone."""
        with self._lock:
            if self._connection is None:
                self._connection = sqlite3.connect(self._database, check_same_thread=False)
                self._opened = object()
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            return self._opened, version

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class PostgresqlStates:
    """PostgreSQL's snapshot says which transactions are over: all that a statement sees follows from it."""

    def __init__(self, readers: Engine) -> None:
        self._readers = readers

    def now(self) -> Hashable:
        """The snapshot of a statement."""
        with self._readers.connect() as connection:
            return str(connection.scalar(text("SELECT pg_current_snapshot()")))

    def close(self) -> None:
        """Nothing is held."""
