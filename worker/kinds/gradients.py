"""A shard of gradients: the features of a range of rows at one checkpoint, of all kinds and dims in one pass.

The rows of the shard that is likely next are read while this one is computed, and this one's features are written
while the next is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from datastore.errors import InvalidInput
from datastore.gradients import Block, sound
from datastore.leases import Claim, NewChunk
from datastore.rows import Example
from worker import budgets, chunks
from worker.context import Context
from worker.directions import Kind
from worker.encoders import encoder_of, read_texts
from worker.engines import kind_of, make_engine, within_memory
from worker.features import Features
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.laps import Laps
from worker.loaded import Base, Engine
from worker.projection import PROJECTION_VERSION
from worker.reading import Rows, read
from worker.suspects import Watch, without_poisoned

log = logging.getLogger(__name__)


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Compute the features of a range of rows at one checkpoint, of all kinds and dims in one pass."""
    plan, payload = claim.plan, claim.payload
    if plan["projection_version"] != PROJECTION_VERSION:
        raise InvalidInput(
            f"the job asks for version {plan['projection_version']} of the projections and this worker has version "
            f"{PROJECTION_VERSION}: bring service and workers to the same version"
        )
    checkpoint = context.catalog.checkpoint(payload["checkpoint"])
    tokenizer = context.loaded.tokenizer(checkpoint.model, checkpoint.revision)
    laps = Laps()
    rows = without_poisoned(_rows(claim, context, tokenizer, heartbeat), claim)
    laps.end("reading")
    base = Base(
        model=checkpoint.model,
        revision=checkpoint.revision,
        precision=plan["precision"],
        quantisation=plan["quantisation"],
        attention=plan["attention"],
        gradient_checkpointing=plan["gradient_checkpointing"],
        encoder=encoder_of(plan) is not None,
    )
    engine = make_engine(context, base, checkpoint, plan, payload["outputs"])
    laps.end("loading")
    _read_ahead(claim, context, tokenizer)
    pad_id = int(tokenizer.pad_token_id)
    key = _measured_as(claim, base, engine)
    # a search goes through rows unseen by a watch
    seen = [] if claim.isolation is not None else rows.encoded
    find = partial(budgets.find, engine, seen, pad_id=pad_id, check=heartbeat.check)
    watch = Watch(context.jobs, claim, claim.isolation, rows, engine) if claim.isolation is not None else None
    if watch is not None:
        watch.try_suspects(pad_id=pad_id)
    features = _features(
        engine,
        rows,
        pad_id=pad_id,
        budget=context.budgets.within_limit(claim.job, _budget(claim, context, key, engine, find)),
        on_less=partial(context.budgets.limit, claim.job, key=key),
        before_batch=watch.about_to if watch is not None else lambda _: None,
        heartbeat=heartbeat,
    )
    if watch is not None:
        watch.over()
    heartbeat.check()
    laps.end("computing")

    def write(output: dict[str, Any]) -> NewChunk:
        block = sound(_block(rows, None if features is None else features[kind_of(output)], output))
        return chunks.write(claim, context, output, block, tokens=sum(len(row.input_ids) for row in rows.encoded))

    return partial(chunks.write_and_commit, claim, context, write, laps)


def _rows(claim: Claim, context: Context, tokenizer: PreTrainedTokenizerBase, heartbeat: Heartbeat) -> Rows:
    """The shard's rows: read ahead, or now."""
    read_ahead = context.ahead.take(_key(claim.plan, claim.payload, tokenizer))
    if read_ahead is not None:
        return read_ahead
    return _read(context, claim.plan, claim.payload, tokenizer, heartbeat.check)


