"""Tokenizers, base models and adapters, loaded so that nothing of theirs is run and nothing of theirs is changed.

Weights are read from safetensors only and no code of a model's author is executed (`trust_remote_code` is off). The
embeddings are never resized: a resized matrix would be trained, and its gradients would belong to the features.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, get_peft_model
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


@dataclass(frozen=True)
class _Before:
    """A base model as it was before an adapter was put on it."""

    weights: dict[str, torch.Tensor]
    """Those of its weights that the adapter changes."""
    children: dict[str, dict[str, torch.nn.Module | None]]
    """The modules of each of its modules, by path; the model itself is none of them, and can be let go of."""
    layers: int | None
    """What its configuration says."""

    @classmethod
    def of(cls, base: PreTrainedModel, folder: Path, config: LoraConfig) -> _Before:
        """Remember the model before the adapter in `folder` is put on it."""
        children = {path: dict(module._modules) for path, module in base.named_modules()}
        return cls(_weights_at_risk(base, folder, config), children, getattr(base.config, "num_hidden_layers", None))

    def restore(self, base: PreTrainedModel) -> None:
        """Make the model what it was: PEFT leaves replicated layers, and what it had put on when it failed."""
        for path, children in self.children.items():  # from the top down
            modules = base.get_submodule(path)._modules
            modules.clear()
            modules.update(children)
        if self.layers is not None:
            base.config.num_hidden_layers = self.layers
        vars(base).pop("peft_config", None)
        base.load_state_dict(self.weights, strict=False)
        base.requires_grad_(False)


_before: WeakKeyDictionary[PreTrainedModel, _Before] = WeakKeyDictionary()


class ModelError(ValueError):
    """A model or adapter that cannot be loaded; the message says why and what to do."""


_LOADING = Lock()
ONLY_PICKLED = (
    "it has no safetensors weights, and pickled ones could run code: name a revision that has them, or a folder that "
    "save_pretrained(..., safe_serialization=True) wrote"
)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say of what `transformers` raises while it loads something that this cannot be loaded: ModelError.

    One model is loaded at a time. While it loads, transformers takes `tie_weights` from all its classes and puts back
    what it found: of two threads at once the second finds nothing, and no weights would be tied in this process again.
    """
    try:
        with _LOADING:
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        pickled = "use_safetensors=True" in str(error)  # which transformers advises to leave away
        raise ModelError(f"{what} cannot be loaded: {ONLY_PICKLED if pickled else _first_line(error)}") from error


