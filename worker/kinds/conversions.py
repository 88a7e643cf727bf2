"""A shard of a conversion: a range of rows of stored feature sets, written again in another dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

from datastore import conversions
from datastore.leases import Claim, NewChunk
from worker import chunks
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.laps import Laps


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Read a range of rows of stored feature sets, to be written in another dtype."""
    start, stop = claim.payload["start"], claim.payload["stop"]
    laps = Laps()

    def write(output: dict[str, Any]) -> NewChunk:
        heartbeat.check()
        source = context.conversions.source(claim.plan, output)
        block = conversions.block(context.features.view(source), start, stop)
        return chunks.write(claim, context, output, block, tokens=context.features.tokens(source.id, start, stop))

    return partial(chunks.write_and_commit, claim, context, write, laps)
