"""Tokenizers, base models and adapters, loaded so that nothing of theirs is run and nothing of theirs is changed.

Weights are read from safetensors only and no code of a model's author is executed (`trust_remote_code` is off). The
embeddings are never resized: a resized matrix would be trained, and its gradients would belong to the features.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Precision = Literal["float32", "bfloat16", "float16"]
Quantisation = Literal["int8", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of LoRA that subtract the adapter from the base weights."""

# base weights that an adapter came with (trained biases, saved embeddings), as they were before it
_overwritten: WeakKeyDictionary[PreTrainedModel, dict[str, torch.Tensor]] = WeakKeyDictionary()


class ModelError(ValueError):
    """A model or adapter that cannot be loaded; the message says why and what to do."""


def use_cpu_threads(threads: int | None = None) -> int:
    """Let torch use `threads` threads, by default one per core that this process may run on; return their number.

    Several workers on one machine must share its cores: give each cores // workers, or they stand in each other's way.
    """
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model` (hub id or folder); where it has no padding token, the end of sequence pads.

    Raises ModelError where it cannot be loaded or has neither token.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer of {model!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {model!r} has neither a padding token nor an end of sequence; set one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    model: str,
    *,
    revision: str | None = None,
    precision: Precision = "float32",
    quantisation: Quantisation | None = None,
    device: torch.device | str = "cpu",
    attention: Attention | None = None,
) -> PreTrainedModel:
    """Load the causal language model `model` (hub id or folder), frozen and in eval mode.

    `attention` None leaves the choice to transformers: SDPA where the architecture has it, else eager. Raises
    ModelError where the weights are not safetensors, bitsandbytes is missing, or nothing can be loaded.
    """
    _refuse_pickled_weights(Path(model))
    options: dict[str, Any] = {"dtype": DTYPES[precision]}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantisation is not None:
        options |= {"quantization_config": _quantised(quantisation, precision), "device_map": {"": str(device)}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"the model {model!r} cannot be loaded: {_first_line(error)}") from error
    if quantisation is None:
        loaded.to(torch.device(device))
    frozen: PreTrainedModel = loaded.requires_grad_(False).eval()
    return frozen


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the LoRA adapter in `folder` (PEFT's layout, safetensors) on `base`, its parameters requiring gradients.

    `base` is changed in place; `unload_adapter` gives it back, so that several checkpoints share one base model.
    Raises ModelError where the folder is no LoRA adapter of a causal language model, or does not fit `base`; the base
    model may be left half adapted then and must be loaded again.
    """
    _refuse_other_adapters(folder)
    overwritten = _base_weights_in(folder, base)
    try:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, torch_device="cpu")
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"the adapter does not fit its base model: {_mismatch(error)}") from error
    for remark in remarks:
        if "missing adapter keys" in str(remark.message):
            raise ModelError(f"the adapter lacks weights that its configuration promises: {remark.message}")
    _refuse_left_over_weights(model, folder)
    _overwritten[base] = overwritten
    model.eval()
    return model


def unload_adapter(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off and return the base model as it was, ready for the next adapter.

    Raises ModelError where the adapter's initialisation has changed the base model (PiSSA and its kin).
    """
    initialisation = model.active_peft_config.init_lora_weights
    if isinstance(initialisation, str) and initialisation.lower().startswith(CHANGES_BASE):
        raise ModelError(f"init_lora_weights={initialisation!r} has changed the base model: load the base model again")
    base: PreTrainedModel = model.unload()
    base.load_state_dict(_overwritten.pop(base, {}), strict=False)
    base.requires_grad_(False)
    return base


def use_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Recompute each layer's activations in the backward pass: about a third more time, far less memory.

    Raises ModelError where the architecture has no support for it.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.supports_gradient_checkpointing:
        raise ModelError(f"{type(base).__name__} does not support gradient checkpointing; ask without it")
    # transformers 5.2x renamed it and warns about the old name
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def use_exact_mode(model: torch.nn.Module) -> None:
    """Turn dropout off and keep gradient checkpointing on, which transformers ties to training mode.

    Only modules that checkpoint are left in training mode, none of their children; a dropout that such a module
    applies by itself, from a number of its own, is set to zero.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def _refuse_pickled_weights(folder: Path) -> None:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        beside = f" (only {', '.join(found[:3])}, which could run code when loaded)" if found else ""
        raise ModelError(
            f"the folder {str(folder)!r} holds no safetensors weights{beside}; "
            "save the model again with save_pretrained(..., safe_serialization=True)"
        )


def _quantised(quantisation: Quantisation, precision: Precision) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantisation={quantisation!r} needs bitsandbytes, which is not installed: "
            "install the extra gradstore-server[quantised], or ask without quantisation"
        )
    options: dict[str, Any] = {"load_in_8bit": True}
    if quantisation == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": DTYPES[precision],
        }
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]  # transformers'


def _refuse_other_adapters(folder: Path) -> None:
    config = _adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"the adapter is of type {config.get('peft_type')!r}; only LORA adapters have features here")
    if config.get("task_type") not in {None, "CAUSAL_LM"}:
        raise ModelError(f"the adapter is for the task {config['task_type']!r}; it must be CAUSAL_LM")


def _base_weights_in(folder: Path, base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the base model's own values of the base weights that the adapter's file holds with other values."""
    state = base.state_dict()
    kept = {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  # not a mapping
                name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
                if name in state and not torch.equal(weights.get_tensor(key).to(state[name]), state[name]):
                    kept[name] = state[name].clone()
    except SafetensorError as error:
        raise ModelError(f"{ADAPTER_WEIGHTS} is not a whole safetensors file: {error}") from error
    return kept


def _refuse_left_over_weights(model: PeftModel, folder: Path) -> None:
    """Refuse a file with weights that the adapted model has no place for; PEFT leaves them out without a word."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        found = set(weights.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    left_over = sorted(key for key in found - expected if "lora_" in key)
    if left_over and expected <= found:  # else PEFT has translated old names of a renamed architecture
        raise ModelError(
            f"the adapter holds {len(left_over)} weights that its base model has no place for, first {left_over[0]!r}: "
            "it was trained on another model"
        )


def _adapter_config(folder: Path) -> dict[str, Any]:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{ADAPTER_CONFIG} is missing: an adapter is a folder that PEFT's save_pretrained wrote")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        beside = "; adapter_model.bin could run code when loaded" if (folder / "adapter_model.bin").exists() else ""
        raise ModelError(f"{ADAPTER_WEIGHTS} is missing{beside}: save the adapter with safe_serialization=True")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{ADAPTER_CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{ADAPTER_CONFIG} is not a JSON object")
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _mismatch(error: Exception) -> str:
    """The first shapes that differ, where torch lists them; else the error's first line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("size mismatch")), _first_line(error))
