"""The gradient engine against float64 autograd of one example alone: unusual adapters, what must not matter, the edges.

Every kind, projection, precision and architecture together is tests/test_engine_matrix.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from datastore.weights import chosen
from tests.architectures import (
    BROKEN_TOKEN,
    EXPERTS,
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
from worker.batches import IGNORED, Encoded
from worker.directions import AdamForm, FeatureKind, Kind, Moments
from worker.features import GRADIENT_NOT_FINITE, GRADIENT_ZERO, LOSS_NOT_FINITE, NOTHING_SUPERVISED, Features
from worker.gradients import GradientEngine
from worker.models import Quantisation, load_model, use_gradient_checkpointing
from worker.packing import same_gradient


def single(
    model: PeftModel | PreTrainedModel, *, kind: FeatureKind, adam: AdamForm = "less", **settings: Any
) -> GradientEngine:
    """An engine of one kind."""
    return GradientEngine(model, kinds=[Kind(kind, adam)], **settings)


def whole(model: PeftModel | PreTrainedModel, *, kind: FeatureKind = "sgd", **settings: Any) -> GradientEngine:
    """An engine of one kind that does not project."""
    count = sum(parameter.numel() for parameter in trainable(model).values())
    return single(model, kind=kind, projection="none", dims=[count], **settings)


def only(features: Features) -> NDArray[np.float32]:
    (array,) = features.by_dim.values()
    return array


def run(engine: GradientEngine, examples: Sequence[Encoded], *, token_budget: int = 80) -> Features:
    """The features of an engine of one kind."""
    (features,) = engine.features(examples, pad_id=PAD, token_budget=token_budget).values()
    return features


# Correctness ----------------------------------------------------------------------------------------------------------


def test_eager_attention_gives_the_same_features() -> None:
    model = adapt(base_model("llama", attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    assert relative_error(only(run(whole(model), rows())), reference(model, rows()).gradients) < 1e-5


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
    engine = whole(model, kind=kind, moments=moments)
    truth = direction(reference(model, rows()).gradients, kind, "less", moments)
    assert relative_error(only(run(engine, rows())), truth) < 1e-5
    assert engine.one_at_a_time


@pytest.mark.parametrize("name", ["llama", EXPERTS])
def test_the_sum_of_the_losses_has_the_gradient_of_the_mean_times_the_tokens(name: str) -> None:
    model, moments, truth = trained(name)
    features = run(whole(model, reduction="sum"), rows())
    assert relative_error(only(features), truth.gradients * torch.tensor(features.tokens)[:, None]) < 1e-5
    np.testing.assert_allclose(features.losses, truth.losses, rtol=1e-5)
    mapped = direction(truth.gradients * torch.tensor(features.tokens)[:, None], "adam", "exact", moments)
    features = run(whole(model, kind="adam", adam="exact", moments=moments, reduction="sum"), rows())
    assert relative_error(only(features), mapped) < 1e-5


def test_all_kinds_of_one_pass_are_those_of_a_pass_each() -> None:
    model, moments, _ = trained("llama")
    kinds = [Kind("adam", "less"), Kind("sgd"), Kind("sign"), Kind("adam", "exact")]
    together = GradientEngine(model, kinds=kinds, moments=moments, dims=[64, 512])
    found = together.features(rows(), pad_id=PAD, token_budget=80)
    assert list(found) == kinds
    for kind in kinds:
        alone = run(GradientEngine(model, kinds=[kind], moments=moments, dims=[64, 512]), rows())
        for dim in (64, 512):
            np.testing.assert_array_equal(found[kind].by_dim[dim], alone.by_dim[dim])
        np.testing.assert_array_equal(found[kind].norms, alone.norms)


@pytest.mark.parametrize("adapter", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_mean_hidden_states_come_from_the_same_pass(adapter: dict[str, Any]) -> None:
    model = adapt(base_model("llama"), **adapter)
    engine = GradientEngine(model, kinds=[Kind("hidden"), Kind("sgd")], dims=[64])
    found = engine.features([*rows(), Encoded((5, 6), (IGNORED, IGNORED))], pad_id=PAD, token_budget=80)
    assert list(found) == [Kind("hidden"), Kind("sgd")]
    features = found[Kind("hidden")]
    base = model.get_base_model().model
    alone = torch.stack([base(torch.tensor([row.input_ids])).last_hidden_state[0].mean(0) for row in rows()]).detach()
    np.testing.assert_allclose(only(features)[:-1], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.norms[:-1], alone.norm(dim=1), rtol=1e-5)
    np.testing.assert_array_equal(features.raw_norms, features.norms)
    np.testing.assert_array_equal(features.losses, found[Kind("sgd")].losses)
    assert not only(features)[-1].any()
    assert features.reasons == [*[None] * len(rows()), NOTHING_SUPERVISED]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_alone_are_those_beside_gradients_without_a_backward_pass(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, moments, _ = trained("llama")
    model = copy.deepcopy(model)
    if checkpointing:
        use_gradient_checkpointing(model)
    both = GradientEngine(model, kinds=[Kind("adam"), Kind("hidden")], moments=moments, dims=[64])
    beside = both.features(rows(), pad_id=PAD, token_budget=80)[Kind("hidden")]
    engine = GradientEngine(model, kinds=[Kind("hidden")], dims=[])
    monkeypatch.setattr(torch.autograd, "backward", None)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    alone = run(engine, rows())
    for name in ("norms", "raw_norms", "losses", "tokens", "reasons"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(beside, name))
    np.testing.assert_array_equal(only(alone), only(beside))


def test_hidden_states_that_are_not_finite_are_named() -> None:
    base = base_model("llama")
    silent = Encoded((7, 8, 9), (IGNORED, 8, 9))
    with torch.no_grad():
        base.model.embed_tokens.weight[7] = float("inf")
    features = run(GradientEngine(adapt(base), kinds=[Kind("hidden")], dims=[]), [Encoded((5, 6), (5, 6)), silent])
    assert features.reasons == [None, LOSS_NOT_FINITE]
    assert not only(features)[1].any()


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
        engine = whole(model, kind=kind, moments=moments)
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
    engine = GradientEngine(model, kinds=[Kind("sgd"), Kind("adam")], moments=moments, dims=[256])
    monkeypatch.setattr("worker.taps.GRADIENT_ELEMENTS", 64 * 512)
    examples = rows([9] * 7)
    with Sizes() as sizes:
        features = engine.features(examples, pad_id=PAD, token_budget=10_000)
    assert features[Kind("sgd")].reasons == [None] * 7
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
    features = run(whole(model, kind="adam", moments=moments), rows())
    monkeypatch.setattr("worker.taps.GRADIENT_ELEMENTS", 1)
    in_slices = run(whole(model, kind="adam", moments=moments), rows())
    assert relative_error(only(in_slices), only(features)) < 1e-6
    unused = [name for name in moments.exp_avg if "layers.1.self_attn.o_proj" in name]
    start = list(moments.exp_avg).index(unused[0])
    first = sum(moment.numel() for moment in list(moments.exp_avg.values())[:start])
    assert truth.gradients[:, first].abs().max() == 0
    assert np.abs(only(features)[:, first]).min() > 0
    assert relative_error(only(features), direction(truth.gradients, "adam", "less", moments)) < 1e-5


# What must not matter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_batch_size_and_order_do_not_change_a_feature(architecture: str, kind: FeatureKind) -> None:
    model, moments, _ = trained(architecture)
    engine = single(model, kind=kind, moments=moments, dims=[512])
    examples = rows()
    usual = run(engine, examples)
    for order in (range(len(examples)), (6, 2, 4, 0, 5, 3, 1)):
        for token_budget in (1, 40, 10_000):
            again = run(engine, [examples[row] for row in order], token_budget=token_budget)
            assert relative_error(only(again), only(usual)[list(order)]) < 1e-5
            assert np.allclose(again.norms, usual.norms[list(order)], rtol=1e-5)


def test_the_same_plan_twice_gives_the_same_bytes() -> None:
    model, moments, _ = trained("llama")
    first, second = (
        run(single(copy.deepcopy(model), kind="adam", moments=moments, dims=[512, 64]), rows()) for _ in range(2)
    )
    for dim in (512, 64):
        assert first.by_dim[dim].tobytes() == second.by_dim[dim].tobytes()
    assert first.norms.tobytes() == second.norms.tobytes()
    assert first.losses.tobytes() == second.losses.tobytes()


def test_layers_taken_in_small_slices_of_the_batch_give_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moments, _ = trained("llama")
    engine = single(model, kind="adam", moments=moments, dims=[128])
    usual = run(engine, rows())
    monkeypatch.setattr("worker.taps.GRADIENT_ELEMENTS", 1)
    monkeypatch.setattr("worker.losses.LOGIT_ELEMENTS", {"cpu": 1, "cuda": 1})
    in_slices = run(engine, rows())
    assert relative_error(only(in_slices), only(usual)) < 1e-6
    np.testing.assert_allclose(in_slices.norms, usual.norms, rtol=1e-6)
    np.testing.assert_allclose(in_slices.raw_norms, usual.raw_norms, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(architecture: str) -> None:
    model, moments, _ = trained(architecture)
    usual = run(single(model, kind="adam", moments=moments, dims=[256]), rows(), token_budget=10_000)
    model = copy.deepcopy(model)
    use_gradient_checkpointing(model)
    engine = single(model, kind="adam", moments=moments, dims=[256])
    calls = []
    (layer, *_) = [
        module for name, module in model.named_modules() if name.endswith(("mlp.c_fc", "mlp.up_proj", "fc1"))
    ]
    run(engine, rows(), token_budget=10_000)  # the first batch also tests the order of flattened tokens (OPT's)
    layer.register_forward_hook(lambda *_: calls.append(1))
    again = run(engine, rows(), token_budget=10_000)
    assert len(calls) == 2, "once forward and once more on the way back"
    assert relative_error(only(again), only(usual)) < 1e-6


def test_the_model_is_left_as_it_was() -> None:
    model = adapt(base_model("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]

    def fail(_done: int) -> None:
        raise InterruptedError

    engine = whole(model)
    hooked = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    hooked.forward = own = lambda inputs: type(hooked).forward(hooked, inputs)  # as accelerate's hooks do
    run(engine, rows())
    with pytest.raises(InterruptedError):
        engine.features(rows(), pad_id=PAD, token_budget=80, on_batch=fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert [module for module in model.modules() if "forward" in vars(module)] == [hooked]
    assert hooked.forward is own
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_a_gradient_left_from_training_is_not_taken_for_a_part_of_a_feature() -> None:
    model = adapt(base_model("llama"))
    loss_of(model, rows()[0]).backward()  # type: ignore[no-untyped-call]  # torch's
    engine = whole(model)
    assert relative_error(only(run(engine, rows())), reference(model, rows()).gradients) < 1e-5
    assert engine.one_at_a_time == []


# Fidelity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["blocks", "sjlt", "fft", "rademacher"])
def test_projected_inner_products_match_the_unprojected_ones_within_the_bound(projection: Any) -> None:
    """For unit x and y all maps have E⟨φx, φy⟩ = ⟨x, y⟩ and Var ≤ (1 + ⟨x, y⟩²)/k ≤ 2/k.

    By Chebyshev a pair misses by √(2/(kδ)) with a probability of at most δ; with δ = 1 % / 28 pairs, no pair does so
    with a probability of 99 %. And over pairs and ten seeds the error's root mean square is within 1.1 times that of
    the variance.
    """
    k, seeds = 2048, range(10)
    model = adapt(base_model("llama"))
    moments = train(model.eval())
    gradients = reference(model, rows()).gradients
    unit = torch.nn.functional.normalize(direction(gradients, "adam", "less", moments), dim=1)
    pairs = torch.triu_indices(len(unit), len(unit))
    cosines = (unit @ unit.T)[pairs[0], pairs[1]]
    errors = []
    for seed in seeds:
        engine = single(model, kind="adam", moments=moments, projection=projection, dims=[k], seed=seed)
        features = run(engine, rows())
        image = torch.as_tensor(only(features) / features.norms[:, None]).double()
        errors.append((image @ image.T)[pairs[0], pairs[1]] - cosines)
    stacked = torch.stack(errors)
    assert len(cosines) == 28
    assert stacked[0].abs().max() <= (2 / (k * 0.01 / 28)) ** 0.5
    assert stacked.square().mean() <= 1.1**2 * ((1 + cosines.square()) / k).mean()
    assert stacked.abs().max() > 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_features_of_single_precision(precision: torch.dtype) -> None:
    """float16 has 6e-8 as its smallest number: without a scaled loss a long row's gradients would vanish in it."""
    examples = rows([60, 9, 64])
    base = base_model("llama")
    base.lm_head.weight.data *= 3e-5  # small gradients
    model = adapt(base)
    wanted = torch.as_tensor(only(run(whole(model), examples)))
    base.to(precision)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()  # as PEFT keeps adapters
    got = run(whole(model), examples)
    assert got.reasons == [None] * 3
    similarity = torch.nn.functional.cosine_similarity(torch.as_tensor(only(got)), wanted)
    assert similarity.min() > 0.99


