"""What a worker does with a claimed shard: load, call, record.

The commit of a shard is fenced (datastore/leases.py), and what it writes outside the catalog is its own attempt's until
then, so a worker that stalled, or works twice, changes nothing. A fine-tune's checkpoints and run are recorded inside
that same commit: on a GPU two attempts need not come to the same bytes, and the loser's must not appear beside the
winner's.

The only broad `except` of the worker is here: whatever a shard raises becomes its job's error, in words for the user,
and the traceback goes to the log under the id that the error names.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, TypeVar, cast

import numpy as np
from gradstore.types import (
    EvaluationRequest,
    EvaluationResult,
    EvaluationRow,
    FinetuneRequest,
    FinetuneResult,
    Interval,
    JobKind,
    Problem,
)
from peft import PeftModel
from sqlalchemy import Select, select
from sqlalchemy.orm import Session
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore import conversions, imports
from datastore.catalog import name_if_free, record_checkpoint, record_run
from datastore.checkpoints import run_id
from datastore.durable import untouched_for
from datastore.errors import (
    Conflict,
    Damaged,
    GradstoreError,
    InvalidInput,
    UnexpectedError,
    problem_of,
)
from datastore.gradients import Block, sound
from datastore.leases import Claim, NewChunk, Publication
from datastore.rows import Example
from datastore.schema import CheckpointRow, JobRow, SegmentRow
from datastore.tasks import TaskExample
from worker import budgets, scoring, validations
from worker.attributions import attribute
from worker.budgets import is_out_of_memory
from worker.context import Context
from worker.directions import Kind
from worker.encoders import encoder_of, read_texts
from worker.engines import OutOfMemory, kind_of, load, make_engine, within_memory
from worker.evaluate import Measured, NotFinite, evaluate, first_rows
from worker.evaluate import work as passes_over
from worker.features import Features
from worker.finetune import draw, finetune
from worker.heartbeat import Heartbeat, Stopped
from worker.imports import block_of, look, open_table
from worker.loaded import Base, Engine
from worker.models import ModelError
from worker.projection import PROJECTION_VERSION
from worker.reading import Rows, read
from worker.templates import NoChatTemplate

log = logging.getLogger(__name__)

Outcome = Literal["succeeded", "failed", "stopped", "lost"]
"""`stopped`: given back unfinished; `lost`: finished by another attempt, or its job cancelled meanwhile."""

Commit = Callable[[], bool]
"""Writes and commits what a shard came to; whether it was in time. The next shard may be computed meanwhile."""
Subject = Literal["base", "tuned"]
T = TypeVar("T")

EVALUATION_TOKENS = 8192  # padded tokens of a batch; part of what makes the same evaluation give the same numbers
LEAST_EVALUATION_TOKENS = 512
LEFT_OVER = 3600.0  # seconds after which an attempt's bytes that nobody committed are removed


def run(claim: Claim, context: Context) -> Outcome:
    """Do a shard and commit it, or say on its job why not."""
    return compute(claim, context)()


def compute(claim: Claim, context: Context) -> Callable[[], Outcome]:
    """Compute a shard, kept alive from now on; the answer is to be called once, in whatever thread: it commits."""
    began = time.monotonic()
    log.info("shard started", extra=_labels(claim))
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
    log.info(f"shard {outcome}", extra={**_labels(claim), "seconds": round(time.monotonic() - began, 3)})
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
        _publish(context, late)
    return waiting


def tidy(context: Context) -> None:
    """Remove what killed processes left behind and nobody will ask for."""
    wanted = {(one.segment, one.start, one.attempt) for one in context.jobs.unpublished()}
    for left in context.store.attempts():
        if left.age_seconds > LEFT_OVER and (left.segment, left.start, left.attempt) not in wanted:
            _discard(context, left.segment, start=left.start, attempt=left.attempt)
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
    log.error("shard raised", exc_info=error, extra={**_labels(claim), "id": id, "permanent": permanent})
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


def _labels(claim: Claim) -> dict[str, Any]:
    return {"job": claim.job, "kind": claim.kind, "shard": claim.number, "attempt": claim.attempt}


# Gradients ------------------------------------------------------------------------------------------------------------


def _gradients(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Compute the features of a range of rows at one checkpoint, of all kinds and dims in one pass."""
    plan, payload = claim.plan, claim.payload
    if plan["projection_version"] != PROJECTION_VERSION:
        raise InvalidInput(
            f"the job asks for version {plan['projection_version']} of the projections and this worker has version "
            f"{PROJECTION_VERSION}: bring service and workers to the same version"
        )
    checkpoint = context.catalog.checkpoint(payload["checkpoint"])
    tokenizer = context.loaded.tokenizer(checkpoint.model, checkpoint.revision)
    laps = _Laps()
    rows = _rows(claim, context, tokenizer, heartbeat)
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
    find = partial(budgets.find, engine, rows.encoded, pad_id=pad_id, check=heartbeat.check)
    features = _features(
        engine,
        rows,
        pad_id=pad_id,
        budget=context.budgets.within_limit(claim.job, _budget(claim, context, base, engine, find)),
        on_less=partial(context.budgets.limit, claim.job),
        heartbeat=heartbeat,
    )
    heartbeat.check()
    laps.end("computing")

    def write(output: dict[str, Any]) -> NewChunk:
        block = sound(_block(rows, None if features is None else features[kind_of(output)], output["dim"]))
        return _write(claim, context, output, block, tokens=sum(len(row.input_ids) for row in rows.encoded))

    return partial(_commit, claim, context, write, laps)


