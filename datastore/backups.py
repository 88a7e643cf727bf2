"""Backups: the catalog as it is at one moment, and every file that it names.

Files are immutable and named by their content, so the catalog comes first and what it names is copied after it, beside
running workers: a file is there as it was, has moved to its final key, or was deleted meanwhile, and then the backup
begins again. What is in the backup already is not copied again, and what its catalog does not name any more is removed
at the end. The catalog is kept as an SQLite file, whatever it came from: a backup of PostgreSQL restores to SQLite, and
the other way round.

Left out is what is computed again when it is asked for (scores of features and texts, indexes, features of questions),
and unfinished trainings, which begin anew. What a job has left that nobody computes again by asking is in it.

Of a store in a bucket the backup is the catalog and the bucket's address: a bucket is copied by its own means, from
bucket to bucket, or keeps versions. What the catalog names was put before it was recorded, so a copy of the bucket that
is begun after the catalog's has all of it but what was deleted meanwhile, which the doctor tells.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import JSON, Connection, MetaData, func, insert, select, text
from sqlalchemy import Table as SqlTable
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from datastore.bucket import Bucket
from datastore.catalog import Catalog
from datastore.durable import copy_file, replacing, sync_folder, write_file
from datastore.errors import Conflict, InvalidInput
from datastore.gradients import FeatureStore
from datastore.inventory import FEATURES, KINDS
from datastore.removal import remove
from datastore.schema import ChunkRow, JobRow, SegmentRow, Table
from datastore.settings import Settings
from datastore.store import OpenStore

CATALOG, FILES, BUCKET = "catalog.sqlite3", "files", "bucket.json"
AT_ONCE = 1000  # rows of a table
TRIES = 5  # at a catalog whose files nobody deletes meanwhile
_COUNTED = ("shards", "audit")
"""Tables whose ids are counted up; those of shards are never given again."""
_WITH_FILES = tuple(table for kind in KINDS for table in kind.rows)
_FILLED: tuple[type[Table], ...] = (*_WITH_FILES, JobRow)


@dataclass(frozen=True)
class Copied:
    """What a backup or a restore has done."""

    rows: int
    """Rows of the catalog."""
    files: int
    """Files that the catalog names."""
    copied: int
    """Of these, files that were not there yet."""
    bytes: int
    """Bytes of the copied ones."""
    bucket: str | None = None
    """Where the files are, none of which was copied; null for a store in a folder."""


def backup(store: OpenStore, folder: Path) -> Copied:
    """Bring a folder up to date with the store. Raises `Conflict` where things are deleted faster than they are copied,
    and for a folder with the backup of a store of the other kind.

    The folder's catalog is replaced last, so that a backup which is cut off leaves the one before it whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / (BUCKET if store.bucket is None else FILES)).exists():
        other = "a bucket" if store.bucket is None else "a folder"
        raise Conflict(f"{folder} has the backup of a store in {other}, and this one is not: name another folder")
    if store.bucket is not None:
        return _back_up_catalog(store.catalog, store.bucket, folder)
    for _ in range(TRIES):
        with _draft(folder) as kept:
            rows = _copy_rows(store.catalog.engine, kept.engine)
            copied = _copy_files(_named(kept, store.settings.data), store.settings.data, folder / FILES)
            if not _all_there(kept, store.catalog):
                continue
            wanted = set(_named(kept, folder / FILES))
            _take_place(kept, folder / CATALOG)
        _prune(folder / FILES, keep=wanted)
        return Copied(rows, *copied)
    raise Conflict("things are being deleted while they are backed up: back up again when that is over")


def _back_up_catalog(catalog: Catalog, bucket: Bucket, folder: Path) -> Copied:
    with _draft(folder) as kept:
        rows = _copy_rows(catalog.engine, kept.engine)
        with replacing(folder / BUCKET) as partial:
            write_file(partial, json.dumps({"store": bucket.url}).encode())
        _take_place(kept, folder / CATALOG)
    return Copied(rows, 0, 0, 0, bucket.url)


def restore(store: OpenStore, folder: Path) -> Copied:
    """Fill an empty store from a backup.

    Raises `InvalidInput` where there is none, `Conflict` where the catalog is filled, where the backup is of a store of
    the other kind, and where a bucket has nothing of what the catalog names.

    Shards that were at work wait again, without a failure. Files come first: a restore that is cut off is repeated.
    """
    if not (folder / CATALOG).exists():
        raise InvalidInput(f"{folder} holds no backup: name a folder that `gradstore backup` has filled")
    _same_kind(store.bucket, folder)
    filled = has(store.catalog)
    if filled:
        raise Conflict(f"the catalog has {', '.join(filled)} already: restore into an empty one, and an empty folder")
    with _draft(store.settings.data, content=folder / CATALOG) as kept:
        if store.bucket is None:
            copied = _restore_files(store, kept, folder / FILES)
        else:
            _look(store, kept, store.bucket)
            copied = Copied(0, 0, 0, 0, store.bucket.url)
        rows = _copy_rows(kept.engine, store.catalog.engine)
    store.jobs.release_all()
    return replace(copied, rows=rows)


