"""The life of a claimed shard, of whatever kind: computed, committed, or put down with the reason on its job.

The commit of a shard is fenced (datastore/leases.py), and what it writes outside the catalog is its own attempt's until
then, so a worker that stalled, or works twice, changes nothing. What is computed is each kind's own (worker/kinds).

The only broad `except` of the worker is here: whatever a shard raises becomes its job's error, in words for the user,
and the traceback goes to the log under the id that the error names.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from secrets import token_hex
from typing import Literal

from gradstore.types import JobKind, Problem

from datastore import hub, leftovers, tracing
from datastore.errors import (
    BucketUnreachable,
    Damaged,
    GradstoreError,
    HubUnreachable,
    LabellerFails,
    UnexpectedError,
    is_outage,
    problem_of,
)
from datastore.leases import Claim, Publication
from datastore.leftovers import OLD
from datastore.logs import about
from datastore.publications import publish
from worker.budgets import is_out_of_memory
from worker.context import Context
from worker.engines import OutOfMemory
from worker.evaluate import NotFinite
from worker.heartbeat import Heartbeat, Stopped
from worker.kinds import (
    Work,
    adapter_choices,
    attributions,
    cascades,
    comparisons,
    conversions,
    embeddings,
    estimate_validations,
    estimates,
    evaluations,
    finetunes,
    generations,
    gradients,
    imports,
    labelling,
    predictors,
    projectors,
    scoring,
    streams,
    validations,
)
from worker.models import ModelError
from worker.monitoring import EXPIRIES, SECONDS, SHARDS
from worker.templates import NoChatTemplate

log = logging.getLogger(__name__)

Outcome = Literal["succeeded", "failed", "stopped", "lost"]
"""`stopped`: given back unfinished; `lost`: finished by another attempt, or its job cancelled meanwhile."""

OUTAGE_PAUSE = 5.0  # seconds until a shard is taken again that the bucket, asked for a minute, was away for
MADE_BY_WORKERS = ("features", "checkpoints", "work", "imports", "projectors")
"""Parts of the store in which lies what has no record: checkpoints of an attempt that lost, or a segment or a training
that was deleted, and made again by a worker that had stalled. Of uploads the doctor and gc look at, when told to."""


def run(claim: Claim, context: Context) -> Outcome:
    """Do a shard and commit it, or say on its job why not."""
    return compute(claim, context)()


def compute(claim: Claim, context: Context) -> Callable[[], Outcome]:
    """Compute a shard, kept alive from now on; the answer is to be called once, in whatever thread: it commits."""
    began = _Beginning(claim)
    with about(claim.labels), ExitStack() as stack:
        log.info("shard started")
        heartbeat = stack.enter_context(Heartbeat(context.jobs, claim, leaving=context.leaving))
        try:
            commit = _WORK[claim.kind](claim, context, heartbeat)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's user is to learn of it
            stack.close()
            return partial(began.ended, _put_down(error, claim, context))
        alive = stack.pop_all()

    def finish() -> Outcome:
        try:
            with about(claim.labels), alive:
                outcome: Outcome = "succeeded" if commit() else "lost"
        except Exception as error:  # noqa: BLE001
            outcome = _put_down(error, claim, context)
        return began.ended(outcome)

    return finish


def _put_down(error: Exception, claim: Claim, context: Context) -> Outcome:
    """Give a shard back that is not to be gone on with, or record what went wrong with it."""
    if isinstance(error, Stopped):
        context.jobs.release(claim)
        return "stopped"
    if is_outage(error):
        log.warning("the bucket is away, the shard waits", extra={**claim.labels, "reason": str(error)})
        context.jobs.release(claim)
        context.leaving.wait(OUTAGE_PAUSE)
        return "stopped"
    _record(error, claim, context)
    return "failed"


class _Beginning:
    """A shard from its beginning: its time, and its span."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._began = time.monotonic()
        attributes = {f"gradstore.{name}": value for name, value in claim.labels.items() if name != "request"}
        self._end_span = tracing.begin(f"shard {claim.kind}", request=claim.request_id, attributes=attributes)

    def ended(self, outcome: Outcome) -> Outcome:
        """Tell the log, the metrics and the trace how it ended."""
        seconds, kind = time.monotonic() - self._began, self._claim.kind
        SHARDS.labels(kind, outcome).inc()
        SECONDS.labels(kind).observe(seconds)
        self._end_span(attributes={"gradstore.outcome": outcome}, error=outcome == "failed")
        log.info(f"shard {outcome}", extra={**self._claim.labels, "seconds": round(seconds, 3)})
        return outcome


def tend(context: Context, seen: Sequence[Publication] = ()) -> list[Publication]:
    """Put back what dead workers held, and publish what they committed and left; returns what waits to be published.

    Given back at the next call, what still waits is published then: its own worker has had its time.
    """
    put_back = context.jobs.sweep()
    if put_back:
        EXPIRIES.inc(put_back)
        log.warning("shards put back", extra={"shards": put_back})
    waiting = context.jobs.unpublished()
    late = [publication for publication in waiting if publication in seen]
    if late:
        log.warning("chunks left unpublished", extra={"chunks": len(late)})
        publish(context, late)
    return waiting


def tidy(context: Context) -> None:
    """Remove what killed processes left behind and nobody will ask for."""
    for left in leftovers.attempts(context, older_than=OLD):
        left.remove()
    context.store.sweep(older_than=OLD)
    context.checkpoints.sweep()
    context.trainings.sweep(context.catalog, older_than=OLD)
    context.attributions.sweep(older_than=OLD)
    context.estimates.sweep(older_than=OLD)
    context.projectors.files.sweep(older_than=OLD)
    context.streams.sweep(older_than=OLD)
    context.adapter_choices.scores.sweep(older_than=OLD)
    context.answers.sweep(older_than=OLD)
    for depot in context.depots:
        depot.tidy(older_than=OLD)
    for orphan in leftovers.orphans(context, older_than=OLD, parts=MADE_BY_WORKERS):
        log.warning("left behind and deleted", extra={"place": orphan.place})
        orphan.remove()


# Errors ---------------------------------------------------------------------------------------------------------------


def _record(error: Exception, claim: Claim, context: Context) -> None:
    id = f"log_{token_hex(6)}"
    problem, permanent = describe(_of_the_hub(error, claim) or error, id)
    log.error("shard raised", exc_info=error, extra={**claim.labels, "id": id, "permanent": permanent})
    if is_out_of_memory(error):
        context.loaded.clear()
    context.jobs.fail(claim, problem, permanent=permanent)


def _of_the_hub(error: Exception, claim: Claim) -> GradstoreError | None:
    """What the hub has to do with an error of a job that works with a model of it."""
    plan = {**claim.request, **claim.plan}
    if isinstance(error, GradstoreError) or plan.get("model") is None:
        return None
    return hub.explained(error, plan["model"], plan.get("revision"))


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
    passing = (Damaged, BucketUnreachable, HubUnreachable, LabellerFails)
    return problem, foreseen and not isinstance(error, passing)


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
    "predictor": predictors.work,
    "cascade": cascades.work,
    "estimates": estimates.work,
    "estimate-validation": estimate_validations.work,
    "comparison": comparisons.work,
    "projector": projectors.work,
    "embedding": embeddings.work,
    "annotation": labelling.work,
    "stream": streams.work,
    "generation": generations.work,
    "adapter-choice": adapter_choices.work,
}

KINDS: tuple[JobKind, ...] = tuple(_WORK)
"""What workers do; small pools are scored by the service itself (service/scoring.py)."""
