"""What lies in the store and nothing refers to: unfinished work of killed processes, and files whose record is gone.

Beside a running service this is told from work in progress by age, and removed in a transaction of the catalog, in
which nobody can record what is about to go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sqlalchemy import Select

from datastore.durable import untouched_for
from datastore.inventory import KINDS, PARTS, Kind
from datastore.publications import discard
from datastore.removal import remove
from datastore.settings import Settings
from datastore.sizes import bytes_of
from datastore.store import OpenStore

OLD = 3600.0
"""Seconds after which what is unfinished is taken for left behind."""


@dataclass(frozen=True)
class Leftover:
    """Something that may go."""

    kind: Literal["unfinished", "orphan", "derived", "record"]
    """Work that was begun, files without a record, what can be made again of what is gone, a row of the catalog."""
    place: str
    detail: str
    bytes: int
    remove: Callable[[], None]


def leftovers(store: OpenStore, *, older_than: float) -> Iterator[Leftover]:
    """Everything that is unfinished or without a record, and was not touched for so many seconds.

    In a bucket, where the data folder is a cache, it is what lies in the bucket, and what this machine has begun.
    """
    yield from _unfinished(store.settings, older_than)
    for depot in store.depots:
        for rest in depot.leftovers(older_than=older_than):
            yield Leftover("unfinished", rest.place, "a publication that was not finished", rest.bytes, rest.remove)
    yield from attempts(store, older_than=older_than)
    yield from orphans(store, older_than=older_than)


def _unfinished(settings: Settings, older_than: float) -> Iterator[Leftover]:
    parts = [settings.data / part for part in PARTS]
    found = [path for part in parts for path in (part / "unfinished").glob("*")]
    found += [path for part in parts for path in part.glob(".*") if path.name != ".lock"]
    found += [*(settings.data / "incoming").glob("form-*"), *(settings.datasets / "incoming").glob("*")]
    for path in found:
        if untouched_for(path) > older_than:
            detail = "begun by a process that was killed"
            yield Leftover("unfinished", _place(settings, path), detail, bytes_of(path), partial(remove, path))


def attempts(store: OpenStore, *, older_than: float) -> Iterator[Leftover]:
    """What attempts have written and nobody has committed."""
    wanted = {(one.segment, one.start, one.attempt) for one in store.jobs.unpublished()}
    for left in store.store.attempts():
        if left.age_seconds > older_than and (left.segment, left.start, left.attempt) not in wanted:
            gone = partial(discard, store, left.segment, start=left.start, attempt=left.attempt)
            detail = "an attempt at these rows that was never committed"
            yield Leftover("unfinished", left.place, detail, left.bytes, gone)


def orphans(store: OpenStore, *, older_than: float, parts: Collection[str] = PARTS) -> Iterator[Leftover]:
    """What lies in these parts of the store and has no record."""
    for kind in KINDS:
        if kind.owners is None or kind.part not in parts:
            continue
        for id in store.catalog.unknown(kind.owners, kind.ids(store)):
            if kind.age(store, id) > older_than:
                gone = partial(_delete_unknown, store, kind, kind.owners, id)
                yield Leftover("orphan", kind.place(id), "no record in the catalog", kind.bytes(store, id), gone)


def _delete_unknown(store: OpenStore, kind: Kind, owners: Select[str], id: str) -> None:
    store.catalog.delete_unknown(owners, [id], delete_files=partial(kind.delete, store))


def _place(settings: Settings, path: Path) -> str:
    return str(path.relative_to(settings.data))
