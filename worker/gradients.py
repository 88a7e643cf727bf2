"""The gradient engine: the projected gradient of every single example, at about the price of a plain training step.

For a linear layer y = xWᵀ the gradient of example b is Σ_t δ_bt ⊗ x_bt, δ being the gradient of y. So one forward and
one backward pass of the *sum* of the examples' mean losses give every example's own gradient, exactly, by one batched
matrix product per layer (Goodfellow, 2015, arXiv 1510.01799); an example's terms never meet another's. A layer's
gradients (examples × size) are mapped (Adam), measured, projected and dropped inside the backward pass: the whole
gradient (examples × parameters) never exists, and no parameter gets a `.grad`.

Three things keep the price low, and none changes a number:

* padding stands on the right, where a causal model's real tokens never look, so there is no attention mask to build;
* logits are made for supervised positions only, and their cross-entropy keeps two float32 numbers per token beside
  them, where log-softmax would keep a second copy;
* the trainable linear layers run as `_TappedLinear`, which computes the per-example gradients in the place of the
  summed one that autograd would compute.

That covers LoRA's A and B and any other trainable weight or bias of an `nn.Linear`. What else PEFT trains (DoRA's
magnitudes, norms, embeddings, biases of a Conv1D, LoRA on fused experts, a layer used twice or on flattened tokens) is
noticed, because autograd reaches the parameter by another way than the tap, and from then on the engine runs the
examples one at a time through plain autograd: as exact, and some three to twenty times slower.
`GradientEngine.one_at_a_time` names the cause.

Order of parameters: `model.named_parameters()`, the trainable ones. Mathematics: LESS (arXiv 2402.04333), section 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from worker.batches import IGNORED, Encoded, collate, plan
from worker.models import use_exact_mode
from worker.projection import Projection, ProjectionName, make_projection

GradientKind = Literal["adam", "sgd", "sign"]
AdamForm = Literal["less", "exact"]

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8

LOSS_NOT_FINITE = "loss is not finite"
GRADIENT_NOT_FINITE = "gradient is not finite"
GRADIENT_ZERO = "gradient is zero"
NOTHING_SUPERVISED = "no supervised token"

GRADIENT_ELEMENTS = 1 << 26  # per-example gradients of one layer at a time: 256 MiB as float32
LOGIT_ELEMENTS = 1 << 22  # logits turned into a loss at a time: 16 MiB as float32

HALF_LOSS_SCALE = 1024.0  # float16 loses gradients below 6e-8; a power of two changes no digit of the others

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """Adam's state at a checkpoint, by parameter name."""

    exp_avg: Mapping[str, Tensor]
    """First moment m, in the shape of its parameter."""
    exp_avg_sq: Mapping[str, Tensor]
    """Second moment v, in the shape of its parameter."""
    step: int
    """Optimizer steps taken."""


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

    The model is put in the mode of evaluation (gradient checkpointing stays on where it is on), a `.grad` left from
    training is dropped, and nothing else of it changes. Memory beside the training step's: examples × sum of `dims`
    float32 per batch, the projection's (`projection.py`), and for `adam` two float32 numbers per parameter.

    Raises ValueError where `moments` do not fit the parameters, or `dims` the projection.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        kind: GradientKind,
        adam: AdamForm = "less",
        moments: Moments | None = None,
        projection: ProjectionName = "blocks",
        dims: Sequence[int],
        seed: int = 0,
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
        self._direction = self._make_direction(kind, adam, moments)
        self._layers, self.one_at_a_time = _tappable_layers(model, self.parameters)
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
        inputs = _Inputs.of(rows, pad_id=pad_id, device=self.device)
        batch = self._batch(len(rows))
        with _tapped(self._layers, inputs.shape, batch.take) as tap:
            losses = self._losses(inputs)
            (losses.sum() * self._scale).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        batch.losses = losses.detach()
        self.one_at_a_time = tap.strays + self._drop_gradients()
        if self.one_at_a_time:
            log.info("examples go one at a time", extra={"parameters": self.one_at_a_time[:5]})
            return None
        batch.take_zeros(self.parameters.keys() - batch.seen)
        return batch

    def _drop_gradients(self) -> list[str]:
        """Name the parameters that autograd gave a gradient by another way than a tap, and drop it."""
        reached = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        for name in reached:
            self.parameters[name].grad = None
        return reached

    def _compute_one_by_one(self, rows: Sequence[Encoded], *, pad_id: int) -> _Batch:
        batch = self._batch(len(rows))
        for position, row in enumerate(rows):
            loss = self._losses(_Inputs.of([row], pad_id=pad_id, device=self.device))
            gradients = torch.autograd.grad(
                loss.sum() * self._scale, list(self.parameters.values()), allow_unused=True, materialize_grads=True
            )
            batch.losses[position] = loss.detach()[0]
            for name, gradient in zip(self.parameters, gradients, strict=True):
                # autograd may give two parameters one tensor, and what is taken may be overwritten
                batch.take(name, gradient.flatten().clone().unsqueeze(0), slice(position, position + 1))
        return batch

    def _batch(self, examples: int) -> _Batch:
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        return _Batch(examples, sizes, self._direction, self.projection, 1 / self._scale)

    def _losses(self, inputs: _Inputs) -> Tensor:
        """Return the mean cross-entropy over the supervised tokens of each example: (examples,) float32."""
        with _logits_only_at(inputs, self.model) as reduced:
            logits = self.model(input_ids=inputs.input_ids, use_cache=False).logits
        logits = logits.flatten(0, 1)
        if not reduced:
            logits = logits.index_select(0, inputs.positions)
        losses: Tensor = _CrossEntropy.apply(logits, inputs.targets)  # type: ignore[no-untyped-call]  # torch's
        # laid out in rows and summed: adding by index has no fixed order on a GPU
        spread = torch.zeros(inputs.input_ids.numel(), device=self.device).index_copy(0, inputs.positions, losses)
        return spread.view(inputs.shape).sum(1) / inputs.counts

    def _make_direction(self, kind: GradientKind, adam: AdamForm, moments: Moments | None) -> Direction:
        if kind == "sgd":
            return _sgd
        if kind == "sign":
            return _sign
        if moments is None:
            raise ValueError("kind='adam' needs Adam's moments, and this checkpoint has none; ask for sgd or sign")
        return _Adam(adam, _fitting(moments, self.parameters), self.device)


