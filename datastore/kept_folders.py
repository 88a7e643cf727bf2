"""Folders of one kind that are kept under names of their own: each whole or absent, and never changed.

What lies in one is its room's business (array_files.py, matrices.py, projector_files.py).

Where one is damaged, what its room does goes by what is lost. A cache (arrays, scores) can be made again from what is
stored: its `get` removes what is damaged and returns None, as if it had not been made. An original (matrices, which are
uploaded or computed for a job, and projectors, which are trained) is what a result stands on: reading one raises
`Damaged`, which says what to delete and make again, and removes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from datastore.depot import LOCAL, Depot, evict
from datastore.durable import sweep


class KeptFolders:
    """The folders below one."""

    def __init__(self, root: Path, *, pattern: str, depot: Depot = LOCAL) -> None:
        """`pattern` is what their names match."""
        self.root, self._pattern, self._depot = root, pattern, depot

    def exists(self, name: str) -> bool:
        """Whether there is one of this name."""
        return self._depot.exists(self.root / name)

    def delete(self, names: Iterable[str]) -> None:
        """Remove some; nothing happens where there is none."""
        for name in names:
            self._depot.delete(self.root / name)
            evict(self.root / name)

    def keys(self, *, older_than: float) -> set[str]:
        """Those that were kept, or asked to be kept, more than so many seconds ago."""
        return set(self._depot.names(self.root, self._pattern, older_than=older_than))

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return sweep(self._unfinished, older_than=older_than)

    @property
    def _unfinished(self) -> Path:
        """Where one is made before it is kept."""
        return self.root / "unfinished"
