"""The chunks of a shard: written as its attempt's own, committed, and then published, or given up.

What gradients, conversions and imports write outside the catalog is theirs alone until the commit of the shard; after
that every row is published by whoever comes first, its worker or another that finds it left (worker/jobs.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from datastore.gradients import Block
from datastore.leases import Claim, NewChunk
from datastore.publications import discard, publish
from worker.context import Context
from worker.laps import Laps

log = logging.getLogger(__name__)


def write(claim: Claim, context: Context, output: dict[str, Any], block: Block, *, tokens: int) -> NewChunk:
    """Keep a shard's features of one dim as this attempt's own."""
    start = claim.payload["start"] - output["base"]
    context.store.create(
        output["segment"],
        rows=output["rows"],
        dim=output["dim"],
        dtype=claim.plan["dtype"],
        attributes=output["attributes"],
    )
    digest = context.store.write(output["segment"], start=start, attempt=claim.token, block=block)
    return NewChunk(
        segment=output["segment"],
        start=start,
        stop=start + len(block.reasons),
        digest=digest,
        excluded=[(start + row, reason) for row, reason in block.excluded.items()],
        tokens=tokens,
    )


def write_and_commit(claim: Claim, context: Context, written: Callable[[dict[str, Any]], NewChunk], laps: Laps) -> bool:
    """Write a shard's features, commit and publish them; whether it was in time.

    What is written is left where it is when anything fails, since a commit may have been made whose answer was lost;
    `tidy` (worker/jobs.py) knows later.
    """
    laps.end("waiting")  # for the shard before to be written
    chunks = [written(output) for output in claim.payload["outputs"]]
    won = commit(claim, context, chunks)
    laps.end("writing")
    log.info("shard's seconds", extra={**claim.labels, **laps.seconds})
    return won


def commit(claim: Claim, context: Context, chunks: Sequence[NewChunk]) -> bool:
    """Commit and publish what a shard has written; whether it was in time."""
    won = context.jobs.succeed(claim, chunks=chunks)
    mine = context.jobs.unpublished(attempt=claim.token)
    publish(context, mine)
    committed = {(one.segment, one.start) for one in mine}
    for chunk in chunks:
        if (chunk.segment, chunk.start) not in committed:  # another attempt has these rows, or has published these
            discard(context, chunk.segment, start=chunk.start, attempt=claim.token)
    return won
