"""The loss of every example of a batch, at the price of the supervised tokens alone.

* Padding stands on the right, where a causal model's real tokens never look, so there is no attention mask to build.
* Packed, a batch has no padding at all: the examples follow one another in a single row, and position ids that begin
  anew with each of them tell the model where one ends. Not every model listens (worker/packing.py).
* Logits are made for supervised positions only, and their cross-entropy keeps nothing beside them, where torch's own
  would keep a copy in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.batches import IGNORED, Encoded, collate, slices
from worker.layouts import Layout, Packed, Padded, Pooling
from worker.models import ModelError, takes, uses_flash_attention

Model = PeftModel | PreTrainedModel

LOGIT_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits turned into a loss at a time: 1 MiB as float32, which a cache holds; 256 MiB, which keep a GPU busy."""


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


@dataclass(frozen=True)
class Outputs:
    """What the model made of a batch."""

    losses: Tensor
    """(examples,) mean cross-entropy over the supervised tokens, float32."""
    hidden: Mapping[Pooling, Tensor]
    """(examples, hidden size) means over each example's tokens of what its output layer gets, float32, as asked for."""


def run(model: Model, inputs: Inputs, *, hidden: Sequence[Pooling] = ()) -> Outputs:
    """Run the model forward, with a graph of the losses. Raises ModelError where hidden states do not come by."""
    with _logits_only_at(inputs, model, hidden=hidden) as seen:
        logits = model(input_ids=inputs.input_ids, use_cache=False, **_boundaries(inputs, model)).logits
    if hidden and not seen.hidden:
        raise ModelError(
            f"the output layer of {type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__} "
            "does not get every token's hidden state: ask for other kinds than hidden and rds"
        )
    logits = logits.flatten(0, 1)
    if not seen.reduced:
        logits = logits.index_select(0, inputs.positions)
    by_token: Tensor = _CrossEntropy.apply(logits, inputs.targets)  # type: ignore[no-untyped-call]  # torch's
    # laid out in rows and summed: adding by index has no fixed order on a GPU
    spread = torch.zeros(inputs.input_ids.numel(), device=by_token.device).index_copy(0, inputs.positions, by_token)
    return Outputs(inputs.layout.sums(spread) / inputs.counts, seen.hidden)


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


@contextmanager
def _logits_only_at(inputs: Inputs, model: Model, *, hidden: Sequence[Pooling]) -> Iterator[_Seen]:
    """Give the output layer the hidden states of the supervised positions only, as a batch of one.

    Every architecture's own treatment of logits (scale, soft cap) still applies. A trainable output layer is left
    alone, since its gradients need the examples apart. The means of what came that `hidden` names are kept.
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
        if not frozen:
            return None
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


def _slices(logits: Tensor) -> Iterator[slice]:
    return slices(*logits.shape, elements=LOGIT_ELEMENTS["cpu" if logits.device.type == "cpu" else "cuda"])