def _commit(claim: Claim, context: Context, write: Callable[[dict[str, Any]], NewChunk], laps: _Laps) -> bool:
    """Write a shard's features, commit and publish them; whether it was in time.

    What is written is left where it is when anything fails, since a commit may have been made whose answer was lost;
    `tidy` knows later.
    """
    laps.end("waiting")  # for the shard before to be written
    chunks = [write(output) for output in claim.payload["outputs"]]
    won = _commit_chunks(claim, context, chunks)
    laps.end("writing")
    log.info("shard's seconds", extra={**_labels(claim), **laps.seconds})
    return won


def _commit_chunks(claim: Claim, context: Context, chunks: Sequence[NewChunk]) -> bool:
    """Commit and publish what a shard has written; whether it was in time."""
    won = context.jobs.succeed(claim, chunks=chunks)
    mine = context.jobs.unpublished(attempt=claim.token)
    _publish(context, mine)
    committed = {(one.segment, one.start) for one in mine}
    for chunk in chunks:
        if (chunk.segment, chunk.start) not in committed:  # another attempt has these rows, or has published these
            _discard(context, chunk.segment, start=chunk.start, attempt=claim.token)
    return won


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
    work = partial(_read, context, claim.plan, payload, tokenizer)
    context.ahead.begin(shard, _key(claim.plan, payload, tokenizer), work)


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


class _Laps:
    """What took how long, for the log."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, name: str) -> None:
        """A stage ends here."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def _features(
    engine: Engine,
    rows: Rows,
    *,
    pad_id: int,
    budget: int,
    on_less: Callable[[int], None],
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
        ),
        budget=budget,
        least=max(len(row.input_ids) for row in rows.encoded),
        device=engine.device,
        on_less=on_less,
    )


def _budget(claim: Claim, context: Context, base: Base, engine: Engine, find: Callable[[], int | None]) -> int:
    """The job's token budget: asked for, found by the worker of another shard, or found now and recorded for all."""
    plan = claim.plan if claim.plan["token_budget"] is not None else context.jobs.plan(claim.job)
    if plan["token_budget"] is not None:
        return int(plan["token_budget"])
    sizes = tuple(parameter.shape for parameter in engine.parameters.values())
    outputs = tuple((kind_of(output), output["dim"]) for output in claim.payload["outputs"])
    budget = context.budgets.found(
        (base, sizes, outputs, *(plan[key] for key in ("projection", "max_length"))),
        find,
        usual=budgets.range_of(engine.device).usual,
    )
    recorded = int(context.jobs.settle(claim, "token_budget", budget))
    log.info("token budget", extra={**_labels(claim), "found": budget, "recorded": recorded})
    return recorded


def _write(claim: Claim, context: Context, output: dict[str, Any], block: Block, *, tokens: int) -> NewChunk:
    """Keep a shard's features of one dim as this attempt's own."""
    start = claim.payload["start"] - output["base"]
    context.store.create(
        output["segment"],
        rows=output["rows"],
        dim=output["dim"],
        dtype=claim.plan["dtype"],
        attributes=output["attributes"],
    )
    digest = context.store.write(output["segment"], start=start, attempt=claim.token, block=block)
    return NewChunk(
        segment=output["segment"],
        start=start,
        stop=start + len(block.reasons),
        digest=digest,
        excluded=[(start + row, reason) for row, reason in block.excluded.items()],
        tokens=tokens,
    )


