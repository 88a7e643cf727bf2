"""Validations: how well scores predict what training on rows does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gradstore.types.base import (
    Aggregate,
    Body,
    Fraction,
    Name,
    Named,
    ProjectionName,
    Request,
    Split,
)
from gradstore.types.evaluations import Interval
from gradstore.types.finetunes import TrainingRecipe
from gradstore.types.gradients import FeatureChoice
from gradstore.types.jobs import Job, TrainingsEstimate
from gradstore.types.selection import SelectionRecipe

ValidationKind = Literal["lds", "leave-top-k-out"]
ValidationTargets = Literal["rows", "subtasks"]
Precondition = Literal["none", "trackstar"]


class ValidatedRecipe(FeatureChoice, Request):
    """Which scores are judged, as /scores asks for them: what is left out must be the only one there is."""

    label: str | None = Field(None, min_length=1, max_length=200)
    """What to call them in the result; by default the parameters that were named."""
    control: Literal["random"] | None = None
    """Scores of no meaning, drawn with the validation's `seed`, to compare the others with; they have no features."""
    run: Named | None = None
    checkpoints: list[Named] | None = Field(None, max_length=1000)
    projection: ProjectionName | None = None
    aggregate: Aggregate = "less"
    """`leave-top-k-out`: how a row's scores over the task become one."""
    precondition: Precondition = "none"
    """`trackstar`: features are whitened by their second moment first (arXiv 2410.17413)."""

    @model_validator(mode="after")
    def _one_training(self) -> ValidatedRecipe:
        if self.run is not None and self.checkpoints:
            raise ValueError("name either a run or checkpoints")
        others = self.model_dump(exclude_defaults=True, exclude={"label", "control"})
        if self.control is not None and others:
            raise ValueError(f"random scores have no features: leave out {', '.join(others)}")
        return self


MAX_TRAININGS = 20_000
"""Of a validation: each is a shard."""


class ValidationRequest(TrainingRecipe, Request):
    """Train models on parts of a pool and compare what scores predict for them with what they do.

    The trainings are shared by all `scores`, and by later validations that ask for the same ones.
    """

    kind: ValidationKind = "lds"
    """`lds`: the linear datamodeling score (arXiv 2303.14186): the rank correlation of predicted and measured losses of
    models trained on random subsets. `leave-top-k-out`: the target's loss after training without the best rows,
    beside that after training without as many random ones."""
    dataset: Named
    """The pool."""
    task: Named
    scores: list[ValidatedRecipe] = Field([ValidatedRecipe()], min_length=1, max_length=100)
    """What is judged, on the same trainings; the first is what the others are compared with. By default the only scores
    that there are."""
    split: Split = "validation"
    """Whose losses are measured: the rows whose gradients give the scores, or the test rows."""
    targets: ValidationTargets = "rows"
    """`lds`: what a prediction is for: each row, or the mean over the rows of each subtask. Scores are for validation
    rows, so test rows go by subtask."""
    subsets: int = Field(64, ge=3, le=10_000)
    """`lds`: models to train, each on a subset of its own."""
    fraction: Fraction = 0.5
    """`lds`: part of the pool in a subset."""
    pct: Fraction | None = None
    """`leave-top-k-out`: part of the pool to leave out."""
    k: int | None = Field(None, ge=1)
    """`leave-top-k-out`: how many rows to leave out."""
    repeats: int | None = Field(None, ge=1, le=100)
    """`lds`: trainings of each subset, which differ in their seed and whose losses are averaged; by default 1.
    `leave-top-k-out`: trainings without the best rows, and random draws to compare them with; by default 5."""
    bootstrap_samples: int = Field(1000, ge=1, le=100_000)
    name: Name | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ValidationRequest:
        if self.kind == "lds" and (self.pct is not None or self.k is not None):
            raise ValueError("pct and k are rows that kind=leave-top-k-out leaves out; kind=lds has a fraction")
        if self.kind == "lds" and self.fraction >= 1:
            raise ValueError("fraction=1 is the whole pool: subsets must differ")
        if self.kind == "leave-top-k-out" and (self.pct is None) == (self.k is None):
            raise ValueError("say how many rows to leave out: either pct, a fraction, or k, a number of rows")
        if self.subsets * (self.repeats or 1) > MAX_TRAININGS:
            raise ValueError(f"subsets times repeats are trainings: at most {MAX_TRAININGS:,}")
        if self.kind == "leave-top-k-out" and self.repeats == 1:
            raise ValueError("one training without the best rows says nothing of chance: repeats is at least 2")
        if self.kind == "lds" and self.split == "test" and self.targets == "rows":
            raise ValueError("scores are for validation rows: split=test goes with targets=subtasks")
        return self


class ValidatedTarget(Body):
    """One target of a validation."""

    row: int | None
    """Position among the rows of the split, from 0; null where the target is a subtask."""
    subtask: str
    value: float
    """The rank correlation, or the change of the loss."""


class ScatterPoint(Body):
    """One training of a validation, the means over its targets."""

    seed: int
    """Which subset, or which draw of random rows."""
    predicted: float | None
    """`lds`: the sum of the scores of the rows trained on."""
    loss: float
    """`lds`: the loss after training on the subset; `leave-top-k-out`: without the best rows."""
    random_loss: float | None
    """`leave-top-k-out`: the loss after training without random rows."""


class ValidatedScores(Body):
    """What is found of one of the scores."""

    label: str
    recipe: SelectionRecipe | None
    """Null for a control."""
    precondition: Precondition
    mixing: list[float]
    """`precondition=trackstar`: the weight of the target's second moment beside the pool's, at each checkpoint."""
    value: float
    """`lds`: the mean rank correlation over the targets, at most 1; near 0 is chance. `leave-top-k-out`: how much
    higher the target's loss is without the best rows than without random ones. More is better."""
    interval: Interval
    difference: float | None
    """How much more that is than for the first of the scores; null for these."""
    difference_interval: Interval | None
    """Interval of the difference, from the same bootstrap samples: narrower than the two apart."""
    unscored_rows: int
    """Rows of the pool that have no feature, and count as 0."""
    targets: list[ValidatedTarget]
    points: list[ScatterPoint]


class ValidationResult(Body):
    """How well the scores predict."""

    kind: ValidationKind
    scores: list[ValidatedScores]
    rows: int
    """Rows of a training; of the first where they differ."""
    left_out_targets: int
    """Target rows without a loss or a feature."""
    trainings: int
    """Different trainings, those that existed before included."""
    tokens: int
    """Tokens that they were trained on, all epochs."""
    seconds: float
    """Seconds that these trainings took, one after the other, whenever they were done."""


class ValidationEstimate(TrainingsEstimate):
    """What a validation would cost (`dry_run=true`)."""


ValidationJob = Job[ValidationRequest, ValidationResult]