# What is done with a gradient ----------------------------------------------------------------------------------------

Direction = Callable[[str, Tensor], Tensor]
"""Maps the flat gradients (examples, size) of the named parameter, float32, to directions; it may overwrite them."""


def _sgd(_name: str, gradients: Tensor) -> Tensor:
    return gradients


def _sign(_name: str, gradients: Tensor) -> Tensor:
    return gradients.sign_()


class _Adam:
    """Adam's step at fixed moments, as four operations on precomputed tensors.

    `less`: (a + c₁g) / √(b + c₂g²) with a = β₁m, b = β₂v + ε, c₁ = 1 − β₁, c₂ = 1 − β₂. `exact`: a and c₁ over 1 − β₁ᵗ,
    b = β₂v and c₂ over 1 − β₂ᵗ, and ε is added to the root.
    """

    def __init__(self, form: AdamForm, moments: Moments, device: torch.device) -> None:
        step = moments.step + 1
        exact = form == "exact"
        first = 1 - BETA1**step if exact else 1.0
        second = 1 - BETA2**step if exact else 1.0
        self._outside = EPSILON if exact else 0.0
        self._c1 = (1 - BETA1) / first
        self._c2 = (1 - BETA2) / second
        inside = 0.0 if exact else EPSILON
        self._a = {name: _flat(m, device).mul_(BETA1 / first) for name, m in moments.exp_avg.items()}
        self._b = {name: _flat(v, device).mul_(BETA2 / second).add_(inside) for name, v in moments.exp_avg_sq.items()}

    def __call__(self, name: str, gradients: Tensor) -> Tensor:
        roots = torch.addcmul(self._b[name], gradients, gradients, value=self._c2).sqrt_()
        if self._outside:
            roots.add_(self._outside)
        return gradients.mul_(self._c1).add_(self._a[name]).div_(roots)


def _flat(moment: Tensor, device: torch.device) -> Tensor:
    return moment.detach().to(device=device, dtype=torch.float32, copy=True).flatten()


