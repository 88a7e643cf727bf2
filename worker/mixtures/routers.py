"""What gives a token's experts their logits: one linear map, or several that a main router weighs (MoR)."""

from __future__ import annotations

import torch
from gradstore.types import RouterSettings
from torch import Tensor, nn


class SingleRouter(nn.Linear):
    """One linear map without a bias, drawn as torch draws linear layers."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__(inputs, experts, bias=False)


class RouterOfRouters(nn.Module):
    """J linear maps whose logits are added up by weights: z = Σ_j g_j R_j x with g = softmax(V x + b).

    The weights are each token's, or one mean of all tokens (`batch`), or 1/J (`fixed`), where there is no V.
    """

    def __init__(self, inputs: int, experts: int, settings: RouterSettings) -> None:
        super().__init__()
        self.settings = settings
        self.experts = experts
        self.sub = nn.Linear(inputs, settings.sub_routers * experts, bias=False)  # R_1 above R_2 and so on
        self.main = nn.Linear(inputs, settings.sub_routers) if settings.gate_scope != "fixed" else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (…, N) of tokens (…, d)."""
        logits: Tensor = self.sub(x).unflatten(-1, (self.settings.sub_routers, self.experts))
        return (self.weights(x).to(logits.dtype).unsqueeze(-1) * logits).sum(dim=-2)

    def weights(self, x: Tensor) -> Tensor:
        """What each sub-router counts (…, J): 1 in sum."""
        if self.main is None:
            return x.new_full((*x.shape[:-1], self.settings.sub_routers), 1 / self.settings.sub_routers)
        gates = softmax(self.main(x))
        if self.settings.gate_scope == "batch":
            return gates.flatten(0, -2).mean(dim=0).expand_as(gates)
        if self.settings.top_sub is not None:
            largest, chosen = gates.topk(self.settings.top_sub, dim=-1)
            return torch.zeros_like(gates).scatter(-1, chosen, largest / largest.sum(dim=-1, keepdim=True))
        return gates


def make_router(settings: RouterSettings, *, inputs: int, experts: int) -> SingleRouter | RouterOfRouters:
    """The router of a linear layer."""
    return SingleRouter(inputs, experts) if settings.kind == "single" else RouterOfRouters(inputs, experts, settings)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, computed and given in float32 or better."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The chosen experts (…, k) of logits (…, N), and the weights (…, N) of all: 0 of the others, 1 in sum."""
    largest, chosen = logits.topk(top_k, dim=-1)
    weights = softmax(largest)
    return chosen, torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, chosen, weights)
