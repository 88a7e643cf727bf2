"""Whatever is trained is covered exactly: unusual adapters, chosen weights, layers that are used in unusual ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from datastore.weights import chosen
from tests.architectures import (
    PAD,
    adapt,
    base_model,
    direction,
    loss_of,
    reference,
    relative_error,
    rows,
    train,
    trainable,
    trained,
)
from tests.engines import SGD, only, run, whole
from worker.directions import FeatureKind, Kind
from worker.gradients import GradientEngine
from worker.models import Quantisation, load_model
from worker.packing import same_gradient

# Adapters -------------------------------------------------------------------------------------------------------------


def special_adapters() -> dict[str, tuple[str, dict[str, Any], bool]]:
    """Name → architecture, LoRA settings, and whether all examples of a batch still go together."""
    biased = {"target_modules": ["q_proj", "v_proj"]}
    return {
        "a bias of LoRA's own": ("qwen2", biased | {"lora_bias": True}, True),
        "trained biases of the base": ("qwen2", biased | {"bias": "lora_only"}, True),
        "a trained output layer": ("llama", {"modules_to_save": ["lm_head"]}, True),
        "LoRA on the output layer": ("llama", {"target_modules": ["q_proj", "lm_head"]}, True),
        "rank-stabilised LoRA on all linear layers": (
            "llama",
            {"target_modules": "all-linear", "use_rslora": True},
            True,
        ),
        "DoRA": ("llama", {"use_dora": True}, True),
        "trained biases of a Conv1D": (
            "gpt2",
            {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
            True,
        ),
        "LoRA on the embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, True),
        "trained norms": ("llama", {"modules_to_save": ["input_layernorm"]}, True),
        "LoRA on fused experts": ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj"]}, False),
        "LoRA on flattened tokens": ("qwen2_moe", {"target_modules": ["shared_expert.up_proj"]}, True),
    }


@pytest.mark.parametrize("name", special_adapters())
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_whatever_else_an_adapter_trains_is_covered_exactly(name: str) -> None:
    architecture, settings, together = special_adapters()[name]
    model = adapt(base_model(architecture), **({"lora_dropout": 0.0} | settings))
    truth = reference(model, rows())
    engine = whole(model)
    features = run(engine, rows())
    assert relative_error(only(features), truth.gradients) < 1e-5
    assert (engine.one_at_a_time == []) == together
    assert set(engine.one_at_a_time) <= set(trainable(model))
    assert relative_error(only(run(engine, rows())), truth.gradients) < 1e-5, "the second time"
    assert all(parameter.grad is None for parameter in model.parameters())


class Twice(torch.nn.Module):
    """A decoder layer that is gone through twice."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, **settings: Any) -> Any:
        return self.layer(self.layer(hidden, **settings), **settings)


@pytest.mark.parametrize("where", ["in two places", "in one place"])
def test_a_layer_used_twice_is_covered_exactly(where: str) -> None:
    base = base_model("llama")
    base.model.layers[1] = base.model.layers[0] if where == "in two places" else Twice(base.model.layers[1])
    model = adapt(base)
    engine = whole(model)
    assert relative_error(only(run(engine, rows())), reference(model, rows()).gradients) < 1e-5
    assert engine.one_at_a_time


class Sorted(torch.nn.Module):
    """A layer for flattened tokens that goes through them in an order of its own, as a sorting router would."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: torch.Tensor) -> Any:
        order = tokens[:, 0].argsort()
        return self.layer(tokens[order])[order.argsort()]


class Routed(torch.nn.Module):
    """A layer that gets some of the flattened tokens, as an expert does."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: torch.Tensor) -> Any:
        chosen = torch.nonzero(tokens[:, 0] > 0).squeeze(1)
        return torch.zeros_like(tokens).index_add(0, chosen, self.layer(tokens[chosen]))


def test_a_layer_that_gets_some_of_the_tokens_is_covered_exactly() -> None:
    base = base_model("qwen2_moe")
    for layer in base.model.layers:
        layer.mlp.shared_expert = Routed(layer.mlp.shared_expert)
    model = adapt(base, target_modules=["v_proj", "shared_expert.layer.up_proj"], lora_dropout=0.0)
    engine = whole(model)
    assert relative_error(only(run(engine, rows())), reference(model, rows()).gradients) < 1e-5
    assert all("shared_expert" in name for name in engine.one_at_a_time)
    assert engine.one_at_a_time