def has(catalog: Catalog) -> list[str]:
    """The tables in which a catalog has what makes it worth keeping."""
    with catalog.reading() as session:
        return [str(noun.__tablename__) for noun in _FILLED if _rows(session, noun)]


def _same_kind(bucket: Bucket | None, folder: Path) -> None:
    """Raise `Conflict` for a backup whose files would have to come from where they are not."""
    marked = (folder / BUCKET).exists()
    if marked and bucket is None:
        of = json.loads((folder / BUCKET).read_bytes())["store"]
        raise Conflict(f"the files of this backup lie in {of}: set GRADSTORE_STORE to that bucket, or to a copy of it")
    if not marked and bucket is not None:
        raise Conflict(
            f"{folder} has the backup of a store in a folder, which cannot become one in a bucket: unset "
            "GRADSTORE_STORE"
        )


def _restore_files(store: OpenStore, kept: Catalog, files: Path) -> Copied:
    copied = _copy_files(_named(kept, files), files, store.settings.data)
    for segment in store.store.root.glob("seg_*"):  # folders that were empty are in no backup
        for part in ("attempts", "receipts"):
            (segment / part).mkdir(exist_ok=True)
    return Copied(0, *copied)


def _look(store: OpenStore, kept: Catalog, bucket: Bucket) -> None:
    """Raise `Conflict` where a bucket has nothing of what a catalog names: it is another's, or not copied yet."""
    with kept.reading() as session:
        named = {FEATURES.place(id) for id in session.scalars(select(ChunkRow.segment_id))}
        named |= {kind.place(id) for kind in KINDS if kind.rows and kind.kept for id in kind.kept(session)}
    there = {kind.place(id) for kind in KINDS if kind.rows for id in kind.ids(store)}
    if named and not named & there:
        raise Conflict(
            f"{bucket.url} has nothing of what the backup's catalog names: copy the objects there first, or set "
            "GRADSTORE_STORE to the bucket that has them"
        )


# Catalog ----------------------------------------------------------------------------------------------------------


@contextmanager
def _draft(folder: Path, *, content: Path | None = None) -> Iterator[Catalog]:
    """A catalog in a hidden file of the folder, empty or a copy, gone at the end; what killed ones left goes first."""
    for stale in folder.glob(f".{CATALOG}.*"):
        stale.unlink()
    draft = folder / f".{CATALOG}.{uuid4().hex}"
    if content is not None:
        copy_file(content, draft)
    kept = Catalog(f"sqlite:///{draft.absolute()}")
    try:
        kept.migrate()
        yield kept
    finally:
        kept.close()
        for rest in folder.glob(f"{draft.name}*"):
            rest.unlink()


def _take_place(kept: Catalog, final: Path) -> None:
    """Write a finished draft as the folder's catalog: one file, without a log beside it."""
    with replacing(final) as partial, closing(sqlite3.connect(kept.engine.url.database or "")) as connection:
        connection.execute("VACUUM INTO ?", (str(partial),))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(final.parent)


def _tables() -> list[SqlTable]:
    """The catalog's tables in the order of their references; what is null is null, and no JSON text that says so."""
    metadata = MetaData()
    tables = [table.to_metadata(metadata) for table in Table.metadata.sorted_tables]
    for column in (column for table in tables for column in table.columns):
        if isinstance(column.type, JSON):
            column.type = JSON(none_as_null=True)
    return tables


def _copy_rows(source: Engine, target: Engine) -> int:
    """Copy all tables, as they are at one moment; returns how many rows."""
    rows = 0
    with _snapshot(source) as reading, target.begin() as writing:
        for table in _tables():
            for batch in reading.execute(select(table)).mappings().partitions(AT_ONCE):
                writing.execute(insert(table), [dict(row) for row in batch])
                rows += len(batch)
        for name in _COUNTED:
            _count_on(writing, name, _counted(reading, name))
    return rows