# Rows without a feature -----------------------------------------------------------------------------------------------


def beginning_with(token: int, row: Encoded) -> Encoded:
    return Encoded((token, *row.input_ids[1:]), row.labels)


@pytest.mark.parametrize(
    ("value", "reason"), [(float("nan"), LOSS_NOT_FINITE), (float("inf"), LOSS_NOT_FINITE), (0.0, GRADIENT_NOT_FINITE)]
)
@pytest.mark.parametrize("kind", ["sgd", "adam", "sign"])
def test_a_row_that_is_not_finite_is_named_and_touches_no_other(kind: FeatureKind, value: float, reason: str) -> None:
    """A first token of zeros stays zero through all layers, and each norm without an ε to speak of divides by it:
    nothing in the forward pass, and 10¹⁹ each on the way back.
    """
    model = adapt(base_model("llama", rms_norm_eps=1e-38))
    moments = train(model.eval())
    engine = single(model, kind=kind, moments=moments, dims=[256])
    examples = [beginning_with(BROKEN_TOKEN, row) if n in {1, 4} else row for n, row in enumerate(rows())]
    healthy = run(engine, examples, token_budget=10_000)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = value
    features = run(engine, examples, token_budget=10_000)
    others = [0, 2, 3, 5, 6]
    assert [features.reasons[n] for n in (1, 4)] == [reason] * 2
    assert [features.reasons[n] for n in others] == [None] * 5
    assert only(features)[others].tobytes() == only(healthy)[others].tobytes()
    assert not only(features)[[1, 4]].any()
    assert np.isfinite(features.losses).all()
    assert not features.norms[[1, 4]].any()
    assert not features.raw_norms[[1, 4]].any()
    assert features.raw_norms[others].all()


