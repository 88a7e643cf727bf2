"""Packed batches: rows one after another, without padding, where the model keeps them apart.

FlashAttention itself needs a GPU. What is tested here in its place is transformers' own way to it, from the position
ids and boundaries that a model is given to the call of the kernel, with the kernel's documented arithmetic in torch.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_flash_attention_utils

from tests.architectures import (
    ADAPTERS,
    BROKEN_TOKEN,
    EXPERTS,
    VOCABULARY,
    adapt,
    base_model,
    direction,
    reference,
    relative_error,
    rows,
    trained,
)
from tests.engines import KINDS, SGD, breakable, features, only, run, settled, whole
from worker.batches import Encoded
from worker.directions import Kind
from worker.features import LOSS_NOT_FINITE
from worker.gradients import GradientEngine
from worker.models import use_gradient_checkpointing

FLASH = "flash_attention_2"
NO_SDPA = ("gemma2", "sdpa")  # which cannot cap its scores


class Kernels:
    """FlashAttention's two functions as their documentation has them, on any device; `lengths` tells what was asked."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention inside each sequence of q (tokens, heads, dim); cu_seqlens are int32 bounds, max_seqlen numbers."""
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert type(max_seqlen_q) is int, "a tensor would make each layer wait for the device"
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        self.lengths.append(lengths)
        parts = zip(*(torch.split(tensor, lengths) for tensor in (q, k, v)), strict=True)
        return torch.cat([_attend(*part, dropout_p, softmax_scale, causal, window_size, softcap) for part in parts])

    @staticmethod
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention inside each row of q (rows, tokens, heads, dim)."""
        parts = zip(q, k, v, strict=True)
        return torch.stack([_attend(*part, dropout_p, softmax_scale, causal, window_size, softcap) for part in parts])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """Attention of one sequence: q (tokens, heads, dim), k and v with as many heads or a divisor of them."""
    assert causal
    assert dropout == 0
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made = Kernels()
    utils = modeling_flash_attention_utils
    functions = (made.flash_attn_func, made.flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    return made


def using(attention: str, name: str) -> PeftModel:
    """A copy of the trained model with this attention."""
    model = copy.deepcopy(trained(name)[0])
    model.config._attn_implementation = attention  # as from_pretrained would, after it has looked for a GPU
    return model


def made(model: PeftModel | PreTrainedModel, *kinds: Kind, **settings: Any) -> GradientEngine:
    """An engine that does not project, and packs unless told otherwise."""
    return whole(model, *kinds, **{"packing": True} | settings)


# Correctness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in ADAPTERS for attention in ("sdpa", "eager", FLASH) if (name, attention) != NO_SDPA],
)
def test_packed_features_are_those_of_each_row_alone_and_of_padded_batches(
    name: str, attention: str, kernels: Kernels
) -> None:
    _, moments, truth = trained(name)
    model = using(attention, name)
    engine = made(model, *KINDS, moments=moments, packing=None if attention == FLASH else True)
    found = features(engine, rows())
    deaf = {EXPERTS} if attention == FLASH else {EXPERTS, "opt"}  # OPT's masks are made without its position ids
    assert engine.packing == (name not in deaf)
    assert any(len(lengths) > 2 for lengths in kernels.lengths) == (attention == FLASH and engine.packing)
    padded = features(made(model, *KINDS, moments=moments, packing=False), rows())
    for kind, packed in found.items():
        wanted = truth.hidden.get(kind.name)
        if wanted is None:
            wanted = direction(truth.gradients, kind.name, kind.adam, moments)
        got, in_rows = (torch.tensor(only(some)).double() for some in (packed, padded[kind]))
        if kind.name == "sign":
            got, in_rows = (settled(signs, wanted, truth.gradients, error=1e-5) for signs in (got, in_rows))
        assert relative_error(got, wanted) < 1e-5, kind
        assert relative_error(got, in_rows) < 1e-5, kind
        np.testing.assert_allclose(packed.losses, truth.losses, rtol=1e-5)
        assert packed.reasons == [None] * len(rows())


@pytest.mark.parametrize("kind", [Kind("hidden"), Kind("rds")])
def test_hidden_states_alone_are_packed_too(kind: Kind) -> None:
    engine = made(using("sdpa", "qwen3"), kind)
    assert relative_error(only(features(engine, rows())[kind]), trained("qwen3")[2].hidden[kind.name]) < 1e-5
    assert engine.packing


@pytest.mark.parametrize("name", ["mistral", "gpt2", "qwen2_moe"])
def test_what_a_row_is_packed_with_does_not_change_its_feature(name: str) -> None:
    engine = made(using("sdpa", name))
    usual = only(features(engine, rows())[SGD])
    for order in (range(7), (6, 2, 4, 0, 5, 3, 1)):
        for token_budget in (1, 40, 10_000):
            again = features(engine, [rows()[row] for row in order], token_budget=token_budget)
            assert relative_error(only(again[SGD]), usual[list(order)]) < 1e-5
    assert engine.packing


def test_the_first_token_of_a_row_is_not_learnt_from_the_row_before() -> None:
    examples = [Encoded(row.input_ids, row.input_ids) for row in rows()]
    packed, padded = (
        features(made(using("sdpa", "llama"), packing=packing), examples)[SGD] for packing in (True, False)
    )
    assert relative_error(only(packed), only(padded)) < 1e-5
    np.testing.assert_allclose(packed.losses, padded.losses, rtol=1e-6)


def test_gradient_checkpointing_changes_no_packed_feature() -> None:
    model = using("sdpa", "llama")
    use_gradient_checkpointing(model)
    engine = made(model)
    assert relative_error(only(features(engine, rows())[SGD]), trained("llama")[2].gradients) < 1e-5
    assert engine.packing


def test_weights_of_a_model_without_an_adapter_have_packed_features() -> None:
    model = base_model("llama", attention_bias=True).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "norm" in name)
    engine = made(model)
    assert relative_error(only(features(engine, rows())[SGD]), reference(model, rows()).gradients) < 1e-5
    assert engine.packing


# When -----------------------------------------------------------------------------------------------------------------


def widths(model: PeftModel) -> list[tuple[int, int]]:
    """Collect the shapes of all batches from now on."""
    shapes: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape))
    return shapes


def test_a_packed_batch_holds_no_padding_and_the_budget_counts_real_tokens() -> None:
    model = using("sdpa", "llama")
    engine = made(model)
    features(engine, rows())
    shapes = widths(model)
    features(engine, rows(), token_budget=50)
    lengths = [len(row.input_ids) for row in rows()]
    assert sum(examples * width for examples, width in shapes) == sum(lengths)
    assert all(examples == 1 and width <= 50 for examples, width in shapes)
    assert len(shapes) == 3


@pytest.mark.parametrize(("attention", "packs"), [("sdpa", False), ("eager", False), (FLASH, True)])
def test_rows_are_packed_by_default_where_attention_is_flash_attentions(
    attention: str, packs: bool, kernels: Kernels
) -> None:
    model = using(attention, "llama")
    engine = made(model, packing=None)
    shapes = widths(model)
    features(engine, rows(), token_budget=200)
    assert engine.packing == packs
    assert ((1, sum(len(row.input_ids) for row in rows())) in shapes) == packs
    assert bool(kernels.lengths) == packs


# Models that do not keep rows apart -----------------------------------------------------------------------------------


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why rows were padded that were to be packed."""
    return [vars(record)["reason"] for record in caplog.records if record.msg == "rows are padded"]


