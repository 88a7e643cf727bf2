"""Storing what was uploaded, and recording it: both or neither, whatever else is stored and deleted meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from datastore.catalog import Catalog
from datastore.errors import Conflict, GradstoreError, NotFound
from datastore.schema import Noun


class Named(Protocol):
    """Something with the id that its content gives it."""

    @property
    def id(self) -> str:
        """The id."""


ATTEMPTS = 5  # at storing what somebody deletes while it is being stored
StoredT = TypeVar("StoredT", bound=Named)
RecordT = TypeVar("RecordT")


def store_and_record(
    catalog: Catalog,
    noun: type[Noun],
    *,
    store: Callable[[], StoredT],
    record: Callable[[StoredT], RecordT],
    look: Callable[[str], object],
    delete: Callable[[str], None],
) -> tuple[StoredT, RecordT, bool]:
    """What was stored, its record, and whether it is new. Where recording is refused, what was stored is deleted.

    Storing what is there already does nothing; so when somebody deletes it just then, it must be stored again. `look`
    raises NotFound where files are missing.
    """
    for _ in range(ATTEMPTS):
        try:
            stored = store()
        except FileNotFoundError:
            continue
        known = is_recorded(catalog, noun, stored.id)
        recorded = _record(catalog, noun, stored, record=record, delete=delete)
        try:
            look(stored.id)
        except NotFound:
            continue
        return stored, recorded, not known
    raise Conflict("what you send is being deleted again and again; send it when that is over")


def _record(
    catalog: Catalog,
    noun: type[Noun],
    stored: StoredT,
    *,
    record: Callable[[StoredT], RecordT],
    delete: Callable[[str], None],
) -> RecordT:
    try:
        return record(stored)
    except GradstoreError:
        with catalog.transaction() as session:  # which also keeps others from recording it meanwhile
            if session.get(noun, stored.id) is None:
                delete(stored.id)
        raise


def is_recorded(catalog: Catalog, noun: type[Noun], id: str) -> bool:
    """Whether the catalog has something of this id."""
    with catalog.reading() as session:
        return session.get(noun, id) is not None
