"""What is wrong with the files of a kind: datasets, tasks, checkpoints, selections, and what jobs have left.

Each check reads a thing as it is made, where it lies in a folder; whole ones of a bucket are looked at by
datastore/bucket_checks.py. Which check is whose is told in datastore/inventory.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore.adapter_scores import recorded as recorded_scores
from datastore.checkpoints import DESCRIPTION
from datastore.dataset_files import EMPTY_CHAIN, KEYS, OFFSETS, DatasetFolder, chain
from datastore.errors import Damaged, NotFound
from datastore.estimate_parts import recorded_parts
from datastore.findings import Finding, ids, known
from datastore.identity import sha256_of
from datastore.schema import CheckpointRow, DatasetRow, JobRow, SelectionRow, SourceRow, TaskRow
from datastore.streams import matrices_of
from datastore.strict_json import canonical, parse

if TYPE_CHECKING:  # the store is opened with what the inventory of the checks tells
    from datastore.array_files import ArrayFiles
    from datastore.inventory import Kind
    from datastore.store import OpenStore


def datasets(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Datasets whose rows are not all there, of the right sizes; or, where it is `deep`, have changed."""
    for id in ids(store, DatasetRow):
        fault = _dataset_fault(store, id, deep=deep)
        if fault is not None and known(store, DatasetRow, id):
            yield _lost(store, kind, id, fault, mend=partial(remake, store, id))


