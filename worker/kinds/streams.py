"""A shard of a stream: hidden states, or routing weights, of a range of rows."""

from __future__ import annotations

from functools import partial

import numpy as np

from datastore.leases import Claim
from datastore.matrices import Matrix
from worker import budgets, states
from worker.context import Context
from worker.engines import load, within_memory
from worker.features import FEATURE_NOT_FINITE
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.loaded import Base
from worker.reading import Rows, read
from worker.states import States


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Compute the rows of a shard, unless an earlier attempt has."""
    matrix = context.streams.kept(claim)
    if matrix is None:
        matrix = _computed(claim, context, heartbeat)
    heartbeat.check()
    return partial(context.streams.finish, claim, matrix)


def _computed(claim: Claim, context: Context, heartbeat: Heartbeat) -> Matrix:
    plan, payload = claim.plan, claim.payload
    context.ahead.drop()
    checkpoint = context.catalog.checkpoint(plan["checkpoint"])
    tokenizer = context.loaded.tokenizer(checkpoint.model, checkpoint.revision)
    rows = read(
        context.streams.owners.examples(plan["owner"], payload["start"], payload["stop"]),
        tokenizer=tokenizer, template=plan["template"], max_length=plan["max_length"], check=heartbeat.check,
    )  # fmt: skip
    if not rows.encoded:  # what a row would be as wide as is not known without one: it has no number
        return _matrix(rows, None)
    base = Base(
        model=checkpoint.model,
        revision=checkpoint.revision,
        precision=plan["precision"],
        quantisation=plan["quantisation"],
    )
    model = load(context, base, checkpoint)
    without = len(rows.reasons) - len(rows.encoded)

    def compute(tokens: int) -> States:
        told = {"pad_id": int(tokenizer.pad_token_id), "token_budget": tokens}
        heard = lambda done: heartbeat.report(without + done)  # noqa: E731
        if plan["kind"] == "hidden":
            return states.hidden(model, rows.encoded, layers=plan["layers"], on_batch=heard, **told)
        return states.routing(model, rows.encoded, on_batch=heard, **told)

    found = within_memory(
        compute,
        budget=plan["token_budget"] or budgets.range_of(context.device).usual,
        least=max(len(row.input_ids) for row in rows.encoded),
        device=context.device,
    )
    return _matrix(rows, found)


def _matrix(rows: Rows, found: States | None) -> Matrix:
    """Put the computed rows back among those that have none."""
    count = len(rows.reasons)
    reasons = {row: reason for row, reason in enumerate(rows.reasons) if reason is not None}
    if found is None:
        return Matrix(np.zeros((count, 0), np.float32), np.zeros(count, np.bool_), reasons)
    numbers = np.zeros((count, found.rows.shape[1]), np.float32)
    present = np.zeros(count, np.bool_)
    finite = np.isfinite(found.rows).all(1)
    positions = np.array(rows.positions)
    numbers[positions[finite]], present[positions[finite]] = found.rows[finite], True
    reasons |= dict.fromkeys(positions[~finite].tolist(), FEATURE_NOT_FINITE)
    return Matrix(numbers, present, reasons, {"layers": list(found.layers)})
