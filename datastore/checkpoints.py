"""Checkpoints on disk: an adapter (or a whole model), Adam's moments by parameter name, and what is known about them.

    <root>/<id>/checkpoint.json       what it is, and the sha256 of every file
    <root>/<id>/adapter/              PEFT's layout: adapter_config.json, adapter_model.safetensors; and of a mixture of
                                      LoRA experts mixture.json, see datastore/mixture_files.py
    <root>/<id>/model/                instead of an adapter, where the model was trained in full; a base model that is
                                      registered as it is has neither
    <root>/<id>/moments.safetensors   exp_avg.<parameter>, exp_avg_sq.<parameter>; metadata: step
    <root>/unfinished/                what a killed process left behind

A checkpoint is named by the hash of all of this, so registering the same files again finds the same checkpoint.
Parameters are called as in `PeftModel.named_parameters()`: the files of an adapter leave out the adapter's name.

Nothing here imports torch, and no pickle is opened in this process: adapters and moments are safetensors, whose headers
are read by hand, and the optimizer files that people have (`optimizer.pt`, `optimizer.bin`) are converted by a process
of their own, `python -m worker.moments`. That costs some seconds of imports for each such file; in exchange the API
needs no torch in its memory, and a file made to do harm meets `weights_only=True` in a process that serves nobody.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from gradstore.types import Checkpoint, CheckpointMethod, Precision, TemplateName

from datastore import encoders, models
from datastore.catalog import utc_now
from datastore.depot import LOCAL, Depot, evict
from datastore.durable import copy_file, sweep, sync_folder, unfinished, write_file
from datastore.errors import InvalidCheckpoint, InvalidInput, NotFound
from datastore.identity import content_id, sha256_of
from datastore.mixture_files import MANIFEST, check_mixture, is_router, read_manifest
from datastore.sizes import bytes_of
from datastore.tensors import Header, check_finite, length, read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MOMENTS = "moments.safetensors"
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
TRAINER_STATE = "trainer_state.json"
DESCRIPTION = "checkpoint.json"
FORMAT_VERSION = 1
NO_MIXTURE_MOMENTS = "a mixture's are not kept: gradient features are of plain adapters and whole models"

CONVERSION_TIMEOUT = 1800.0  # seconds for reading an optimizer file, its base model's configuration included
UNFINISHED_LIFETIME = 86400.0  # seconds

_MODEL_FILES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
_SET_VALUED = ("target_modules", "modules_to_save", "exclude_modules")
_ADAPTER_NAME = re.compile(r"\.default(?=\.|$)")
_TOKENS = ".trainable_tokens_delta"
_LORA = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?=\.|$)")


@dataclass(frozen=True)
class Description:
    """What is known of a checkpoint beside its files."""

    model: str
    revision: str | None
    method: CheckpointMethod
    precision: Precision
    epoch: int | None = None
    step: int | None = None
    learning_rate: float | None = None
    """Mean over the steps of the epoch."""
    template: TemplateName | None = None
    max_length: int | None = None
    moments_note: str | None = None


class Checkpoints:
    """The checkpoints under one folder."""

    def __init__(self, root: Path, *, depot: Depot = LOCAL) -> None:
        self.root, self._depot = root, depot

    def register(
        self,
        folder: Path,
        *,
        model: str | None = None,
        revision: str | None = None,
        learning_rate: float | None = None,
        step: int | None = None,
        precision: Precision = "float32",
        name: str | None = None,
    ) -> Checkpoint:
        """Take in a copy of a folder that PEFT, the HF Trainer or LESS wrote, or a whole model's.

        What is not said is read from the folder: the base model from the adapter's configuration, step and mean
        learning rate of the last epoch from `trainer_state.json`. Raises `InvalidCheckpoint` saying what does not fit.
        """
        source = _single_folder(folder)
        model, revision = _base_model(source, model, revision)
        revision = models.revision_of(model, revision)
        last_step, last_rate = _trainer_state(source)
        description = Description(
            model=model,
            revision=revision,
            method=_method(source),
            precision=precision,
            step=last_step if step is None else step,
            learning_rate=last_rate if learning_rate is None else learning_rate,
        )
        with unfinished(self._unfinished, "register") as partial:
            if description.method == "full":
                description = _take_model(source, partial, description)
            elif description.method == "mixture":
                description = _take_mixture(source, partial, description)
            else:
                description = _take_adapter(source, partial, description)
            return self._place(partial, description, name=name)

    def register_base(
        self,
        model: str,
        *,
        revision: str | None = None,
        learning_rate: float | None = None,
        precision: Precision = "float32",
        name: str | None = None,
    ) -> Checkpoint:
        """Register a base model as it is before any training; its files stay where they are.

        Raises `InvalidInput` where there is no such model, or a sentence encoder of modules that are not done here, and
        `HubUnreachable`.
        """
        revision = models.revision_of(model, revision)
        encoders.refuse_other_modules(model, revision)
        description = Description(
            model=model,
            revision=revision,
            method="none",
            precision=precision,
            learning_rate=learning_rate,
            moments_note="a base model has none before its training",
        )
        with unfinished(self._unfinished, "register") as partial:
            return self._place(partial, description, name=name)

    def add(self, folder: Path, description: Description, *, name: str | None = None) -> Checkpoint:
        """Take in a folder that is laid out as a checkpoint is (`adapter/` or `model/`, perhaps moments).

        The files become the checkpoint's without a copy where the file system has hard links: nobody may change them.
        """
        with unfinished(self._unfinished, "add") as partial:
            if description.method in {"lora", "mixture"}:
                _write_config(_config(folder / "adapter"), partial / "adapter", description)
                for file in (ADAPTER_WEIGHTS, *([MANIFEST] if description.method == "mixture" else [])):
                    link(folder / "adapter" / file, partial / "adapter" / file)
            else:
                for path in _model_files(folder / "model"):
                    link(path, partial / "model" / path.name)
            if (folder / MOMENTS).exists():
                link(folder / MOMENTS, partial / MOMENTS)
            return self._place(partial, description, name=name)

    def weights(self, checkpoint: str) -> Path:
        """Folder of the adapter in PEFT's layout, or of the whole model; a base model has none. Raises `NotFound`."""
        home = self._home(checkpoint)
        return home / "adapter" if (home / "adapter").is_dir() else home / "model"

    def moments(self, checkpoint: str) -> Path | None:
        """File of Adam's moments, where there are any. Raises `NotFound`."""
        path = self._home(checkpoint) / MOMENTS
        return path if path.exists() else None

    def trained(self, checkpoint: str) -> dict[str, int]:
        """Sizes of the parameters that have moments, by their names in the model. Raises `NotFound`."""
        path = self.moments(checkpoint)
        tensors = {} if path is None else read_header(path).tensors
        moment = "exp_avg."
        return {name.removeprefix(moment): each.size for name, each in tensors.items() if name.startswith(moment)}

    def adapter_length(self, checkpoint: str) -> float:
        """The L2 norm of all LoRA matrices together. Raises `NotFound`, and `InvalidInput` without an adapter."""
        path = self.weights(checkpoint) / ADAPTER_WEIGHTS
        if not path.exists():
            raise InvalidInput(f"{checkpoint} has no adapter whose length a step could be measured by: say abs_scale")
        return length(path, names={key for key in read_header(path).tensors if "lora" in key})

    def exists(self, checkpoint: str) -> bool:
        """Whether a checkpoint's files are there."""
        return self._depot.exists(self.root / checkpoint)

    def look(self, checkpoint: str) -> None:
        """Raise `NotFound` where a checkpoint's files are missing."""
        if not self.exists(checkpoint):
            raise NotFound("checkpoint", checkpoint, collection="/checkpoints")

    def delete(self, checkpoint: str) -> None:
        """Remove a checkpoint's files; nothing happens where there are none."""
        self._depot.delete(self.root / checkpoint)
        evict(self.root / checkpoint)

    def sweep(self) -> int:
        """Remove what killed processes left unfinished a day ago or earlier; returns how many there were."""
        return sweep(self._unfinished, older_than=UNFINISHED_LIFETIME)

    @property
    def _unfinished(self) -> Path:
        return self.root / "unfinished"

    def _home(self, checkpoint: str) -> Path:
        home = self.root / checkpoint
        if not checkpoint.startswith("ck_") or not self._depot.ensure(home):
            raise NotFound("checkpoint", checkpoint, collection="/checkpoints")
        return home

    def _place(self, partial: Path, description: Description, *, name: str | None) -> Checkpoint:
        """Give a finished folder its name, made from all that is in it."""
        parameters = _CHECKS[description.method](partial)
        if not (partial / MOMENTS).exists() and description.moments_note is None:
            raise InvalidCheckpoint(f"{MOMENTS} is missing, and nothing says why")
        for path in sorted(partial.rglob("*.safetensors")):
            check_finite(path)
        files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
        content = {"format": FORMAT_VERSION, **asdict(description), "parameters": parameters}
        content["files"] = {name: sha256_of(path) for name, path in files.items()}
        id = content_id("ck", content)
        write_file(partial / DESCRIPTION, json.dumps({"id": id, **content}, indent=2).encode())
        for path in partial.rglob("*"):
            if path.is_dir():
                sync_folder(path)
        size = bytes_of(partial)
        while not self._depot.keep(partial, self.root / id):
            if self._depot.touch(self.root / id):  # nobody is to take it for left behind
                break
        return Checkpoint(
            id=id,
            name=name,
            run=None,
            **asdict(description),
            has_moments=MOMENTS in files,
            parameters=parameters,
            bytes=size,
            created_at=utc_now(),
        )