def _block(rows: Rows, features: Features | None, dim: int) -> Block:
    """Put the encoded rows' features back among the rows that have none."""
    count = len(rows.reasons)
    block = Block(
        features=np.zeros((count, dim), np.float32),
        norms=np.zeros(count, np.float32),
        raw_norms=np.zeros(count, np.float32),
        losses=np.zeros(count, np.float32),
        tokens=np.zeros(count, np.int32),
        reasons=list(rows.reasons),
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
    reasons = list(rows.reasons)
    for position, reason in zip(rows.positions, features.reasons, strict=True):
        reasons[position] = reason
    return replace(block, reasons=reasons)


def _publish(context: Context, publications: Sequence[Publication]) -> None:
    done = []
    for one in publications:
        try:
            context.store.publish(one.segment, start=one.start, attempt=one.attempt, digest=one.digest)
        except (Conflict, Damaged) as error:
            _give_up(context, one, reason=str(error))
        else:
            done.append(one)
    if done:
        context.jobs.published(done)


def _give_up(context: Context, chunk: Publication, *, reason: str) -> None:
    """Have rows computed again whose bytes are lost; these may also be deleted, or another attempt's, and then stay so.

    A publication is refused only where it can never be finished: an attempt's bytes are either in its folder or, moved
    by another publisher, under their keys.
    """
    problem = Problem(
        type="bytes-lost", title="Bytes lost", status=500,
        detail=f"what was computed for rows from {chunk.start} of {chunk.segment} was lost before it was published: "
        f"{reason}",
    )  # fmt: skip
    discard = partial(context.store.give_up, chunk.segment, start=chunk.start, attempt=chunk.attempt)
    again = context.jobs.lost(chunk, problem, discard=discard)
    log.warning(
        "chunk not published",
        extra={"segment": chunk.segment, "start": chunk.start, "reason": reason, "computed_again": again},
    )


def _discard(context: Context, segment: str, *, start: int, attempt: int) -> None:
    try:
        context.store.discard(segment, start=start, attempt=attempt)
    except Conflict:  # somebody is publishing it at this moment
        log.info("attempt is being published", extra={"segment": segment, "start": start})


# Fine-tunes -----------------------------------------------------------------------------------------------------------


def _finetune(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Train, and record the run and its checkpoints in the commit of the shard."""
    began = time.monotonic()
    resolved = {"model": claim.plan["model"], "revision": claim.plan["revision"]}
    request = FinetuneRequest.model_validate(claim.request).model_copy(update=resolved)
    context.ahead.drop()
    context.loaded.clear()  # the Trainer needs the memory
    work = context.settings.work / claim.job
    try:
        done = finetune(
            _training_examples(claim, context, request),
            request,
            work=work,
            device=context.device,
            attempt=str(claim.token),
            on_step=heartbeat.report,
        )
    finally:
        context.loaded.clear()
    heartbeat.check()
    checkpoints = [context.checkpoints.add(epoch.folder, epoch.description) for epoch in done.epochs]
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
            shutil.rmtree(work, ignore_errors=True)
        return won

    return commit


def _training_examples(claim: Claim, context: Context, request: FinetuneRequest) -> Iterator[Example]:
    if claim.plan["selection"] is not None:
        for row in context.answers.rows(claim.plan["selection"]):
            yield from context.datasets.examples(row.dataset, row.row, row.row + 1)
        return
    dataset = context.catalog.dataset(claim.plan["dataset"])
    wanted = set(draw(dataset.rows, fraction=request.fraction, number=request.rows, seed=request.seed))
    for number, example in enumerate(context.datasets.examples(dataset.id)):
        if number in wanted:
            yield example


# Conversions --------------------------------------------------------------------------------------------------------


def _conversion(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Read a range of rows of stored feature sets, to be written in another dtype."""
    start, stop = claim.payload["start"], claim.payload["stop"]
    laps = _Laps()

    def write(output: dict[str, Any]) -> NewChunk:
        heartbeat.check()
        source = context.conversions.source(claim.plan, output)
        block = conversions.block(context.features.view(source), start, stop)
        return _write(claim, context, output, block, tokens=context.features.tokens(source.id, start, stop))

    return partial(_commit, claim, context, write, laps)


# Evaluations ----------------------------------------------------------------------------------------------------------


def _evaluation(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Measure a model, and the base model beside it, on the test rows of tasks."""
    began = time.monotonic()
    context.ahead.drop()
    request = EvaluationRequest.model_validate(claim.request)
    tasks = {task: first_rows(context.tasks.test(task), request.max_rows) for task in claim.plan["tasks"]}
    names = {task: context.catalog.task(task).name for task in tasks}
    subjects: list[Subject] = ["base"] if claim.plan["checkpoint"] is None or request.baseline else []
    subjects += ["tuned"] if claim.plan["checkpoint"] is not None else []
    before = 0
    rows: list[EvaluationRow] = []
    for subject in subjects:
        for task, examples in tasks.items():
            report = partial(_report, heartbeat, before)
            measured = _measure(context, claim.plan, request, subject, examples, report)
            before += passes_over(examples)
            rows += [_evaluation_row(subject, task, names[task], each) for each in measured]
    result = EvaluationResult(rows=rows, seconds=claim.worked + time.monotonic() - began)
    return partial(context.jobs.succeed, claim, result=result.model_dump(mode="json"))


def _report(heartbeat: Heartbeat, before: int, done: int) -> None:
    heartbeat.report(before + done)


def _measure(
    context: Context,
    plan: dict[str, Any],
    request: EvaluationRequest,
    subject: Subject,
    examples: Sequence[TaskExample],
    on_progress: Callable[[int], None],
) -> list[Measured]:
    model, tokenizer = _subject(context, plan, request, subject)
    return within_memory(
        lambda tokens: evaluate(
            model,
            tokenizer,
            examples,
            template=plan["template"],
            max_length=plan["max_length"],
            max_new_tokens=request.max_new_tokens,
            token_budget=tokens,
            bootstrap_samples=request.bootstrap_samples,
            seed=request.seed,
            on_progress=on_progress,
        ),
        budget=EVALUATION_TOKENS,
        least=LEAST_EVALUATION_TOKENS,
        device=context.device,
    )


def _subject(
    context: Context, plan: dict[str, Any], request: EvaluationRequest, subject: Subject
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, or the checkpoint's: an adapter on it, or a model of its own."""
    tokenizer = context.loaded.tokenizer(plan["model"], plan["revision"])
    base = Base(plan["model"], plan["revision"], precision=plan["precision"], quantisation=request.quantisation)
    if subject == "base":
        return context.loaded.base(base), tokenizer
    model = load(context, base, context.catalog.checkpoint(plan["checkpoint"]))
    if isinstance(model, PeftModel):
        return cast("PreTrainedModel", model.get_base_model()), tokenizer  # the adapter is inside its layers
    return model, tokenizer


def _evaluation_row(subject: Subject, task: str, name: str, measured: Measured) -> EvaluationRow:
    def interval(ends: tuple[float, float] | None) -> Interval | None:
        return Interval(low=ends[0], high=ends[1]) if ends else None

    return EvaluationRow(
        model=subject,
        task=task,
        task_name=name,
        subtask=measured.subtask,
        examples=measured.examples,
        loss=measured.loss,
        loss_interval=interval(measured.loss_interval),
        metric=measured.metric,
        value=measured.value,
        interval=interval(measured.interval),
        unparsed=measured.unparsed,
    )


# Validations ----------------------------------------------------------------------------------------------------------


def _validation(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Do one training; with the last one goes what all of them come to."""
    return partial(context.validations.finish, claim, validations.measure(claim, context, heartbeat))


# Imports --------------------------------------------------------------------------------------------------------------


def _import(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Read the features of another program, find every row sound, and write them as this attempt's own."""
    began = time.monotonic()
    plan = claim.plan
    paths = imports.find(Path(plan["files"]), dim=plan["dim"])
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
    chunks = []
    for start, rows in table.blocks():
        heartbeat.check()
        block = sound(block_of(rows, found.norms[start : start + len(rows)]))
        digest = context.store.write(segment, start=start, attempt=claim.token, block=block)
        excluded = [(start + row, reason) for row, reason in block.excluded.items()]
        chunks.append(NewChunk(segment, start, start + len(rows), digest, excluded))
        heartbeat.report(start + len(rows))
    return partial(_commit_import, claim, context, chunks)


def _commit_import(claim: Claim, context: Context, chunks: Sequence[NewChunk]) -> bool:
    won = _commit_chunks(claim, context, chunks)
    if context.jobs.get(claim.job).status == "succeeded":  # else its bytes may be lost yet, and needed again
        context.imports.forget(claim.job)
    return won


def _owner_name(claim: Claim, context: Context) -> str:
    """What the user calls the dataset or task that the features are said to be of."""
    owner = claim.plan["owner"]
    if claim.plan["is_task"]:
        return f"the validation rows of the task {context.catalog.task(owner).name}"
    return f"the dataset {context.catalog.dataset(owner).name or owner}"


# Kinds ----------------------------------------------------------------------------------------------------------------

_WORK: dict[JobKind, Callable[[Claim, Context, Heartbeat], Commit]] = {
    "gradients": _gradients,
    "conversion": _conversion,
    "finetune": _finetune,
    "evaluation": _evaluation,
    "import": _import,
    "scoring": scoring.work,
    "validation": _validation,
    "attribution": attribute,
}

KINDS: tuple[JobKind, ...] = tuple(_WORK)
"""What workers do; small pools are scored by the service itself (service/scoring.py)."""
