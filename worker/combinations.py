"""Several adapters on one base model as one model: a static merge of PEFT's, or Arrow's routing (arXiv 2405.11157).

    cat     ΔW = Σ w_n s_n B_n A_n, as it is: the ranks add up        (s_n: an adapter's own scale)
    svd     the best approximation of that sum of a given rank
    linear  ΔW = (Σ √(w_n s_n) B_n) (Σ √(w_n s_n) A_n), which has the products of different adapters in it, too
    ties, dare_*, magnitude_prune   as linear, or as svd, of values most of which were dropped before
    arrow   y = W x + Σ_{n ∈ S} softmax_S(|x · v_n| / T) s_n B_n A_n x, S the k largest |x · v_n|

v_n is the top right singular vector of B_n A_n, by 15 steps of PEFT's power iteration from a random vector: of two
singular values that are nearly equal it finds something between their vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gradstore.types import Combination
from peft import ArrowConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from worker.models import ModelError, load_adapters, unload_adapter

MERGED = "merged"
ROUTER = "arrow_router"
"""What PEFT's Arrow layer takes for its own name among those of adapters."""


@dataclass(frozen=True)
class Combined:
    """Adapters, each by what errors call it and its folder, and how they become one model."""

    adapters: tuple[tuple[str, Path], ...]
    how: Combination
    weights: tuple[float, ...] = ()
    """Of a merge, one for each adapter."""
    rank: int | None = None
    """Of a merge that ends in svd."""
    density: float | None = None
    """Of a merge that drops values: the fraction that is kept."""
    top_k: int = 0
    """Of Arrow."""
    temperature: float = 1.0
    """Of Arrow."""
    seed: int = 0
    """Of what is drawn: the values that dare drops, and where Arrow's iterations begin."""

    @property
    def names(self) -> list[str]:
        """What the adapters are called, by PEFT, too."""
        return [name for name, _ in self.adapters]


def combine(base: PreTrainedModel, combined: Combined) -> PeftModel:
    """Put the combination on `base`, as `load_adapters` does. Raises ModelError where PEFT cannot combine these."""
    model = load_adapters(base, dict(combined.adapters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a density of 1, at which nothing is dropped
        try:
            if combined.how == "arrow":
                _route(model, combined)
            else:
                _merge(model, combined)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            unload_adapter(model)
            raise ModelError(f"the adapters cannot be combined by {combined.how}: {error}") from error
        except BaseException:
            unload_adapter(model)
            raise
    frozen: PeftModel = model.requires_grad_(False).eval()
    return frozen


def _merge(model: PeftModel, combined: Combined) -> None:
    lora: Any = model.base_model  # which torch declares as a module or a tensor
    for name in combined.names:
        lora.peft_config[name] = _as_merged(lora.peft_config[name], _modules(model, [name]))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(combined.seed)
        lora.add_weighted_adapter(
            combined.names,
            list(combined.weights),
            MERGED,
            combined.how,
            svd_rank=combined.rank,
            svd_full_matrices=False,  # what is kept is the same, and 11,008² numbers are not made for 16 of their rows
            density=combined.density,
        )
    lora.set_adapter(MERGED)


def _as_merged(config: LoraConfig, modules: list[str]) -> LoraConfig:
    """The configuration of an adapter as PEFT can merge it: the merged one is made after the first, and by that alone
    it would be on the first's layers only, and scaled by √rank where the first is rank-stabilised.
    """
    return replace(
        config,
        target_modules=modules,
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
        use_rslora=False,
        init_lora_weights=True,
    )


def _route(model: PeftModel, combined: Combined) -> None:
    """As PEFT's `create_arrow_model`, which loads adapters by itself and routes in every module of their last names."""
    modules = _modules(model, combined.names)
    lacking = next((each for each in combined.names if _modules(model, [each]) != modules), None)
    if lacking is not None:
        raise ModelError(f"{lacking} is not on all modules that the others are on, and Arrow chooses among all in each")
    arrow = ArrowConfig(top_k=combined.top_k, router_temperature=combined.temperature, rng_seed=combined.seed)
    arrow.task_adapter_names, arrow.gks_adapter_names = combined.names, []
    lora: Any = model.base_model
    rank = lora.peft_config[combined.names[0]].r
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow, target_modules=modules, r=rank))
    lora.set_adapter(ROUTER)


def _modules(model: PeftModel, names: Iterable[str]) -> list[str]:
    """The modules of the base model that one of these adapters is on."""
    wanted = set(names)
    found = model.get_base_model().named_modules()
    return [path for path, module in found if isinstance(module, LoraLayer) and wanted & set(module.lora_A)]
