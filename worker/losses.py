"""The loss of every example of a batch, and its log-odds, at the price of the supervised tokens alone.

* Padding stands on the right, where a causal model's real tokens never look, so there is no attention mask to build.
* Packed, a batch has no padding at all: the examples follow one another in a single row, and position ids that begin
  anew with each of them tell the model where one ends. Not every model listens (worker/packing.py).
* Logits are made for supervised positions only, and their cross-entropy keeps nothing beside them, where torch's own
  would keep a copy in float32.
* So it is with log-odds: log(p / (1 − p)) of a token is its logit minus the logsumexp of the others', which loses
  nothing where p is 0 or 1 to float32, and the loss follows from it, log(1 + exp(−log-odds)).
* The output layer's gradient needs what it gets and the loss's gradient with respect to that: the graph of a forward
  pass alone begins where the output layer does, whatever an architecture makes of its logits afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from worker.batches import IGNORED, Encoded, collate, slices
from worker.directions import LogoddsForm
from worker.layouts import Layout, Packed, Padded, Pooling
from worker.models import ModelError, takes, uses_flash_attention

Model = PeftModel | PreTrainedModel

LOGIT_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits turned into a loss at a time: 1 MiB as float32, which a cache holds; 256 MiB, which keep a GPU busy."""
LARGE_ODDS, SMALL_ODDS = math.log(9), -math.log(999)
"""The log-odds of p = 0.9 and p = 0.001."""
OUTPUT_ELEMENTS = 1 << 24
"""Gradients of the output layer at a time, 64 MiB as float32; at least those of one example, however large."""


@dataclass(frozen=True)
class Inputs:
    """A batch on its device, and where its N supervised tokens are."""

    layout: Layout
    """How the examples lie in `input_ids`, and in all that the model makes of them."""
    input_ids: Tensor
    """(examples, width), or packed (1, total tokens)."""
    positions: Tensor
    """(N,) positions, in the flattened batch, whose logits predict the supervised tokens."""
    targets: Tensor
    """(N,) the supervised tokens."""
    counts: Tensor
    """(examples,) supervised tokens, float32."""

    @classmethod
    def of(cls, rows: Sequence[Encoded], *, pad_id: int, device: torch.device) -> Inputs:
        """Pad `rows` on the right and put them on the device."""
        batch = collate(rows, pad_id=pad_id)
        mask = batch.attention_mask.bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
            raise ValueError("a batch must be padded on the right: a causal model then never looks at the padding")
        # padding repeats the example's first token: the pad token may lie outside the vocabulary
        input_ids = torch.where(mask, batch.input_ids, batch.input_ids[:, :1])
        examples, predictors = torch.nonzero(batch.labels[:, 1:] != IGNORED, as_tuple=True)
        positions = examples * input_ids.shape[1] + predictors
        targets = batch.labels[examples, predictors + 1]
        counts = torch.bincount(examples, minlength=len(rows)).float()
        tensors = (tensor.to(device) for tensor in (input_ids, positions, targets, counts))
        return cls(Padded(input_ids.shape, mask.sum(1).to(device)), *tensors)

    @classmethod
    def packed(cls, rows: Sequence[Encoded], *, device: torch.device) -> Inputs:
        """Put `rows` one after another, without padding, on the device."""
        lengths = [len(row.input_ids) for row in rows]
        input_ids = torch.tensor([[token for row in rows for token in row.input_ids]])
        labels = torch.tensor([label for row in rows for label in (IGNORED, *row.labels[1:])])
        (supervised,) = torch.nonzero(labels != IGNORED, as_tuple=True)
        examples = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
        counts = torch.bincount(examples[supervised], minlength=len(rows)).float()
        tensors = (tensor.to(device) for tensor in (input_ids, supervised - 1, labels[supervised], counts))
        return cls(Packed(tuple(lengths)), *tensors)


