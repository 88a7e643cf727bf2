"""Adam's moments by parameter name: written from an optimizer at work, read back, and made from the files people have.

An HF Trainer's `optimizer.pt` numbers its parameters: the decaying weights first, then biases and norms, each in the
order of `named_parameters()`. That order is found by building the model without weights (on torch's meta device, from
its configuration alone) and putting the adapter's configuration on it; many LoRA matrices have one shape, so guessing
would go unnoticed. LESS's `optimizer.bin` has names.

`python -m worker.moments optimizer.pt moments.safetensors --adapter FOLDER --model MODEL` converts a file and answers
with one line of JSON: {"step": …, "parameters": …} or {"problem": …}. The API runs it in a process of its own
(datastore/checkpoints.py); pickles are read with `weights_only=True` only, which builds tensors and containers and
refuses everything else.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from datastore import hub
from datastore.checkpoints import ADAPTER_WEIGHTS, file_key, parameter_name, trainable
from datastore.errors import GradstoreError, InvalidCheckpoint, first_line
from datastore.tensors import read_header
from worker.directions import Moments

MOMENTS = ("exp_avg", "exp_avg_sq")
NOT_DECAYING = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names that the HF Trainer puts in its second group, without weight decay."""

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")

Shapes = Mapping[str, tuple[int, ...]]


def write(path: Path, moments: Moments) -> None:
    """Write moments as float32 safetensors; the same moments give the same bytes."""
    tensors = {f"exp_avg.{name}": value for name, value in moments.exp_avg.items()}
    tensors |= {f"exp_avg_sq.{name}": value for name, value in moments.exp_avg_sq.items()}
    ready = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
    # one entry only: safetensors writes several in any order
    save_file(ready, path, metadata={"step": str(moments.step)})


def read(path: Path, *, names: Collection[str] | None = None) -> Moments:
    """Read what `write` wrote, of the parameters named or of all. Raises InvalidCheckpoint."""
    found: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    try:
        with safe_open(path, framework="pt") as file:
            step = int((file.metadata() or {})["step"])
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                moment, _, name = key.partition(".")
                if names is None or name in names:
                    found[moment][name] = file.get_tensor(key)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InvalidCheckpoint(f"the moments cannot be read ({type(error).__name__}: {error})") from error
    return Moments(found["exp_avg"], found["exp_avg_sq"], step)


def of_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> Moments:
    """The moments of an Adam at work, by the names of the model's trainable parameters.

    A parameter that has never had a gradient has moments of zero.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in named.items()}
    found = {
        moment: {name: states[name].get(moment, torch.zeros_like(named[name])) for name in named} for moment in MOMENTS
    }
    step = max((int(state["step"]) for state in states.values() if "step" in state), default=0)
    return Moments(found["exp_avg"], found["exp_avg_sq"], step)


# From files -----------------------------------------------------------------------------------------------------------


def of_file(optimizer: Path, *, adapter: Path, model: str, revision: str | None = None) -> Moments:
    """The moments in `optimizer.pt` or `optimizer.bin`, by name, in the shapes of the adapter's tensors.

    Raises InvalidCheckpoint saying what does not fit.
    """
    content = _load(optimizer)
    states = content.get("state")
    if not isinstance(states, dict) or not states:
        raise InvalidCheckpoint("it holds no state of an optimizer (a dictionary with `state` and `param_groups`)")
    if all(isinstance(key, str) for key in states):
        named = {_canonical(key): state for key, state in states.items()}
    else:
        named = _by_position(states, content.get("param_groups"), adapter=adapter, model=model, revision=revision)
    return _checked(named, _adapter_shapes(adapter))


def _load(optimizer: Path) -> dict[str, Any]:
    """Read a pickle that may hold tensors and containers only; anything else in it is refused, and never run."""
    try:
        mapped = zipfile.is_zipfile(optimizer)  # files from before torch 1.6 cannot be
        content = torch.load(optimizer, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InvalidCheckpoint(
            f"it holds more than tensors and was not opened further ({_refused(error)}); "
            "save the optimizer's state_dict() alone"
        ) from error
    except (RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, OSError, struct.error) as error:
        raise InvalidCheckpoint(f"it cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"it holds a {type(content).__name__} instead of an optimizer's state_dict()")
    return cast("dict[str, Any]", content)


def _by_position(
    states: Mapping[Any, Any], groups: Any, *, adapter: Path, model: str, revision: str | None
) -> dict[str, Any]:
    """Name the states that a torch optimizer has numbered."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise InvalidCheckpoint("its states are numbered, and it has no `param_groups` to say which numbers there are")
    numbers = [list(group["params"]) for group in groups]
    parameters = _model_parameters(adapter, model, revision)
    order = _order(parameters, [len(group) for group in numbers])
    positions = [number for group in numbers for number in group]
    missing = [name for name, number in zip(order, positions, strict=True) if number not in states]
    if missing:
        raise InvalidCheckpoint(
            f"{len(missing)} of its {len(positions)} parameters have no moments, the first one {missing[0]!r}: "
            "they have never been trained"
        )
    return {name: states[number] for name, number in zip(order, positions, strict=True)}


