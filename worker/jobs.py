"""The life of a claimed shard, of whatever kind: computed, committed, or put down with the reason on its job.

The commit of a shard is fenced (datastore/leases.py), and what it writes outside the catalog is its own attempt's until
then, so a worker that stalled, or works twice, changes nothing. What is computed is each kind's own (worker/kinds).

The only broad `except` of the worker is here: whatever a shard raises becomes its job's error, in words for the user,
and the traceback goes to the log under the id that the error names.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Literal

from gradstore.types import JobKind, Problem
from sqlalchemy import Select, select

from datastore.durable import untouched_for
from datastore.errors import Damaged, GradstoreError, UnexpectedError, problem_of
from datastore.leases import Claim, Publication
from datastore.schema import CheckpointRow, JobRow, SegmentRow
from worker.budgets import is_out_of_memory
from worker.chunks import discard, publish
from worker.context import Context
from worker.engines import OutOfMemory
from worker.evaluate import NotFinite
from worker.heartbeat import Heartbeat, Stopped
from worker.kinds import (
    Work,
    attributions,
    conversions,
    evaluations,
    finetunes,
    gradients,
    imports,
    scoring,
    validations,
)
from worker.models import ModelError
from worker.templates import NoChatTemplate

log = logging.getLogger(__name__)

Outcome = Literal["succeeded", "failed", "stopped", "lost"]
"""`stopped`: given back unfinished; `lost`: finished by another attempt, or its job cancelled meanwhile."""

LEFT_OVER = 3600.0  # seconds after which an attempt's bytes that nobody committed are removed


def run(claim: Claim, context: Context) -> Outcome:
    """Do a shard and commit it, or say on its job why not."""
    return compute(claim, context)()


def compute(claim: Claim, context: Context) -> Callable[[], Outcome]:
    """Compute a shard, kept alive from now on; the answer is to be called once, in whatever thread: it commits."""
    began = time.monotonic()
    log.info("shard started", extra=claim.labels)
    with ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(context.jobs, claim, leaving=context.leaving))
        try:
            commit = _WORK[claim.kind](claim, context, heartbeat)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's user is to learn of it
            stack.close()
            return partial(_ended, claim, began, _put_down(error, claim, context))
        alive = stack.pop_all()

    def finish() -> Outcome:
        try:
            with alive:
                outcome: Outcome = "succeeded" if commit() else "lost"
        except Exception as error:  # noqa: BLE001
            outcome = _put_down(error, claim, context)
        return _ended(claim, began, outcome)

    return finish


def _put_down(error: Exception, claim: Claim, context: Context) -> Outcome:
    """Give a shard back that is not to be gone on with, or record what went wrong with it."""
    if isinstance(error, Stopped):
        context.jobs.release(claim)
        return "stopped"
    _record(error, claim, context)
    return "failed"


def _ended(claim: Claim, began: float, outcome: Outcome) -> Outcome:
    log.info(f"shard {outcome}", extra={**claim.labels, "seconds": round(time.monotonic() - began, 3)})
    return outcome


def tend(context: Context, seen: Sequence[Publication] = ()) -> list[Publication]:
    """Put back what dead workers held, and publish what they committed and left; returns what waits to be published.

    Given back at the next call, what still waits is published then: its own worker has had its time.
    """
    put_back = context.jobs.sweep()
    if put_back:
        log.warning("shards put back", extra={"shards": put_back})
    waiting = context.jobs.unpublished()
    late = [publication for publication in waiting if publication in seen]
    if late:
        log.warning("chunks left unpublished", extra={"chunks": len(late)})
        publish(context, late)
    return waiting


def tidy(context: Context) -> None:
    """Remove what killed processes left behind and nobody will ask for."""
    wanted = {(one.segment, one.start, one.attempt) for one in context.jobs.unpublished()}
    for left in context.store.attempts():
        if left.age_seconds > LEFT_OVER and (left.segment, left.start, left.attempt) not in wanted:
            discard(context, left.segment, start=left.start, attempt=left.attempt)
    context.store.sweep(older_than=LEFT_OVER)
    context.checkpoints.sweep()
    context.validations.sweep(older_than=LEFT_OVER)
    context.attributions.sweep(older_than=LEFT_OVER)
    context.answers.sweep(older_than=LEFT_OVER)
    segments, checkpoints = select(SegmentRow.id), select(CheckpointRow.id)
    unfinished = select(JobRow.id).where(JobRow.status != "succeeded")
    _delete_unknown(context, segments, context.store.root.glob("seg_*"), context.store.delete)
    _delete_unknown(context, checkpoints, context.checkpoints.root.glob("ck_*"), context.checkpoints.delete)
    _delete_unknown(
        context, unfinished, context.settings.work.glob("ft_*"),
        lambda job: shutil.rmtree(context.settings.work / job, ignore_errors=True),
    )  # fmt: skip
    _delete_unknown(context, unfinished, context.settings.imports.glob("imp_*"), context.imports.forget)


def _delete_unknown(
    context: Context, known: Select[str], folders: Iterable[Path], delete: Callable[[str], None]
) -> None:
    """Delete old folders whose ids the catalog does not know: checkpoints of an attempt that lost, or a segment or a
    training that was deleted, and made again by a worker that had stalled.
    """
    places = {folder.name: folder for folder in folders}
    left = [id for id in context.catalog.unknown(known, places) if untouched_for(places[id]) > LEFT_OVER]
    gone = context.catalog.delete_unknown(known, left, delete_files=delete) if left else []
    if gone:
        log.warning("left behind and deleted", extra={"folders": gone})


# Errors ---------------------------------------------------------------------------------------------------------------


def _record(error: Exception, claim: Claim, context: Context) -> None:
    id = f"log_{token_hex(6)}"
    problem, permanent = describe(error, id)
    log.error("shard raised", exc_info=error, extra={**claim.labels, "id": id, "permanent": permanent})
    if is_out_of_memory(error):
        context.loaded.clear()
    context.jobs.fail(claim, problem, permanent=permanent)


def describe(error: Exception, id: str) -> tuple[Problem, bool]:
    """An error as the job's user reads it, and whether trying again is pointless; `id` is the log's."""
    if is_out_of_memory(error):
        error = OutOfMemory(
            "the device's memory is full: ask for fewer tokens or examples at a time (token_budget, "
            "device_batch_size), a smaller max_length, gradient_checkpointing=true, or quantisation"
        )
    foreseen = isinstance(error, (GradstoreError, ModelError, NoChatTemplate, NotFinite))
    if not foreseen:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        error = UnexpectedError(f"{type(error).__name__}: {first} (the traceback is in the worker's log under {id})")
    problem = problem_of(error, status=422 if foreseen else 500, instance=id)
    return problem, foreseen and not isinstance(error, Damaged)


# Kinds ----------------------------------------------------------------------------------------------------------------

_WORK: dict[JobKind, Work] = {
    "gradients": gradients.work,
    "conversion": conversions.work,
    "finetune": finetunes.work,
    "evaluation": evaluations.work,
    "import": imports.work,
    "scoring": scoring.work,
    "validation": validations.work,
    "attribution": attributions.work,
}

KINDS: tuple[JobKind, ...] = tuple(_WORK)
"""What workers do; small pools are scored by the service itself (service/scoring.py)."""