@dataclass
class OutputLayer:
    """What the gradient of the output layer is made of."""

    layout: Layout
    states: Tensor
    """What it got of every token of the batch, (…, hidden size)."""
    deltas: Tensor | None = None
    """The gradient of the objective with respect to `states`, once it has been taken."""

    @property
    def size(self) -> int:
        """Numbers of an example's gradient: the square of the hidden size."""
        return int(self.states.shape[-1]) ** 2

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Σ_t δ_t ⊗ h_t some examples at a time: which, and (examples, size) float32.

        Raises RuntimeError before the objective has been differentiated.
        """
        if self.deltas is None:
            raise RuntimeError("the objective has not been differentiated: there is no gradient of the output layer")
        deltas, states = self.deltas.float(), self.states.detach().float()
        for part in slices(self.layout.examples, self.size, elements=OUTPUT_ELEMENTS):
            yield part, self.layout.outer(deltas, states, part).flatten(1)

    def take(self, deltas: Tensor) -> None:
        """Take in the gradient with respect to `states`."""
        self.deltas = deltas.detach()


@dataclass(frozen=True)
class Outputs:
    """What the model made of a batch."""

    losses: Tensor
    """(examples,) mean cross-entropy over the supervised tokens, float32."""
    hidden: Mapping[Pooling, Tensor]
    """(examples, hidden size) means over each example's tokens of what its output layer gets, float32, as asked for."""
    logodds: Tensor | None = None
    """(examples,) mean log-odds of the supervised tokens, float32; None where they are not asked for."""
    output: OutputLayer | None = None
    """What the output layer's gradient is made of; None where it is not asked for."""


def run(
    model: Model,
    inputs: Inputs,
    *,
    hidden: Sequence[Pooling] = (),
    logodds: LogoddsForm | None = None,
    output: bool = False,
) -> Outputs:
    """Run the model forward, with a graph of the losses, or in their place of the log-odds in the form asked for.

    With `output` the graph goes as far as to what the output layer gets even inside of `no_grad`, which then has to be
    left: gradients are on from there.
    Raises ModelError where hidden states do not come by.
    """
    with _logits_only_at(inputs, model, hidden=hidden, output=output) as seen:
        logits = model(input_ids=inputs.input_ids, use_cache=False, **_boundaries(inputs, model)).logits
    if (hidden and not seen.hidden) or (output and seen.output is None):
        raise ModelError(
            f"the output layer of {type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__} "
            "does not get every token's hidden state: ask for other kinds than hidden, rds and output"
        )
    logits = logits.flatten(0, 1)
    if not seen.reduced:
        logits = logits.index_select(0, inputs.positions)
    if logodds is None:
        by_token: Tensor = _CrossEntropy.apply(logits, inputs.targets)  # type: ignore[no-untyped-call]  # torch's
        return Outputs(_means(by_token, inputs), seen.hidden, output=seen.output)
    exact: Tensor = _LogOdds.apply(logits, inputs.targets)  # type: ignore[no-untyped-call]  # likewise
    losses = _means(functional.softplus(-exact.detach()), inputs)
    return Outputs(losses, seen.hidden, _means(stabilised(exact, logodds), inputs))


def stabilised(logodds: Tensor, form: LogoddsForm) -> Tensor:
    """Return the log-odds of tokens in a form, from the exact ones log(p / (1 − p)), any shape.

    `exact` leaves them: made of logits they are finite and smooth wherever these are, and nothing is to be kept from 0
    or 1. `reference` is what GradEx's published code for instructions has: log(p̃ / (1 − p̃)) with p̃ = p − 0.01 where
    p > 0.9, p + 0.01 where p < 0.001, and p between. It jumps there, lies between −log 999 and log 99, and hardly has
    a gradient where p is nearly 0 or 1.
    """
    if form == "exact":
        return logodds
    rarer = torch.sigmoid(-logodds.abs())  # p or 1 − p, whichever is small: the other one has lost its digits
    shifted = torch.log(0.99 - rarer) - torch.log(0.01 + rarer)
    ends = torch.where(logodds > 0, shifted, -shifted)
    return torch.where((logodds > LARGE_ODDS) | (logodds < SMALL_ODDS), ends, logodds)


def _means(by_token: Tensor, inputs: Inputs) -> Tensor:
    """Mean over each example's supervised tokens: (N,) to (examples,)."""
    # laid out in rows and summed: adding by index has no fixed order on a GPU
    spread = torch.zeros(inputs.input_ids.numel(), device=by_token.device).index_copy(0, inputs.positions, by_token)
    return inputs.layout.sums(spread) / inputs.counts


def _boundaries(inputs: Inputs, model: Model) -> dict[str, Any]:
    """Say where the examples of a packed batch begin and end; nothing of a padded one.

    Position ids say it where an architecture listens to them. FlashAttention's kernels want the boundaries themselves,
    and would read them off the position ids in each layer anew, waiting for the device.
    """
    layout = inputs.layout
    if isinstance(layout, Padded):
        return {}
    device = inputs.input_ids.device
    told: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(length) for length in layout.lengths]).unsqueeze(0).to(device)
    }
    if uses_flash_attention(model) and takes(model, "cu_seq_lens_q"):
        bounds, longest = torch.tensor(layout.bounds, dtype=torch.int32, device=device), max(layout.lengths)
        told |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return told


