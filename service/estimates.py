"""What gradients, a fine-tune or trainings that are measured would cost: the model's tokenizer measures some rows."""

from __future__ import annotations

from collections.abc import Iterator

from gradstore.types import (
    CascadeEstimate,
    CascadeRequest,
    ComparisonEstimate,
    ComparisonRequest,
    Estimate,
    EstimateValidationRequest,
    FinetuneRequest,
    GradientsRequest,
    ValidationEstimate,
    ValidationRequest,
)

from datastore import models
from datastore.features import Plan
from datastore.finetunes import FinetunePlan
from datastore.rows import Example
from service.dependencies import Backend

SAMPLED = 256  # rows


def of_gradients(backend: Backend, request: GradientsRequest) -> Estimate:
    """Rows, tokens, bytes, seconds and memory of a request. Raises what starting it would raise."""
    return _of_plan(backend, backend.features.plan(request))


def of_cascade(backend: Backend, request: CascadeRequest) -> CascadeEstimate:
    """Rows, gradients and forward passes of a request. Raises what starting it would raise."""
    plan = backend.cascades.plan(request)
    inputs = [_of_plan(backend, backend.features.plan(each)) for each in backend.cascades.passes(plan)]
    whole = backend.features.plan(backend.cascades.gradients_of(plan, plan["dataset"]))
    gradients = _of_plan(backend, whole.of_new_rows(sum(plan["stages"])))
    return backend.cascades.estimate(plan, gradients=gradients, inputs=inputs)


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


def of_comparison(backend: Backend, request: ComparisonRequest) -> ComparisonEstimate:
    """Trainings and seconds of a request. Raises what starting it would raise."""
    plan = backend.comparisons.plan(request)
    return backend.comparisons.estimate(plan, None if plan.finetune is None else of_finetune(backend, plan.finetune))


def of_estimate_validation(backend: Backend, request: EstimateValidationRequest) -> ValidationEstimate:
    """Trainings and seconds of a request. Raises what starting it would raise."""
    plan = backend.estimate_validations.plan(request)
    like_one = backend.estimate_validations.finetune(plan)
    return backend.estimate_validations.estimate(plan, of_finetune(backend, like_one))


def _of_plan(backend: Backend, plan: Plan) -> Estimate:
    checkpoint = backend.catalog.checkpoint(plan.feature_sets[0].checkpoint)
    folder, size = models.described(checkpoint.model, checkpoint.revision)
    lengths = models.lengths(_computed(backend, plan), folder=folder, max_length=plan.settings["max_length"])
    return backend.features.estimate(plan, tokens_per_row=lengths.mean, size=size)


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
