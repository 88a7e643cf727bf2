"""Jobs whose result is put together when their last shard is done, by the worker that did it.

That reads files and takes seconds, which no transaction should wait for: a shard is committed without a result unless
no other is left, and the last one with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore.catalog import Catalog
from datastore.leases import Claim, Jobs
from datastore.schema import ShardRow


class _ResultWanted(Exception):
    """All shards are done, and nobody has put together what they came to."""


def commit(
    jobs: Jobs, claim: Claim, *, record: Callable[[Session, ShardRow], None], result: Callable[[], BaseModel]
) -> bool:
    """Commit a shard that is done, and with the last one the job's result; False where it is not wanted.

    `record` writes on the shard what it came to, in the transaction that commits it. `result` is called outside of one.
    """
    try:
        return jobs.succeed(claim, records=partial(_unless_last, claim, record))
    except _ResultWanted:
        found = result()
        return jobs.succeed(
            claim,
            result=found.model_dump(mode="json"),
            records=lambda session: record(session, session.get_one(ShardRow, claim.shard)),
        )


def _unless_last(claim: Claim, record: Callable[[Session, ShardRow], None], session: Session) -> None:
    record(session, session.get_one(ShardRow, claim.shard))
    others = select(ShardRow.id).where(
        ShardRow.job_id == claim.job, ShardRow.id != claim.shard, ShardRow.status != "succeeded"
    )
    if session.scalar(others.limit(1)) is None:
        raise _ResultWanted


def payloads(catalog: Catalog, claim: Claim, **own: Any) -> list[dict[str, Any]]:
    """What the shards of a claim's job were made from and have recorded, in order; `own` is the claim's record."""
    query = select(ShardRow.number, ShardRow.payload).where(ShardRow.job_id == claim.job).order_by(ShardRow.number)
    with catalog.reading() as session:
        found = session.execute(query).all()
    return [{**payload, **own} if number == claim.number else payload for number, payload in found]