def use_cpu_threads(threads: int | None = None) -> int:
    """Let torch use `threads` threads, by default one per core that this process may run on; return their number.

    Several workers on one machine must share its cores: give each cores // workers, or they stand in each other's way.
    """
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model` (hub id or folder); where it has no padding token, the end of sequence pads.

    Raises ModelError where it cannot be loaded, has neither token, or does not say where its tokens stand in a text.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer of {model!r} cannot be loaded: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the {type(tokenizer).__name__} of {model!r} does not tell where its tokens stand in the text: a fast "
            "tokenizer is needed, one with a tokenizer.json"
        )
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
    spread: bool = False,
) -> PreTrainedModel:
    """Load the causal language model `model` (hub id or folder), frozen and in eval mode.

    `attention` None leaves the choice to transformers: SDPA where the architecture has it, else eager. `spread` lays
    the layers over all GPUs that are seen, and over the CPU where there is none. Raises ModelError where the weights
    are not safetensors, bitsandbytes is missing, or nothing can be loaded.
    """
    refuse_pickled_weights(Path(model))
    if attention == "flash_attention_2":
        _refuse_flash_attention(precision, torch.device(device))
    options: dict[str, Any] = {"dtype": DTYPES[precision]}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantisation is not None:
        options |= {"quantization_config": _quantised(quantisation, precision), "device_map": {"": str(device)}}
    if spread:
        options["device_map"] = "auto"
    with loading(f"the model {model!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, trust_remote_code=False, use_safetensors=True, **options
        )
    if "device_map" not in options:
        loaded.to(torch.device(device))
    frozen: PreTrainedModel = loaded.requires_grad_(False).eval()
    return frozen


def load_adapter(
    base: PreTrainedModel, folder: Path, *, config: LoraConfig | None = None, name: str = "default"
) -> PeftModel:
    """Put the LoRA adapter in `folder` (PEFT's layout, safetensors) on `base`, its parameters requiring gradients.

    `base` is changed in place; `unload_adapter` gives it back, so that several checkpoints share one base model. A
    `config` is what the adapter is made by instead of what the folder says, and `name` what PEFT calls it. Raises
    ModelError where the folder is no LoRA adapter of a causal language model, or does not fit `base`, which is then as
    it was.
    """
    own = lora_config(folder)
    config = own if config is None else config
    before = _Before.of(base, folder, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters in them is refused below
        try:
            model = get_peft_model(base, config, adapter_name=name)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            before.restore(base)
            raise ModelError(f"the adapter does not fit its base model: {_first_line(error)}") from error
        _before[base] = before
        try:
            _fill_adapter(model, folder, name=name)
        except BaseException:
            unload_adapter(model)
            raise
    # peft lets gradients go down to the embeddings where checkpointing is on: work for nothing here
    base.disable_input_require_grads()  # type: ignore[no-untyped-call]  # transformers'
    model.eval()
    return model


def load_adapters(base: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel:
    """Put the plain LoRA adapters in these folders on `base`, under these names; none of them requires gradients.

    `base` is changed in place, as by `load_adapter`, and given back by `unload_adapter`. Raises ModelError as there,
    and for an adapter that changes the base weights, which all others would see.
    """
    configs = {name: _plain(name, folder) for name, folder in folders.items()}
    (first, folder), *others = folders.items()
    with _about(first):
        model = load_adapter(base, folder, config=configs[first], name=first)
    try:
        for name, folder in others:
            with _about(name):
                model.add_adapter(name, configs[name])
                _fill_adapter(model, folder, name=name)
    except BaseException:
        unload_adapter(model)
        raise
    frozen: PeftModel = model.requires_grad_(False).eval()
    return frozen


@contextmanager
def several_adapters(base: PreTrainedModel, folders: Mapping[str, Path]) -> Iterator[PeftModel]:
    """The model with adapters on it, as by `load_adapters`, for batches whose rows have different ones (PEFT's
    `adapter_names`); `base` is as it was afterwards.
    """
    model = load_adapters(base, folders)
    try:
        yield model
    finally:
        unload_adapter(model)


def _plain(name: str, folder: Path) -> LoraConfig:
    with _about(name):
        config = lora_config(folder)
        if str(config.init_lora_weights).lower().startswith(CHANGES_BASE):
            raise ModelError(
                f"it began with a part of the base weights ({config.init_lora_weights}), which is taken off them: "
                "convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
            )
        return config


@contextmanager
def _about(adapter: str) -> Iterator[None]:
    """Say of what goes wrong which adapter it is."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapter}: {_mismatch(error)}") from error


def unload_adapter(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off and return the base model as it was, ready for the next adapter."""
    base: PreTrainedModel = model.unload()
    _before.pop(base).restore(base)
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
    base.disable_input_require_grads()  # which only reentrant checkpoints need


def use_exact_mode(model: PreTrainedModel | PeftModel) -> None:
    """Turn dropout off and keep gradient checkpointing on, which transformers ties to training mode.

    Only modules that checkpoint are left in training mode, none of their children; a dropout that such a module
    applies by itself, from a number of its own, is set to zero. FlashAttention's backward pass adds in a fixed order
    from now on, in the whole process and unless the environment says otherwise: it gives other bits each time if not.
    """
    model.eval()
    if uses_flash_attention(model):
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def uses_flash_attention(model: PreTrainedModel | PeftModel) -> bool:
    """Whether attention is one of FlashAttention's kernels, whatever its version and whoever built it."""
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


def takes(model: PreTrainedModel | PeftModel, argument: str) -> bool:
    """Whether the architecture's forward takes an argument of this name, or hands on whatever it gets."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = inspect.signature(base.forward).parameters
    return argument in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def most_tokens(model: PreTrainedModel | PeftModel) -> int | None:
    """Tokens that a row may have where the model looks positions up in a table; None where it computes them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (
        module.num_embeddings
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and re.search(r"position|wpe", path.rpartition(".")[2])
    )
    return most if most and any(size >= most for size in tables) else None


def vocabulary(model: PreTrainedModel | PeftModel) -> int | None:
    """How many tokens the model has embeddings of; None where they are in no table."""
    modules = model.get_input_embeddings().modules()  # what an adapter puts around the table, too
    return next((module.num_embeddings for module in modules if isinstance(module, torch.nn.Embedding)), None)


def refuse_pickled_weights(folder: Path) -> None:
    """Raise ModelError for a folder without safetensors weights."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        beside = f" (only {', '.join(found[:3])}, which could run code when loaded)" if found else ""
        raise ModelError(
            f"the folder {str(folder)!r} holds no safetensors weights{beside}; "
            "save the model again with save_pretrained(..., safe_serialization=True)"
        )


def _refuse_flash_attention(precision: Precision, device: torch.device) -> None:
    reasons = (
        (precision == "float32", "computes in 16 bits: ask for precision='bfloat16' or 'float16'"),
        (device.type != "cuda", f"runs on a GPU, and this worker has the device {str(device)!r}"),
        (importlib.util.find_spec("flash_attn") is None, "needs the package flash-attn, which is not installed"),
    )
    for refused, reason in reasons:
        if refused:
            raise ModelError(f"attention='flash_attention_2' {reason}; attention='sdpa' works everywhere")


def _quantised(quantisation: Quantisation, precision: Precision) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantisation={quantisation!r} needs bitsandbytes, which is not installed: "
            "install the extra gradstore-server[quantised], or ask without quantisation"
        )
    # columns above a threshold would be picked over the whole batch: a feature would depend on its batch (by 4 %)
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if quantisation == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": DTYPES[precision],
        }
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]  # transformers'


def lora_config(folder: Path) -> LoraConfig:
    """What the folder of a LoRA adapter says of it. Raises ModelError where it is none, or cannot be used here."""
    settings = _adapter_config(folder)
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"the adapter is of type {settings.get('peft_type')!r}; only LORA adapters have features here")
    if settings.get("task_type") not in {None, "CAUSAL_LM"}:
        raise ModelError(f"the adapter is for the task {settings['task_type']!r}; it must be CAUSAL_LM")
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{ADAPTER_CONFIG} is no configuration of a LoRA: {_first_line(error)}") from error
    if str(config.init_lora_weights).startswith("pissa_niter"):
        raise ModelError(
            f"the adapter began with a random decomposition of the base weights ({config.init_lora_weights}), which is "
            "taken off them and cannot be made again: convert it to a plain LoRA (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    config.inference_mode = False
    return config


def _weights_at_risk(base: PreTrainedModel, folder: Path, config: LoraConfig) -> dict[str, torch.Tensor]:
    """Copy the weights of the base model that the adapter would change.

    Those are the ones its file holds with other values (trained biases, saved embeddings), or all of them where its
    initialisation takes the adapter's first values, or what KaSA takes for noise, off the base weights, or where its
    file calls layers by other names than the base model: a second base model in memory.
    """
    state = base.state_dict()
    initialisation = str(config.init_lora_weights).lower()
    if initialisation.startswith(CHANGES_BASE) or config.kasa_config or config.layer_replication:
        return {name: value.clone() for name, value in state.items()}
    kept = {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  # it is no mapping
                name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
                if name in state and not torch.equal(weights.get_tensor(key).to(state[name]), state[name]):
                    kept[name] = state[name].clone()
    except SafetensorError as error:
        raise ModelError(f"{ADAPTER_WEIGHTS} is not a whole safetensors file: {error}") from error
    return kept


def _fill_adapter(model: PeftModel, folder: Path, *, name: str) -> None:
    """Read the adapter's weights into their places; raises ModelError where weights and places differ."""
    renamed = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {})
    try:
        result = model.load_adapter(str(folder), name, is_trainable=True, torch_device="cpu", key_mapping=renamed)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"the adapter does not fit its base model: {_mismatch(error)}") from error
    for keys, fault in (
        (result.missing_keys, "lacks weights that its configuration promises"),
        (result.unexpected_keys, "holds weights that its base model has no place for"),
    ):
        if keys:
            raise ModelError(f"the adapter {fault}: {keys[0]!r} and {len(keys) - 1} more")


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
    # as datastore.errors.first_line, which the engine would bring the whole datastore for
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _mismatch(error: Exception) -> str:
    """The first shapes that differ, where torch lists them; else the error's first line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("size mismatch")), _first_line(error))
