"""Recording what an upload has stored, or undoing it: a refused name leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datastore.catalog import Catalog
from datastore.errors import GradstoreError
from datastore.schema import Noun


@contextmanager
def recording(catalog: Catalog, noun: type[Noun], id: str, *, undo: Callable[[], None]) -> Iterator[None]:
    """Undo what was stored as `id` where recording it is refused and nobody else has recorded it."""
    try:
        yield
    except GradstoreError:
        with catalog.transaction() as session:  # which also keeps others from recording it meanwhile
            if session.get(noun, id) is None:
                undo()
        raise


def is_recorded(catalog: Catalog, noun: type[Noun], id: str) -> bool:
    """Whether the catalog has something of this id."""
    with catalog.reading() as session:
        return session.get(noun, id) is not None
