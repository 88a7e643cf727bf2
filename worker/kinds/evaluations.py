"""The one shard of an evaluation: a model, and the base model beside it, measured on test rows (worker/evaluate.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

from gradstore.types import EvaluationRequest, EvaluationResult, EvaluationRow, Interval
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.evaluations import is_tuned
from datastore.leases import Claim
from datastore.tasks import TaskExample
from worker.combinations import Combined
from worker.context import Context
from worker.engines import load, within_memory
from worker.evaluate import LEAST_TOKENS, TOKENS, Measured, evaluate, first_rows
from worker.evaluate import work as passes_over
from worker.heartbeat import Heartbeat
from worker.kinds import Commit
from worker.loaded import Base

Subject = Literal["base", "tuned"]


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Measure a model, and the base model beside it, on the test rows of tasks."""
    began = time.monotonic()
    context.ahead.drop()
    request = EvaluationRequest.model_validate(claim.request)
    tasks = {task: first_rows(context.tasks.test(task), request.max_rows) for task in claim.plan["tasks"]}
    names = {task: context.catalog.task(task).name for task in tasks}
    subjects: list[Subject] = ["base"] if request.baseline or not is_tuned(claim.plan) else []
    subjects += ["tuned"] if is_tuned(claim.plan) else []
    before = 0
    rows: list[EvaluationRow] = []
    for subject in subjects:
        for task, examples in tasks.items():
            report = partial(_report, heartbeat, before)
            measured = _measure(context, claim.plan, request, subject, examples, report)
            before += passes_over(examples)
            rows += [_row(subject, task, names[task], each) for each in measured]
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
        budget=TOKENS,
        least=LEAST_TOKENS,
        device=context.device,
    )


def _subject(
    context: Context, plan: dict[str, Any], request: EvaluationRequest, subject: Subject
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, or what was named: an adapter on it, several as one, or a model of its own."""
    tokenizer = context.loaded.tokenizer(plan["model"], plan["revision"])
    base = Base(plan["model"], plan["revision"], precision=plan["precision"], quantisation=request.quantisation)
    if subject == "base":
        return context.loaded.base(base), tokenizer
    if "combination" in plan:
        model: PreTrainedModel | PeftModel = context.loaded.combined(base, _combined(context, plan, request))
    else:
        model = load(context, base, context.catalog.checkpoint(plan["checkpoint"]))
    if isinstance(model, PeftModel):
        return cast("PreTrainedModel", model.get_base_model()), tokenizer  # the adapter is inside its layers
    return model, tokenizer


def _combined(context: Context, plan: dict[str, Any], request: EvaluationRequest) -> Combined:
    checkpoints = {id: context.catalog.adapter(id).checkpoint for id in plan["adapters"]}
    folders = tuple((id, context.checkpoints.weights(checkpoint)) for id, checkpoint in checkpoints.items())
    settings = {**plan["combination"]}
    settings["weights"] = tuple(settings.get("weights", ()))
    return Combined(folders, **settings, seed=request.seed)


def _row(subject: Subject, task: str, name: str, measured: Measured) -> EvaluationRow:
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
