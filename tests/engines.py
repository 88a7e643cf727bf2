"""Engines over the small models of tests/architectures.py, and what is compared of what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from tests.architectures import BROKEN_TOKEN, PAD, trainable
from worker.batches import Encoded
from worker.directions import Kind
from worker.features import Features
from worker.gradients import GradientEngine

KINDS = [Kind("adam", "less"), Kind("adam", "exact"), Kind("sgd"), Kind("sign"), Kind("hidden"), Kind("rds")]
SGD = Kind("sgd")


def whole(model: PeftModel | PreTrainedModel, *kinds: Kind, **settings: Any) -> GradientEngine:
    """An engine that does not project; of `sgd` where no kind is named."""
    count = sum(parameter.numel() for parameter in trainable(model).values())
    return GradientEngine(model, kinds=kinds or [SGD], projection="none", dims=[count], **settings)


def features(engine: GradientEngine, examples: Sequence[Encoded], *, token_budget: int = 80) -> dict[Kind, Features]:
    """The features of all kinds, by default in several batches."""
    return engine.features(examples, pad_id=PAD, token_budget=token_budget)


def run(engine: GradientEngine, examples: Sequence[Encoded], *, token_budget: int = 80) -> Features:
    """The features of an engine of one kind."""
    (found,) = features(engine, examples, token_budget=token_budget).values()
    return found


def only(found: Features) -> NDArray[np.float32]:
    """The features of the only dim there is."""
    (array,) = found.by_dim.values()
    return array


def breakable(examples: Sequence[Encoded], which: set[int]) -> list[Encoded]:
    """The examples, `which` of them beginning with the token that no other has."""
    return [
        Encoded((BROKEN_TOKEN, *row.input_ids[1:]), row.labels) if number in which else row
        for number, row in enumerate(examples)
    ]


def settled(signs: torch.Tensor, others: torch.Tensor, gradients: torch.Tensor, *, error: float) -> torch.Tensor:
    """Signs, but those of `others` where a gradient is zero but for an error relative to its largest number: there a
    sign is anyone's.
    """
    decided = gradients.abs() > error * gradients.abs().amax(1, keepdim=True)
    assert decided.double().mean() > 0.1
    return signs.where(decided, others)
