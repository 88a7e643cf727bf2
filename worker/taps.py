"""Taps: modules that hand out the gradient of every single example where autograd would sum over the batch.

For a linear layer y = xWᵀ the gradient of example b is Σ_t δ_bt ⊗ x_bt, δ being the gradient of y: one batched matrix
product gives those of all examples (Goodfellow, 2015, arXiv 1510.01799). That is `LinearSite`: any trainable
`nn.Linear`, whatever stands around it. `LoraSite` is the same for A and B of an ordinary LoRA, together with the layer
under it.

What else is trained is used by a module that treats the examples one by one, only not as a linear map: DoRA's
magnitudes, norms, embeddings and LoRA on them, biases of a Conv1D or of a quantised layer. `ModuleSite` runs such a
module's own forward again on the way back, an example at a time, and asks autograd. That costs one more forward and
backward pass of this module alone.

Both need what comes in to lie as the batch does (worker/layouts.py): the examples in rows, or packed one after another.
Where it does not (fused experts get the tokens they are sent), or where a layer is used twice, autograd reaches the
parameter without a tap, or it becomes one of `Recorder.strays`.
Tokens that a mixture of experts has flattened to (all tokens, features) are taken to be in the batch's order, and
`Recorder.flattened` has what came of it: whether they were in order is for the caller to test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from worker.batches import slices
from worker.layouts import Layout, Packed

Take = Callable[[str, Tensor, slice], None]
"""Takes in the flat gradients (examples, size) of the named parameter for a slice of the batch's examples."""

Forward = Callable[..., Any]

GRADIENT_ELEMENTS = 1 << 26
"""Per-example gradients of one weight at a time, 256 MiB as float32; at least those of one example, however large."""

COMPARED_OUTPUTS = 64
"""Outputs of a weight by which the order of flattened tokens is tested: all of a large model would be another model."""


