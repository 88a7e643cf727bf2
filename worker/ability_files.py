"""A projector as a safetensors file: the network's tensors under `space.`, the standards' under `standard.`.

Its dims and config are in the file's metadata, so that the file alone is the projector.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from gradstore.types import ProjectorConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from worker.ability_space import AbilitySpace, Dims
from worker.ability_training import Projector, Standard

_SPACE, _STANDARD = "space.", "standard."


def write_projector(projector: Projector, path: Path) -> None:
    """Write a projector into a file."""
    tensors = {
        f"{_SPACE}{name}": value.detach().cpu().contiguous() for name, value in projector.space.state_dict().items()
    }
    for name in ("gradients", "routing"):
        standard: Standard | None = getattr(projector, name)
        if standard is not None:
            tensors[f"{_STANDARD}{name}.mean"] = torch.from_numpy(standard.mean)
            tensors[f"{_STANDARD}{name}.deviation"] = torch.from_numpy(standard.deviation)
    space = projector.space
    about = {"dims": asdict(space.dims), "config": space.config.model_dump(mode="json")}
    save_file(tensors, path, metadata={"projector": json.dumps(about)})


def read_projector(path: Path, *, device: torch.device | str = "cpu") -> Projector:
    """The projector that a file holds, in eval mode."""
    with safe_open(path, framework="pt", device="cpu") as file:
        about = json.loads(file.metadata()["projector"])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    with torch.device("meta"):
        space = AbilitySpace(Dims(**about["dims"]), ProjectorConfig.model_validate(about["config"]))
    weights = {name.removeprefix(_SPACE): value for name, value in tensors.items() if name.startswith(_SPACE)}
    space.load_state_dict(weights, assign=True)
    standards = {
        name: Standard(*(tensors[f"{_STANDARD}{name}.{part}"].numpy() for part in ("mean", "deviation")))
        for name in ("gradients", "routing")
        if f"{_STANDARD}{name}.mean" in tensors
    }
    return Projector(space.to(device).eval(), standards["gradients"], standards.get("routing"))
