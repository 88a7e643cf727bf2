"""A labeller's annotation: every row that has no reply yet is asked about, and replies are recorded as they come."""

from __future__ import annotations

from contextlib import closing
from functools import partial

import httpx
from gradstore.types import Labeller

from datastore.annotations import allowed_url
from datastore.leases import Claim
from worker.context import Context
from worker.heartbeat import Heartbeat, Stopped
from worker.kinds import Commit
from worker.labelling import TIMEOUT, Asking, Rate, replies


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Ask about the rows that are left, and return the commit of all."""
    labeller = Labeller.model_validate(claim.plan["labeller"])
    url = allowed_url(labeller.url, context.settings)
    asked = context.annotations.asked(claim)
    left, done = context.annotations.to_ask(claim, asked=asked), len(asked)
    key = context.settings.labeller_key(url)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=False) as http:
        asking = Asking(http, url, labeller, context.annotations.taxonomy(claim), Rate(labeller.calls_per_minute))
        with closing(replies(asking, left, check=heartbeat.check)) as found:
            for arrived in found:
                if not context.annotations.record(claim, arrived):
                    raise Stopped
                done += len(arrived)
                heartbeat.report(done)
    return partial(context.jobs.succeed, claim)