def drop_positions(base: Any) -> None:
    forward = base.forward

    @functools.wraps(forward)
    def without(*arguments: Any, position_ids: Any = None, **settings: Any) -> Any:
        del position_ids
        return forward(*arguments, **settings)

    base.forward = without


def take_no_positions(base: Any) -> None:
    forward = base.forward
    base.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)


def go_on_counting(base: Any) -> None:
    """Boundaries are kept, but the second row's learned positions go on from the first one's."""
    embeddings = base.transformer.wpe
    forward = embeddings.forward
    embeddings.forward = lambda positions: forward(torch.arange(positions.shape[1]).expand_as(positions))


@pytest.mark.parametrize(
    ("name", "deafen", "reason"),
    [
        ("llama", drop_positions, "does not take position ids for boundaries"),
        ("llama", take_no_positions, "takes no position ids"),
        ("gpt2", go_on_counting, "is not that of the row alone"),
    ],
)
@pytest.mark.parametrize("kind", [SGD, Kind("hidden"), Kind("rds")])
def test_a_model_that_does_not_keep_rows_apart_is_noticed_and_its_rows_are_padded(
    name: str, deafen: Any, reason: str, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    model = using("sdpa", name)
    deafen(model.get_base_model())
    engine = made(model, kind)
    with caplog.at_level(logging.INFO):
        found = features(engine, rows())[kind]
    truth = trained(name)[2]
    assert relative_error(only(found), truth.hidden.get(kind.name, truth.gradients)) < 1e-5
    assert not engine.packing
    assert [reason in told for told in reasons(caplog)] == [True]
    assert all(parameter.grad is None for parameter in model.parameters())


class Turned(torch.nn.Module):
    """A decoder layer behind a weight of its own, whose forward also gets the rotations of all positions."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.turn = Turn()

    def forward(self, hidden: Tensor, **settings: Any) -> Any:
        return self.layer(self.turn(hidden, rotations=settings["position_embeddings"]), **settings)


class Turn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.1, 0.9, 32))

    def forward(self, hidden: Tensor, *, rotations: tuple[Tensor, Tensor]) -> Tensor:
        return hidden + self.weight * hidden * rotations[0][..., :1]


@pytest.mark.parametrize("kind", [SGD, Kind("hidden"), Kind("rds")])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_a_model_that_looks_ahead_go_one_at_a_time(
    kind: Kind, packing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=VOCABULARY, **shape))
    model = adapt(base, target_modules=["query", "value"])
    engine = whole(model, kind, packing=packing)
    with caplog.at_level(logging.INFO, "worker.gradients"):
        together = only(features(engine, rows(), token_budget=10_000)[kind])
    assert [vars(record)["reason"] for record in caplog.records if record.msg == "rows go one at a time"]
    alone = np.concatenate([only(run(whole(model, kind), [row])) for row in rows()])
    np.testing.assert_array_equal(together, alone)


def test_rows_are_padded_where_a_module_gets_more_than_a_row_can_be_cut_from(caplog: pytest.LogCaptureFixture) -> None:
    model = base_model("llama").requires_grad_(False)
    model.model.layers[0] = Turned(model.model.layers[0])
    engine = made(model)
    with caplog.at_level(logging.INFO):
        found = features(engine, rows())[SGD]
    assert relative_error(only(found), reference(model, rows()).gradients) < 1e-5
    assert reasons(caplog) == ["no tap tells the rows apart: model.layers.0.turn.weight"]
    assert not engine.packing
    assert engine.one_at_a_time == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_one_row_reaching_the_next_is_noticed_and_rounding_is_not(dtype: torch.dtype) -> None:
    for deafen, packs in ((None, True), (drop_positions, False)):
        model = copy.deepcopy(trained("qwen2", dtype)[0])
        if deafen is not None:
            deafen(model.get_base_model())
        engine = made(model)
        features(engine, rows())
        assert engine.packing == packs


def test_of_a_large_model_the_first_weights_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.packing.COMPARED", 1)
    for deafen, packs in ((None, True), (go_on_counting, False)):
        model = using("sdpa", "gpt2")
        if deafen is not None:
            deafen(model.get_base_model())
        engine = made(model)
        features(engine, rows())
        assert engine.packing == packs


def test_a_model_is_tested_once_and_only_where_rows_share_a_batch() -> None:
    model = using("sdpa", "llama")
    engine, shapes = made(model), widths(model)
    features(engine, rows(), token_budget=1)
    assert len(shapes) == len(rows())
    features(engine, rows(), token_budget=200)
    assert len(shapes) == len(rows()) + 3 + 1, "three passes of the test, and all rows in one"
    features(engine, rows(), token_budget=200)
    assert len(shapes) == len(rows()) + 3 + 2


@pytest.mark.parametrize("kinds", [[SGD], [Kind("hidden")]])
@pytest.mark.parametrize("attention", ["sdpa", FLASH])
def test_a_row_that_is_not_finite_spoils_none_that_it_is_packed_with(
    kinds: list[Kind], attention: str, kernels: Kernels
) -> None:
    model = adapt(base_model("llama"))
    model.config._attn_implementation = attention
    broken = {1, 4}
    examples = breakable(rows(), broken)
    engine = made(model, *kinds)
    healthy = features(engine, examples, token_budget=10_000)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = float("nan")
    found = features(engine, examples, token_budget=10_000)
    assert engine.packing
    for kind in kinds:
        others = [n for n in range(len(examples)) if n not in broken]
        assert [found[kind].reasons[n] for n in sorted(broken)] == [LOSS_NOT_FINITE] * 2
        assert [found[kind].reasons[n] for n in others] == [None] * 5
        assert relative_error(only(found[kind])[others], only(healthy[kind])[others]) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_flash_attention_gives_nearly_the_features_of_padded_rows() -> None:
    pytest.importorskip("flash_attn", reason="needs the package flash-attn")
    model = copy.deepcopy(trained("llama", torch.bfloat16)[0]).to("cuda")
    padded = features(made(model, packing=False), rows())[SGD]
    model.config._attn_implementation = FLASH
    engine = made(model, packing=None)
    packed = features(engine, rows())[SGD]
    assert engine.packing
    similarity = torch.nn.functional.cosine_similarity(torch.tensor(only(packed)), torch.tensor(only(padded)))
    assert similarity.min() > 0.98
