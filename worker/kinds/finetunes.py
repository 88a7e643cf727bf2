"""The one shard of a fine-tune: a training (worker/finetune.py) whose run and checkpoints are recorded in its commit.

On a GPU two attempts need not come to the same bytes, and the loser's must not appear beside the winner's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gradstore.types import Checkpoint, FinetuneRequest, FinetuneResult
from sqlalchemy.orm import Session

from datastore.catalog import name_if_free, record_checkpoint, record_run
from datastore.checkpoints import run_id
from datastore.errors import Damaged, InvalidCheckpoint
from datastore.leases import Claim
from datastore.rows import Example
from worker.context import Context
from worker.finetune import Diverged, Epoch, draw, finetune
from worker.heartbeat import Heartbeat
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Train, and record the run and its checkpoints in the commit of the shard."""
    began = time.monotonic()
    resolved = {"model": claim.plan["model"], "revision": claim.plan["revision"]}
    request = FinetuneRequest.model_validate(claim.request).model_copy(update=resolved)
    context.ahead.drop()
    context.loaded.clear()  # the Trainer needs the memory
    folder = context.settings.work / claim.job
    try:
        done = finetune(
            _training_examples(claim, context, request),
            request,
            work=folder,
            device=context.device,
            experts=_experts(claim, context),
            attempt=str(claim.token),
            on_step=heartbeat.report,
        )
    finally:
        context.loaded.clear()
    heartbeat.check()
    checkpoints = [_kept(epoch, context, request) for epoch in done.epochs]
    ids = [checkpoint.id for checkpoint in checkpoints]
    run = run_id(ids)

    def record(session: Session) -> None:
        for checkpoint in checkpoints:
            if not context.checkpoints.exists(checkpoint.id):  # found there, and taken for left behind at that moment
                raise Damaged(f"{checkpoint.id} was deleted before it was recorded; the next attempt makes it again")
            record_checkpoint(session, checkpoint)
        row = record_run(session, id=run, checkpoints=ids, finetune=claim.job)
        if request.name is not None:
            name_if_free(session, row, request.name)

    result = FinetuneResult(
        run=run,
        checkpoints=ids,
        rows=done.rows,
        skipped_rows=done.skipped_rows,
        steps=done.steps,
        tokens=done.tokens,
        precision=done.precision,
        loss_curve=done.loss_curve,
        seconds=claim.worked + time.monotonic() - began,
    )

    def commit() -> bool:
        won = context.jobs.succeed(claim, result=result.model_dump(mode="json"), records=record)
        if won:
            shutil.rmtree(folder, ignore_errors=True)
        return won

    return commit


def _kept(epoch: Epoch, context: Context, request: FinetuneRequest) -> Checkpoint:
    """The checkpoint of an epoch. Raises `Diverged` where its last step, after the last loss, has left no numbers."""
    try:
        return context.checkpoints.add(epoch.folder, epoch.description)
    except InvalidCheckpoint as error:
        what = f"after epoch {epoch.description.epoch} the weights or their moments are not finite"
        raise Diverged(what, rate=request.learning_rate, precision=epoch.description.precision) from error


def _experts(claim: Claim, context: Context) -> list[Path]:
    """The files of the adapters that a mixture's experts begin as."""
    found = (context.catalog.adapter(id) for id in claim.plan.get("experts") or ())
    return [context.checkpoints.weights(adapter.checkpoint) for adapter in found]


def _training_examples(claim: Claim, context: Context, request: FinetuneRequest) -> Iterator[Example]:
    if claim.plan["selection"] is not None:
        for _, example in context.answers.rows_and_examples(claim.plan["selection"]):
            yield example
        return
    dataset = context.catalog.dataset(claim.plan["dataset"])
    drawn = draw(dataset.rows, fraction=request.fraction, number=request.rows, seed=request.seed)
    yield from context.datasets.examples_at(dataset.id, drawn)