@contextmanager
def _snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection that only reads, and sees one state of the database however long it reads."""
    options: dict[str, Any] = {"reading": True, "stream_results": True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.execution_options(**options).connect() as connection:
        yield connection


def _counted(connection: Connection, table: str) -> int:
    """The last id that a table has given."""
    last = connection.execute(select(func.coalesce(func.max(Table.metadata.tables[table].c.id), 0))).scalar_one()
    if connection.dialect.name == "postgresql":
        sequence = f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {table}_id_seq"  # noqa: S608 - ours
        return max(int(last), int(connection.execute(text(sequence)).scalar_one()))
    given = connection.execute(text("SELECT seq FROM sqlite_sequence WHERE name = :table"), {"table": table}).scalar()
    return max(int(last), int(given or 0))


def _count_on(connection: Connection, table: str, last: int) -> None:
    """Have a table go on after an id."""
    if not last:
        return
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT setval(:sequence, :last)"), {"sequence": f"{table}_id_seq", "last": last})
        return
    given = {"table": table, "last": last}
    connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :table"), given)
    connection.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last)"), given)


def _all_there(kept: Catalog, live: Catalog) -> bool:
    """Whether everything with files that the backup's catalog names is still in the catalog that it was made of."""
    with kept.reading() as old, live.reading() as now:
        for noun in _WITH_FILES:
            keys = noun.__table__.primary_key.columns  # type: ignore[attr-defined]  # of a Table
            if {*map(tuple, old.execute(select(*keys)))} - {*map(tuple, now.execute(select(*keys)))}:
                return False
        return _left_by_jobs(old) <= _left_by_jobs(now)


def _left_by_jobs(session: Session) -> set[str]:
    """The places of what jobs have left, and no table of its own records."""
    return {kind.place(id) for kind in KINDS if kind.kept and not kind.rows for id in kind.kept(session)}


def _rows(session: Session, noun: type[Table]) -> int:
    return session.scalar(select(func.count()).select_from(noun)) or 0


# Files ------------------------------------------------------------------------------------------------------------


def _named(kept: Catalog, root: Path) -> Iterator[Path]:
    """The files below `root` that a catalog names, relative to it, in the order in which they are to be copied."""
    with kept.reading() as session:
        places = [root / kind.place(id) for kind in KINDS if kind.kept for id in sorted(kind.kept(session))]
        segments = dict(session.execute(select(SegmentRow.id, SegmentRow.complete)).all())
    for place in places:
        yield from (path.relative_to(root) for path in _files(place))
    store = FeatureStore(Settings(data=root).features)
    for segment, complete in segments.items():
        if store.is_local(segment):
            yield from (path.relative_to(root) for path in _of_segment(kept, store, segment, complete=complete))


def _files(place: Path) -> list[Path]:
    """The files of a thing; none where it is gone."""
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def _of_segment(kept: Catalog, store: FeatureStore, segment: str, *, complete: bool) -> Iterator[Path]:
    """A segment's files: all of a complete one, else those of the chunks that are committed.

    Bytes move from an attempt to their keys, and the receipt is there before they do: in the order of attempts, keys
    and receipts each file is met once at least.
    """
    folder = store.root / segment
    if complete:
        yield from sorted(
            path for part in ("data.zarr", "receipts") for path in (folder / part).rglob("*") if path.is_file()
        )
        return
    with kept.reading() as session:
        chunks = list(session.scalars(select(ChunkRow).where(ChunkRow.segment_id == segment)))
    if not chunks:
        return
    yield from sorted((folder / "data.zarr").rglob("zarr.json"))
    for chunk in chunks:
        yield from sorted((folder / "attempts" / f"{chunk.start}-{chunk.attempt}").glob("*"))
    for chunk in chunks:
        yield from filter(Path.exists, store.files(segment, start=chunk.start, stop=chunk.stop))
    for chunk in chunks:
        yield from filter(Path.exists, [folder / "receipts" / f"{chunk.start}.json"])


def _copy_files(files: Iterable[Path], source: Path, target: Path) -> tuple[int, int, int]:
    """Copy what is not there, each file as it comes; returns how many files there are, how many were copied, and the
    bytes of these. What vanishes meanwhile is left out.
    """
    total = count = size = 0
    folders = set()
    for file in files:
        final = target / file
        total += 1
        folders.add(final.parent)
        try:
            found = (source / file).stat().st_size
            if final.exists() and final.stat().st_size == found:
                continue
            with replacing(final) as partial:
                copy_file(source / file, partial)
        except FileNotFoundError:
            continue
        count, size = count + 1, size + found
    for folder in filter(Path.is_dir, folders):
        sync_folder(folder)
    return total, count, size


def _prune(root: Path, *, keep: set[Path]) -> None:
    """Remove files that are not to be kept, and folders that are empty then."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(root) not in keep:
            remove(path)
