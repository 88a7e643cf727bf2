"""Steps from a checkpoint: weights of features taken back through their projection, and θ* + Δ as an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from datastore.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, file_key
from datastore.durable import copy_file
from worker.models import ModelError
from worker.projection import ProjectionName, make_projection

Step = Mapping[str, Tensor]
"""A step in each trainable parameter, flat, by its name in the model."""


def unprojected(
    model: PreTrainedModel | PeftModel, weights: Tensor, *, projection: ProjectionName, seed: int, device: torch.device
) -> Step:
    """Pŵ of weights ŵ (dim,): the step in the trainable parameters that they stand for.

    P is that of features of `dim` numbers with this projection and seed, and the parameters are in the model's order.
    """
    parameters = [(name, each.shape) for name, each in model.named_parameters() if each.requires_grad]
    made = make_projection(projection, dims=[len(weights)], parameters=parameters, seed=seed, device=device)
    return made.lift(weights)


def length(step: Step) -> float:
    """The L2 norm of a step, its squares added up in float64."""
    return float(torch.stack([each.double().square().sum().cpu() for each in step.values()]).sum().sqrt())


def export(adapter: Path, target: Path, step: Step, *, factor: float) -> None:
    """Write the adapter of a folder, moved by `factor` times a step, into the folder `target` in PEFT's layout.

    What moves is written as float32, whatever the adapter's own type is: a small step would be lost in 16 bits. Raises
    `ModelError` where the file has another name for a parameter, or none.
    """
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    for name, moved in step.items():
        key = file_key(name)
        if key not in tensors:
            raise ModelError(f"the adapter's file has no {key!r}, which its model trains: no step can be written there")
        tensors[key] = (tensors[key].double() + factor * moved.double().cpu().view_as(tensors[key])).float()
    target.mkdir(parents=True)
    save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    copy_file(adapter / ADAPTER_CONFIG, target / ADAPTER_CONFIG)