def base_model(folder: Path) -> str | None:
    """The base model that the folder's adapter names: check that it may be read before `register` does.

    Raises `InvalidCheckpoint` where the folder is no checkpoint.
    """
    source = _single_folder(folder)
    return _config(source).get("base_model_name_or_path") if (source / ADAPTER_CONFIG).exists() else None


def run_id(checkpoints: Sequence[str]) -> str:
    """Name of the run that has these checkpoints, in order."""
    return content_id("run", list(checkpoints))


def file_key(parameter: str) -> str:
    """The name that an adapter's file gives to a parameter of `PeftModel.named_parameters()`.

    >>> file_key("base_model.model.q_proj.lora_A.default.weight")
    'base_model.model.q_proj.lora_A.weight'
    """
    key = parameter.replace(".modules_to_save.default.", ".")
    if key.endswith(".lora_magnitude_vector.default.weight"):
        return key.removesuffix(".default.weight")
    return _ADAPTER_NAME.sub("", key) if _of_adapter(key) else key


def parameter_name(key: str) -> str:
    """The name in `PeftModel.named_parameters()` of a LoRA tensor of an adapter's file, or of trained tokens.

    >>> parameter_name("base_model.model.q_proj.lora_A.weight")
    'base_model.model.q_proj.lora_A.default.weight'
    """
    if key.endswith(".lora_magnitude_vector"):
        return f"{key}.default.weight"
    if key.endswith(_TOKENS):
        return f"{key}.default"
    return _LORA.sub(r".\1.default", key)


