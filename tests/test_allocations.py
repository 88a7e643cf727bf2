"""Mixtures' settings, their expansion over layers, and exact parameter counts from configurations alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradstore.types import MixtureSettings, RouterSettings
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from datastore.allocations import allocation, expand, shape_of
from datastore.errors import InvalidInput
from worker.mixtures.model import make_mixture

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32,
)  # fmt: skip
MISTRAL_7B = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROCKET = MixtureSettings(experts=4, top_k=2, rank=16, modules=["q_proj", "v_proj"])


def mola(scheme: str, **router: Any) -> MixtureSettings:
    return MixtureSettings(experts=scheme, top_k=2, rank=8, modules=ALL_SEVEN, router=RouterSettings(**router))


PUBLISHED = [
    pytest.param(LLAMA_2_7B, ROCKET, 34_603_008, id="ROCKET, Llama-2-7B"),
    pytest.param(MISTRAL_7B, ROCKET, 28_311_552, id="ROCKET, Mistral-7B"),
    pytest.param(LLAMA_2_7B, mola("2468"), 105_635_840, id="MoLA 2468"),
    pytest.param(LLAMA_2_7B, mola("8888"), 169_017_344, id="MoLA 8888"),
    pytest.param(LLAMA_2_7B, mola("2468", kind="mor"), 113_607_104, id="MoR 2468"),
]


def on_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("config", "settings", "published"), PUBLISHED)
def test_trainable_parameters_are_those_that_were_published(
    config: PreTrainedConfig, settings: MixtureSettings, published: int
) -> None:
    found = allocation(settings, config.to_dict()).parameters
    assert found.trainable == found.experts + found.routers == published


@pytest.mark.parametrize(("config", "settings", "published"), PUBLISHED[1:2] + PUBLISHED[4:])
def test_the_layers_that_are_made_have_as_many(
    config: PreTrainedConfig, settings: MixtureSettings, published: int
) -> None:
    model = make_mixture(on_meta(config), settings)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published
    assert all(module.lora_A["default"].weight.is_meta for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        MistralConfig(**SMALL),
        MistralConfig(**SMALL, head_dim=10),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=8, attention_bias=True),
        GemmaConfig(**SMALL, head_dim=12),
    ],
    ids=lambda config: f"{config.model_type} {config.head_dim if hasattr(config, 'head_dim') else ''}",
)
@pytest.mark.parametrize(
    "router",
    [{}, {"kind": "mor", "sub_routers": 3}, {"kind": "mor", "gate_scope": "fixed"}],
    ids=["single", "mor", "fixed"],
)
def test_arithmetic_counts_what_the_meta_device_has(config: PreTrainedConfig, router: dict[str, Any]) -> None:
    settings = MixtureSettings(
        experts="13", top_k=1, rank=[1, 2, 3, 4], modules=["k_proj", "o_proj", "down_proj"], router=router
    )
    found = allocation(settings, config.to_diff_dict(), precision="float32")  # what config.json has
    base = on_meta(config)
    assert found.parameters.base == sum(p.numel() for p in base.parameters())
    model = make_mixture(base, settings)
    own = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert found.parameters.routers == sum(size for name, size in own.items() if "lora_router" in name)
    assert found.parameters.experts == sum(size for name, size in own.items() if "lora_router" not in name)
    assert found.memory.base == 4 * found.parameters.base
    assert found.memory.total == 4 * (found.parameters.base + 4 * found.parameters.trainable)


def test_router_only_training_counts_routers_only() -> None:
    settings = ROCKET.model_copy(update={"router_only": True})
    found = allocation(settings, LLAMA_2_7B.to_dict()).parameters
    assert found.trainable == found.routers == 32 * 2 * 4 * 4096
    assert found.active == found.routers + 32 * 2 * 2 * 16 * 8192


def test_a_scheme_gives_each_block_of_layers_its_digit() -> None:
    expanded = expand(MixtureSettings(experts="2468", top_k=2, rank=8), layers=32)
    assert [layer.experts for layer in expanded] == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert [layer.experts for layer in expand(MixtureSettings(experts="2468"), layers=28)] == [
        experts for experts in (2, 4, 6, 8) for _ in range(7)
    ]


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ({"experts": "2468"}, 6, r"experts='2468' has 4 blocks, and 6 layers cannot .* give a list of 6 numbers"),
        ({"experts": [2, 3]}, 3, r"experts lists 2 numbers, and the model has 3 layers"),
        ({"rank": [2, 3]}, 3, r"rank lists 2 numbers"),
        ({"experts": [2, 1], "top_k": 2}, 2, r"layer 1 has experts=1 and top_k=2: top_k is at most"),
    ],
)
def test_lists_and_schemes_that_do_not_fit_are_refused(settings: dict[str, Any], layers: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        expand(MixtureSettings(**settings), layers=layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 2468}, "a scheme of blocks is text: '2468'"),
        ({"experts": "2048"}, "pattern"),
        ({"experts": 0}, "greater than or equal to 1"),
        ({"modules": []}, "at least 1"),
        ({"modules": ["q_proj", "q_proj"]}, "twice"),
        ({"router": {"sub_routers": 3}}, "ask for kind=mor"),
        ({"router": {"kind": "mor", "gate_scope": "batch", "top_sub": 1}}, "gate_scope=token"),
        ({"router": {"kind": "mor", "top_sub": 3}}, "at most sub_routers, which is 2"),
        ({"router_only": True, "top_k": "11"}, "set balance, or top_k to 2"),
        ({"expert": 3}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixtureSettings(**settings)


def test_a_model_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"of the type 'gpt2' are not counted here: it must be one of gemma, llama"):
        shape_of({"model_type": "gpt2"})
    with pytest.raises(InvalidInput, match="has no hidden_size"):
        shape_of({"model_type": "llama"})
    with pytest.raises(InvalidInput, match=r"called 'w_proj': it has q_proj"):
        allocation(MixtureSettings(modules=["w_proj"]), LLAMA_2_7B.to_dict())
