"""What a gradients job would cost: its rows are sampled and measured with the base model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from gradstore.types import Estimate, GradientsRequest

from datastore import models
from datastore.features import Plan
from datastore.rows import Example
from service.dependencies import Backend


def of_gradients(backend: Backend, request: GradientsRequest) -> Estimate:
    """Rows, tokens, bytes, seconds and memory of a request. Raises what starting it would raise."""
    plan = backend.features.plan(request)
    settings = plan.settings
    checkpoint = backend.catalog.checkpoint(plan.feature_sets[0].checkpoint)
    folder = models.folder_of(checkpoint.model, checkpoint.revision)
    lengths = models.lengths(_sample(backend, plan), folder=folder, max_length=settings["max_length"])
    size = models.size_of(folder) if folder else None
    kind = settings["quantisation"] or settings["precision"]
    return backend.features.estimate(
        request, tokens_per_row=lengths.mean, model_bytes=size.stored_bytes(kind) if size else None
    )


def _sample(backend: Backend, plan: Plan) -> Iterator[Example]:
    if plan.is_task:
        yield from (row.example for row in backend.tasks.validation(plan.owner)[:256])
        return
    for rows in models.sample(plan.rows):
        yield from backend.datasets.examples(plan.owner, rows.start, rows.stop)
