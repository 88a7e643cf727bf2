"""What is made of a raw gradient g before it is projected: nothing, its sign, or the step that Adam would take.

One kind of features is made of no gradient: the mean hidden state, which is not projected either.

Mathematics: LESS (arXiv 2402.04333), section 2, and Adam (Kingma and Ba, arXiv 1412.6980), at moments that stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FeatureKind = Literal["adam", "sgd", "sign", "hidden"]
AdamForm = Literal["less", "exact"]

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8


@dataclass(frozen=True)
class Kind:
    """What a feature is made of: the gradient as it is or its sign, Adam's step in one of its forms, hidden states."""

    name: FeatureKind
    adam: AdamForm = "less"
    """Of no account where the name is not `adam`."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes a backward pass."""
        return self.name != "hidden"


Direction = Callable[[str, Tensor], Tensor]
"""Maps the flat gradients (examples, size) of the named parameter, float32, to directions; it may overwrite them."""


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
    if kind.name == "sgd":
        return sgd
    if kind.name == "sign":
        return sign
    if moments is None:
        raise ValueError("kind='adam' needs Adam's moments, and this checkpoint has none; ask for sgd or sign")
    return Adam(kind.adam, _fitting(moments, parameters), device)


def sgd(_name: str, gradients: Tensor) -> Tensor:
    """Leave the gradients as they are."""
    return gradients


def sign(_name: str, gradients: Tensor) -> Tensor:
    """Return −1, 0 or 1 for each number."""
    return gradients.sign_()


class Adam:
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

    def terms(self, name: str) -> tuple[Tensor, Tensor, float, float, float]:
        """Return a parameter's a and b, c₁, c₂, and what is added to the root."""
        return self._a[name], self._b[name], self._c1, self._c2, self._outside

    def __call__(self, name: str, gradients: Tensor) -> Tensor:
        """Return the steps at these gradients, which are overwritten."""
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