@dataclass
class _Seen:
    """What came by the output layer."""

    reduced: bool = False
    """It got the supervised positions only."""
    hidden: dict[Pooling, Tensor] = field(default_factory=dict)
    output: OutputLayer | None = None


@contextmanager
def _logits_only_at(inputs: Inputs, model: Model, *, hidden: Sequence[Pooling], output: bool) -> Iterator[_Seen]:
    """Give the output layer the hidden states of the supervised positions only, as a batch of one.

    Every architecture's own treatment of logits (scale, soft cap) still applies. A trainable output layer is left
    alone, since its gradients need the examples apart. The means of what came that `hidden` names are kept, and with
    `output` what came itself, whose gradient is noted when it is made.
    """
    seen = _Seen()
    head = model.get_output_embeddings()
    if head is None:
        yield seen
        return
    frozen = not any(parameter.requires_grad for parameter in head.parameters())

    def reduce(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = arguments[0]
        if states.shape[:-1] != inputs.layout.shape:
            return None
        for pooling in hidden:
            seen.hidden[pooling] = inputs.layout.means(states.detach(), pooling)
        if output:
            torch.set_grad_enabled(True)  # of a forward pass alone the graph begins here
            # a view, which nothing but the output layer uses, or a leaf where no graph leads here
            states = states.view_as(states) if states.requires_grad else states.detach().requires_grad_()
            seen.output = OutputLayer(inputs.layout, states)
            states.register_hook(seen.output.take)
        if not frozen:
            return (states, *arguments[1:])
        seen.reduced = True
        positions = inputs.positions.to(states.device)  # the last layer's may be another than the first one's
        return (states.flatten(0, 1).index_select(0, positions).unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(reduce)
    try:
        yield seen
    finally:
        handle.remove()


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token from its logits, in float32 whatever the logits are.

    It goes through the logits in slices and keeps nothing beside them; the backward pass makes the softmax again.
    torch's own keeps a float32 copy of all of them: 5 GB at 8,192 tokens of a vocabulary of 152K.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (tokens, vocabulary) and targets (tokens,) to losses (tokens,)."""
        ctx.save_for_backward(logits, targets)
        losses = torch.empty(len(logits), device=logits.device)
        for part in _slices(logits):
            log_softmax = logits[part].log_softmax(1, dtype=torch.float32)
            losses[part] = log_softmax.gather(1, targets[part].unsqueeze(1)).squeeze(1)
        return losses.neg_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return softmax − one-hot, times the gradient of the loss."""
        logits, targets = ctx.saved_tensors
        weights = gradients[0].unsqueeze(1)
        result = torch.empty_like(logits)
        for part in _slices(logits):
            softmax = logits[part].softmax(1, dtype=torch.float32)
            softmax.scatter_add_(1, targets[part].unsqueeze(1), torch.full_like(weights[part], -1))
            torch.mul(softmax, weights[part], out=result[part])
        return result, None


class _LogOdds(torch.autograd.Function):
    """Exact log-odds of each token from its logits, log(p / (1 − p)), in float32 whatever the logits are.

    Like `_CrossEntropy` it keeps nothing beside the logits: the gradient is one-hot − softmax of the other tokens.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (tokens, vocabulary) and targets (tokens,) to log-odds (tokens,)."""
        ctx.save_for_backward(logits, targets)
        logodds = torch.empty(len(logits), device=logits.device)
        for part in _slices(logits):
            own = logits[part].gather(1, targets[part].unsqueeze(1)).squeeze(1)
            logodds[part] = own.float() - _others(logits, targets, part).logsumexp(1)
        return logodds

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return one-hot − softmax of the others, times the gradient of the log-odds."""
        logits, targets = ctx.saved_tensors
        weights = gradients[0].unsqueeze(1)
        result = torch.empty_like(logits)
        for part in _slices(logits):
            softmax = _others(logits, targets, part).softmax(1)
            softmax.scatter_(1, targets[part].unsqueeze(1), -1)
            torch.mul(softmax, -weights[part], out=result[part])
        return result, None


def _others(logits: Tensor, targets: Tensor, part: slice) -> Tensor:
    """Return a copy of some tokens' logits in float32 in which the right one is out of play."""
    others = logits[part].to(torch.float32, copy=True)
    return others.scatter_(1, targets[part].unsqueeze(1), -torch.inf)


def _slices(logits: Tensor) -> Iterator[slice]:
    return slices(*logits.shape, elements=LOGIT_ELEMENTS["cpu" if logits.device.type == "cpu" else "cuda"])