def _read_ahead(claim: Claim, context: Context, tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin to read the rows of the shard that is likely next."""
    upcoming = context.jobs.upcoming(claim)
    if upcoming is None:
        return
    shard, payload = upcoming
    reading = partial(_read, context, claim.plan, payload, tokenizer)
    context.ahead.begin(shard, _key(claim.plan, payload, tokenizer), reading)


def _key(plan: dict[str, Any], payload: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Hashable:
    """What a shard's token ids depend on."""
    parts = (*(plan[key] for key in ("dataset", "task", "template", "max_length")), payload["start"], payload["stop"])
    return (*parts, tokenizer)


def _read(
    context: Context,
    plan: dict[str, Any],
    payload: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    check: Callable[[], None],
) -> Rows:
    start, stop = payload["start"], payload["stop"]
    examples: Iterable[Example] = (
        context.datasets.examples(plan["dataset"], start, stop)
        if plan["dataset"] is not None
        else (row.example for row in context.tasks.validation(plan["task"])[start:stop])
    )
    max_length = plan["max_length"]
    encoder = encoder_of(plan)
    if encoder is not None:
        return read_texts(examples, tokenizer=tokenizer, encoder=encoder, max_length=max_length, check=check)
    return read(examples, tokenizer=tokenizer, template=plan["template"], max_length=max_length, check=check)


def _features(
    engine: Engine,
    rows: Rows,
    *,
    pad_id: int,
    budget: int,
    on_less: Callable[[int], None],
    before_batch: Callable[[Sequence[int]], None],
    heartbeat: Heartbeat,
) -> dict[Kind, Features] | None:
    """The features of the encoded rows, by kind, or None where no row could be encoded."""
    if not rows.encoded:
        return None
    without = len(rows.reasons) - len(rows.encoded)
    return within_memory(
        lambda tokens: engine.features(
            rows.encoded,
            pad_id=pad_id,
            token_budget=tokens,
            on_batch=lambda done: heartbeat.report(without + done),
            before_batch=before_batch,
        ),
        budget=budget,
        least=max(len(row.input_ids) for row in rows.encoded),
        device=engine.device,
        on_less=on_less,
    )


def _measured_as(claim: Claim, base: Base, engine: Engine) -> Hashable:
    """What a token budget is found for."""
    sizes = tuple(parameter.shape for parameter in engine.parameters.values())
    outputs = tuple((kind_of(output), output["dim"]) for output in claim.payload["outputs"])
    return base, sizes, outputs, claim.plan["projection"], claim.plan["max_length"]


def _budget(claim: Claim, context: Context, key: Hashable, engine: Engine, find: Callable[[], int | None]) -> int:
    """The job's token budget: asked for, found by the worker of another shard, or found now and recorded for all."""
    plan = claim.plan if claim.plan["token_budget"] is not None else context.jobs.plan(claim.job)
    if plan["token_budget"] is not None:
        return int(plan["token_budget"])
    budget = context.budgets.found(key, find, usual=budgets.range_of(engine.device).usual)
    recorded = int(context.jobs.settle(claim, "token_budget", budget))
    log.info("token budget", extra={**claim.labels, "found": budget, "recorded": recorded})
    return recorded


def _block(rows: Rows, features: Features | None, output: dict[str, Any]) -> Block:
    """Put the encoded rows' features back among the rows that have none."""
    count, dim = len(rows.reasons), output["dim"]
    block = Block(
        features=np.zeros((count, dim), np.float32),
        norms=np.zeros(count, np.float32),
        raw_norms=np.zeros(count, np.float32),
        losses=np.zeros(count, np.float32),
        tokens=np.zeros(count, np.int32),
        reasons=list(rows.reasons),
        logodds=np.zeros(count, np.float32) if output["kind"] == "logodds" else None,
    )
    if features is None:
        return block
    if dim not in features.by_dim:
        raise InvalidInput(
            f"the model's config.json promises hidden states of {dim:,} numbers, and its output layer takes "
            f"{', '.join(map(str, features.by_dim))}: this architecture has no features of kinds hidden and rds"
        )
    block.features[rows.positions] = features.by_dim[dim]
    block.norms[rows.positions] = features.norms
    block.raw_norms[rows.positions] = features.raw_norms
    block.losses[rows.positions] = features.losses
    block.tokens[rows.positions] = features.tokens
    if block.logodds is not None:
        block.logodds[rows.positions] = features.logodds
    reasons = list(rows.reasons)
    for position, reason in zip(rows.positions, features.reasons, strict=True):
        reasons[position] = reason
    return replace(block, reasons=reasons)
