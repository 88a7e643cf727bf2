"""Tasks and datasets as tables show them: by their names, which say more to a reader than ids do."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from gradstore.errors import NotFound

if TYPE_CHECKING:
    from gradstore import GradientStore


class Names:
    """The names of what lies in a store, each asked for once; the id of what has no name, or is deleted."""

    def __init__(self, store: GradientStore) -> None:
        self._store = store
        self._known = cache(self._find)

    def task(self, id: str | None) -> str | None:
        """A task's."""
        return None if id is None else self._known("tasks", id)

    def dataset(self, id: str) -> str:
        """A dataset's."""
        return self._known("datasets", id)

    def _find(self, noun: str, id: str) -> str:
        try:
            found: str | None = getattr(self._store, noun).get(id).name
        except NotFound:
            return id
        return found or id
