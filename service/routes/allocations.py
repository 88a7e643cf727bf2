"""Allocations: what a mixture of LoRA experts would take in a model."""

from __future__ import annotations

from gradstore.types import Allocation, AllocationRequest

from datastore import models
from datastore.allocations import allocation
from datastore.errors import refusal
from service.dependencies import BackendDep
from service.routing import noun

router = noun("allocations")


@router.post("/preview")
def preview_allocation(backend: BackendDep, body: AllocationRequest) -> Allocation:
    """Layers, numbers and bytes of a mixture, from the model's configuration alone; nothing is kept."""
    model = models.resolve(body.model, roots=backend.settings.allowed_roots)
    revision = models.revision_of(model, body.revision)
    config = models.configuration(model, revision)
    if config is None:
        raise refusal(
            f"the config.json of {body.model} is not to be had: name a model of the hub, or a folder of the server "
            "that save_pretrained has written",
            "/model",
        )
    return allocation(body.mixture, config, precision=body.precision)