def _fitting(moments: Moments, parameters: Mapping[str, Tensor]) -> Moments:
    """Return `moments` where they are those of `parameters`: the same names and shapes, finite, v not negative."""
    for label, values in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
        _refuse_names(label, missing=parameters.keys() - values.keys(), extra=values.keys() - parameters.keys())
        for name, value in values.items():
            if value.shape != parameters[name].shape:
                raise ValueError(
                    f"Adam's {label} of {name!r} has the shape {tuple(value.shape)} and the parameter "
                    f"{tuple(parameters[name].shape)}: the moments belong to another adapter"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"Adam's {label} of {name!r} holds numbers that are not finite")
            if label == "exp_avg_sq" and bool((value < 0).any()):
                raise ValueError(f"Adam's {label} of {name!r} holds negative numbers: it is no mean of squares")
    if moments.step < 0:
        raise ValueError(f"Adam's step is {moments.step}; it counts the steps taken")
    return moments


def _refuse_names(label: str, *, missing: set[str], extra: set[str]) -> None:
    for names, fault in ((missing, "lack the trainable parameter"), (extra, "name what is no trainable parameter:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"Adam's moments ({label}) {fault} {min(names)!r}{more}")


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
            for examples in _slices(self._examples, self._sizes[name]):
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


# The forward pass ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """A batch on its device, and where its N supervised tokens are."""

    input_ids: Tensor
    """(examples, tokens)."""
    positions: Tensor
    """(N,) positions, in the flattened batch, whose logits predict the supervised tokens."""
    targets: Tensor
    """(N,) the supervised tokens."""
    counts: Tensor
    """(examples,) supervised tokens, float32."""

    @property
    def shape(self) -> torch.Size:
        return self.input_ids.shape

    @classmethod
    def of(cls, rows: Sequence[Encoded], *, pad_id: int, device: torch.device) -> _Inputs:
        batch = collate(rows, pad_id=pad_id)
        mask = batch.attention_mask.bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
            raise ValueError("a batch must be padded on the right: a causal model then never looks at the padding")
        # padding repeats the example's first token: the pad token may lie outside the vocabulary
        input_ids = torch.where(mask, batch.input_ids, batch.input_ids[:, :1])
        examples, predictors = torch.nonzero(batch.labels[:, 1:] != IGNORED, as_tuple=True)
        positions = examples * input_ids.shape[1] + predictors
        targets = batch.labels[examples, predictors + 1]
        counts = torch.bincount(examples, minlength=len(rows)).float()
        return cls(*(tensor.to(device) for tensor in (input_ids, positions, targets, counts)))


@dataclass
class _Reduced:
    """Whether the output layer saw the supervised positions only."""

    done: bool = False

    def __bool__(self) -> bool:
        return self.done


@contextmanager
def _logits_only_at(inputs: _Inputs, model: PeftModel) -> Iterator[_Reduced]:
    """Give the output layer the hidden states of the supervised positions only, as a batch of one.

    Every architecture's own treatment of logits (scale, soft cap) still applies. A trainable output layer is left
    alone, since its gradients need the examples apart.
    """
    reduced = _Reduced()
    head = model.get_output_embeddings()
    if head is None or any(parameter.requires_grad for parameter in head.parameters()):
        yield reduced
        return

    def reduce(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0]
        if hidden.shape[:-1] != inputs.shape:
            return None
        reduced.done = True
        return (hidden.flatten(0, 1).index_select(0, inputs.positions).unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(reduce)
    try:
        yield reduced
    finally:
        handle.remove()


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token from its logits, in float32 whatever the logits are.

    The backward pass makes the softmax again from the logits and two numbers per token (maximum, and log of the sum):
    log-softmax keeps a float32 copy of all logits instead, 5 GB at 8,192 tokens of a vocabulary of 152K.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (tokens, vocabulary) and targets (tokens,) to losses (tokens,)."""
        highest = logits.amax(1, keepdim=True).float()
        sums = torch.empty_like(highest)
        for part in _slices(*logits.shape, elements=LOGIT_ELEMENTS):
            torch.sum((logits[part].float() - highest[part]).exp_(), 1, keepdim=True, out=sums[part])
        log_sums = sums.log()
        ctx.save_for_backward(logits, targets, highest, log_sums)
        chosen = logits.gather(1, targets.unsqueeze(1)).float()
        return (log_sums - (chosen - highest)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return softmax − one-hot, times the gradient of the loss."""
        logits, targets, highest, log_sums = ctx.saved_tensors
        weights = gradients[0].unsqueeze(1)
        result = torch.empty_like(logits)
        for part in _slices(*logits.shape, elements=LOGIT_ELEMENTS):
            softmax = (logits[part].float() - highest[part]).sub_(log_sums[part]).exp_()
            softmax.scatter_add_(1, targets[part].unsqueeze(1), torch.full_like(weights[part], -1))
            result[part] = softmax.mul_(weights[part])
        return result, None


def _slices(examples: int, size: int, *, elements: int = GRADIENT_ELEMENTS) -> Iterator[slice]:
    """Cut `examples` rows of `size` numbers into slices of at most `elements` numbers, at least one row each."""
    at_once = max(1, elements // max(1, size))
    for start in range(0, examples, at_once):
        yield slice(start, min(start + at_once, examples))


# Taps ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A trainable linear layer and the full names of its trainable parameters."""

    module: nn.Linear
    weight: str | None
    bias: str | None


@dataclass
class _Tap:
    """Where the taps of one batch put what they get, and what they could not attribute to examples."""

    shape: torch.Size
    """(examples, tokens) of the batch."""
    take: Callable[[str, Tensor, slice], None]
    strays: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def gradients(self, layer: _Layer, inputs: Tensor, deltas: Tensor) -> None:
        """Take the gradients of `layer` from its inputs (examples, tokens, in) and those of its outputs (…, out)."""
        names = [name for name in (layer.weight, layer.bias) if name is not None]
        if inputs.shape[:-1] != self.shape or not self.used.isdisjoint(names):
            self.strays += names
            return
        self.used.update(names)
        if layer.weight is not None:
            for part in _slices(inputs.shape[0], inputs.shape[-1] * deltas.shape[-1]):
                outer = torch.bmm(deltas[part].transpose(1, 2), inputs[part])
                self.take(layer.weight, outer.flatten(1), part)
        if layer.bias is not None:
            self.take(layer.bias, deltas.sum(1), slice(0, inputs.shape[0]))


class _TappedLinear(torch.autograd.Function):
    """`nn.Linear` whose backward pass hands the per-example gradients to a tap instead of summing them.

    The weight goes in as an argument so that the output requires a gradient where the input does not (the first layer).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layer, tap: _Tap) -> Tensor:
        """Return xWᵀ + b."""
        ctx.save_for_backward(inputs, weight)  # and not on ctx: gradient checkpointing packs what is saved here
        ctx.layer = layer
        ctx.tap = tap
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Return the inputs' gradient only."""
        inputs, weight = ctx.saved_tensors
        ctx.tap.gradients(ctx.layer, inputs, deltas[0])
        return (deltas[0] @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


def _tappable_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[list[_Layer], list[str]]:
    """Find the linear layers that hold trainable parameters, and the trainable parameters outside of them."""
    layers = []
    covered: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            own = {name: f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.requires_grad}
            if own:
                layers.append(_Layer(module, own.get("weight"), own.get("bias")))
                covered += own.values()
    # a parameter shared by two layers comes up under a name that named_parameters() leaves out
    shared = [name for name in covered if name not in parameters]
    return layers, shared + [name for name in parameters if name not in covered]


@contextmanager
def _tapped(layers: Sequence[_Layer], shape: torch.Size, take: Callable[[str, Tensor, slice], None]) -> Iterator[_Tap]:
    """Let `layers` run as tapped ones for one forward and backward pass."""
    tap = _Tap(shape, take)
    before = [vars(layer.module).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer.module)["forward"] = _tapped_forward(layer, tap)
        yield tap
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer.module).pop("forward", None)
            else:
                vars(layer.module)["forward"] = forward  # as a hook of accelerate left it


def _tapped_forward(layer: _Layer, tap: _Tap) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        module = layer.module
        output: Tensor = _TappedLinear.apply(  # type: ignore[no-untyped-call]  # torch's
            inputs, module.weight, module.bias, layer, tap
        )
        return output

    return forward