def _order(parameters: Sequence[tuple[str, bool]], sizes: Sequence[int]) -> list[str]:
    """Names in the order of the numbers: `parameters` are (name, decays), `sizes` those of the optimizer's groups."""
    decaying = [name for name, decays in parameters if decays]
    others = [name for name, decays in parameters if not decays]
    if [len(decaying), len(others)] == list(sizes):
        return decaying + others
    if [len(parameters)] == [size for size in sizes if size]:
        return [name for name, _ in parameters]
    raise InvalidCheckpoint(
        f"it has {sum(sizes):,} parameters in groups of {list(sizes)}, and the model with this adapter has "
        f"{len(parameters):,}: {len(decaying):,} that decay and {len(others):,} that do not"
    )


def _model_parameters(adapter: Path, model: str, revision: str | None) -> list[tuple[str, bool]]:
    """The trainable parameters of the model with this adapter in their order, and whether they decay; no weights."""
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            lora = LoraConfig.from_pretrained(str(adapter))
            lora.inference_mode = False
            skeleton = get_peft_model(base, lora)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise InvalidCheckpoint(
            f"its parameters are numbered, and the model {model!r} that would name them cannot be built: "
            f"{first_line(hub.explained(error, model, revision) or error)}"
        ) from error
    decaying = set(get_parameter_names(skeleton, [nn.LayerNorm], NOT_DECAYING))  # type: ignore[no-untyped-call]  # likewise
    return [(name, name in decaying) for name, parameter in skeleton.named_parameters() if parameter.requires_grad]


def _adapter_shapes(adapter: Path) -> Shapes:
    """Shapes of the adapter's trained tensors, by their names in its file."""
    header = read_header(adapter / ADAPTER_WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    return {key: header.tensors[key].shape for key in trainable(header, config)}


def _checked(states: Mapping[str, Any], shapes: Shapes) -> Moments:
    """The moments of every tensor of the adapter and of nothing else."""
    found = {file_key(name): name for name in states}
    missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or extra:
        parts = [
            f"{len(keys):,} {text}, the first one {keys[0]!r}"
            for keys, text in ((missing, "tensors of the adapter are not in it"), (extra, "of its own are not there"))
            if keys
        ]
        raise InvalidCheckpoint(
            f"its {len(states):,} parameters are not the adapter's {len(shapes):,}: {'; '.join(parts)}"
        )
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for key, name in sorted(found.items()):
        for moment in MOMENTS:
            moments[moment][name] = _moment(states[name], moment, name, shapes[key])
    return Moments(moments["exp_avg"], moments["exp_avg_sq"], max(_step(state) for state in states.values()))


def _moment(state: Any, moment: str, name: str, shape: tuple[int, ...]) -> Tensor:
    value = state.get(moment) if isinstance(state, dict) else None
    if not isinstance(value, Tensor):
        kept = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise InvalidCheckpoint(f"{name!r} has no {moment}, so this is no Adam of torch (its state: {kept})")
    if tuple(value.shape) != shape:
        raise InvalidCheckpoint(
            f"the {moment} of {name!r} has the shape {list(value.shape)}, the adapter {list(shape)}"
        )
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise InvalidCheckpoint(f"the {moment} of {name!r} holds something else than finite numbers")
    if moment == "exp_avg_sq" and bool((value < 0).any()):
        raise InvalidCheckpoint(f"the exp_avg_sq of {name!r} holds negative numbers: it is no mean of squares")
    return value


def _step(state: Mapping[str, Any]) -> int:
    step = state.get("step")
    if not isinstance(step, (int, float, Tensor)):
        raise InvalidCheckpoint("it does not say how many steps were taken (`step`)")
    return int(step)


def _canonical(name: str) -> str:
    """The name of a parameter as `PeftModel.named_parameters()` has it, whatever trained it had put around it."""
    parts = name
    for wrapper in _WRAPPERS:
        parts = parts.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return parameter_name(file_key(parts)) if ".lora_" in parts else parts


def _refused(error: Exception) -> str:
    """What torch met: it writes a page, and names the thing in one of its lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert an optimizer's file; the answer is one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m worker.moments", description="Adam's moments by parameter name.")
    parser.add_argument("optimizer", type=Path, help="optimizer.pt of an HF Trainer, or optimizer.bin of LESS")
    parser.add_argument("target", type=Path, help="moments.safetensors to write")
    parser.add_argument("--adapter", type=Path, required=True, help="folder with the PEFT adapter")
    parser.add_argument("--model", required=True, help="base model: hub id or folder")
    parser.add_argument("--revision", default=None, help="revision of the base model on the hub")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # nobody reads them: the answer says what matters
    try:
        moments = of_file(options.optimizer, adapter=options.adapter, model=options.model, revision=options.revision)
        write(options.target, moments)
        answer: dict[str, Any] = {"step": moments.step, "parameters": sum(v.numel() for v in moments.exp_avg.values())}
    except GradstoreError as error:
        answer = {"problem": str(error)}
    print(json.dumps(answer))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