@pytest.mark.parametrize("kind", ["sgd", "adam", "sign"])
def test_a_zero_gradient_is_named_even_where_adam_would_step(kind: FeatureKind) -> None:
    """LoRA on q and k gives a row of two tokens none: its only prediction is made where attention has no choice."""
    model = adapt(base_model("llama", attn_implementation="eager"), target_modules=["q_proj", "k_proj"])
    moments = train(model.eval())
    features = run(whole(model, kind=kind, moments=moments), rows(), token_budget=10_000)
    lengths = [len(row.input_ids) for row in rows()]
    assert [reason for reason, length in zip(features.reasons, lengths, strict=True) if length == 2] == [GRADIENT_ZERO]
    assert [reason for reason, length in zip(features.reasons, lengths, strict=True) if length > 2] == [None] * 6
    assert not only(features)[lengths.index(2)].any()
    assert features.losses[lengths.index(2)] > 0


def test_a_row_with_nothing_supervised_is_named_and_touches_no_other() -> None:
    model, _, truth = trained("llama")
    examples = rows()
    silent = Encoded(examples[1].input_ids, (IGNORED,) * len(examples[1].labels))
    first_only = Encoded((5, 6), (5, IGNORED))  # nothing predicts the first token
    features = run(whole(model), [silent, *examples, first_only, Encoded((5,), (5,))])
    assert features.reasons == [NOTHING_SUPERVISED, *[None] * len(examples), NOTHING_SUPERVISED, NOTHING_SUPERVISED]
    assert features.tokens[[0, -2, -1]].tolist() == [0, 0, 0]
    assert relative_error(only(features)[1:-2], truth.gradients) < 1e-5


