"""Trainings that are measured and not kept: a model is trained on rows of a pool, and a task's losses are kept."""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.tasks import TaskExample
from datastore.trainings import Measured, Training
from worker.context import Context
from worker.engines import within_memory
from worker.evaluate import LEAST_TOKENS, TOKENS, losses
from worker.finetune import chosen_precision, train
from worker.heartbeat import Heartbeat
from worker.loaded import Base


def measure(training: Training, context: Context, heartbeat: Heartbeat) -> None:
    """Have what comes of a training in the store; one that has been done before is not done again."""
    if context.trainings.get(training.key) is None:
        context.ahead.drop()
        measured = _trained(training, context, heartbeat) if training.rows else _base(training, context, heartbeat)
        heartbeat.check()
        context.trainings.put(training, measured)


def _trained(training: Training, context: Context, heartbeat: Heartbeat) -> Measured:
    began = time.monotonic()
    recipe = training.recipe
    context.loaded.make_room()
    trained = train(
        context.datasets.examples_at(training.dataset, sorted(training.rows)),
        recipe,
        device=context.device,
        on_step=lambda _done, _total: heartbeat.check(),
    )
    return Measured(
        losses=_losses(trained.model, trained.tokenizer, training, context, heartbeat),
        rows=trained.rows,
        tokens=trained.tokens * recipe.epochs,
        seconds=time.monotonic() - began,
    )


def _base(training: Training, context: Context, heartbeat: Heartbeat) -> Measured:
    """The losses of the base model as it is."""
    began = time.monotonic()
    recipe = training.recipe
    precision = chosen_precision(recipe.precision, context.device)
    model = context.loaded.base(
        Base(recipe.model, recipe.revision, precision=precision, quantisation=recipe.quantisation)
    )
    tokenizer = context.loaded.tokenizer(recipe.model, recipe.revision)
    found = _losses(model, tokenizer, training, context, heartbeat)
    return Measured(losses=found, rows=0, tokens=0, seconds=time.monotonic() - began)


def _rows(training: Training, context: Context) -> Sequence[TaskExample]:
    """The rows whose losses are measured."""
    tasks = context.tasks
    return tasks.test(training.task) if training.split == "test" else tasks.validation(training.task)


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    context: Context,
    heartbeat: Heartbeat,
) -> list[float | None]:
    rows, recipe = _rows(training, context), training.recipe
    return within_memory(
        lambda tokens: losses(
            model,
            tokenizer,
            rows,
            template=recipe.template,
            max_length=recipe.max_length,
            token_budget=tokens,
            check=heartbeat.check,
        ),
        budget=TOKENS,
        least=LEAST_TOKENS,
        device=context.device,
    )
