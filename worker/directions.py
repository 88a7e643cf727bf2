"""What is made of a raw gradient g before it is projected: nothing, its sign, or the step that Adam would take.

Two kinds of features are made of no gradient, and are not projected either: means of hidden states, in which every
token weighs the same (`hidden`), or the t-th as much as t (`rds`: RDS+, Ivison et al., arXiv 2503.01807, whose pooling
is SGPT's, arXiv 2202.08904: Σ t·h_t / Σ t over all tokens of the sequence, the prompt's too).

`output` is the gradient of the output layer, as the layers before it would see it: Σ_t δ_t ⊗ h_t with h_t what that
layer gets and δ_t = ∂loss/∂h_t, which is Wᵀ(p_t − y_t) over the number of tokens where it is a matrix W alone. That is
Wᵀ times the gradient of W, and the gradient of a matrix of the model's width that stood before W and were the identity.
It is projected as gradients are, and costs a forward pass: nothing but the output layer is differentiated. (Gradients
of the last layer stand for those of all in TracIn, arXiv 2002.08484, and in BADGE, arXiv 1906.03671.)

`logodds` is the gradient as it is, but of another number than the loss: of the mean log-odds of the right tokens
(GradEx, arXiv 2409.19458), in one of the forms of `worker.losses.stabilised`.

Mathematics: LESS (arXiv 2402.04333), section 2, and Adam (Kingma and Ba, arXiv 1412.6980), at moments that stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from worker.layouts import Pooling

FeatureKind = Literal["adam", "sgd", "sign", "logodds", "output", "hidden", "rds", "embedding"]
AdamForm = Literal["less", "exact"]
LogoddsForm = Literal["exact", "reference"]

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8


@dataclass(frozen=True)
class Kind:
    """What a feature is made of: the gradient as it is, its sign, Adam's step in one of its forms, the output layer's
    gradient, hidden states."""

    name: FeatureKind
    adam: AdamForm = "less"
    """Of no account where the name is not `adam`."""
    logodds: LogoddsForm = "exact"
    """Of no account where the name is not `logodds`."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes a backward pass through the model."""
        return self.name in ("adam", "sgd", "sign", "logodds")

    @property
    def is_projected(self) -> bool:
        """Whether it is a projected gradient, of all trainable parameters or of the output layer."""
        return self.needs_gradient or self.name == "output"

    @property
    def pooling(self) -> Pooling | None:
        """How a causal model's hidden states become the feature; None where it is not made of them."""
        return _POOLINGS.get(self.name)


_POOLINGS: Mapping[FeatureKind, Pooling] = {"hidden": "mean", "rds": "position"}

Direction = Callable[[Sequence[str], Tensor], Tensor]
"""Maps the flat gradients of the named parameters, (examples, their size together) float32, to directions.

It may overwrite them."""


@dataclass(frozen=True)
class Moments:
    """Adam's state at a checkpoint, by parameter name."""

    exp_avg: Mapping[str, Tensor]
    """First moment m, in the shape of its parameter."""
    exp_avg_sq: Mapping[str, Tensor]
    """Second moment v, in the shape of its parameter."""
    step: int
    """Optimizer steps taken."""


def make_direction(
    kind: Kind, *, moments: Moments | None, parameters: Mapping[str, Tensor], device: torch.device
) -> Direction:
    """Make the map of a gradient's `kind`; raises ValueError where `adam` has no moments, or they do not fit."""
    if kind.name in ("sgd", "logodds"):
        return sgd
    if kind.name == "sign":
        return sign
    if moments is None:
        raise ValueError("kind='adam' needs Adam's moments, and this checkpoint has none; ask for sgd or sign")
    return Adam(kind.adam, _fitting(moments, parameters), device)


def sgd(_names: Sequence[str], gradients: Tensor) -> Tensor:
    """Leave the gradients as they are."""
    return gradients


def sign(_names: Sequence[str], gradients: Tensor) -> Tensor:
    """Return −1, 0 or 1 for each number."""
    return gradients.sign_()


class Adam:
    """Adam's step at fixed moments, as four operations on precomputed tensors: (g + a) / (√(b + cg²) + d).

    `less`, (β₁m + c₁g) / √(β₂v + ε + c₂g²) with c₁ = 1 − β₁ and c₂ = 1 − β₂, over c₁ above and below. `exact`, where
    β₁m and c₁ are over 1 − β₁ᵗ, β₂v and c₂ over 1 − β₂ᵗ, and ε is added to the root, likewise.
    """

    def __init__(self, form: AdamForm, moments: Moments, device: torch.device) -> None:
        step = moments.step + 1
        exact = form == "exact"
        first = 1 - BETA1**step if exact else 1.0
        second = 1 - BETA2**step if exact else 1.0
        c1 = (1 - BETA1) / first
        self._c = (1 - BETA2) / second / c1**2
        self._d = EPSILON / c1 if exact else 0.0
        inside = 0.0 if exact else EPSILON / c1**2
        self._a = {name: _flat(m, device).mul_(BETA1 / (1 - BETA1)) for name, m in moments.exp_avg.items()}
        self._b = {
            name: _flat(v, device).mul_(BETA2 / second / c1**2).add_(inside) for name, v in moments.exp_avg_sq.items()
        }

    def terms(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float, float]:
        """Return the named parameters' a and b, and c and d."""
        a, b = (
            terms[names[0]] if len(names) == 1 else torch.cat([terms[name] for name in names])
            for terms in (self._a, self._b)
        )
        return a, b, self._c, self._d

    def __call__(self, names: Sequence[str], gradients: Tensor) -> Tensor:
        """Return the steps at these gradients, which are overwritten."""
        a, b, c, d = self.terms(names)
        roots = torch.addcmul(b, gradients, gradients, value=c).sqrt_()
        if d:
            roots.add_(d)
        return gradients.add_(a).div_(roots)


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
