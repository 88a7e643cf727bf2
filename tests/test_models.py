"""Models and adapters are loaded whole or refused with a reason; none runs code, and a base model stays itself."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import KasaConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from worker.models import (
    ModelError,
    load_adapter,
    load_model,
    load_tokenizer,
    unload_adapter,
    use_cpu_threads,
    use_exact_mode,
    use_gradient_checkpointing,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), attention_bias=True)


@pytest.fixture
def base(model_folder: Path) -> PreTrainedModel:
    return load_model(str(model_folder))


def save_adapter(folder: Path, *, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write an adapter of random weights as PEFT does; `model` overrides the shape of its base."""
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 2} | settings
    shape = {"attention_bias": True} | (model or {})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about transformers' old names
        torch.manual_seed(seed)
        adapted = get_peft_model(tiny_model(tiny_tokenizer(), **shape), LoraConfig(**settings))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        assert isinstance(adapted, PeftModel)
        adapted.save_pretrained(str(folder))
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
    save_file(weights, path)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.tensor([[5, 9, 30, 12]]), use_cache=False).logits
    return result


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_pads_with_its_end_of_sequence(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "</s>"
    assert len(loaded) == len(tokenizer), "no token is added"
    assert load_tokenizer(str(save_tiny_model(tmp_path / "other"))).pad_token == "<pad>"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither a padding token nor an end of sequence"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ByT5Tokenizer of .* a fast tokenizer is needed"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


# Base models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_is_loaded_frozen_in_eval_mode_and_in_its_precision(
    model_folder: Path, precision: Any, dtype: torch.dtype
) -> None:
    model = load_model(str(model_folder), precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_attention_can_be_chosen(model_folder: Path) -> None:
    assert load_model(str(model_folder)).config._attn_implementation == "sdpa"
    assert load_model(str(model_folder), attention="eager").config._attn_implementation == "eager"


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no safetensors weights \(only pytorch_model.bin, which could run code"):
        load_model(str(tmp_path))


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["config", "weights"])
def test_a_damaged_model_is_refused_with_a_reason(tmp_path: Path, damage: str) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / {"config": "config.json", "weights": "model.safetensors"}[damage]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_quantisation_without_bitsandbytes_says_what_to_install(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for quantisation in ("int8", "nf4"):
        with pytest.raises(ModelError, match=r"gradstore-server\[quantised\]"):
            load_model(str(model_folder), quantisation=quantisation)


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["plain", "dora", "modules_to_save", "embeddings"],
)
def test_an_adapter_comes_back_trainable_and_with_its_own_numbers(
    tmp_path: Path, base: PreTrainedModel, settings: dict[str, Any]
) -> None:
    saved = load_file(save_adapter(tmp_path, **settings) / "adapter_model.safetensors")
    plain = logits(base)
    model = load_adapter(base, tmp_path)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = {tuple(value.flatten().tolist()) for value in saved.values()}
    assert trainable
    assert all(tuple(parameter.flatten().tolist()) in held for parameter in trainable.values())
    assert not any(module.training for module in model.modules())
    assert not torch.allclose(logits(model), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"kasa_config": KasaConfig()},
        {"layer_replication": [[0, 2], [1, 2]], "bias": "all"},
        {"trainable_token_indices": [5, 9]},
    ],
    ids=["plain", "trained biases", "dora", "modules_to_save", "pissa", "kasa", "replicated layers", "tokens"],
)
def test_adapters_take_turns_on_one_base_model(tmp_path: Path, base: PreTrainedModel, settings: dict[str, Any]) -> None:
    first, second = (save_adapter(tmp_path / str(seed), seed=seed, **settings) for seed in (1, 2))
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    alone = logits(load_adapter(load_model(base.name_or_path), second))
    base = unload_adapter(load_adapter(base, first))
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(load_adapter(base, second)), alone)


OTHER_CONFIGS: dict[str, dict[str, Any]] = {
    "modules of two sorts": {"target_modules": ["q_proj", "norm"]},
    "no such modules": {"target_modules": ["query_key_value"]},
    "another kind": {"peft_type": "IA3"},
    "another task": {"task_type": "SEQ_CLS"},
    "a random beginning": {"init_lora_weights": "pissa_niter_4"},
}


