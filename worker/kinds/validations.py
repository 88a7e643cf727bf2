"""Validations on a worker: a model is trained on some rows of a pool and measured on a task's rows, and not kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from gradstore.types import TrainingRecipe

from datastore.leases import Claim
from datastore.tasks import TaskExample
from datastore.trainings import Measured, Training
from worker.context import Context
from worker.engines import within_memory
from worker.evaluate import LEAST_TOKENS, TOKENS, losses
from worker.finetune import Trained, train
from worker.heartbeat import Heartbeat
from worker.kinds import Commit


def work(claim: Claim, context: Context, heartbeat: Heartbeat) -> Commit:
    """Do one training unless it has been done before; with the last one goes what all of them come to."""
    training = context.validations.training(claim.plan, claim.payload)
    if context.validations.trainings.get(training.key) is None:
        measured = _measured(training, context, heartbeat)
        context.validations.trainings.put(training, measured)
    return partial(context.validations.finish, claim, training.key)


def _measured(training: Training, context: Context, heartbeat: Heartbeat) -> Measured:
    began = time.monotonic()
    recipe = training.recipe
    context.ahead.drop()
    context.loaded.make_room()
    trained = train(
        context.datasets.examples_at(training.dataset, sorted(training.rows)),
        recipe,
        device=context.device,
        on_step=lambda _done, _total: heartbeat.check(),
    )
    found = _losses(trained, _rows(training, context), recipe, context, heartbeat)
    heartbeat.check()
    return Measured(
        losses=found,
        rows=trained.rows,
        tokens=trained.tokens * recipe.epochs,
        seconds=time.monotonic() - began,
    )


def _rows(training: Training, context: Context) -> Sequence[TaskExample]:
    """The rows whose losses are measured."""
    tasks = context.tasks
    return tasks.test(training.task) if training.split == "test" else tasks.validation(training.task)


def _losses(
    trained: Trained, rows: Sequence[TaskExample], recipe: TrainingRecipe, context: Context, heartbeat: Heartbeat
) -> list[float | None]:
    return within_memory(
        lambda tokens: losses(
            trained.model,
            trained.tokenizer,
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
