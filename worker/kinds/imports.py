"""The one shard of an import: the features of another program (worker/imports.py), found sound and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from datastore import imports
from datastore.gradients import sound
from datastore.leases import Claim, NewChunk
from worker import chunks
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.imports import block_of, look, open_table
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Read the features of another program, find every row sound, and write them as this attempt's own."""
    began = time.monotonic()
    plan = claim.plan
    paths = imports.find(context.imports.files(claim), dim=plan["dim"])
    table = open_table(paths, rows=plan["rows"], owner=_owner_name(claim, context), dim=plan["dim"])
    found = look(table, on_error=plan["on_error"], check=heartbeat.check)
    feature = context.imports.prepare(
        claim,
        dim=table.dim,
        found={
            "files": [path.name for path in paths],
            "source_dtype": table.dtype,
            "normalised": found.normalised,
            "norms": found.described.model_dump(),
            "seconds": claim.worked + time.monotonic() - began,
        },
    )
    segment = feature.segments[0][0]
    attributes = {**feature.parameters, "feature_set": feature.id, "first_row": 0}
    context.store.create(segment, rows=table.rows, dim=table.dim, dtype=feature.dtype, attributes=attributes)
    written = []
    for start, rows in table.blocks():
        heartbeat.check()
        block = sound(block_of(rows, found.norms[start : start + len(rows)]))
        digest = context.store.write(segment, start=start, attempt=claim.token, block=block)
        excluded = [(start + row, reason) for row, reason in block.excluded.items()]
        written.append(NewChunk(segment, start, start + len(rows), digest, excluded))
        heartbeat.report(start + len(rows))
    return partial(_commit, claim, context, written)


def _commit(claim: Claim, context: Context, written: Sequence[NewChunk]) -> bool:
    won = chunks.commit(claim, context, written)
    if context.jobs.get(claim.job).status == "succeeded":  # else its bytes may be lost yet, and needed again
        context.imports.forget(claim.job)
    return won


def _owner_name(claim: Claim, context: Context) -> str:
    """What the user calls the dataset or task that the features are said to be of."""
    owner = claim.plan["owner"]
    if claim.plan["is_task"]:
        return f"the validation rows of the task {context.catalog.task(owner).name}"
    return f"the dataset {context.catalog.dataset(owner).name or owner}"