def trainable(header: Header, config: Mapping[str, Any]) -> set[str]:
    """Names, as the adapter's file has them, of the tensors that are trained: not the embeddings that PEFT may add."""
    saved = config.get("modules_to_save") or []
    biases = config.get("bias", "none") != "none"
    return {
        key
        for key in header.tensors
        # PEFT saves the modules whose path ends so: `norm` means every `input_layernorm`, too
        if _of_adapter(key) or (biases and key.endswith(".bias")) or any(f"{module}." in key for module in saved)
    }


def _of_adapter(key: str) -> bool:
    """Whether a tensor is not one of the base model's own."""
    return ".lora_" in key or _TOKENS in key


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy_file(source, target)


# Taking in what others wrote ------------------------------------------------------------------------------------------


def _single_folder(folder: Path) -> Path:
    """The folder itself, or the only one in it, as an archive of a folder unpacks."""
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    adapters = sorted(path for path in folder.iterdir() if (path / ADAPTER_CONFIG).is_file())
    if len(adapters) > 1:
        shown = ", ".join(path.name for path in adapters[:10])
        raise InvalidCheckpoint(f"the folder holds {len(adapters)} adapters ({shown}): register them one by one")
    if adapters:
        return adapters[0]
    entries = list(folder.iterdir())
    source = entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
    if (source / MODEL_CONFIG).is_file() and any(source.glob("*.safetensors")):
        return source
    found = ", ".join(sorted(path.name for path in source.iterdir())[:10]) or "nothing"
    raise InvalidCheckpoint(
        f"{ADAPTER_CONFIG} is missing (found: {found}); a checkpoint is the folder that PEFT's save_pretrained or the "
        f"HF Trainer wrote, with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    )


def _base_model(source: Path, model: str | None, revision: str | None) -> tuple[str, str | None]:
    config = _config(source) if (source / ADAPTER_CONFIG).exists() else {}
    if model is not None:
        return model, revision
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InvalidCheckpoint("the files do not name their base model; say which one it is with `model`")
    if Path(named).is_absolute() and not Path(named).is_dir():
        raise InvalidCheckpoint(
            f"the adapter was trained on the base model {named!r}, a folder that is not on this machine; "
            "say where it is, or its hub id, with `model`"
        )
    of_adapter = config.get("revision")
    if Path(named).is_absolute() or not isinstance(of_adapter, str):
        return named, revision
    return named, revision or of_adapter


def _config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / ADAPTER_CONFIG).read_bytes())
    except ValueError as error:
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise InvalidCheckpoint(
            f"the adapter is of type {config.get('peft_type')!r}; only LORA adapters can be registered"
        )
    if config.get("task_type") not in {None, "CAUSAL_LM"}:
        raise InvalidCheckpoint(f"the adapter is for the task {config['task_type']!r}; it must be CAUSAL_LM")
    return config


