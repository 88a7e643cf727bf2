"""Gradients of the output layer from a forward pass, against float64 autograd; what must not matter; inner products."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.architectures import (
    ARCHITECTURES,
    BROKEN_TOKEN,
    adapt,
    base_model,
    loss_of,
    relative_error,
    rows,
    trained,
)
from tests.engines import SGD, features, only, run
from worker import losses
from worker.batches import IGNORED, Encoded
from worker.directions import Kind
from worker.features import LOSS_NOT_FINITE, NOTHING_SUPERVISED
from worker.gradients import GradientEngine

OUTPUT = Kind("output")
WIDTH = 32
WHOLE = {"projection": "none", "dims": [WIDTH**2]}


def truth(model: PeftModel | PreTrainedModel, examples: Sequence[Encoded]) -> torch.Tensor:
    """The float64 gradient of a matrix before the output layer, at the identity: (n, width²), a row at a time."""
    double = copy.deepcopy(model).double().eval().requires_grad_(False)
    before = torch.eye(WIDTH, dtype=torch.float64, requires_grad=True)
    head = double.get_output_embeddings()
    head.register_forward_pre_hook(lambda _module, arguments: (arguments[0] @ before.T, *arguments[1:]))
    return torch.stack([torch.autograd.grad(loss_of(double, row), before)[0].flatten() for row in examples])


# Against float64 autograd ---------------------------------------------------------------------------------------------


def test_a_feature_is_the_output_layers_weights_times_the_float64_gradient_of_these() -> None:
    model, _, reference = trained("llama")
    double = copy.deepcopy(model).double().eval().requires_grad_(False)
    weight = double.get_output_embeddings().weight.requires_grad_()
    parts = [weight.detach().T @ torch.autograd.grad(loss_of(double, row), weight)[0] for row in rows()]
    wanted = torch.stack(parts).flatten(1)
    found = run(GradientEngine(model, kinds=[OUTPUT], **WHOLE), rows())
    assert relative_error(only(found), wanted) < 1e-5
    np.testing.assert_allclose(found.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(found.norms, wanted.norm(dim=1), rtol=1e-5)
    np.testing.assert_array_equal(found.norms, found.raw_norms)
    assert found.reasons == [None] * len(rows())


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"mixtral", "qwen2_moe"}))
def test_caps_and_scales_of_an_architecture_are_in_its_gradient(name: str) -> None:
    model = trained(name)[0]
    found = run(GradientEngine(model, kinds=[OUTPUT], **WHOLE), rows())
    assert relative_error(only(found), truth(model, rows())) < 1e-5


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_digits(precision: torch.dtype) -> None:
    model = trained("llama", precision)[0]
    found = run(GradientEngine(model, kinds=[OUTPUT], **WHOLE), rows())
    assert relative_error(only(found), truth(model, rows())) < 0.05


@pytest.mark.parametrize(
    ("kinds", "adapter"),
    [
        ([OUTPUT, SGD], {}),
        ([SGD, Kind("hidden"), OUTPUT], {}),
        ([SGD, OUTPUT], {"modules_to_save": ["lm_head"]}),
        ([OUTPUT], {"target_modules": ["lm_head"]}),
        ([SGD, OUTPUT], {"target_modules": ["lm_head"]}),
    ],
)
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_beside_gradients_and_under_an_output_layer_that_is_trained_it_is_the_same(
    kinds: list[Kind], adapter: dict[str, list[str]], one_at_a_time: bool
) -> None:
    model = adapt(base_model("llama"), lora_dropout=0.0, **adapter)
    engine = GradientEngine(model, kinds=kinds, dims=[256])
    alone = GradientEngine(model, kinds=[OUTPUT], dims=[256])
    others = [GradientEngine(model, kinds=[SGD], dims=[256])] if SGD in kinds else []
    if one_at_a_time:
        engine.one_at_a_time = ["for the test"]
    found = features(engine, rows())
    whole = only(run(GradientEngine(model, kinds=[OUTPUT], **WHOLE), rows()))
    assert relative_error(whole, truth(model, rows())) < 1e-5
    assert relative_error(only(found[OUTPUT]), only(run(alone, rows()))) < 1e-5
    for other in others:
        assert relative_error(only(found[SGD]), only(run(other, rows()))) < 1e-5


def test_the_sum_of_losses_is_their_mean_times_the_tokens() -> None:
    model = trained("llama")[0]
    mean = run(GradientEngine(model, kinds=[OUTPUT], dims=[64]), rows())
    total = run(GradientEngine(model, kinds=[OUTPUT], dims=[64], reduction="sum"), rows())
    assert relative_error(only(total), only(mean) * mean.tokens[:, None]) < 1e-5


# What must not matter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [1, 40, 80, 1000])
def test_batches_and_the_order_of_rows_do_not_matter(token_budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "OUTPUT_ELEMENTS", 2 * WIDTH**2)
    model = trained("llama")[0]
    engine = GradientEngine(model, kinds=[OUTPUT], **WHOLE)
    found = only(run(engine, rows(), token_budget=token_budget))
    turned = only(run(engine, rows()[::-1], token_budget=token_budget))
    assert relative_error(found, truth(model, rows())) < 1e-5
    assert relative_error(turned[::-1].copy(), found) < 1e-5


def test_packed_rows_are_as_padded_ones() -> None:
    model = trained("qwen3")[0]
    engine = GradientEngine(model, kinds=[OUTPUT], packing=True, **WHOLE)
    found = only(run(engine, rows()))
    assert engine.packing
    assert relative_error(found, truth(model, rows())) < 1e-5


def test_nothing_of_the_model_is_differentiated_but_its_output_layer() -> None:
    """Of a layer before it no tensor has a graph, no parameter has a gradient, and gradients are on again as before."""
    model = copy.deepcopy(trained("llama")[0])
    seen: list[bool] = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _module, _inputs, out: seen.append(out.requires_grad))
    engine = GradientEngine(model, kinds=[OUTPUT, Kind("rds")], dims=[64])
    features(engine, rows())
    seen.clear()  # the engine's own test of the model, which has a backward pass
    features(engine, rows())
    assert torch.is_grad_enabled()
    assert seen
    assert not any(seen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_nothing_to_train_has_it() -> None:
    model = base_model("llama").requires_grad_(False)
    found = run(GradientEngine(model, kinds=[OUTPUT], **WHOLE), rows())
    assert relative_error(only(found), truth(model, rows())) < 1e-5


# Projected ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["blocks", "sjlt", "fft", "rademacher"])
def test_inner_products_are_right_on_average_over_seeds(projection: str) -> None:
    """The mean over 200 seeds is within five standard errors of Σ_tt' ⟨h, h'⟩⟨δ, δ'⟩, and they vary as promised."""
    model = trained("llama")[0]
    whole = truth(model, rows())
    inner = (whole @ whole.T).numpy()
    found = []
    for seed in range(200):
        engine = GradientEngine(model, kinds=[OUTPUT], projection=projection, dims=[128], seed=seed)
        mine = only(run(engine, rows(), token_budget=1000)).astype(np.float64)
        found.append(mine @ mine.T)
    squares = np.diag(inner)
    bound = np.sqrt((np.outer(squares, squares) + inner**2) / 128)
    assert (np.abs(np.mean(found, 0) - inner) < 5 * bound / np.sqrt(200)).all()
    assert (np.std(found, 0) < 1.3 * bound).all()


# What has none --------------------------------------------------------------------------------------------------------


def test_rows_without_a_feature_say_why_and_spoil_no_other() -> None:
    base = base_model("llama")
    with torch.no_grad():
        base.model.embed_tokens.weight[BROKEN_TOKEN] = float("inf")
    examples = [*rows(), Encoded((BROKEN_TOKEN, 5, 6), (IGNORED, 5, 6)), Encoded((5, 6), (IGNORED, IGNORED))]
    model = adapt(base)
    found = run(GradientEngine(model, kinds=[OUTPUT], **WHOLE), examples)
    assert found.reasons == [*[None] * len(rows()), LOSS_NOT_FINITE, NOTHING_SUPERVISED]
    assert not only(found)[-2:].any()
    assert relative_error(only(found)[:-2], truth(model, rows())) < 1e-5


def test_log_odds_have_no_output_layer_beside_them() -> None:
    with pytest.raises(ValueError, match="without other kinds of gradients"):
        GradientEngine(trained("llama")[0], kinds=[OUTPUT, Kind("logodds")], dims=[64])
