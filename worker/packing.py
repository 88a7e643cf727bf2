"""Whether a model keeps packed rows apart: it is told where they begin, and tested before it is believed.

Position ids that begin anew say it. FlashAttention's kernels then do no work across a boundary; transformers' masks for
`sdpa`, `eager` and `flex_attention` become block-diagonal, which is as exact and saves nothing. Architectures differ:
linear attention and convolutions go on across a boundary, and some layers never see the ids. So two rows are packed,
and

* the second one's loss must not depend on the first one's embeddings: its gradient by them is zero to the last digit
  wherever attention stops, in any precision;
* the second one's gradient, as the taps give it out, must be that of the row alone: positions begin anew, and every tap
  finds the row's own tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worker.batches import Encoded
from worker.losses import Inputs, Model, run
from worker.models import takes
from worker.sites import drop_gradients, tapped
from worker.taps import Site

LEAST_COSINE = {torch.float32: 0.999, torch.float64: 0.999}
"""Least cosine of one gradient computed in two ways, by the model's type."""
LEAST_COSINE_HALF = 0.95

COMPARED = 1 << 26
"""Numbers of a row's gradient that are compared: the gradient of a whole model would take the memory of another one."""


def packing_fault(
    model: Model,
    rows: tuple[Encoded, Encoded],
    *,
    sites: Sequence[Site],
    parameters: Mapping[str, nn.Parameter],
    scale: float,
    device: torch.device,
) -> str | None:
    """Say why rows of this model cannot be packed; None where they can.

    `parameters` are the trainable ones, `sites` their taps, and `scale` is what losses are multiplied by against
    underflow. It costs three passes over at most two rows.
    """
    if not takes(model, "position_ids"):
        return "the model takes no position ids"
    pair = Inputs.packed(rows, device=device)
    if _leaks(model, pair, scale):
        return "the model does not take position ids for boundaries: a row depends on the one before it"
    compared = _compared(parameters)
    packed, strays = _second_packed(model, pair, sites, parameters, scale, wanted=compared.keys())
    if strays:
        return f"no tap tells the rows apart: {', '.join(strays[:5])}"
    losses = run(model, Inputs.of(rows[1:], pad_id=0, device=device)).losses
    alone = torch.autograd.grad(
        losses.sum() * scale, list(compared.values()), allow_unused=True, materialize_grads=True
    )
    got = [packed.get(name, torch.zeros_like(gradient)) for name, gradient in zip(compared, alone, strict=True)]
    if not same_gradient(got, alone, dtype=model.dtype):
        return "a packed row's gradient is not that of the row alone"
    return None


def padding_fault(
    model: Model, rows: tuple[Encoded, Encoded], *, scale: float, pad_id: int, device: torch.device
) -> str | None:
    """Say why rows of this model cannot share a padded batch; None where they can.

    The second of `rows` is the shorter one: of what is not its own tokens its loss must depend on nothing.
    """
    pair = Inputs.of(rows, pad_id=pad_id, device=device)
    reach = _reach(model, pair, scale)
    if reach.shape[:-1] != pair.layout.shape:
        return "the model's embeddings do not lie as the batch does"
    reach[1, : len(rows[1].input_ids)] = 0
    if bool(reach.nan_to_num(0, 0, 0).any()):  # a row that is not finite tells nothing
        return "a row depends on what stands behind it or in other rows: the model is not causal"
    return None


def same_gradient(first: Sequence[Tensor], second: Sequence[Tensor], *, dtype: torch.dtype) -> bool:
    """Whether two gradients, part by part, are one that was computed in two ways; also where both are zero."""
    sums = torch.zeros(3, dtype=torch.float64)
    for parts in zip(first, second, strict=True):
        one, other = (part.flatten().double() for part in parts)
        sums += torch.stack([one @ other, one @ one, other @ other]).cpu()
    dot, *squares = sums.tolist()
    if squares == [0, 0]:
        return True
    least = LEAST_COSINE.get(dtype, LEAST_COSINE_HALF)
    return bool(dot >= least * (squares[0] * squares[1]) ** 0.5 > 0)


def _leaks(model: Model, pair: Inputs, scale: float) -> bool:
    """Whether the second row's loss depends on the first row's embeddings."""
    return bool(pair.layout.cut(_reach(model, pair, scale), 0).any())


def _reach(model: Model, pair: Inputs, scale: float) -> Tensor:
    """Return the gradient of the second row's loss by all embeddings, as they lie in the batch."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append(output if output.requires_grad else output.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        (gradient,) = torch.autograd.grad(run(model, pair).losses[1] * scale, seen[0])
    finally:
        handle.remove()
    return gradient


def _compared(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the first parameters, of up to COMPARED numbers together, and one at least."""
    chosen: dict[str, nn.Parameter] = {}
    left = COMPARED
    for name, parameter in parameters.items():
        left -= parameter.numel()
        if chosen and left < 0:
            break
        chosen[name] = parameter
    return chosen


def _second_packed(
    model: Model,
    pair: Inputs,
    sites: Sequence[Site],
    parameters: Mapping[str, nn.Parameter],
    scale: float,
    *,
    wanted: Collection[str],
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the second row's flat gradients from taps, by name, and the parameters that no tap tells apart by row."""
    gradients: dict[str, Tensor] = {}

    def take(name: str, some: Tensor, examples: slice) -> None:
        if name in wanted and examples.stop == pair.layout.examples:
            gradients[name] = some[-1].clone()

    with tapped(sites, pair.layout, take) as recorder:
        (run(model, pair).losses.sum() * scale).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return gradients, recorder.strays + drop_gradients(parameters)
