"""How well several labels a row are told: by row, as CODS counts it, and by label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gradstore.types import CapabilityScore
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
EPSILON = 1e-8


@dataclass(frozen=True)
class SampleScores:
    """Means over rows."""

    exact_match: float
    precision: float
    recall: float
    f1: float


def sample_scores(predicted: Bools, true: Bools) -> SampleScores:
    """Of each row the part of what is predicted that is right, and of what is right that is predicted, (n, labels).

    As CODS has it: 1e-8 in the denominators, so that a row without labels, predicted to have none, counts as 0.
    """
    both = (predicted & true).sum(axis=1)
    precision = both / (predicted.sum(axis=1) + EPSILON)
    recall = both / (true.sum(axis=1) + EPSILON)
    f1 = 2 * precision * recall / (precision + recall + EPSILON)
    exact = (predicted == true).all(axis=1)
    return SampleScores(*(float(values.mean()) for values in (exact, precision, recall, f1)))


def label_scores(predicted: Bools, true: Bools, training: Bools, *, names: Sequence[str]) -> list[CapabilityScore]:
    """Precision, recall and F1 of each label; `training` are the labels of the rows trained on."""
    return [
        _score(name, predicted[:, number], true[:, number], int(training[:, number].sum()))
        for number, name in enumerate(names)
    ]


def _score(name: str, predicted: Bools, true: Bools, training_rows: int) -> CapabilityScore:
    right, said, there = int((predicted & true).sum()), int(predicted.sum()), int(true.sum())
    return CapabilityScore(
        name=name,
        training_rows=training_rows,
        rows=there,
        predicted=said,
        precision=right / said if said else None,
        recall=right / there if there else None,
        f1=2 * right / (said + there) if there else None,
    )
