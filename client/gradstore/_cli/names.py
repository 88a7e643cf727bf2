"""Tasks, datasets and selections as tables show them: by their names, which say more to a reader than ids do."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from gradstore.errors import NotFound

if TYPE_CHECKING:
    from gradstore import GradientStore


_NOUNS = {"ds": "datasets", "task": "tasks", "sel": "selections"}
"""The noun of an id, by how it begins."""


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

    def called(self, reference: str) -> str:
        """What a job's request names: a dataset, a task or a selection by its name; what is no id of one, as it is."""
        noun = _NOUNS.get(reference.partition("_")[0])
        return reference if noun is None else self._known(noun, reference)

    def _find(self, noun: str, id: str) -> str:
        try:
            found: str | None = getattr(self._store, noun).get(id).name
        except NotFound:
            return id
        return found or id
