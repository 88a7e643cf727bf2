"""A shard of a choice of adapters: what a few of them make of the shots, in batches that they share."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from datastore.leases import Claim
from worker.context import Context
from worker.engines import within_memory
from worker.evaluate import LEAST_TOKENS, TOKENS, with_adapters
from worker.evaluate import work as passes_over
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.loaded import Base
from worker.models import several_adapters


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Score a shard's adapters, those apart that have been; with the last shard goes the choice."""
    began = time.monotonic()
    context.ahead.drop()
    missing = context.adapter_choices.missing(claim)
    if missing:
        _score(missing, claim, context, heartbeat)
    heartbeat.check()
    seconds = time.monotonic() - began if missing else 0.0
    return partial(context.adapter_choices.finish, claim, len(missing), seconds)


def _score(missing: dict[str, Path], claim: Claim, context: Context, heartbeat: Heartbeat) -> None:
    """Score adapters, by their folders, and keep the scores."""
    plan = claim.plan
    shots = context.adapter_choices.examples(plan)
    before = passes_over(shots) * (len(claim.payload["adapters"]) - len(missing))
    tokenizer = context.loaded.tokenizer(plan["model"], plan["revision"])
    base = context.loaded.base(Base(plan["model"], plan["revision"], precision=plan["precision"]))
    with several_adapters(base, missing) as model:
        losses, values = within_memory(
            lambda tokens: with_adapters(
                model,
                tokenizer,
                shots * len(missing),
                adapters=[id for id in missing for _ in shots],
                template=plan["template"],
                max_length=plan["max_length"],
                max_new_tokens=plan["max_new_tokens"],
                token_budget=tokens,
                on_progress=lambda done: heartbeat.report(before + done),
            ),
            budget=TOKENS,
            least=LEAST_TOKENS,
            device=context.device,
        )
    for number, id in enumerate(missing):
        own = slice(number * len(shots), (number + 1) * len(shots))
        context.adapter_choices.keep(plan, id, losses[own], values[own])
