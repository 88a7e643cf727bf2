"""What a job computes with: the gradient engine of a checkpoint, its model, and work that is made to fit the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from gradstore.types import Checkpoint
from peft import PeftModel
from transformers import PreTrainedModel

from datastore.errors import InvalidCheckpoint, InvalidInput
from datastore.weights import chosen
from worker import moments
from worker.budgets import is_out_of_memory
from worker.context import Context
from worker.directions import Kind
from worker.encoders import EncoderEngine, encoder_of
from worker.gradients import GradientEngine
from worker.loaded import Base, Engine

log = logging.getLogger(__name__)

T = TypeVar("T")


class OutOfMemory(InvalidInput):
    """What the request asks for does not fit into the device's memory."""


def make_engine(
    context: Context, base: Base, checkpoint: Checkpoint, plan: dict[str, Any], outputs: Sequence[dict[str, Any]]
) -> Engine:
    """The engine that computes these outputs at a checkpoint, kept in the worker's memory until another is asked for.

    `plan` is that of the job: reduction, projection, seed and weights, or an encoder. Raises `InvalidCheckpoint`,
    `ModelError`.
    """
    encoder = encoder_of(plan)
    if encoder is not None:
        return context.loaded.engine((base, encoder), lambda: EncoderEngine(context.loaded.base(base), encoder))
    kinds = tuple(dict.fromkeys(kind_of(output) for output in outputs))
    dims = tuple(dict.fromkeys(output["dim"] for output in outputs if kind_of(output).is_projected))
    settings = (*(plan[key] for key in ("reduction", "projection", "seed")), tuple(plan["weights"] or ()))

    def make() -> GradientEngine:
        model = load(context, base, checkpoint)
        stored = context.checkpoints.moments(checkpoint.id) if any(kind.name == "adam" for kind in kinds) else None
        names = None
        if plan["weights"] is not None:
            names = chosen(plan["weights"], dict(model.named_parameters()))
            for name in names:
                model.get_parameter(name).requires_grad_(True)
        try:
            return GradientEngine(
                model,
                kinds=kinds,
                moments=moments.read(stored, names=names) if stored else None,
                projection=plan["projection"],
                dims=dims,
                seed=plan["seed"],
                reduction=plan["reduction"],
            )
        except ValueError as error:
            raise InvalidCheckpoint(f"{checkpoint.id}: {error}") from error

    return context.loaded.engine((base, checkpoint.id, settings, kinds, dims), make)


def load(context: Context, base: Base, checkpoint: Checkpoint) -> PreTrainedModel | PeftModel:
    """The model of a checkpoint: an adapter on its base model, a model of its own, or the base model itself."""
    if checkpoint.method == "none":
        return context.loaded.base(base)
    weights = context.checkpoints.weights(checkpoint.id)
    if checkpoint.method == "full":
        return context.loaded.base(replace(base, model=str(weights), revision=None))
    return context.loaded.adapted(base, weights)


def kind_of(output: dict[str, Any]) -> Kind:
    """Which kind of features an output has."""
    return Kind(output["kind"], output["adam"] or "less", output.get("logodds_form") or "exact")


def within_memory(
    work: Callable[[int], T],
    *,
    budget: int,
    least: int,
    device: torch.device,
    on_less: Callable[[int], None] = lambda _: None,
) -> T:
    """Do the work in batches of `budget` tokens; where these do not fit the memory, of half as many, down to `least`.

    Another batch plan changes results by rounding only. `on_less` gets each smaller budget. Raises `OutOfMemory` where
    even `least` tokens do not fit.
    """
    while True:
        try:
            return work(budget)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if budget <= least:
                raise OutOfMemory(
                    f"{least:,} tokens do not fit the device's memory even alone: ask for a smaller max_length, "
                    "gradient_checkpointing=true (for gradients), or quantisation"
                ) from error
            budget = max(least, budget // 2)
            on_less(budget)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: smaller batches", extra={"token_budget": budget})
