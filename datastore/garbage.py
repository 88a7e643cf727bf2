"""Garbage collection: what nothing refers to any more, with its size, to be listed or removed.

Nothing that a record of the catalog names is ever garbage, so that no answer changes: features go with the last job
that answers with them, datasets, tasks and checkpoints when somebody deletes them, which is refused while they are
used. What is collected here is left by killed processes and by deletions of earlier days: derived files (scores,
indexes, runs of words, features of questions, finished trainings, rows of streams) of what is gone, and keys that have
had their day.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sqlalchemy import Select, delete, func, select

from datastore.catalog import outlived, utc_now
from datastore.inventory import FEATURES, KINDS, Gone, Kind
from datastore.leftovers import Leftover, leftovers
from datastore.schema import ChunkRow, FeatureSegmentRow, FeatureSetRow, IdempotencyRow, JobFeatureRow, SegmentRow
from datastore.store import OpenStore


def garbage(store: OpenStore, *, older_than: float) -> Iterator[Leftover]:
    """Everything that may go; files only where they were not touched for so many seconds.

    Features come first: what is derived of them is garbage at the next call, when they are gone.
    """
    yield from leftovers(store, older_than=older_than)
    yield from _segments(store)
    for kind in KINDS:
        if kind.gone is not None:
            yield from _derived(store, kind, kind.gone(store), older_than=older_than)
    yield from _keys(store)


def _derived(store: OpenStore, kind: Kind, gone: Gone, *, older_than: float) -> Iterator[Leftover]:
    """The things of a kind that were made of what is gone."""
    for id in kind.ids(store):
        lost = gone(id)
        if lost and kind.age(store, id) > older_than:
            detail = f"made of what is gone: {', '.join(sorted(lost))}"
            yield Leftover("derived", kind.place(id), detail, kind.bytes(store, id), partial(kind.delete, store, id))


def _unanswered() -> Select[str]:
    """The feature sets that no job answers with."""
    return select(FeatureSetRow.id).where(FeatureSetRow.id.not_in(select(JobFeatureRow.feature_set_id)))


def _unused() -> Select[str]:
    """The segments that belong to no feature set which a job answers with."""
    answered = select(FeatureSegmentRow.segment_id).where(FeatureSegmentRow.feature_set_id.not_in(_unanswered()))
    return select(SegmentRow.id).where(SegmentRow.id.not_in(answered))


def _segments(store: OpenStore) -> Iterator[Leftover]:
    with store.catalog.reading() as session:
        found = list(session.scalars(_unused()))
    for segment in found:
        gone, detail = partial(_delete_segment, store, segment), "no job answers with these features"
        yield Leftover("record", FEATURES.place(segment), detail, FEATURES.bytes(store, segment), gone)


def _delete_segment(store: OpenStore, segment: str) -> None:
    """Delete a segment and the feature sets that have it, unless a job answers with them by now."""
    with store.catalog.transaction() as session:
        if session.scalar(_unused().where(SegmentRow.id == segment)) is None:
            return
        of_segment = select(FeatureSegmentRow.feature_set_id).where(FeatureSegmentRow.segment_id == segment)
        sets = list(session.scalars(of_segment))
        session.execute(delete(FeatureSegmentRow).where(FeatureSegmentRow.feature_set_id.in_(sets)))
        session.execute(delete(FeatureSetRow).where(FeatureSetRow.id.in_(sets)))
        session.execute(delete(ChunkRow).where(ChunkRow.segment_id == segment))
        session.execute(delete(SegmentRow).where(SegmentRow.id == segment))
        FEATURES.delete(store, segment)


def _keys(store: OpenStore) -> Iterator[Leftover]:
    with store.catalog.reading() as session:
        old = session.scalar(select(func.count()).select_from(IdempotencyRow).where(outlived(utc_now())))
    if old:
        forget = partial(_forget_keys, store)
        yield Leftover("record", "idempotency_keys", f"{old:,} Idempotency-Keys that have had their day", 0, forget)


def _forget_keys(store: OpenStore) -> None:
    with store.catalog.transaction() as session:
        session.execute(delete(IdempotencyRow).where(outlived(utc_now())))
