"""The gradient engine: the projected gradient of every single example, at about the price of a plain training step.

One forward and one backward pass of the *sum* of the examples' losses (worker/losses.py) give every example's own
gradient, exactly, since an example's terms never meet another's: taps in the layers (worker/taps.py) compute it in the
place of the sum over the batch that autograd would compute. A layer's gradients (examples × size) are mapped
(worker/directions.py), measured, projected (worker/projection.py) and dropped inside the backward pass: the whole
gradient (examples × parameters) never exists, and no parameter gets a `.grad`.

What no tap can attribute to examples (LoRA on fused experts, a layer used twice) is noticed, because autograd reaches
the parameter by another way, and from then on the engine runs the examples one at a time through plain autograd: as
exact, and some three to twenty times slower. `GradientEngine.one_at_a_time` names the cause.

Order of parameters: `model.named_parameters()`, the trainable ones. They may be an adapter's, or chosen weights of a
model without one: the features are then those of its full gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker import taps
from worker.batches import IGNORED, Encoded, plan, slices
from worker.directions import AdamForm, Direction, GradientKind, Moments, make_direction
from worker.losses import Inputs, Model, losses
from worker.models import use_exact_mode
from worker.projection import Projection, ProjectionName, make_projection

Reduction = Literal["mean", "sum"]

LOSS_NOT_FINITE = "loss is not finite"
GRADIENT_NOT_FINITE = "gradient is not finite"
GRADIENT_ZERO = "gradient is zero"
NOTHING_SUPERVISED = "no supervised token"

HALF_LOSS_SCALE = 1024.0  # float16 loses gradients below 6e-8; a power of two changes no digit of the others

LEAST_COSINE = {torch.float32: 0.999, torch.float64: 0.999}  # of one feature computed in two ways
LEAST_COSINE_HALF = 0.95

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """The features of n examples, in the order they were given."""

    by_dim: dict[int, NDArray[np.float32]]
    """(n, dim) for each dim; zeros where there is a reason."""
    norms: NDArray[np.float32]
    """(n,) length of the gradient after Adam's map or the sign, before the projection; 0 where there is a reason."""
    losses: NDArray[np.float32]
    """(n,) mean cross-entropy over the supervised tokens; 0 where it is not finite."""
    tokens: NDArray[np.int32]
    """(n,) supervised tokens."""
    reasons: list[str | None]
    """Why an example has no feature; None where it has one."""


