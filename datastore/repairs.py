"""Taking back chunks whose bytes are lost or damaged, so that they are computed again.

A chunk that was published is read by everybody, so it is taken back as a whole: its record, its receipt and its files,
in one transaction of the catalog. The shards that computed it wait again, their jobs with them, and what was derived of
the rows is forgotten. Same input, same bytes: the new chunk is the old one as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradstore.types import Problem
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from datastore.features import PlannedFeatureSet, output_of
from datastore.leases import MAKE_FEATURES
from datastore.schema import ChunkRow, FeatureSegmentRow, FeatureSetRow, JobFeatureRow, JobRow, SegmentRow, ShardRow
from datastore.store import OpenStore

Range = tuple[int, int]
"""The first row of a segment, and the one after the last."""
IMPOSSIBLE = "not mended: no job can compute these rows again; delete their features and ask for them anew"


def take_back(store: OpenStore, segment: str, rows: Range) -> str:
    """Remove a chunk's record and bytes and have its rows computed again; says what was done, or what is to be done.

    Nothing changes where no job can compute them. Readers of these rows meet `Damaged` until they are there again.
    """
    with store.catalog.transaction() as session:
        again = _again(session, segment, rows, recipe=store.store.open(segment).recipe)
        if again is None:
            return IMPOSSIBLE
        _forget(session, segment, rows)
        store.store.forget(segment, start=rows[0], stop=rows[1])
    _forget_derived(store, segment)
    return f"taken back: {again}"


def take_back_all(store: OpenStore, segment: str) -> str:
    """The same for a whole segment: its metadata are lost, or its folder."""
    with store.catalog.transaction() as session:
        every = (0, session.get_one(SegmentRow, segment).rows)
        again = _again(session, segment, every, recipe=None)
        if again is None:
            return IMPOSSIBLE
        _forget(session, segment, every)
        store.store.delete(segment)
    _forget_derived(store, segment)
    return f"taken back: {again}"


def _forget(session: Session, segment: str, rows: Range) -> None:
    inside = (ChunkRow.segment_id == segment, ChunkRow.start >= rows[0], ChunkRow.start < rows[1])
    session.execute(delete(ChunkRow).where(*inside))
    session.get_one(SegmentRow, segment).complete = False


def _forget_derived(store: OpenStore, segment: str) -> None:
    store.scoring.cache.delete(segment)
    store.attributions.indexes.delete(segment)


def _again(session: Session, segment: str, rows: Range, *, recipe: dict[str, Any] | None) -> str | None:
    """Have those who have computed these rows do it again; says who does, None where nobody can."""
    query = select(ShardRow, JobRow).join(JobRow, JobRow.id == ShardRow.job_id).where(JobRow.kind.in_(MAKE_FEATURES))
    found = session.execute(query.order_by(ShardRow.id))
    covering = [(shard, job) for shard, job in found if _covers(shard.payload, segment, rows)]
    if covering:
        return "; ".join(dict.fromkeys(_reopen(shard, job) for shard, job in covering))
    answering = session.execute(
        select(JobRow, FeatureSetRow, FeatureSegmentRow)
        .join(JobFeatureRow, JobFeatureRow.job_id == JobRow.id)
        .join(FeatureSetRow, FeatureSetRow.id == JobFeatureRow.feature_set_id)
        .join(FeatureSegmentRow, FeatureSegmentRow.feature_set_id == FeatureSetRow.id)
        .where(FeatureSegmentRow.segment_id == segment, JobRow.kind == "gradients")
        .order_by(JobRow.created_at)
    ).first()
    return None if answering is None else _extend(session, *answering, rows=rows, recipe=recipe)


def _covers(payload: dict[str, Any], segment: str, rows: Range) -> bool:
    return any(
        output["segment"] == segment
        and payload["start"] < output["base"] + rows[1]
        and output["base"] + rows[0] < payload["stop"]
        for output in payload["outputs"]
    )


def _reopen(shard: ShardRow, job: JobRow) -> str:
    """Have a shard wait again, and its job with it; an import, whose files are gone, fails until they come again."""
    if shard.status != "succeeded":
        return f"{job.id} computes the rows anyway"
    job.done -= shard.done
    shard.done, shard.failures = 0, 0
    if job.kind == "import":
        problem = Problem(
            type="damaged", title="Damaged", status=500,
            detail="stored bytes of this import were damaged and have been removed: send the same files again",
        ).model_dump(mode="json")  # fmt: skip
        shard.status, shard.error = "failed", problem
        job.status, job.error, job.result = "failed", problem, None
        return f"{job.id} has failed until POST /imports brings the same files"
    shard.status = "queued"
    if job.status == "succeeded":
        _requeue(job)
    waits = job.status in {"queued", "running"}
    return f"{job.id} computes the rows again" + ("" if waits else " once it is asked for")


def _extend(
    session: Session,
    job: JobRow,
    feature: FeatureSetRow,
    place: FeatureSegmentRow,
    *,
    rows: Range,
    recipe: dict[str, Any] | None,
) -> str:
    """Give the rows to a job that answers with them and never computed them: the one that did has been deleted.

    `recipe` are the attributes of the segment, which name the feature set that it was first made for.
    """
    segment = session.get_one(SegmentRow, place.segment_id)
    planned = PlannedFeatureSet(
        id=feature.id, recipe=feature.recipe, checkpoint=feature.checkpoint, parameters=feature.parameters,
        rows=feature.rows, covered=place.start, segments=[(segment.id, place.start, place.stop)],
        shard_rows=segment.shard_rows, exists=False,
    )  # fmt: skip
    output = output_of(planned)
    if recipe is not None:
        output["attributes"] = recipe
    numbers = select(func.coalesce(func.max(ShardRow.number), -1)).where(ShardRow.job_id == job.id)
    last = session.execute(numbers).scalar_one()
    for number, (start, stop) in enumerate(_shards(rows, size=segment.shard_rows), 1 + last):
        payload = {"checkpoint": feature.checkpoint, "start": place.start + start, "stop": place.start + stop}
        session.add(
            ShardRow(
                job_id=job.id, number=number, kind=job.kind, status="queued", payload={**payload, "outputs": [output]},
                units=stop - start, done=0, attempt=0, failures=0, worked=0.0,
            )
        )  # fmt: skip
    job.total += rows[1] - rows[0]
    if job.status == "succeeded":
        _requeue(job)
    return f"{job.id} computes the rows again"


def _shards(rows: Range, *, size: int) -> Sequence[Range]:
    return [(start, min(start + size, rows[1])) for start in range(rows[0], rows[1], size)]


def _requeue(job: JobRow) -> None:
    job.status, job.error, job.result, job.finished_at, job.resumed_at = "queued", None, None, None, None
