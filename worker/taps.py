"""Taps: modules that hand out the gradient of every single example where autograd would sum over the batch.

For a linear layer y = xWᵀ the gradient of example b is Σ_t δ_bt ⊗ x_bt, δ being the gradient of y: one batched matrix
product gives those of all examples (Goodfellow, 2015, arXiv 1510.01799). That is `LinearSite`: LoRA's A and B, and any
other trainable `nn.Linear`, whatever stands around it.

What else PEFT trains is used by a module that treats the examples one by one, only not as a linear map: DoRA's
magnitudes, norms, embeddings and LoRA on them, biases of a Conv1D or of a quantised layer. `ModuleSite` runs such a
module's own forward again on the way back, an example at a time, and asks autograd. That costs one more forward and
backward pass of this module alone.

Both need the examples to be the first dimension of what comes in. Where they are not (fused experts get the tokens
they are sent), or where a layer is used twice, autograd reaches the parameter without a tap; `tapped` reports it.
Tokens that a mixture of experts has flattened to (examples · tokens, features) are taken for rows in order, and
`Recorder.flattened` has what came of it: whether they were in order is for the caller to test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from worker.batches import slices

Take = Callable[[str, Tensor, slice], None]
"""Takes in the flat gradients (examples, size) of the named parameter for a slice of the batch's examples."""

Forward = Callable[..., Any]

GRADIENT_ELEMENTS = 1 << 26  # per-example gradients of one layer at a time: 256 MiB as float32


@dataclass
class Recorder:
    """Where the taps of one batch put what they get, and what they could not attribute to examples."""

    shape: torch.Size
    """(examples, tokens) of the batch."""
    take: Take
    strays: list[str] = field(default_factory=list)
    flattened: dict[str, Tensor] = field(default_factory=dict)
    """The first example's flat gradient of each weight whose examples were told apart by the order of their tokens."""
    used: set[str] = field(default_factory=set)

    def admit(self, names: Sequence[str], *, fits: bool) -> bool:
        """Whether the gradients of these parameters are the examples' own; they are strays where not."""
        if not fits or not self.used.isdisjoint(names):
            self.strays += names
            return False
        self.used.update(names)
        return True


@dataclass(frozen=True)
class LinearSite:
    """A trainable linear layer and the full names of its trainable parameters."""

    module: nn.Linear
    weight: str | None
    bias: str | None

    @property
    def names(self) -> list[str]:
        """The full names of the parameters."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def tap(self, forward: Forward, recorder: Recorder) -> Forward:
        """Return a forward that taps; `forward` itself is the same as `nn.Linear`'s."""
        del forward

        def tapped_forward(inputs: Tensor) -> Tensor:
            weight, bias = self.module.weight, self.module.bias
            return _apply(_TappedLinear, inputs, weight, bias, self, recorder)

        return tapped_forward

    def record(self, inputs: Tensor, deltas: Tensor, recorder: Recorder) -> None:
        """Hand out the gradients, from the inputs (examples, tokens, in) and those of the outputs (…, out)."""
        flat = self.weight is not None and inputs.dim() == 2 and len(inputs) == recorder.shape.numel()
        if not recorder.admit(self.names, fits=flat or inputs.shape[:-1] == recorder.shape):
            return
        if flat:
            inputs, deltas = (tensor.reshape(*recorder.shape, -1) for tensor in (inputs, deltas))
        if self.weight is not None:
            if flat:
                recorder.flattened[self.weight] = (deltas[0].T @ inputs[0]).flatten()
            for part in slices(inputs.shape[0], inputs.shape[-1] * deltas.shape[-1], elements=GRADIENT_ELEMENTS):
                outer = torch.bmm(deltas[part].transpose(1, 2), inputs[part])
                recorder.take(self.weight, outer.flatten(1), part)
        if self.bias is not None:
            recorder.take(self.bias, deltas.sum(1), slice(0, inputs.shape[0]))


