"""The gradient engine against float64 autograd of one example alone: losses, kinds, what must not matter, the edges.

Every kind, projection, precision and architecture together is tests/test_engine_matrix.py, and whatever else may be
trained is tests/test_taps.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.architectures import (
    BROKEN_TOKEN,
    EXPERTS,
    PAD,
    VOCABULARY,
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
from tests.engines import SGD, breakable, only, run, whole
from worker.batches import IGNORED, Encoded
from worker.directions import FeatureKind, Kind
from worker.features import GRADIENT_NOT_FINITE, GRADIENT_ZERO, LOSS_NOT_FINITE, NOTHING_SUPERVISED
from worker.gradients import GradientEngine, Reduction
from worker.models import ModelError, use_gradient_checkpointing

# Correctness ----------------------------------------------------------------------------------------------------------


def test_eager_attention_gives_the_same_features() -> None:
    model = adapt(base_model("llama", attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    assert relative_error(only(run(whole(model), rows())), reference(model, rows()).gradients) < 1e-5


@pytest.mark.parametrize("name", ["llama", EXPERTS])
def test_the_sum_of_the_losses_has_the_gradient_of_the_mean_times_the_tokens(name: str) -> None:
    model, moments, truth = trained(name)
    features = run(whole(model, reduction="sum"), rows())
    assert relative_error(only(features), truth.gradients * torch.tensor(features.tokens)[:, None]) < 1e-5
    np.testing.assert_allclose(features.losses, truth.losses, rtol=1e-5)
    mapped = direction(truth.gradients * torch.tensor(features.tokens)[:, None], "adam", "exact", moments)
    features = run(whole(model, Kind("adam", "exact"), moments=moments, reduction="sum"), rows())
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


TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        ("llama", {}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("qwen3", TIED),
        ("qwen3", {"trainable_token_indices": [5, 9]}),
    ],
)
def test_mean_hidden_states_come_from_the_same_pass(architecture: str, adapter: dict[str, Any]) -> None:
    model = adapt(base_model(architecture), **adapter)
    engine = GradientEngine(model, kinds=[Kind("hidden"), Kind("rds"), Kind("sgd")], dims=[64])
    found = engine.features([*rows(), Encoded((5, 6), (IGNORED, IGNORED))], pad_id=PAD, token_budget=80)
    assert list(found) == [Kind("hidden"), Kind("rds"), Kind("sgd")]
    features = found[Kind("hidden")]
    base = model.get_base_model().model
    alone = torch.stack([base(torch.tensor([row.input_ids])).last_hidden_state[0].mean(0) for row in rows()]).detach()
    np.testing.assert_allclose(only(features)[:-1], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.norms[:-1], alone.norm(dim=1), rtol=1e-5)
    np.testing.assert_array_equal(features.raw_norms, features.norms)
    np.testing.assert_array_equal(features.losses, found[Kind("sgd")].losses)
    assert not only(features)[-1].any()
    assert features.reasons == [*[None] * len(rows()), NOTHING_SUPERVISED]


@pytest.mark.parametrize("kinds", [[Kind("rds")], [Kind("rds"), Kind("hidden")], [Kind("sgd"), Kind("rds")]])
@pytest.mark.parametrize("token_budget", [1, 40, 80, 1000])
def test_rds_is_the_position_weighted_mean_of_the_last_hidden_states_whatever_shares_a_batch(
    kinds: list[Kind], token_budget: int
) -> None:
    """Σ t·h_t / Σ t over a row's tokens, the prompt's too; `transformers` gives the states, a row at a time."""
    model = adapt(base_model("llama"))
    engine = GradientEngine(model, kinds=kinds, dims=[64])
    features = engine.features(rows(), pad_id=PAD, token_budget=token_budget)[Kind("rds")]
    wanted, means = [], []
    for row in rows():
        with torch.no_grad():
            given = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
        states = given.hidden_states[-1][0].double().numpy()
        places = np.arange(1, len(states) + 1)
        wanted.append((places[:, None] * states).sum(0) / places.sum())
        means.append(states.mean(0))
    np.testing.assert_allclose(only(features), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.norms, np.linalg.norm(wanted, axis=1), rtol=1e-5)
    assert not np.allclose(only(features), means, atol=0.01)


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


# What must not matter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_batch_size_and_order_do_not_change_a_feature(architecture: str, kind: FeatureKind) -> None:
    model, moments, _ = trained(architecture)
    engine = GradientEngine(model, kinds=[Kind(kind)], moments=moments, dims=[512])
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
        run(GradientEngine(copy.deepcopy(model), kinds=[Kind("adam")], moments=moments, dims=[512, 64]), rows())
        for _ in range(2)
    )
    for dim in (512, 64):
        assert first.by_dim[dim].tobytes() == second.by_dim[dim].tobytes()
    assert first.norms.tobytes() == second.norms.tobytes()
    assert first.losses.tobytes() == second.losses.tobytes()


def test_layers_taken_in_small_slices_of_the_batch_give_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moments, _ = trained("llama")
    engine = GradientEngine(model, kinds=[Kind("adam")], moments=moments, dims=[128])
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
    usual = run(GradientEngine(model, kinds=[Kind("adam")], moments=moments, dims=[256]), rows(), token_budget=10_000)
    model = copy.deepcopy(model)
    use_gradient_checkpointing(model)
    engine = GradientEngine(model, kinds=[Kind("adam")], moments=moments, dims=[256])
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
        engine = GradientEngine(
            model, kinds=[Kind("adam")], moments=moments, projection=projection, dims=[k], seed=seed
        )
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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_long_rows_gradient_fits_half_precision(reduction: Reduction) -> None:
    model, _, _ = trained("llama", torch.float16)
    examples = rows([1500, 40])
    tokens = [sum(label != IGNORED for label in row.labels[1:]) if reduction == "sum" else 1 for row in examples]
    found = run(whole(model, reduction=reduction), examples, token_budget=1)
    assert found.reasons == [None, None]
    truth = reference(model, examples).gradients * torch.tensor(tokens).unsqueeze(1)
    assert relative_error(only(found), truth) < 0.03


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
    engine = GradientEngine(model, kinds=[Kind(kind)], moments=moments, dims=[256])
    examples = breakable(rows(), {1, 4})
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
    features = run(whole(model, Kind(kind), moments=moments), rows(), token_budget=10_000)
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
    features = run(GradientEngine(model, kinds=[SGD], dims=[16]), [])
    assert features.by_dim[16].shape == (0, 16)
    assert features.reasons == []


# The edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_row_beyond_a_table_of_positions_is_refused_with_the_length_to_ask_for(architecture: str) -> None:
    engine = whole(trained(architecture)[0], Kind("hidden"))
    assert run(engine, rows([64])).reasons == [None]
    with pytest.raises(ModelError, match=r"a row has 65 tokens .* max_length=64"):
        run(engine, rows([4, 65]))


def test_a_row_may_be_longer_than_positions_that_are_computed() -> None:
    assert run(whole(trained("llama")[0], Kind("hidden")), rows([65])).reasons == [None]


@pytest.mark.parametrize("adapter", [{}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [5]}])
def test_a_token_that_the_model_does_not_know_is_refused(adapter: dict[str, Any]) -> None:
    engine = whole(adapt(base_model("llama"), **({"lora_dropout": 0.0} | adapter)))
    known = Encoded((5, VOCABULARY - 1), (IGNORED, VOCABULARY - 1))
    assert run(engine, [known]).reasons == [None]
    with pytest.raises(ModelError, match="the token 96 and the model has embeddings of 96"):
        run(engine, [known, Encoded((5, VOCABULARY), (IGNORED, 5))])


def test_on_batch_hears_how_many_rows_are_done() -> None:
    model, _, _ = trained("llama")
    heard: list[int] = []
    examples = [*rows(), Encoded((5,), (5,))]
    GradientEngine(model, kinds=[SGD], dims=[16]).features(examples, pad_id=PAD, token_budget=40, on_batch=heard.append)
    assert heard == sorted(set(heard))
    assert heard[-1] == len(examples)
    assert len(heard) > 2


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = adapt(base_model("llama"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        GradientEngine(model, kinds=[SGD], dims=[16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_gpu_gives_the_same_features(kind: FeatureKind) -> None:
    model, moments, _ = trained("llama")
    wanted = run(GradientEngine(model, kinds=[Kind(kind)], moments=moments, dims=[512]), rows())
    on_gpu = copy.deepcopy(model).to("cuda")
    got = run(GradientEngine(on_gpu, kinds=[Kind(kind)], moments=moments, dims=[512]), rows())
    assert relative_error(only(got), only(wanted)) < 1e-5
