"""Where taps are put: the modules that use the trainable parameters, and their exchange for one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from worker.layouts import Layout
from worker.taps import LinearSite, LoraSite, ModuleSite, Recorder, Site, Take


def find_sites(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[list[Site], list[str]]:
    """Find the modules that use `parameters`, the trainable ones by full name, and the parameters none can tap."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {_owner(name, modules) for name in parameters if type(modules[_parent(name)]) is not nn.Linear}
    sites: list[Site] = [_module_site(path, modules[path], parameters) for path in _outermost(owners)]
    taken = {name for site in sites for name in site.names}
    loras = (_lora_site(path, module) for path, module in modules.items() if type(module) is Linear)
    sites += [site for site in loras if site is not None and taken.isdisjoint(site.names)]
    covered = {name for site in sites for name in site.names}
    for path, module in modules.items():
        if type(module) is nn.Linear:
            own = {name: f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.requires_grad}
            if own and covered.isdisjoint(own.values()):
                sites.append(LinearSite(module, own.get("weight"), own.get("bias")))
    named = [name for site in sites for name in site.names]
    # a parameter shared by two modules comes up under a name that named_parameters() leaves out
    shared = [name for name in named if name not in parameters]
    return sites, shared + sorted(parameters.keys() - named)


def _lora_site(path: str, module: Linear) -> LoraSite | None:
    """Return the site of an ordinary LoRA of which A and B are trained and nothing else."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for adapter in module.lora_A:
        own = [f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"]
        plain = adapter not in module.lora_variant and not module.lora_bias[adapter]
        if plain and sorted(names) == own and type(module.base_layer) in (nn.Linear, Conv1D):
            return LoraSite(module, adapter, *(f"{path}.{name}" for name in own))
    return None


def _outermost(paths: Iterable[str]) -> list[str]:
    """Leave out paths below another: a tap inside a tapped module would hide the parameter from it."""
    outer: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(f"{above}.") or not above for above in outer):
            outer.append(path)
    return outer


def _owner(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the path of the module whose forward uses the parameter: PEFT's layers keep theirs in containers."""
    path = parent = _parent(name)
    while path:
        if isinstance(modules[path], BaseTunerLayer):
            return path if parent != f"{path}.base_layer" else parent
        path = _parent(path)
    return parent


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _module_site(path: str, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> ModuleSite:
    within = f"{path}." if path else ""
    return ModuleSite(module, {name: p for name, p in parameters.items() if name.startswith(within)})


@contextmanager
def tapped(sites: Sequence[Site], layout: Layout, take: Take) -> Iterator[Recorder]:
    """Let the modules of `sites` run as tapped ones for one forward and backward pass of a batch that lies so."""
    recorder = Recorder(layout, take)
    sites = [part for site in sites for part in _in_use(site)]
    before = [vars(site.module).get("forward") for site in sites]
    try:
        for site in sites:
            vars(site.module)["forward"] = site.tap(site.module.forward, recorder)
        yield recorder
    finally:
        for site, forward in zip(sites, before, strict=True):
            if forward is None:
                vars(site.module).pop("forward", None)
            else:
                vars(site.module)["forward"] = forward  # as a hook of accelerate left it


def drop_gradients(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Name the parameters that autograd gave a gradient by another way than a tap, and drop it."""
    reached = [name for name, parameter in parameters.items() if parameter.grad is not None]
    for name in reached:
        parameters[name].grad = None
    return reached


def _in_use(site: Site) -> Sequence[Site]:
    return site.parts if isinstance(site, LoraSite) and not site.untouched() else [site]
