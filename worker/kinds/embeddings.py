"""An embedding's work: rows are read as a projector's were, standardised as they were, and placed."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from datastore.leases import Claim
from worker.ability_files import read_projector
from worker.ability_training import Streams
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Place the rows; the answer keeps and commits them."""
    began = time.monotonic()
    context.ahead.drop()
    context.loaded.make_room()
    projector = read_projector(context.projectors.files.weights(claim.plan["projector"]), device=context.device)
    joined = context.embeddings.read(claim.plan)
    placed = projector.place(Streams(joined.gradients, joined.routing), on_rows=heartbeat.report)
    places = replace(placed, present=joined.present)
    heartbeat.check()
    return partial(context.embeddings.finish, claim, places, seconds=claim.worked + time.monotonic() - began)
