"""Making a mixture of experts on a base model: fresh, or of LoRA adapters that exist."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gradstore.types import MixtureLayer, MixtureSettings
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from datastore.allocations import expand
from worker.mixtures.layer import Mixture, MixtureLinear, mixture_of
from worker.models import ADAPTER_WEIGHTS, CHANGES_BASE, ModelError, loading, lora_config

ADAPTER = "default"
"""What PEFT calls the mixture, the only adapter of its model."""

NOT_PLAIN = {
    "use_dora": "a DoRA",
    "use_bdlora": "a BD-LoRA",
    "use_qalora": "a QALoRA",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "a router",
    "kasa_config": "a KaSA",
    "monteclora_config": "a MonteCLoRA",
    "velora_config": "a VeLoRA",
    "alpha_pattern": "a LoRA with alphas of its own for some layers",
    "rank_pattern": "a LoRA with ranks of its own for some layers",
    "layer_replication": "a LoRA of repeated layers",
    "lora_bias": "a LoRA with biases of its own",
    "modules_to_save": "trained together with whole modules",
    "target_parameters": "for parameters that are no linear layers",
    "fan_in_fan_out": "for weights that lie transposed",
}
"""Fields of a configuration, and what an adapter is where they are set: no expert."""


@dataclass(frozen=True)
class Expert:
    """A LoRA adapter that an expert is made from."""

    folder: Path
    rank: int
    alpha: float
    """By which, over the rank, its output is multiplied."""
    weights: dict[str, Tensor]
    """As the file has them, A (r, d) and B (o, r) of each module."""


def make_mixture(
    base: PreTrainedModel, settings: MixtureSettings, *, experts: Sequence[Path] = (), seed: int = 0
) -> PeftModel:
    """Put a mixture on `base`, which is changed in place: routers drawn with `seed`, experts too (A, with B = 0), or
    copied from the LoRA adapters in the folders `experts`, each with its own alpha.

    Raises InvalidInput where the settings do not fit the model's layers, and ModelError for modules that it does not
    have and for adapters that cannot be experts.
    """
    read = [read_expert(folder) for folder in experts]
    layers = tuple(expand(settings, layers=layers_of(base)))
    if read:
        _refuse_other_shapes(read, layers)
    alphas = tuple(expert.alpha for expert in read) or (settings.alpha,) * max(layer.experts for layer in layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = put_on(base, Mixture(settings, layers, alphas))
    if read:
        try:
            _copy(model, read)
        except ModelError:
            model.unload()
            raise
    return model


def layers_of(base: PreTrainedModel) -> int:
    """How many layers a model has."""
    count: int = base.config.get_text_config().num_hidden_layers
    return count


def put_on(base: PreTrainedModel, mixture: Mixture) -> PeftModel:
    """Put a mixture of drawn weights on `base`. Raises ModelError for modules that it does not have."""
    refuse_unknown_modules(base, mixture.settings.modules)
    with loading("the mixture"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        for path, module in base.named_modules():  # before anything is changed
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in mixture.settings.modules:
                mixture.layer_of(path)
        model: PeftModel = get_peft_model(base, peft_config(mixture))
    # peft lets gradients go down to the embeddings where checkpointing is on: work for nothing here
    base.disable_input_require_grads()  # type: ignore[no-untyped-call]  # transformers'
    return model


def peft_config(mixture: Mixture) -> LoraConfig:
    """The configuration that PEFT makes a mixture by.

    Its rank is the smallest of an expert's, not the N·r of the matrices: PEFT by itself, which does not know of
    mixtures, refuses the weights for their shapes.
    """
    settings = mixture.settings
    config = LoraConfig(
        r=min(layer.rank for layer in mixture.layers),
        lora_alpha=mixture.alphas[0],  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=list(settings.modules),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: mixture})  # type: ignore[dict-item]  # it is called as a class would be
    return config


def of_model(model: PeftModel) -> Mixture:
    """The mixture on a model. Raises ModelError where there is none."""
    found = _found(model)
    if found is None:
        raise ModelError("the model has no mixture of experts on it")
    return found


def has_mixture(model: PeftModel) -> bool:
    """Whether what is on a model is a mixture."""
    return _found(model) is not None


def _found(model: PeftModel) -> Mixture | None:
    config = model.peft_config.get(ADAPTER)
    return mixture_of(config) if isinstance(config, LoraConfig) else None


def refuse_unknown_modules(base: PreTrainedModel, names: Sequence[str]) -> None:
    """Raise ModelError for a name that no linear layer has: PEFT looks for any of them, and is content with one."""
    own = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in names if name not in own]
    if missing:
        raise ModelError(f"no linear layer of this model is called {missing[0]!r}: it has {', '.join(sorted(own))}")


def read_expert(folder: Path) -> Expert:
    """Read a LoRA adapter in PEFT's layout, safetensors only. Raises ModelError where it cannot be an expert."""
    config = lora_config(folder)
    for field, what in NOT_PLAIN.items():
        if getattr(config, field, None):
            raise ModelError(f"the adapter {folder.name!r} is {what}, and experts are plain LoRAs: convert it to one")
    if str(config.init_lora_weights).lower().startswith(CHANGES_BASE):
        raise ModelError(
            f"the adapter {folder.name!r} began with a part of the base weights ({config.init_lora_weights}), which is "
            "taken off them: convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    if config.bias != "none":
        raise ModelError(f"the adapter {folder.name!r} trains biases, and experts are plain LoRAs: train it without")
    alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
    with loading(f"the adapter {folder.name!r}"):
        weights = load_file(folder / ADAPTER_WEIGHTS)
    return Expert(folder, config.r, float(alpha), weights)


def _refuse_other_shapes(experts: Sequence[Expert], layers: Sequence[MixtureLayer]) -> None:
    for number, layer in enumerate(layers):
        if layer.experts != len(experts):
            raise ModelError(
                f"layer {number} has {layer.experts} experts, and {len(experts)} adapters are given: each layer has "
                f"one for each adapter, so ask for experts={len(experts)}"
            )
        for expert in experts:
            if expert.rank != layer.rank:
                raise ModelError(
                    f"the adapter {expert.folder.name!r} is of the rank {expert.rank}, and the experts of layer "
                    f"{number} are of the rank {layer.rank}: ask for rank={expert.rank}, or choose adapters of one rank"
                )


def _copy(model: PeftModel, experts: Sequence[Expert]) -> None:
    """Fill the experts with the adapters' weights; every weight has its place, and every place its weight."""
    places = list(_places(model))
    for number, expert in enumerate(experts):
        left = set(expert.weights)
        for path, module in places:
            rank = module.shape.rank
            block = slice(number * rank, (number + 1) * rank)
            a, b = weight(module.lora_A)[block], weight(module.lora_B)[:, block]
            for name, place in ((f"{path}.lora_A.weight", a), (f"{path}.lora_B.weight", b)):
                if name not in left:
                    raise ModelError(_misfit(expert, f"it has no {name}", "leave the module out of `modules`"))
                found = expert.weights[name]
                if found.shape != place.shape:
                    shapes = f"{name} is of {tuple(found.shape)}, and its place of {tuple(place.shape)}"
                    raise ModelError(_misfit(expert, shapes, "choose adapters of this base model"))
                with torch.no_grad():
                    place.copy_(found)
                left.remove(name)
        if left:
            raise ModelError(_misfit(expert, f"nothing takes its {min(left)}", "add the module to `modules`"))


def weight(matrices: nn.ModuleDict) -> Tensor:
    """The mixture's A (N·r, d) or B (o, N·r): those of a layer's experts, one block after another."""
    return matrices[ADAPTER].get_parameter("weight")


def _places(model: PeftModel) -> Iterator[tuple[str, MixtureLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, MixtureLinear):
            yield path, module


def _misfit(expert: Expert, what: str, do: str) -> str:
    return f"the adapter {expert.folder.name!r} does not fit the mixture: {what}; {do}, or choose other adapters"