def test_an_adapter_beside_one_that_is_not_trained_is_covered_exactly() -> None:
    model = adapt(base_model("llama"), lora_dropout=0.0)
    other = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"], r=2)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
    assert relative_error(only(run(whole(model), rows())), reference(model, rows()).gradients) < 1e-5


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}])
def test_what_an_adapter_has_beside_a_and_b_counts_where_it_is_not_trained(settings: dict[str, Any]) -> None:
    model = adapt(base_model("qwen2"), **({"lora_dropout": 0.0} | settings))
    for name, parameter in trainable(model).items():
        if not name.endswith(("lora_A.default.weight", "lora_B.default.weight")):
            parameter.requires_grad_(False).mul_(1.5)  # DoRA's magnitudes change nothing as they begin
    assert relative_error(only(run(whole(model), rows())), reference(model, rows()).gradients) < 1e-5


@pytest.mark.parametrize("how", ["merged", "switched off"])
def test_an_adapter_that_is_not_in_use_at_a_layer_is_not_added_to_it(how: str) -> None:
    model = adapt(base_model("llama"), lora_dropout=0.0)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    if how == "merged":
        layer.merge()
    else:
        layer.enable_adapters(False)
        for parameters in (layer.lora_A, layer.lora_B):
            parameters.requires_grad_(True)  # which PEFT has switched off with it
    truth = reference(model, rows())
    features = run(whole(model), rows())
    assert relative_error(only(features), truth.gradients) < 1e-5
    np.testing.assert_allclose(features.losses, truth.losses, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # of bitsandbytes, which multiplies in float16
@pytest.mark.parametrize("quantisation", ["int8", "nf4"])
def test_on_a_quantised_base_a_feature_is_that_of_its_example_alone(tmp_path: Path, quantisation: Quantisation) -> None:
    """bitsandbytes has no double precision: the examples alone go through plain autograd of the same layers."""
    base_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    model = adapt(load_model(str(tmp_path), quantisation=quantisation), lora_dropout=0.0)
    features = run(whole(model), rows())
    for row, feature in zip(rows(), only(features), strict=True):
        alone = torch.autograd.grad(loss_of(model, row), list(trainable(model).values()))
        assert relative_error(feature[None], torch.cat([part.flatten() for part in alone])[None]) < 1e-5
    assert any("bnb" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_flattened_tokens_in_another_order_are_noticed(kind: FeatureKind) -> None:
    base = base_model("qwen2_moe")
    for layer in base.model.layers:
        layer.mlp.shared_expert = Sorted(layer.mlp.shared_expert)
    model = adapt(base, target_modules=["q_proj", "shared_expert.layer.up_proj"], lora_dropout=0.0)
    moments = train(model.eval())
    engine = whole(model, Kind(kind), moments=moments)
    truth = direction(reference(model, rows()).gradients, kind, "less", moments)
    assert relative_error(only(run(engine, rows())), truth) < 1e-5
    assert engine.one_at_a_time


# Weights of a model without an adapter --------------------------------------------------------------------------------


CHOSEN: dict[str, tuple[str, list[str], bool]] = {
    "a linear layer": ("llama", ["*.mlp.down_proj.weight"], True),
    "attention": ("llama", ["*.self_attn.*"], True),
    "norms": ("llama", ["*norm*"], True),
    "embeddings": ("llama", ["*.embed_tokens.weight"], True),
    "the output layer": ("llama", ["lm_head.weight"], True),
    "biases": ("qwen2", ["*.bias"], True),
    "weights, biases and norms": ("opt", ["*.fc1.*", "*.fc2.*", "*.self_attn_layer_norm.*"], True),
    "norms of flattened tokens": ("opt", ["*.layers.0.*"], False),
    "Conv1D": ("gpt2", ["*.c_attn.*", "*.mlp.c_proj.weight"], True),
    "embeddings that are the output layer too": ("qwen3", ["*.embed_tokens.weight", "*.q_proj.weight"], False),
    "fused experts": ("mixtral", ["*.experts.*"], False),
    "a router": ("qwen2_moe", ["*.gate.weight"], False),
    "all weights": ("llama", ["*"], True),
}
"""Architecture, patterns, and whether all examples of a batch go together."""


def choose(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Let the parameters that the patterns name require gradients, and no others; returns their names."""
    model.requires_grad_(False)
    names = chosen(patterns, dict(model.named_parameters()))
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


@pytest.mark.parametrize("what", CHOSEN)
def test_chosen_weights_of_a_model_without_an_adapter_have_their_exact_features(what: str) -> None:
    architecture, patterns, together = CHOSEN[what]
    model = base_model(architecture)
    choose(model, patterns)
    moments = train(model.eval())
    truth = reference(model, rows())
    kinds: tuple[FeatureKind, ...] = ("sgd", "adam")
    for kind in kinds:
        engine = whole(model, Kind(kind), moments=moments)
        wanted = direction(truth.gradients, kind, "less", moments)
        assert relative_error(only(run(engine, rows())), wanted) < 1e-5
        assert (engine.one_at_a_time == []) == together


@pytest.mark.parametrize("in_order", [True, False])
def test_the_order_of_flattened_tokens_is_tested_by_some_outputs_of_a_weight(
    in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base_model("qwen2_moe")
    if not in_order:
        for layer in model.model.layers:
            layer.mlp.shared_expert = Sorted(layer.mlp.shared_expert)
    choose(model, ["*.shared_expert.*"])
    compared: list[int] = []

    def spy(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], **settings: Any) -> bool:
        compared.extend(part.numel() for part in (*first, *second))
        return same_gradient(first, second, **settings)

    monkeypatch.setattr("worker.gradients.same_gradient", spy)
    monkeypatch.setattr("worker.taps.COMPARED_OUTPUTS", 3)
    engine = whole(model)
    assert relative_error(only(run(engine, rows())), reference(model, rows()).gradients) < 1e-5
    assert (engine.one_at_a_time == []) == in_order
    assert 0 < max(compared) <= 3 * 32
    assert all(parameter.grad is None for parameter in model.parameters())


class Sizes(TorchDispatchMode):
    """Hears the shape of every tensor that is made, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.made |= {each.shape for each in tree_leaves(found) if isinstance(each, torch.Tensor)}
        return found


def test_no_more_than_one_weight_of_one_example_need_exist_and_nothing_of_weights_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = base_model("llama", hidden_size=64, intermediate_size=512)
    names = choose(model, ["*.mlp.up_proj.weight", "*.mlp.down_proj.weight"])
    moments = train(model.eval())
    engine = GradientEngine(model, kinds=[SGD, Kind("adam")], moments=moments, dims=[256])
    monkeypatch.setattr("worker.taps.GRADIENT_ELEMENTS", 64 * 512)
    examples = rows([9] * 7)
    with Sizes() as sizes:
        features = engine.features(examples, pad_id=PAD, token_budget=10_000)
    assert features[SGD].reasons == [None] * 7
    assert engine.one_at_a_time == []
    assert max(shape.numel() for shape in sizes.made) == 64 * 512
    ends = {tuple(shape[-2:]) for shape in sizes.made}
    assert {(64, 512), (512, 64)} <= ends, "the gradients asked for"
    others = {tuple(p.shape) for name, p in model.named_parameters() if name not in names and p.dim() == 2}
    others -= {(64, 512), (512, 64)}
    assert len(others) >= 3
    assert ends.isdisjoint(others | {shape[::-1] for shape in others})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adam_moves_parameters_that_the_loss_does_not_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's o_proj is cut off; its Γ is β₁m / √(β₂v + ε), not 0."""
    model, moments, _ = trained("llama")
    model = copy.deepcopy(model)
    layer = model.get_base_model().model.layers[1].self_attn
    layer.o_proj.forward = layer.o_proj.base_layer.forward
    truth = reference(model, rows())
    features = run(whole(model, Kind("adam"), moments=moments), rows())
    monkeypatch.setattr("worker.taps.GRADIENT_ELEMENTS", 1)
    in_slices = run(whole(model, Kind("adam"), moments=moments), rows())
    assert relative_error(only(in_slices), only(features)) < 1e-6
    unused = [name for name in moments.exp_avg if "layers.1.self_attn.o_proj" in name]
    start = list(moments.exp_avg).index(unused[0])
    first = sum(moment.numel() for moment in list(moments.exp_avg.values())[:start])
    assert truth.gradients[:, first].abs().max() == 0
    assert np.abs(only(features)[:, first]).min() > 0
    assert relative_error(only(features), direction(truth.gradients, "adam", "less", moments)) < 1e-5