class _TappedLinear(torch.autograd.Function):
    """`nn.Linear` whose backward pass hands the per-example gradients to a recorder instead of summing them.

    The weight goes in as an argument so that the output requires a gradient where the input does not (the first layer).
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, site: LinearSite, recorder: Recorder
    ) -> Tensor:
        """Return xWᵀ + b."""
        ctx.save_for_backward(inputs, weight)  # and not on ctx: gradient checkpointing packs what is saved here
        ctx.site = site
        ctx.recorder = recorder
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Return the inputs' gradient only."""
        inputs, weight = ctx.saved_tensors
        ctx.site.record(inputs, deltas[0], ctx.recorder)
        return (deltas[0] @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


@dataclass(frozen=True)
class ModuleSite:
    """A module that treats each example by itself, and its trainable parameters by their full names."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]

    @property
    def names(self) -> list[str]:
        """The full names of the parameters."""
        return list(self.parameters)

    def tap(self, forward: Forward, recorder: Recorder) -> Forward:
        """Return a forward that taps, or is `forward` itself where the examples are not the first dimension."""

        def tapped_forward(*tensors: Any, **settings: Any) -> Any:
            if not _by_example(tensors, settings, recorder.shape):
                return forward(*tensors, **settings)
            anchor = next(iter(self.parameters.values()))
            call = _Call(self, lambda *inputs: forward(*inputs, **settings), recorder)
            return _apply(_TappedModule, call, anchor, *tensors)

        return tapped_forward


@dataclass(frozen=True)
class _Call:
    """One call of a tapped module: its own forward, with the settings of this call."""

    site: ModuleSite
    forward: Forward
    recorder: Recorder

    def gradients(self, inputs: Sequence[Tensor], deltas: Tensor, example: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return one example's gradients: of the parameters, and of those inputs that are real numbers."""
        one = slice(example, example + 1)
        own = [tensor[one].detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
        parameters = list(self.site.parameters.values())
        asked = [*parameters, *(tensor for tensor in own if tensor.requires_grad)]
        with torch.enable_grad():
            output = self.forward(*own)
            found = torch.autograd.grad(output, asked, deltas[one], allow_unused=True, materialize_grads=True)
        return list(found[: len(parameters)]), list(found[len(parameters) :])


class _TappedModule(torch.autograd.Function):
    """A module run without a graph, and once more for each example on the way back.

    A parameter goes in as an argument so that the output requires a gradient where no input does (embeddings).
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *inputs: Tensor) -> Tensor:
        """Return what the module returns."""
        del anchor
        ctx.save_for_backward(*inputs)
        ctx.call = call
        output: Tensor = call.forward(*inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """Return the inputs' gradients only."""
        call: _Call = ctx.call
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        recorder = call.recorder
        wanted = recorder.admit(call.site.names, fits=True)
        upstream: list[list[Tensor]] = []
        for example in range(recorder.shape[0]):
            own, above = call.gradients(inputs, deltas[0], example)
            upstream.append(above)
            for name, gradient in zip(call.site.names, own, strict=True) if wanted else ():
                # autograd may give two parameters one tensor, and what is taken may be overwritten
                recorder.take(name, gradient.flatten().clone().unsqueeze(0), slice(example, example + 1))
        whole = iter(torch.cat(parts) for parts in zip(*upstream, strict=True))
        return (None, None, *(next(whole) if tensor.is_floating_point() else None for tensor in inputs))


def _by_example(tensors: Sequence[Any], settings: Mapping[str, Any], shape: torch.Size) -> bool:
    """Whether a module got nothing but tensors (examples, tokens, …) and settings that are no tensors."""
    return (
        bool(tensors)
        and all(isinstance(tensor, Tensor) and tensor.shape[:2] == shape for tensor in tensors)
        and not any(isinstance(setting, Tensor) for setting in settings.values())
    )


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return output


# Finding them --------------------------------------------------------------------------------------------------------

Site = LinearSite | ModuleSite


def find_sites(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[list[Site], list[str]]:
    """Find the modules that use `parameters`, the trainable ones by full name, and the parameters none can tap."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {_owner(name, modules) for name in parameters if type(modules[_parent(name)]) is not nn.Linear}
    sites: list[Site] = [_module_site(path, modules[path], parameters) for path in _outermost(owners)]
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
def tapped(sites: Sequence[Site], shape: torch.Size, take: Take) -> Iterator[Recorder]:
    """Let the modules of `sites` run as tapped ones for one forward and backward pass of a batch of this shape."""
    recorder = Recorder(shape, take)
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