def _trainer_state(source: Path) -> tuple[int | None, float | None]:
    """Step and mean learning rate of the last epoch, from the log of an HF Trainer; None for what it does not say."""
    path = source / TRAINER_STATE
    if not path.is_file():
        return None, None
    try:
        state = json.loads(path.read_bytes())
        last = math.ceil(float(state["epoch"]) - 1e-6)
        rates = [
            float(entry["learning_rate"])
            for entry in state["log_history"]
            if "learning_rate" in entry and last - 1 < float(entry["epoch"]) - 1e-6 <= last
        ]
        step = int(state["global_step"])
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidCheckpoint(
            f"{TRAINER_STATE} is not what the HF Trainer writes ({type(error).__name__}: {error}); leave it out"
        ) from error
    return step, sum(rates) / len(rates) if rates else None


def _method(source: Path) -> CheckpointMethod:
    """What a folder holds."""
    if not (source / ADAPTER_CONFIG).exists():
        return "full"
    return "mixture" if (source / MANIFEST).exists() else "lora"


def _take_weights(source: Path, partial: Path, description: Description) -> None:
    """Copy an adapter's configuration and weights."""
    if not (source / ADAPTER_WEIGHTS).is_file():
        beside = " (adapter_model.bin could run code when loaded)" if (source / "adapter_model.bin").exists() else ""
        raise InvalidCheckpoint(
            f"{ADAPTER_WEIGHTS} is missing{beside}: convert the adapter to safetensors by loading it with PEFT and "
            "calling save_pretrained(..., safe_serialization=True)"
        )
    _write_config(_config(source), partial / "adapter", description)
    copy_file(source / ADAPTER_WEIGHTS, partial / "adapter" / ADAPTER_WEIGHTS)


def _take_mixture(source: Path, partial: Path, description: Description) -> Description:
    _take_weights(source, partial, description)
    copy_file(source / MANIFEST, partial / "adapter" / MANIFEST)
    return replace(description, moments_note=NO_MIXTURE_MOMENTS)


def _take_adapter(source: Path, partial: Path, description: Description) -> Description:
    _take_weights(source, partial, description)
    _adapter_shapes(partial / "adapter")
    if (source / MOMENTS).is_file():
        copy_file(source / MOMENTS, partial / MOMENTS)
        return description
    for name in OPTIMIZERS:
        if (source / name).is_file():
            summary = _convert(source / name, partial, description)
            step = int(summary["step"])
            return replace(description, step=step if description.step is None else description.step)
    return replace(description, moments_note=f"the files hold no optimizer state ({', '.join((*OPTIMIZERS, MOMENTS))})")


def _write_config(config: Mapping[str, Any], folder: Path, description: Description) -> None:
    """Write the adapter's configuration, the same bytes for the same adapter: PEFT writes sets in any order."""
    written = dict(config)
    for key in _SET_VALUED:
        if isinstance(written.get(key), list):
            written[key] = sorted(written[key])
    written |= {"base_model_name_or_path": description.model, "revision": description.revision, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / ADAPTER_CONFIG, json.dumps(written, indent=2, sort_keys=True).encode())


def _convert(optimizer: Path, partial: Path, description: Description) -> dict[str, Any]:
    """Have the optimizer's file read by a process of its own, which writes the moments by name."""
    command = [sys.executable, "-m", "worker.moments", str(optimizer), str(partial / MOMENTS)]
    command += ["--adapter", str(partial / "adapter"), "--model", description.model]
    command += ["--revision", description.revision] if description.revision else []
    without = f"leave {optimizer.name} out to register the adapter without moments (for sgd and sign features)"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_TIMEOUT, check=False)  # noqa: S603 - our own module, arguments as a list
    except subprocess.TimeoutExpired as error:
        raise InvalidCheckpoint(f"{optimizer.name} was not read within {error.timeout:.0f} s; {without}") from error
    if "No module named" in done.stderr and done.returncode:
        raise InvalidCheckpoint(
            f"{optimizer.name} cannot be read here, where the worker's packages are not installed: convert it on a "
            f"machine that has them (python -m worker.moments {optimizer.name} {MOMENTS} --adapter FOLDER --model "
            f"MODEL) and send {MOMENTS} instead; or {without}"
        )
    try:
        answer = cast("dict[str, Any]", json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InvalidCheckpoint(f"{optimizer.name} cannot be read ({last}); {without}") from None
    if "problem" in answer:
        raise InvalidCheckpoint(f"{optimizer.name} does not fit: {answer['problem']}; or {without}")
    return answer


def _take_model(source: Path, partial: Path, description: Description) -> Description:
    models.refuse_weights_elsewhere(source)
    for path in _model_files(source):
        copy_file(path, partial / "model" / path.name)
    return replace(description, moments_note="a whole model's are those of the service's own fine-tunes only")


def _model_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer: nothing that is loaded as a pickle."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _MODEL_FILES and path.name != TRAINER_STATE
    ]