def test_no_rows_give_no_features() -> None:
    model, _, _ = trained("llama")
    features = run(single(model, kind="sgd", dims=[16]), [])
    assert features.by_dim[16].shape == (0, 16)
    assert features.reasons == []


# The edges ------------------------------------------------------------------------------------------------------------


def test_on_batch_hears_how_many_rows_are_done() -> None:
    model, _, _ = trained("llama")
    heard: list[int] = []
    examples = [*rows(), Encoded((5,), (5,))]
    single(model, kind="sgd", dims=[16]).features(examples, pad_id=PAD, token_budget=40, on_batch=heard.append)
    assert heard == sorted(set(heard))
    assert heard[-1] == len(examples)
    assert len(heard) > 2


def broken_moments() -> dict[str, tuple[Moments | None, str]]:
    _, moments, _ = trained("llama")
    name = next(iter(moments.exp_avg))
    m, v = dict(moments.exp_avg), dict(moments.exp_avg_sq)
    without = {key: value for key, value in m.items() if key != name}
    return {
        "none": (None, "needs Adam's moments"),
        "missing": (Moments(without, v, 1), rf"exp_avg\) lack the trainable parameter '{name}'"),
        "extra": (Moments(m, v | {"other": v[name]}, 1), r"exp_avg_sq\) name what is no trainable parameter: 'other'"),
        "shape": (Moments(m | {name: m[name].T}, v, 1), "the moments belong to another adapter"),
        "nan": (Moments(m | {name: m[name] * float("nan")}, v, 1), "not finite"),
        "negative": (Moments(m, v | {name: v[name] - 1}, 1), "negative"),
        "step": (Moments(m, v, -1), "step is -1"),
    }


@pytest.mark.parametrize("fault", ["none", "missing", "extra", "shape", "nan", "negative", "step"])
def test_moments_that_do_not_fit_are_refused(fault: str) -> None:
    model, _, _ = trained("llama")
    moments, message = broken_moments()[fault]
    with pytest.raises(ValueError, match=message):
        single(model, kind="adam", moments=moments, dims=[16])


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = adapt(base_model("llama"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        single(model, kind="sgd", dims=[16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_gpu_gives_the_same_features(kind: FeatureKind) -> None:
    model, moments, _ = trained("llama")
    wanted = run(single(model, kind=kind, moments=moments, dims=[512]), rows())
    on_gpu = copy.deepcopy(model).to("cuda")
    got = run(single(on_gpu, kind=kind, moments=moments, dims=[512]), rows())
    assert relative_error(only(got), only(wanted)) < 1e-5
