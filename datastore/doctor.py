"""The doctor: compares what lies in the store with what the catalog says, and mends what can be mended.

It works beside a running service: what is in the making is told from what was left by its age, and every repair is made
in a transaction that looks again. What it cannot make good, it says how somebody else can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy import delete, exists, select, text, update
from sqlalchemy.orm import aliased

from datastore.bucket_checks import things
from datastore.catalog import USABLE
from datastore.errors import Damaged, NotFound
from datastore.findings import Finding, FindingKind, done, ids, known
from datastore.leases import Publication
from datastore.leftovers import leftovers
from datastore.publications import publish
from datastore.repairs import Range, take_back, take_back_all
from datastore.schema import (
    ChunkRow,
    DatasetRow,
    FeatureSetRow,
    JobRow,
    SegmentRow,
    ShardRow,
    UseRow,
)
from datastore.store import OpenStore


def examine(store: OpenStore, *, older_than: float, deep: bool = False) -> Iterator[Finding]:
    """Everything that is wrong; `deep` compares the checksum of every chunk and file, at the speed of the disk.

    What is unfinished counts as left behind once it was not touched for `older_than` seconds. Of a store in a bucket it
    is the bucket that is looked at, whatever this machine's cache has or lacks.
    """
    yield from _catalog(store, deep=deep)
    for left in leftovers(store, older_than=older_than):
        kind: FindingKind = "orphan" if left.kind == "orphan" else "leftover"
        mend = partial(done, left.remove, "removed")
        yield Finding(kind=kind, place=left.place, detail=left.detail, bytes=left.bytes, mend=mend)
    yield from _leases(store, older_than)
    yield from _unpublished(store, older_than)
    for segment in ids(store, SegmentRow):
        yield from _segment(store, segment, deep=deep)
    yield from things(store, deep=deep)
    yield from _references(store)


# Catalog ----------------------------------------------------------------------------------------------------------


def _catalog(store: OpenStore, *, deep: bool) -> Iterator[Finding]:
    """What SQLite says of its own file; PostgreSQL checks its pages itself, when it is told to."""
    if store.catalog.engine.dialect.name != "sqlite":
        return
    check = "integrity_check" if deep else "quick_check"
    with store.catalog.reading() as session:
        said = list(session.scalars(text(f"PRAGMA {check}")))
    if said != ["ok"]:
        yield Finding(kind="catalog", place="catalog.sqlite3", detail=f"{'; '.join(said[:3])}: restore a backup")


def _leases(store: OpenStore, older_than: float) -> Iterator[Finding]:
    """Shards whose lease ended long ago: every worker puts such back, so none has run since."""
    with store.catalog.reading() as session:
        ended = store.catalog.now(session) - older_than
        query = select(ShardRow).where(ShardRow.status == "running", ShardRow.leased_until < ended)
        found = [(row.job_id, row.number, row.owner) for row in session.scalars(query)]
    for job, number, owner in found:
        detail = f"the lease of {owner} has ended, and nobody has put the shard back: no worker runs"
        mend = partial(done, store.jobs.sweep, "put back")
        yield Finding(kind="lease", place=f"shards {job} {number}", detail=detail, mend=mend)


def _references(store: OpenStore) -> Iterator[Finding]:
    """Records that name what is not there; what foreign keys keep right is not looked at."""
    nouns: dict[str, Any] = {**USABLE}  # each with an id
    with store.catalog.reading() as session:
        uses = list(session.scalars(select(UseRow)))
        there = {prefix: set(session.scalars(select(noun.id))) for prefix, noun in nouns.items()}
        jobs = set(session.scalars(select(JobRow.id)))
        users = jobs | there["sel"] | there["ad"]
        sets = list(session.scalars(select(FeatureSetRow)))
        whole = aliased(DatasetRow)
        cut = DatasetRow.prefix.is_not(None) & ~exists().where(whole.id == DatasetRow.prefix)
        prefixes = list(session.scalars(select(DatasetRow.id).where(cut)))
    for use in uses:
        if use.user not in users:
            mend = partial(_forget_use, store, use.user, use.used)
            yield Finding(kind="dangling", place=f"uses {use.user} {use.used}", detail="its user is gone", mend=mend)
        elif use.used not in there.get(use.used.partition("_")[0], jobs):
            detail = "what it uses is gone: upload that again, or delete the user"
            yield Finding(kind="dangling", place=f"uses {use.user} {use.used}", detail=detail)
    for row in sets:
        owner = row.dataset or row.task or ""
        if owner not in there["ds"] | there["task"]:
            detail = f"features of {owner}, which is gone: upload it again, or delete them"
            yield Finding(kind="dangling", place=f"feature_sets {row.id}", detail=detail)
    for id in prefixes:
        mend = partial(done, partial(_forget_prefix, store, id), "no prefix is named any more")
        yield Finding(kind="dangling", place=f"datasets {id}", detail="names a prefix that is gone", mend=mend)


def _forget_use(store: OpenStore, user: str, used: str) -> str:
    with store.catalog.transaction() as session:
        session.execute(delete(UseRow).where(UseRow.user == user, UseRow.used == used))
    return "record removed"


def _forget_prefix(store: OpenStore, id: str) -> None:
    with store.catalog.transaction() as session:
        session.execute(update(DatasetRow).where(DatasetRow.id == id).values(prefix=None))


# Features ---------------------------------------------------------------------------------------------------------


def _unpublished(store: OpenStore, older_than: float) -> Iterator[Finding]:
    """Committed chunks without their keys: published here where their bytes are there, else computed again."""
    unpublished = store.jobs.unpublished()
    attempts = {
        (each.segment, each.start, each.attempt): each for each in (store.store.attempts() if unpublished else ())
    }
    for one in unpublished:
        attempt = attempts.get((one.segment, one.start, one.attempt))
        if attempt is not None and attempt.age_seconds <= older_than:
            continue  # its worker, or another, is about to
        if attempt is None and one not in store.jobs.unpublished():
            continue  # published at this moment
        detail = f"committed by {one.attempt}, and published by nobody"
        mend = partial(_publish, store, one)
        yield Finding(kind="unpublished", place=_place(one.segment, (one.start, one.stop)), detail=detail, mend=mend)


def _publish(store: OpenStore, one: Publication) -> str:
    [fate] = publish(store, [one])
    return {
        "published": "published",
        "computed again": "taken back: it is computed again",
        "another's": "published or taken back by somebody else",
    }[fate]


def _segment(store: OpenStore, segment: str, *, deep: bool) -> Iterator[Finding]:
    with store.catalog.reading() as session:
        row = session.get(SegmentRow, segment)
        if row is None:
            return
        rows, complete = row.rows, row.complete
        query = select(ChunkRow).where(ChunkRow.segment_id == segment).order_by(ChunkRow.start)
        chunks = {row.start: row for row in session.scalars(query)}
    published = [(row.start, row.stop) for row in chunks.values() if row.published]
    fault = _metadata_fault(store, segment) if published else None
    if fault is not None and known(store, SegmentRow, segment):
        mend = partial(take_back_all, store, segment)
        yield Finding(kind="damaged", place=f"features/{segment}", detail=fault, mend=mend)
        return
    for start, stop, fault in _chunk_faults(store, segment, published, deep=deep):
        if _is_committed(store, segment, (start, stop)):
            yield _damaged(store, segment, (start, stop), fault)
    if complete:
        for range_ in _gaps(published, rows):
            if not _is_committed(store, segment, range_) and known(store, SegmentRow, segment):
                yield _damaged(
                    store, segment, range_, "the segment is said to be complete, and nobody has committed these"
                )
    yield from _unregistered(store, segment, chunks)


def _damaged(store: OpenStore, segment: str, rows: Range, fault: str) -> Finding:
    mend = partial(take_back, store, segment, rows)
    return Finding(kind="damaged", place=_place(segment, rows), detail=fault, mend=mend)


def _unregistered(store: OpenStore, segment: str, chunks: dict[int, ChunkRow]) -> Iterator[Finding]:
    """Receipts that the catalog does not know: their rows would be refused to whoever computes them."""
    for start, digest in store.store.receipts(segment).items():
        if start in chunks and chunks[start].digest == digest:
            continue
        detail = (
            "published bytes that the catalog does not know" if start not in chunks else "another attempt's receipt"
        )
        mend = partial(_forget_unregistered, store, segment, start)
        place = f"features/{segment}/receipts/{start}.json"
        if start in chunks:
            yield _damaged(store, segment, (start, chunks[start].stop), detail)
        elif not _is_committed(store, segment, (start, start + 1)):
            yield Finding(kind="unregistered", place=place, detail=detail, mend=mend)


def _forget_unregistered(store: OpenStore, segment: str, start: int) -> str:
    with store.catalog.transaction() as session:
        if session.get(ChunkRow, (segment, start)) is not None:
            return "committed meanwhile: left as it is"
        store.store.give_up(segment, start=start, attempt=0)
        store.store.renew(segment)
    return "removed"


def _metadata_fault(store: OpenStore, segment: str) -> str | None:
    try:
        store.store.afresh(segment)
    except NotFound:
        return "the segment is missing"
    except (Damaged, KeyError, TypeError) as error:
        return str(error)
    return None


def _chunk_faults(
    store: OpenStore, segment: str, published: list[Range], *, deep: bool
) -> Iterator[tuple[int, int, str]]:
    """What is wrong with published ranges: bytes that are missing, cut or changed, or nobody's by their receipt."""
    if not published:
        return
    found = set()
    with suppress(NotFound):  # deleted at this moment
        for start, stop, fault in store.store.faults(segment, published, deep=deep):
            found.add(start)
            yield start, stop, fault
    receipts = store.store.receipts(segment)
    for start, stop in published:
        if start not in receipts and start not in found:
            yield start, stop, "the receipt of these rows is missing"


def _gaps(published: list[Range], rows: int) -> Iterator[Range]:
    at = 0
    for start, stop in [*published, (rows, rows)]:
        if at < start:
            yield at, start
        at = max(at, stop)


def _is_committed(store: OpenStore, segment: str, rows: Range) -> bool:
    with store.catalog.reading() as session:
        return session.get(ChunkRow, (segment, rows[0])) is not None


def _place(segment: str, rows: Range) -> str:
    return f"features/{segment} rows {rows[0]}:{rows[1]}"
