"""The doctor's look at everything but features: in a folder each kind by its own check, in a bucket by the index.

In a bucket each thing is compared with its index: the sizes that a list tells or, where it is `deep`, the SHA-256 of
what is read; what this machine has of it may mend it, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datastore.findings import Finding
from datastore.inventory import KINDS, Kind, of_part
from datastore.removal import forget
from datastore.store import OpenStore
from datastore.thing_checks import remake, set_aside


def things(store: OpenStore, *, deep: bool) -> Iterator[Finding]:
    """What is wrong with the files of everything but features."""
    for depot in store.depots:
        for path, fault in depot.faults(deep=deep):
            yield _faulty(store, path, fault)
    for kind in KINDS:
        if kind.check is None:
            continue
        if store.depots and kind.rows:
            yield from _missing(store, kind)
        else:
            yield from kind.check(store, kind, deep and not store.depots)


def _faulty(store: OpenStore, path: Path, fault: str) -> Finding:
    """A thing of which the bucket has lost or changed something."""
    place = path.relative_to(store.settings.data)
    again = of_part(place.parts[0])[0].again
    if again is None:
        mend = partial(_forget_derived, store, path)
        return Finding(kind="damaged", place=str(place), detail=f"{fault}: it can be made again", mend=mend)
    mend = partial(_mend, store, path)
    return Finding(kind="damaged", place=str(place), detail=f"{fault}: {again}", mend=mend)


def _missing(store: OpenStore, kind: Kind) -> Iterator[Finding]:
    """Records whose things are not in the bucket."""
    there = set(kind.ids(store))
    for id in sorted(_recorded(store, kind)):
        path = kind.path(store.settings, id)
        if id in there or store.depot(path).exists(path) or id not in _recorded(store, kind):
            continue
        mend = partial(_mend, store, path) if path.parent == store.settings.datasets else None
        detail = f"it is not in the bucket: {kind.again}"
        yield Finding(kind="missing", place=kind.place(id), detail=detail, mend=mend)


def _recorded(store: OpenStore, kind: Kind) -> set[str]:
    """What the catalog names now: what somebody deletes while the doctor looks is not missing."""
    if kind.kept is None:
        return set()
    with store.catalog.reading() as session:
        return kind.kept(session)


def _mend(store: OpenStore, path: Path) -> str:
    """Put a thing again from this machine's copy, store a dataset anew, or else make room for the next upload."""
    if store.depot(path).heal(path):
        return "put again from this machine's copy"
    return remake(store, path.name) if path.parent == store.settings.datasets else set_aside(store, path)


def _forget_derived(store: OpenStore, path: Path) -> str:
    forget(store.depot(path), path)
    return "removed: it is made again when it is asked for"