@dataclass
class Recorder:
    """Where the taps of one batch put what they get, and what they could not attribute to examples."""

    layout: Layout
    """How the batch's examples lie in what the modules get."""
    take: Take
    strays: list[str] = field(default_factory=list)
    flattened: dict[str, Tensor] = field(default_factory=dict)
    """Of each weight whose examples were told apart by the order of their tokens, the first example's gradient at some
    outputs, flat."""
    used: set[str] = field(default_factory=set)

    def admit(self, names: Sequence[str], *, fits: bool) -> bool:
        """Whether the gradients of these parameters are the examples' own; they are strays where not."""
        if not fits or not self.used.isdisjoint(names):
            self.strays += names
            return False
        self.used.update(names)
        return True

    def holds(self, inputs: Tensor) -> bool:
        """Whether these are all tokens of the batch, as it has them or flattened."""
        return self.flat(inputs) or inputs.shape[:-1] == self.layout.shape

    def flat(self, tokens: Tensor) -> bool:
        """Whether these are as many as all tokens of the batch, flattened to (tokens, features)."""
        return tokens.dim() == 2 and len(tokens) == self.layout.shape.numel()

    def record_weight(self, name: str, inputs: Tensor, deltas: Tensor) -> None:
        """Hand out the gradients of a linear map's weight: Σ_t δ_bt ⊗ x_bt of every example b.

        `inputs` are those of all tokens (…, in), as the batch has them or flattened, `deltas` the outputs' gradients
        (…, out).
        """
        if self.flat(inputs):
            some = deltas[..., :: -(-deltas.shape[-1] // COMPARED_OUTPUTS)]
            self.flattened[name] = self.layout.outer(some, inputs, slice(0, 1)).flatten()
        for part in slices(self.layout.examples, inputs.shape[-1] * deltas.shape[-1], elements=GRADIENT_ELEMENTS):
            self.take(name, self.layout.outer(deltas, inputs, part).flatten(1), part)


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
        """Hand out the gradients, from the inputs of all tokens (…, in) and those of the outputs (…, out)."""
        in_order = self.weight is not None or not recorder.flat(inputs)  # a bias alone has nothing to test that by
        if not recorder.admit(self.names, fits=in_order and recorder.holds(inputs)):
            return
        if self.weight is not None:
            recorder.record_weight(self.weight, inputs, deltas)
        if self.bias is not None:
            layout = recorder.layout
            recorder.take(self.bias, layout.sums(deltas.reshape(-1, deltas.shape[-1])), slice(0, layout.examples))


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
class LoraSite:
    """A LoRA over a frozen linear layer, as one map: y = xWᵀ + c + s·(xAᵀ)Bᵀ, and the full names of A and B.

    PEFT makes four passes over y where one is needed, and as many over its gradient on the way back; it also computes
    in the adapter's precision where that is the wider one, float32 beside bfloat16, which a GPU does many times slower.
    Here A and B are rounded to the precision of what comes in.
    """

    module: Linear
    adapter: str
    a: str
    b: str

    @property
    def names(self) -> list[str]:
        """The full names of the parameters."""
        return [self.a, self.b]

    @property
    def parts(self) -> list[LinearSite]:
        """The sites of A and B alone, for where PEFT's own forward is to run."""
        layers = [(self.module.lora_A, self.a), (self.module.lora_B, self.b)]
        return [LinearSite(cast("nn.Linear", pair[self.adapter]), name, None) for pair, name in layers]

    def untouched(self) -> bool:
        """Whether nobody has hooked into the layers, and the adapter is in use, alone and without dropout."""
        module = self.module
        layers = (module, module.base_layer, module.lora_A[self.adapter], module.lora_B[self.adapter])
        return (
            not any("forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
            and list(module.active_adapters) == [self.adapter]
            and not module.disable_adapters
            and not module.merged
            and not module.lora_dropout[self.adapter].training
        )

    def tap(self, forward: Forward, recorder: Recorder) -> Forward:
        """Return a forward that taps, or is `forward` where it is called with more than an input."""

        def tapped_forward(inputs: Tensor, *others: Any, **settings: Any) -> Any:
            if others or settings:
                return forward(inputs, *others, **settings)
            base = self.module.base_layer
            a, b = (layers[self.adapter].weight for layers in (self.module.lora_A, self.module.lora_B))
            weight = base.weight if isinstance(base, nn.Linear) else base.weight.T  # Conv1D keeps it the other way
            return _apply(_TappedLora, inputs, a, b, weight, base.bias, self, recorder)

        return tapped_forward

    def record(self, inputs: Tensor, inner: Tensor, inner_deltas: Tensor, deltas: Tensor, recorder: Recorder) -> None:
        """Hand out the gradients of A and B; `inner` is s·xAᵀ, and `inner_deltas` the gradient of xAᵀ."""
        if recorder.admit(self.names, fits=recorder.holds(inputs)):
            recorder.record_weight(self.a, inputs, inner_deltas)
            recorder.record_weight(self.b, inner, deltas)


class _TappedLora(torch.autograd.Function):
    """LoRA over a frozen linear layer, whose backward pass hands out the per-example gradients of A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: LoraSite,
        recorder: Recorder,
    ) -> Tensor:
        """Return xWᵀ + c + s·(xAᵀ)Bᵀ."""
        a, b = a.to(inputs.dtype), b.to(inputs.dtype)
        inner = nn.functional.linear(inputs, a).mul_(site.module.scaling[site.adapter])
        ctx.save_for_backward(inputs, inner, a, b, weight)
        ctx.site = site
        ctx.recorder = recorder
        output = nn.functional.linear(inputs, weight, bias)
        output.view(-1, len(b)).addmm_(inner.view(-1, len(a)), b.T)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the inputs' gradient only."""
        inputs, inner, a, b, weight = ctx.saved_tensors
        site: LoraSite = ctx.site
        deltas = gradients[0]
        inner_deltas = (deltas @ b).mul_(site.module.scaling[site.adapter])
        site.record(inputs, inner, inner_deltas, deltas, ctx.recorder)
        upstream = None
        if ctx.needs_input_grad[0]:
            upstream = deltas @ weight
            upstream.view(-1, a.shape[1]).addmm_(inner_deltas.view(-1, len(a)), a)
        return upstream, None, None, None, None, None, None


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
        """Return a forward that taps, or is `forward` itself where what comes in does not lie as the batch does."""

        def tapped_forward(*tensors: Any, **settings: Any) -> Any:
            if not _by_example(tensors, settings, recorder.layout):
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
        layout = self.recorder.layout
        own = [layout.cut(tensor, example).detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
        parameters = list(self.site.parameters.values())
        asked = [*parameters, *(tensor for tensor in own if tensor.requires_grad)]
        with torch.enable_grad():
            output = self.forward(*own)
            upstream = layout.cut(deltas, example)
            found = torch.autograd.grad(output, asked, upstream, allow_unused=True, materialize_grads=True)
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
        for example in range(recorder.layout.examples):
            own, above = call.gradients(inputs, deltas[0], example)
            upstream.append(above)
            for name, gradient in zip(call.site.names, own, strict=True) if wanted else ():
                # autograd may give two parameters one tensor, and what is taken may be overwritten
                recorder.take(name, gradient.flatten().clone().unsqueeze(0), slice(example, example + 1))
        whole = iter(recorder.layout.join(parts) for parts in zip(*upstream, strict=True))
        return (None, None, *(next(whole) if tensor.is_floating_point() else None for tensor in inputs))


def _by_example(tensors: Sequence[Any], settings: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a module got nothing but tensors (examples, tokens, …) and settings that are no tensors.

    Of a packed batch no setting may hold tensors inside either: the rotations of all positions, say.
    """
    refused = (Tensor, tuple, list, dict) if isinstance(layout, Packed) else Tensor
    return (
        bool(tensors)
        and all(isinstance(tensor, Tensor) and tensor.shape[:2] == layout.shape for tensor in tensors)
        and not any(isinstance(setting, refused) for setting in settings.values())
    )


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return output


Site = LinearSite | LoraSite | ModuleSite
