"""A linear layer with a mixture of LoRA experts, as a layer of PEFT's LoRA.

The experts' matrices lie in those of one LoRA of the rank N·r: A_n is the n-th block of r rows of its A (N·r, d), B_n
of as many columns of its B (o, N·r). So all experts of all tokens take two products, a token's weights come between
them, and no expert is gone to by itself: for four experts of which two are chosen the larger products cost less than
sorting tokens by their experts (docs/decisions/all-experts-in-two-products.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from gradstore.types import MixtureLayer, MixtureSettings
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from datastore.mixture_files import layer_number
from worker.mixtures.balance import Record
from worker.mixtures.routers import choose, make_router

REFUSED = (
    "a mixture of experts cannot be merged, or made one LoRA: what it adds to a layer depends on the token. "
    "Save it as it is, and load it with its mixture.json"
)


class NotMergeable(NotImplementedError):
    """What PEFT can do with a LoRA and nobody with a mixture."""

    def __init__(self) -> None:
        super().__init__(REFUSED)


@dataclass(frozen=True)
class Mixture:
    """A mixture as the layers of a model see it; what PEFT calls to make such a layer."""

    settings: MixtureSettings
    layers: tuple[MixtureLayer, ...]
    alphas: tuple[float, ...]
    """Of each expert; the first N are a layer's."""

    def __call__(self, target: nn.Module, adapter: str, *, config: LoraConfig, **kwargs: Any) -> MixtureLinear:
        """Put a mixture on a linear layer."""
        return MixtureLinear(target, adapter, config=config, **kwargs)

    def layer_of(self, path: str) -> MixtureLayer:
        """The layer that the module at this dotted path belongs to: the first number of the path says which."""
        number = layer_number(path)
        if number is None:
            raise ValueError(f"{path} belongs to no layer of the model: name linear layers inside its layers only")
        return self.layers[number]


def mixture_of(config: LoraConfig) -> Mixture | None:
    """The mixture that a configuration of PEFT's is for: it keeps it for the process, and never writes it."""
    modules: Mapping[type[nn.Module], Any] = config._custom_modules or {}
    found = modules.get(nn.Linear)
    return found if isinstance(found, Mixture) else None


class MixtureLinear(Linear):
    """A frozen linear layer, and the outputs of its experts that a router has chosen for each token."""

    adapter_layer_names: tuple[str, ...] = (*Linear.adapter_layer_names, "lora_router")

    lora_router: nn.ModuleDict
    expert_scales: Tensor
    """(N,): each expert's alpha / rank."""
    mixture: Mixture
    shape: MixtureLayer
    record: Record | None
    """Where this layer writes down what its router does, while anybody wants to know."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:  # noqa: ARG002 - PEFT's interface
        """Make the experts and the router; PEFT calls this once for each layer."""
        mixture = mixture_of(config)
        if mixture is None or hasattr(self, "lora_router"):
            raise ValueError("a mixture of experts shares its layers with no other adapter: load one of them at a time")
        shape = mixture.layer_of(kwargs["target_name"])
        self.mixture, self.shape, self.record = mixture, shape, None
        router = make_router(mixture.settings.router, inputs=int(self.in_features or 0), experts=shape.experts)
        self.lora_router = nn.ModuleDict({adapter_name: router})
        scales = torch.tensor([alpha / shape.rank for alpha in mixture.alphas[: shape.experts]], dtype=torch.float64)
        device = next(self.get_base_layer().parameters()).device
        self.register_buffer("expert_scales", scales.to(device), persistent=False)
        super().update_layer(adapter_name, shape.experts * shape.rank, lora_alpha=lora_alpha, config=config, **kwargs)
        self.scaling[adapter_name] = 1.0  # of all experts together: what PEFT's `scale_layer` changes

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate; trained are experts and routers, or routers alone."""
        super().set_adapter(adapter_names, inference_mode)
        if self.mixture.settings.router_only:
            self.lora_A.requires_grad_(False)
            self.lora_B.requires_grad_(False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs (…, o) of tokens (…, d)."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("a mixture of experts is the only adapter of its layers: leave adapter_names out")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            x = self._cast_input_dtype(x, next(self.lora_A[adapter].parameters()).dtype)
            logits = self.lora_router[adapter](x)
            chosen, weights = choose(logits, self.shape.top_k)
            if self.record is not None:
                self.record.add(self, logits, chosen)
            scales = self.expert_scales.to(weights.dtype) * self.scaling[adapter]
            result = result + self.mix(adapter, self.lora_dropout[adapter](x), chosen, weights * scales)
        return result.to(dtype)

    def mix(self, adapter: str, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002 - `chosen` is for other ways
        """The experts' outputs (…, o) of tokens x (…, d), added up by `weights` (…, N): zero but for the `chosen`."""
        hidden: Tensor = self.lora_A[adapter](x)
        by_expert = hidden.view(*hidden.shape[:-1], self.shape.experts, self.shape.rank)
        added: Tensor = self.lora_B[adapter]((by_expert * weights.to(hidden.dtype).unsqueeze(-1)).flatten(-2))
        return added

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:  # noqa: ARG002 - PEFT's interface
        """Refused, where PEFT would give the base model back without a word."""
        raise NotMergeable

    def unmerge(self) -> NoReturn:
        """Refused: nothing is merged."""
        raise NotMergeable

    def get_delta_weight(self, adapter: str) -> NoReturn:  # noqa: ARG002 - PEFT's interface
        """Refused: there is no such weight."""
        raise NotMergeable

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # noqa: ARG002 - PEFT's interface
        """No."""
        return False