def broken_adapter(fault: str, folder: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if fault == "another width":
        save_adapter(folder, model={"hidden_size": 64})
        return
    if fault == "more layers":
        save_adapter(folder, model={"num_hidden_layers": 3})
        return
    if fault == "resized embeddings":
        save_adapter(folder, modules_to_save=["embed_tokens"], model={"vocab_size": 400})
        return
    save_adapter(folder)
    if fault == "a missing weight":
        change_weights(folder, **{name: None})
    elif fault in OTHER_CONFIGS:
        change_config(folder, **OTHER_CONFIGS[fault])
    elif fault == "pickled":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif fault == "torn":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    elif fault == "no configuration":
        (folder / "adapter_config.json").unlink()
    elif fault == "no JSON":
        (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("another width", r"does not fit its base model: size mismatch for .*shape"),
        ("more layers", r"no place for: .*layers\.2\."),
        ("resized embeddings", r"does not fit its base model: size mismatch"),
        ("a missing weight", r"lacks weights that its configuration promises: .*lora_A"),
        ("no such modules", r"does not fit its base model: .*query_key_value"),
        ("modules of two sorts", r"does not fit its base model: .*RMSNorm"),
        ("a random beginning", "cannot be made again: convert it"),
        ("another kind", "only LORA adapters"),
        ("another task", "it must be CAUSAL_LM"),
        ("pickled", r"adapter_model.safetensors is missing; adapter_model.bin could run code"),
        ("torn", "is not a whole safetensors file"),
        ("no configuration", r"adapter_config.json is missing"),
        ("no JSON", "is not JSON"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_base_model_alone(
    tmp_path: Path, base: PreTrainedModel, fault: str, reason: str
) -> None:
    broken_adapter(fault, tmp_path / "broken")
    plain = logits(base)
    with pytest.raises(ModelError, match=reason):
        load_adapter(base, tmp_path / "broken")
    assert torch.equal(logits(base), plain)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    good = save_adapter(tmp_path / "good")
    wanted = logits(load_adapter(load_model(base.name_or_path), good))
    assert torch.equal(logits(load_adapter(base, good)), wanted)


# Modes ----------------------------------------------------------------------------------------------------------------


def test_cpu_threads_are_the_ones_asked_for_or_all_cores_of_the_process() -> None:
    assert use_cpu_threads() == torch.get_num_threads() == len(os.sched_getaffinity(0))
    assert use_cpu_threads(1) == torch.get_num_threads() == 1


def test_exact_mode_has_flash_attention_add_in_a_fixed_order(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "set so that it is put back")
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC")
    use_exact_mode(base)
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    use_exact_mode(base)
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"


def test_exact_mode_keeps_checkpointing_and_nothing_else_of_training(base: PreTrainedModel, tmp_path: Path) -> None:
    use_gradient_checkpointing(base)
    model = load_adapter(base, save_adapter(tmp_path, lora_dropout=0.5)).train()
    use_exact_mode(model)
    training = {type(module).__name__ for module in model.modules() if module.training}
    assert training == {"LlamaModel", "LlamaDecoderLayer"}
    assert torch.equal(logits(model), logits(model))
    assert not base.get_input_embeddings()._forward_hooks, "the embeddings need no gradients"


def test_a_model_that_cannot_checkpoint_is_refused(base: PreTrainedModel) -> None:
    base.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="does not support gradient checkpointing"):
        use_gradient_checkpointing(base)


def test_a_model_is_what_transformers_loads(model_folder: Path, base: PreTrainedModel) -> None:
    assert torch.equal(logits(base), logits(AutoModelForCausalLM.from_pretrained(model_folder).eval()))


def test_models_loaded_in_several_threads_leave_weights_tied(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "model", hidden_size=16, tie_word_embeddings=True))
    tie = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: load_model(folder), range(24)))
    assert PreTrainedModel.tie_weights is tie
    for model in loaded:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
