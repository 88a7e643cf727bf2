"""What gradients, a fine-tune or a validation would cost: the base model's tokenizer measures some of its rows."""

from __future__ import annotations

from collections.abc import Iterator

from gradstore.types import Estimate, FinetuneRequest, GradientsRequest, ValidationEstimate, ValidationRequest

from datastore import models
from datastore.features import Plan
from datastore.finetunes import FinetunePlan
from datastore.rows import Example
from service.dependencies import Backend

SAMPLED = 256  # rows


def of_gradients(backend: Backend, request: GradientsRequest) -> Estimate:
    """Rows, tokens, bytes, seconds and memory of a request. Raises what starting it would raise."""
    plan = backend.features.plan(request)
    checkpoint = backend.catalog.checkpoint(plan.feature_sets[0].checkpoint)
    folder, size = models.described(checkpoint.model, checkpoint.revision)
    lengths = models.lengths(_computed(backend, plan), folder=folder, max_length=plan.settings["max_length"])
    return backend.features.estimate(request, tokens_per_row=lengths.mean, size=size)


def of_finetune(backend: Backend, request: FinetuneRequest) -> Estimate:
    """Rows, tokens, bytes, seconds and memory of a request. Raises what starting it would raise."""
    plan = backend.finetunes.plan(request)
    folder, size = models.described(plan.model, plan.revision)
    lengths = models.lengths(_trained_on(backend, plan), folder=folder, max_length=request.max_length)
    return backend.finetunes.estimate(request, plan, lengths=lengths, size=size)


def of_validation(backend: Backend, request: ValidationRequest) -> ValidationEstimate:
    """Trainings and seconds of a request. Raises what starting it would raise."""
    plan = backend.validations.plan(request)
    return backend.validations.estimate(plan, of_finetune(backend, plan.finetune))


def _computed(backend: Backend, plan: Plan) -> Iterator[Example]:
    """Some of the rows whose gradients are asked for."""
    if plan.is_task:
        yield from (row.example for row in backend.tasks.validation(plan.owner)[:SAMPLED])
        return
    yield from _of_dataset(backend, plan.owner)


def _trained_on(backend: Backend, plan: FinetunePlan) -> Iterator[Example]:
    """Some of the rows trained on; of a selection from its best to its last, since lengths may follow the score."""
    if plan.dataset is not None:
        yield from _of_dataset(backend, plan.dataset)
        return
    wanted = {round(number * (plan.rows - 1) / max(SAMPLED - 1, 1)) for number in range(SAMPLED)}
    for number, row in enumerate(backend.answers.rows(plan.selection or "")):
        if number in wanted:
            yield from backend.datasets.examples(row.dataset, row.row, row.row + 1)


def _of_dataset(backend: Backend, dataset: str) -> Iterator[Example]:
    for rows in models.sample(backend.catalog.dataset(dataset).rows, size=SAMPLED):
        yield from backend.datasets.examples(dataset, rows.start, rows.stop)
