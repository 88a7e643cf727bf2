"""The chunks of a shard: written as its attempt's own, committed, and then published, or given up.

What gradients, conversions and imports write outside the catalog is theirs alone until the commit of the shard; after
that every row is published by whoever comes first, its worker or another that finds it left (worker/jobs.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gradstore.types import Problem

from datastore.errors import Conflict, Damaged
from datastore.gradients import Block
from datastore.leases import Claim, NewChunk, Publication
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


def publish(context: Context, publications: Sequence[Publication]) -> None:
    """Put committed chunks where they are read, or have their rows computed again."""
    done = []
    for one in publications:
        try:
            context.store.publish(one.segment, start=one.start, attempt=one.attempt, digest=one.digest)
        except (Conflict, Damaged) as error:
            _give_up(context, one, reason=str(error))
        else:
            done.append(one)
    if done:
        context.jobs.published(done)


def discard(context: Context, segment: str, *, start: int, attempt: int) -> None:
    """Remove what an attempt has written, unless it is being published."""
    try:
        context.store.discard(segment, start=start, attempt=attempt)
    except Conflict:  # somebody is publishing it at this moment
        log.info("attempt is being published", extra={"segment": segment, "start": start})


def _give_up(context: Context, chunk: Publication, *, reason: str) -> None:
    """Have rows computed again whose bytes are lost; these may also be deleted, or another attempt's, and then stay so.

    A publication is refused only where it can never be finished: an attempt's bytes are either in its folder or, moved
    by another publisher, under their keys.
    """
    problem = Problem(
        type="bytes-lost", title="Bytes lost", status=500,
        detail=f"what was computed for rows from {chunk.start} of {chunk.segment} was lost before it was published: "
        f"{reason}",
    )  # fmt: skip
    give_up = partial(context.store.give_up, chunk.segment, start=chunk.start, attempt=chunk.attempt)
    again = context.jobs.lost(chunk, problem, discard=give_up)
    log.warning(
        "chunk not published",
        extra={"segment": chunk.segment, "start": chunk.start, "reason": reason, "computed_again": again},
    )