class GradientEngine:
    """Computes features with the gradients of `model`'s trainable parameters.

    `kind`: `sgd` is the gradient g; `sign` its sign; `adam` the direction in which Adam would step,
    with m' = β₁m + (1 − β₁)g and v' = β₂v + (1 − β₂)g²: m' / √(v' + ε) in the form `less` (LESS's published code), and
    (m' / (1 − β₁ᵗ)) / (√(v' / (1 − β₂ᵗ)) + ε) at t = step + 1 in the form `exact` (its paper, and Adam itself).
    `reduction`: whether g is that of the mean of the supervised tokens' losses, or of their sum.

    The model is put in the mode of evaluation (gradient checkpointing stays on where it is on), a `.grad` left from
    training is dropped, and nothing else of it changes. Memory beside the training step's: examples × sum of `dims`
    float32 per batch, the projection's (`projection.py`), and for `adam` two float32 numbers per parameter.

    Raises ValueError where `moments` do not fit the parameters, or `dims` the projection.
    """

    def __init__(
        self,
        model: Model,
        *,
        kind: GradientKind,
        adam: AdamForm = "less",
        moments: Moments | None = None,
        projection: ProjectionName = "blocks",
        dims: Sequence[int],
        seed: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: load the adapter with is_trainable=True")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("features are those of causal language models; this one is an encoder-decoder")
        self.device = next(iter(self.parameters.values())).device
        self.projection: Projection = make_projection(
            projection,
            dims=dims,
            parameters=[(name, p.shape) for name, p in self.parameters.items()],
            seed=seed,
            device=self.device,
        )
        self._direction = make_direction(
            kind, adam=adam, moments=moments, parameters=self.parameters, device=self.device
        )
        self._reduction = reduction
        self._sites, self.one_at_a_time = taps.find_sites(model, self.parameters)
        self._in_order = False
        self._scale = HALF_LOSS_SCALE if model.dtype == torch.float16 else 1.0
        self._drop_gradients()
        use_exact_mode(model)

    def features(
        self,
        rows: Sequence[Encoded],
        *,
        pad_id: int,
        token_budget: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> Features:
        """Compute the features of `rows`, in batches of at most `token_budget` padded tokens, planned by length.

        `on_batch` gets the number of rows done so far after every batch; an exception of its own ends the work.
        """
        features = _empty_features(rows, self.projection.dims)
        todo = [row for row, reason in enumerate(features.reasons) if reason is None]
        done = len(rows) - len(todo)
        for batch in plan([len(rows[row].input_ids) for row in todo], token_budget=token_budget):
            indices = [todo[position] for position in batch]
            self._compute([rows[index] for index in indices], pad_id=pad_id).store(features, indices)
            done += len(indices)
            if on_batch is not None:
                on_batch(done)
        return features

    def _compute(self, rows: Sequence[Encoded], *, pad_id: int) -> _Batch:
        """Compute one batch; where its parameters turn out not to be covered by taps, one at a time from now on."""
        if not self.one_at_a_time:
            batch = self._compute_together(rows, pad_id=pad_id)
            if batch is not None:
                return batch
        return self._compute_one_by_one(rows, pad_id=pad_id)

    def _compute_together(self, rows: Sequence[Encoded], *, pad_id: int) -> _Batch | None:
        inputs = Inputs.of(rows, pad_id=pad_id, device=self.device)
        batch = self._batch(len(rows))
        with taps.tapped(self._sites, inputs.shape, batch.take) as recorder:
            means = losses(self.model, inputs)
            self._objective(means, inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        batch.losses = means.detach()
        self.one_at_a_time = recorder.strays + self._drop_gradients()
        if not self.one_at_a_time and recorder.flattened:
            self.one_at_a_time = self._out_of_order(rows, recorder.flattened, pad_id=pad_id)
        if self.one_at_a_time:
            log.info("examples go one at a time", extra={"parameters": self.one_at_a_time[:5]})
            return None
        batch.take_zeros(self.parameters.keys() - batch.seen)
        return batch

    def _objective(self, means: Tensor, inputs: Inputs) -> Tensor:
        """Return the number whose gradient is taken: the examples' losses together, scaled."""
        by_example = means * inputs.counts if self._reduction == "sum" else means
        return by_example.sum() * self._scale

    def _out_of_order(self, rows: Sequence[Encoded], flattened: Mapping[str, Tensor], *, pad_id: int) -> list[str]:
        """Name the parameters whose flattened tokens were no rows in order: tested once, by the first example alone.

        A router that sorts tokens by their expert gives as many as there are, in another order.
        """
        if self._in_order or len(rows) == 1:
            return []
        inputs = Inputs.of(rows[:1], pad_id=pad_id, device=self.device)
        objective = self._objective(losses(self.model, inputs), inputs)
        alone = torch.autograd.grad(objective, [self.parameters[name] for name in flattened], materialize_grads=True)
        least = LEAST_COSINE.get(self.model.dtype, LEAST_COSINE_HALF)
        wrong = [
            name
            for (name, together), gradient in zip(flattened.items(), alone, strict=True)
            if not _cosine(together, gradient.flatten()) >= least
        ]
        self._in_order = not wrong
        return wrong

    def _drop_gradients(self) -> list[str]:
        """Name the parameters that autograd gave a gradient by another way than a tap, and drop it."""
        reached = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        for name in reached:
            self.parameters[name].grad = None
        return reached

    def _compute_one_by_one(self, rows: Sequence[Encoded], *, pad_id: int) -> _Batch:
        batch = self._batch(len(rows))
        for position, row in enumerate(rows):
            inputs = Inputs.of([row], pad_id=pad_id, device=self.device)
            mean = losses(self.model, inputs)
            gradients = torch.autograd.grad(
                self._objective(mean, inputs),
                list(self.parameters.values()),
                allow_unused=True,
                materialize_grads=True,
            )
            batch.losses[position] = mean.detach()[0]
            for name, gradient in zip(self.parameters, gradients, strict=True):
                # autograd may give two parameters one tensor, and what is taken may be overwritten
                batch.take(name, gradient.flatten().clone().unsqueeze(0), slice(position, position + 1))
        return batch

    def _batch(self, examples: int) -> _Batch:
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        return _Batch(examples, sizes, self._direction, self.projection, 1 / self._scale)


class _Batch:
    """The features of one batch while they are being summed, parameter by parameter."""

    def __init__(
        self, examples: int, sizes: Mapping[str, int], direction: Direction, projection: Projection, unscale: float
    ) -> None:
        device = projection.device
        self.losses = torch.zeros(examples, device=device)
        self.seen: set[str] = set()
        self._examples = examples
        self._sizes = sizes
        self._direction = direction
        self._projection = projection
        self._unscale = unscale
        self._sums = projection.zeros(examples)
        self._squares = torch.zeros(examples, dtype=torch.float64, device=device)
        self._peaks = torch.zeros(examples, device=device)

    def take(self, name: str, gradients: Tensor, examples: slice) -> None:
        """Take in the flat gradients (examples, size) of one parameter; they may be overwritten."""
        gradients = gradients.to(torch.float32)
        if self._unscale != 1:
            gradients = gradients * self._unscale
        self.seen.add(name)
        # amax keeps a NaN; the peak of the raw gradient tells zero from small, which squares would not
        self._peaks[examples] = torch.maximum(self._peaks[examples], gradients.abs().amax(1))
        directions = self._direction(name, gradients)
        self._squares[examples] += torch.linalg.vector_norm(directions, dim=1).double().square()
        self._projection.add(name, directions, {dim: sums[examples] for dim, sums in self._sums.items()})

    def take_zeros(self, names: set[str]) -> None:
        """Take in parameters that the loss did not depend on: Adam moves these too."""
        for name in sorted(names):
            for examples in slices(self._examples, self._sizes[name], elements=taps.GRADIENT_ELEMENTS):
                zeros = torch.zeros(examples.stop - examples.start, self._sizes[name], device=self._peaks.device)
                self.take(name, zeros, examples)

    def store(self, features: Features, rows: Sequence[int]) -> None:
        """Write the batch to its rows of `features`, with a reason and zeros for what is no feature."""
        norms = self._squares.sqrt().float()
        losses = self.losses
        reasons = _reasons(losses.cpu(), self._peaks.cpu(), norms.cpu())
        kept = torch.tensor([reason is None for reason in reasons], device=norms.device)
        for dim, sums in self._sums.items():
            features.by_dim[dim][rows] = torch.where(kept[:, None], sums, 0).cpu().numpy()
        features.norms[rows] = torch.where(kept, norms, 0).cpu().numpy()
        features.losses[rows] = torch.where(losses.isfinite(), losses, 0).cpu().numpy()
        for row, reason in zip(rows, reasons, strict=True):
            features.reasons[row] = reason


def _reasons(losses: Tensor, peaks: Tensor, norms: Tensor) -> list[str | None]:
    """Say what is wrong with each example; `peaks` are the largest magnitudes in the raw gradients."""
    faults = [
        (LOSS_NOT_FINITE, ~losses.isfinite()),
        (GRADIENT_NOT_FINITE, ~(peaks.isfinite() & norms.isfinite())),
        (GRADIENT_ZERO, peaks == 0),
    ]
    return [
        next((reason for reason, faulty in faults if bool(faulty[example])), None) for example in range(len(losses))
    ]


def _empty_features(rows: Sequence[Encoded], dims: Sequence[int]) -> Features:
    """Make the room for the features; an example without a supervised token gets its reason at once."""
    tokens = np.array([_supervised_tokens(row) for row in rows], dtype=np.int32)
    return Features(
        by_dim={dim: np.zeros((len(rows), dim), dtype=np.float32) for dim in dims},
        norms=np.zeros(len(rows), dtype=np.float32),
        losses=np.zeros(len(rows), dtype=np.float32),
        tokens=tokens,
        reasons=[None if count else NOTHING_SUPERVISED for count in tokens],
    )


def _supervised_tokens(row: Encoded) -> int:
    """Count the tokens that are predicted and supervised; nothing predicts the first one."""
    return sum(label != IGNORED for label in row.labels[1:])


def _cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of two vectors; 1 where both are zero."""
    if not bool(first.any()) and not bool(second.any()):
        return 1.0
    return float(torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=0))