def sources(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Uploads of datasets that are not there; or, where it is `deep`, have changed."""
    with store.catalog.reading() as session:
        query = select(SourceRow.dataset_id, SourceRow.sha256).order_by(SourceRow.dataset_id)
        recorded = [(id, sha256) for id, sha256 in session.execute(query)]
    for id, sha256 in recorded:
        path = kind.path(store.settings, sha256)
        if not path.exists():
            detail = f"the upload of {id} is missing; its rows are not: {kind.again}"
            yield Finding(kind="missing", place=kind.place(sha256), detail=detail)
        elif deep and sha256_of(path) != sha256:
            detail = f"the upload of {id} has changed; its rows have not: {kind.again}"
            yield Finding(kind="damaged", place=kind.place(sha256), detail=detail)


def _dataset_fault(store: OpenStore, id: str, *, deep: bool) -> str | None:
    path = store.settings.datasets / id
    try:
        folder = DatasetFolder(path)
        manifest = folder.manifest
        sizes = {OFFSETS: 8 * (manifest.rows + 1), KEYS: 16 * manifest.rows}
        wrong = [name for name, size in sizes.items() if (path / name).stat().st_size != size]
        if wrong:
            return f"{wrong[0]} has another size than its {manifest.rows:,} rows need"
        if not deep:
            return None
        digest = EMPTY_CHAIN
        for line in folder.lines(range(manifest.rows)):
            digest = chain(digest, canonical(parse(line)))
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (Damaged, ValueError) as error:
        return str(error)
    return None if digest.hex() == manifest.digest else "the rows do not match their content hash"


def remake(store: OpenStore, id: str) -> str:
    """Store a dataset anew from its own upload, where one upload brought all its rows and is still sound."""
    said = set_aside(store, store.settings.datasets / id)
    with store.catalog.reading() as session:
        rows = session.get_one(DatasetRow, id).rows
        sources = list(session.scalars(select(SourceRow).where(SourceRow.dataset_id == id, SourceRow.rows == rows)))
    for source in sources:
        upload = _upload(store, source.sha256)
        if upload is not None:
            known = store.catalog.dataset_sizes()
            with upload.open("rb") as file:
                found = store.datasets.ingest(file, filename=source.filename, on_error="skip", known=known)
            if found.id == id:
                return "stored anew from its upload"
    return said


def _upload(store: OpenStore, sha256: str) -> Path | None:
    """An upload that is there and sound."""
    try:
        path = store.datasets.source(sha256)
        return path if sha256_of(path) == sha256 else None
    except (NotFound, Damaged, FileNotFoundError):
        return None


def _lost(store: OpenStore, kind: Kind, id: str, fault: str, *, mend: Callable[[], str] | None = None) -> Finding:
    """A noun whose files are damaged or missing: a repair sets aside what is left, so that the same can come again."""
    path, detail = kind.path(store.settings, id), f"{fault}: {kind.again}"
    if path.is_dir():
        mend = mend or partial(set_aside, store, path)
        return Finding(kind="damaged", place=kind.place(id), detail=detail, mend=mend)
    return Finding(kind="missing", place=kind.place(id), detail=detail, mend=mend)


def set_aside(store: OpenStore, path: Path) -> str:
    """Move what is left of a noun out of the way: what is stored under its name is not stored again."""
    aside = store.settings.data / "set-aside"
    store.depot(path).set_aside(path, aside)
    return f"not mended: what is left is set aside in {aside.name}; upload the same again"


def tasks(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:  # noqa: ARG001 - as all of them
    """Tasks whose rows cannot be read."""
    for id in ids(store, TaskRow):
        try:
            store.tasks.validation(id)
            store.tasks.test(id)
        except (NotFound, Damaged) as error:
            if known(store, TaskRow, id):
                yield _lost(store, kind, id, str(error))


def checkpoints(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Checkpoints of which a file is missing; or, where it is `deep`, has changed."""
    for id in ids(store, CheckpointRow):
        fault = _checkpoint_fault(kind.path(store.settings, id), deep=deep)
        if fault is not None and known(store, CheckpointRow, id):
            yield _lost(store, kind, id, fault)


def _checkpoint_fault(home: Path, *, deep: bool) -> str | None:
    try:
        files = json.loads((home / DESCRIPTION).read_bytes())["files"]
        for name, sha256 in files.items():
            if not (home / name).exists():
                return f"{name} is missing"
            if deep and sha256_of(home / name) != sha256:
                return f"{name} does not match its content hash"
    except (OSError, ValueError, KeyError) as error:
        return f"{DESCRIPTION} cannot be read ({error})"
    return None


def selections(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Selections whose rows cannot be read: the first, or, where it is `deep`, any."""
    for id in ids(store, SelectionRow):
        try:
            if deep:
                store.answers.files.table(id)
            else:
                store.answers.files.page(id, limit=1, after=0)
        except Damaged as error:
            if known(store, SelectionRow, id):
                yield Finding(kind="missing", place=kind.place(id), detail=str(error))


# What jobs have left --------------------------------------------------------------------------------------------------


def projectors(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Trained projectors whose files are not there; or, where it is `deep`, have changed."""
    files = store.projectors.files
    with store.catalog.reading() as session:
        trained = select(JobRow.id).where(JobRow.kind == "projector", JobRow.status == "succeeded")
        recorded = sorted(session.scalars(trained))
    for id in recorded:
        place = kind.place(id)
        try:
            there = files.exists(id)
            if there and deep:
                files.weights(id)
        except Damaged as error:
            if known(store, JobRow, id):
                yield Finding(kind="damaged", place=place, detail=str(error))
        if not there and known(store, JobRow, id):
            yield Finding(kind="missing", place=place, detail=f"it is recorded and not there: {kind.again}")


def estimates(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """What subsets were estimated to give that is recorded and not there; or, where it is `deep`, has changed."""
    yield from _arrays(store, kind, store.estimates.files, recorded_parts, deep=deep)


def adapter_scores(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Scores of adapters that a choice rests on and that are not there; or, where it is `deep`, have changed."""
    yield from _arrays(store, kind, store.adapter_choices.scores, recorded_scores, deep=deep)


def _arrays(
    store: OpenStore, kind: Kind, files: ArrayFiles, recorded: Callable[[Session], set[str]], *, deep: bool
) -> Iterator[Finding]:
    def known() -> set[str]:
        with store.catalog.reading() as session:
            return recorded(session)

    for key in sorted(known()):
        place = kind.place(key)
        there = files.exists(key)
        try:
            if there and deep:
                files.check(key)
        except Damaged as error:
            if key in known():
                yield Finding(kind="damaged", place=place, detail=f"{error}: {kind.again}")
        if not there and key in known():
            yield Finding(kind="missing", place=place, detail=f"it is recorded and not there: {kind.again}")


def matrices(store: OpenStore, kind: Kind, deep: bool) -> Iterator[Finding]:
    """Rows of streams, and uploaded labels, that are recorded and not there; or, where it is `deep`, have changed."""
    files = store.streams.matrices
    with store.catalog.reading() as session:
        recorded = sorted(matrices_of(session))
    for key in recorded:
        place = kind.place(key)
        try:
            if deep:
                files.get(key)
            there = files.exists(key)
        except Damaged as error:
            there = files.exists(key)
            if there and _still_has(store, key):
                yield Finding(kind="damaged", place=place, detail=str(error))
        if not there and _still_has(store, key):
            yield Finding(kind="missing", place=place, detail=f"it is recorded and not there: {kind.again}")


def _still_has(store: OpenStore, key: str) -> bool:
    """Whether a matrix is still recorded: what somebody deletes while the doctor looks is not missing."""
    with store.catalog.reading() as session:
        return key in matrices_of(session)