# Checks --------------------------------------------------------------------------------------------------------------


def _check_lora(partial: Path) -> int:
    """Check adapter and moments by their headers; returns the number of trainable parameters."""
    shapes = _adapter_shapes(partial / "adapter")
    if (partial / MOMENTS).exists():
        check_moments(read_header(partial / MOMENTS), shapes)
    return sum(math.prod(shape) for shape in shapes.values())


def _check_mixture(partial: Path) -> int:
    """Hold a mixture's weights against what its manifest says; returns the number of trained parameters."""
    folder = partial / "adapter"
    manifest, header = read_manifest(folder), read_header(folder / ADAPTER_WEIGHTS)
    shapes = _shapes(header, _config(folder))
    check_mixture(manifest, header)
    router_only = manifest.settings.router_only
    return sum(math.prod(shape) for key, shape in shapes.items() if is_router(key) or not router_only)


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained tensors of a plain adapter by their names in its file."""
    header = read_header(folder / ADAPTER_WEIGHTS)
    if any(is_router(key) for key in header.tensors):
        raise InvalidCheckpoint(
            f"{ADAPTER_WEIGHTS} has routers, so it is a mixture of experts, and {MANIFEST} is missing: send the whole "
            "folder"
        )
    return _shapes(header, _config(folder))


def _shapes(header: Header, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    keys = trainable(header, config)
    if not keys:
        raise InvalidCheckpoint(f"{ADAPTER_WEIGHTS} holds no LoRA tensor; it has {_first(sorted(header.tensors))}")
    for key in keys:
        if not header.tensors[key].dtype.startswith(("F", "BF")):
            raise InvalidCheckpoint(f"{key!r} is of type {header.tensors[key].dtype}, not a floating-point number")
        other = key.replace(".lora_A.", ".lora_B.")
        if other != key:
            _check_pair(header, key, other)
    return {key: header.tensors[key].shape for key in keys}


def _check_pair(header: Header, key: str, other: str) -> None:
    if other not in header.tensors:
        raise InvalidCheckpoint(f"{ADAPTER_WEIGHTS} has {key!r} without {other!r}")
    a, b = header.tensors[key].shape, header.tensors[other].shape
    if len(a) == len(b) == 2 and a[0] != b[1]:
        raise InvalidCheckpoint(f"the rank of {key!r} is {a[0]} and that of its lora_B {b[1]}")


def check_moments(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a file of moments has both moments of every tensor of the adapter, in its shape, and the step.

    `shapes` go by the names in the adapter's file. Raises `InvalidCheckpoint`.
    """
    for moment in ("exp_avg", "exp_avg_sq"):
        found = {
            file_key(name.removeprefix(f"{moment}.")): tensor
            for name, tensor in header.tensors.items()
            if name.startswith(f"{moment}.")
        }
        missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
        if missing:
            raise InvalidCheckpoint(f"{MOMENTS} lacks the {moment} of {_first(missing)}")
        if extra:
            raise InvalidCheckpoint(f"{MOMENTS} has the {moment} of {_first(extra)}, which the adapter does not have")
        for key, shape in shapes.items():
            if found[key].shape != shape:
                raise InvalidCheckpoint(
                    f"the {moment} of {key!r} has the shape {list(found[key].shape)} and the adapter {list(shape)}"
                )
    if not header.metadata.get("step", "").isdigit():
        raise InvalidCheckpoint(f"{MOMENTS} does not say its step: its metadata need step=<optimizer steps taken>")


def _check_model(folder: Path) -> int:
    """Check a whole model by its headers; returns the number of its parameters."""
    return sum(
        tensor.size for path in sorted(folder.glob("*.safetensors")) for tensor in read_header(path).tensors.values()
    )


_CHECKS: Mapping[CheckpointMethod, Callable[[Path], int]] = {
    "lora": _check_lora,
    "mixture": _check_mixture,
    "full": lambda partial: _check_model(partial / "model"),
    "none": lambda _: 0,
}
"""By what was trained, the check of a finished folder; it returns the number of trained parameters."""


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}" if names else "nothing"
