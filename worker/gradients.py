"""The gradient engine: the projected gradient of every single example, at about the price of a plain training step.

One forward and one backward pass of the *sum* of the examples' losses (worker/losses.py) give every example's own
gradient, exactly, since an example's terms never meet another's: taps in the layers (worker/taps.py) compute it in the
place of the sum over the batch that autograd would compute. A layer's gradients (examples × size) are mapped
(worker/directions.py), measured, projected (worker/projection) and dropped inside the backward pass: the whole
gradient (examples × parameters) never exists, and no parameter gets a `.grad`.

What no tap can attribute to examples (LoRA on fused experts, a layer used twice) is noticed, because autograd reaches
the parameter by another way, and from then on the engine runs the examples one at a time through plain autograd: as
exact, and some three to twenty times slower. `GradientEngine.one_at_a_time` names the cause.

Where attention is FlashAttention's, the rows of a batch are packed one after another instead of padded, once two of
them have shown that the model keeps them apart (worker/packing.py). `GradientEngine.packing` tells.

Mean hidden states are kinds of features beside those of gradients: they come from the same forward pass, and asked for
alone they need no other.

So is the output layer's gradient, `output`: of all that a backward pass would do, it takes the step through that layer.

`logodds` is the gradient of another number than the loss, and takes the backward pass for itself: hidden states may
come beside it, and no other kind of gradient.

Order of parameters: `model.named_parameters()`, the trainable ones. They may be an adapter's, or chosen weights of a
model without one: the features are then those of its full gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from worker.batches import Encoded, plan
from worker.directions import Kind, LogoddsForm, Moments, make_direction, sgd
from worker.features import OUTPUT, Batch, Features, Found
from worker.losses import Inputs, Model, Outputs, run
from worker.models import ModelError, most_tokens, use_exact_mode, uses_flash_attention, vocabulary
from worker.packing import packing_fault, padding_fault, same_gradient
from worker.projection import Projection, ProjectionName, make_projection
from worker.sites import drop_gradients, find_sites, tapped
from worker.sums import make_sums

Reduction = Literal["mean", "sum"]

HALF_LOSS_SCALE = 1024.0  # float16 loses gradients below 6e-8; a power of two changes no digit of the others

log = logging.getLogger(__name__)


class GradientEngine:
    """Computes features with the gradients of `model`'s trainable parameters.

    `kinds`, all from one pass: `sgd` is the gradient g; `sign` its sign; `adam` the direction in which Adam would step,
    with m' = β₁m + (1 − β₁)g and v' = β₂v + (1 − β₂)g²: m' / √(v' + ε) in the form `less` (LESS's published code), and
    (m' / (1 − β₁ᵗ)) / (√(v' / (1 − β₂ᵗ)) + ε) at t = step + 1 in the form `exact` (its paper, and Adam itself);
    `logodds` the gradient of the mean log-odds of the supervised tokens in the place of their loss;
    `output` the gradient of the output layer, from the hidden states' side (worker/directions.py), projected likewise;
    `hidden` the mean over an example's tokens of what the output layer gets, and `rds` the one in which the t-th token
    weighs as much as t, which no projection touches. Where there are no others than these three there is no backward
    pass through the model, and for hidden states alone `dims` are of no account.
    `reduction`: whether g is that of the mean of the supervised tokens' losses, or of their sum; log-odds have a mean.
    `packing`: whether the rows of a batch follow one another without padding; by default where the model's attention is
    FlashAttention's, which alone gets faster by it. A model that does not keep packed rows apart gets them padded.

    The model is put in the mode of evaluation (gradient checkpointing stays on where it is on), a `.grad` left from
    training is dropped, and nothing else of it changes. Memory beside the training step's: per kind examples × sum of
    `dims` float32, of two batches at a time (the kernel for GPUs adds them up in parts, of 65,536 numbers together for
    a smaller dim); for each form of `adam` two float32 numbers per parameter; the projection's (`worker/projection`).

    Beside these, two or three times the gradients of one weight (`taps.GRADIENT_ELEMENTS`): of one example, where the
    weight is that large, however many a batch has. What requires no gradient never gets one.

    Raises ValueError where `moments` do not fit the parameters, `dims` the projection, or a kind the model.
    """

    def __init__(
        self,
        model: Model,
        *,
        kinds: Sequence[Kind],
        moments: Moments | None = None,
        projection: ProjectionName = "blocks",
        dims: Sequence[int],
        seed: int = 0,
        reduction: Reduction = "mean",
        packing: bool | None = None,
    ) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters and any(kind.needs_gradient for kind in kinds):
            raise ValueError("the model has no trainable parameter: load the adapter with is_trainable=True")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("features are those of causal language models; this one is an encoder-decoder")
        self._logodds = _logodds(kinds, reduction)
        self.device = next(model.get_input_embeddings().parameters()).device  # its layers may be on others
        self._kinds = tuple(kinds)
        self._directions = {
            kind: make_direction(kind, moments=moments, parameters=self.parameters, device=self.device)
            for kind in kinds
            if kind.needs_gradient
        }
        self._poolings = [kind.pooling for kind in kinds if kind.pooling is not None]
        self._output = next((kind for kind in kinds if kind.name == "output"), None)
        self._hidden_size = _hidden_size(model) if self._poolings or self._output else 0
        project = partial(make_projection, projection, dims=dims, seed=seed, device=self.device)
        self._projection: Projection | None = None
        if self._directions:
            self._projection = project(parameters=[(name, p.shape) for name, p in self.parameters.items()])
        self._output_projection: Projection | None = None
        if self._output:
            square = torch.Size((self._hidden_size, self._hidden_size))
            self._output_projection = project(parameters=[(OUTPUT, square)])
        self._dims = tuple(dims)
        self._reduction = reduction
        self._most_tokens, self._vocabulary = most_tokens(model), vocabulary(model)
        self._sites, self.one_at_a_time = find_sites(model, self.parameters)
        self._in_order = False
        self.packing = (uses_flash_attention(model) if packing is None else packing) and not self.one_at_a_time
        self._packing_tested = False
        self._causal: bool | None = None  # not known yet
        # a sum over a long row is large by itself, and scaled beyond what float16 holds
        self._scale = HALF_LOSS_SCALE if model.dtype == torch.float16 and reduction == "mean" else 1.0
        drop_gradients(self.parameters)
        use_exact_mode(model)

    def features(
        self,
        rows: Sequence[Encoded],
        *,
        pad_id: int,
        token_budget: int,
        on_batch: Callable[[int], None] | None = None,
        before_batch: Callable[[Sequence[int]], None] = lambda _: None,
    ) -> dict[Kind, Features]:
        """Compute the features of `rows`, in batches of at most `token_budget` tokens with their padding.

        `before_batch` gets the indices of the rows that are about to go through the model, and `on_batch` the number
        of rows done so far after every batch; an exception of theirs ends the work.
        Raises ModelError where a row is longer than the model's positions, or has a token that it does not know.
        """
        self._refuse_beyond(rows)
        found = Found(
            rows, dims={kind: self._dims if kind.is_projected else (self._hidden_size,) for kind in self._kinds}
        )
        todo = [row for row, tokens in enumerate(found.tokens) if tokens]
        done = len(rows) - len(todo)
        batches = self._plan(rows, todo, pad_id=pad_id, token_budget=token_budget, before_batch=before_batch)
        for batch, indices in self._batches(rows, batches, pad_id=pad_id, before_batch=before_batch):
            batch.store(found, indices)
            done += len(indices)
            if on_batch is not None:
                on_batch(done)
        return found.by_kind()

    def _refuse_beyond(self, rows: Sequence[Encoded]) -> None:
        """Refuse what the model has no embedding of: on a GPU it would be the end of the process."""
        longest = max((len(row.input_ids) for row in rows), default=0)
        if self._most_tokens is not None and longest > self._most_tokens:
            raise ModelError(
                f"a row has {longest:,} tokens and the model has positions for {self._most_tokens:,}: "
                f"ask for max_length={self._most_tokens}"
            )
        highest = max((max(row.input_ids, default=0) for row in rows), default=0)
        if self._vocabulary is not None and highest >= self._vocabulary:
            raise ModelError(
                f"the tokenizer gives the token {highest:,} and the model has embeddings of {self._vocabulary:,}: "
                "it is another model's, or has tokens that the model was not resized for"
            )

    def _batches(
        self,
        rows: Sequence[Encoded],
        batches: Sequence[list[int]],
        *,
        pad_id: int,
        before_batch: Callable[[Sequence[int]], None],
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Compute batch after batch, and give each out when the next one is on its way.

        A GPU works on the next batch while the numbers of the last one are waited for.
        """
        last: tuple[Batch, list[int]] | None = None
        for indices in batches:
            before_batch(indices)
            computed = self._compute([rows[index] for index in indices], pad_id=pad_id)
            if last is not None:
                yield from self._apart(rows, *last, pad_id=pad_id)
            last = computed, indices
        if last is not None:
            yield from self._apart(rows, *last, pad_id=pad_id)

    def _plan(
        self,
        rows: Sequence[Encoded],
        todo: Sequence[int],
        *,
        pad_id: int,
        token_budget: int,
        before_batch: Callable[[Sequence[int]], None],
    ) -> list[list[int]]:
        """Plan the batches of the rows `todo`; before the first packed or padded ones the model is tested."""
        if self._causal is False:
            return [[row] for row in todo]
        lengths = [len(row.input_ids) for row in rows]
        planned = plan([lengths[row] for row in todo], token_budget=token_budget, packed=self.packing)
        batches = [[todo[position] for position in batch] for batch in planned]
        shared = (batch for batch in batches if len(batch) > 1)
        if self.packing:
            untested = None if self._packing_tested else next(shared, None)
        else:
            mixed = (batch for batch in shared if lengths[batch[0]] > lengths[batch[-1]])
            untested = None if self._causal else next(mixed, None)
        if untested is None:
            return batches
        before_batch((untested[0], untested[-1]))
        pair = rows[untested[0]], rows[untested[-1]]
        if self.packing:
            self._test_packing(pair)
        else:
            self._test_padding(pair, pad_id=pad_id)
        return self._plan(rows, todo, pad_id=pad_id, token_budget=token_budget, before_batch=before_batch)

    def _test_padding(self, pair: tuple[Encoded, Encoded], *, pad_id: int) -> None:
        """Give batches up for good where a row's loss depends on more than the row."""
        fault = padding_fault(self.model, pair, scale=self._scale, pad_id=pad_id, device=self.device)
        self._causal = fault is None
        if fault:
            log.info("rows go one at a time", extra={"reason": fault})

    def _test_packing(self, pair: tuple[Encoded, Encoded]) -> None:
        """Give packing up for good where the model does not keep two packed rows apart."""
        fault = packing_fault(
            self.model, pair, sites=self._sites, parameters=self.parameters, scale=self._scale, device=self.device
        )
        self._packing_tested = True
        if fault:
            self.packing = False
            log.info("rows are padded", extra={"reason": fault})

    def _apart(
        self, rows: Sequence[Encoded], batch: Batch, indices: list[int], *, pad_id: int
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Give out a batch; a packed one in which something is not finite row by row, each computed alone.

        A masked attention weight is zero, and zero times NaN is NaN: a broken row spoils what it is packed with.
        """
        if not self.packing or len(indices) == 1 or batch.finite():
            yield batch, indices
            return
        for index in indices:
            yield self._compute([rows[index]], pad_id=pad_id), [index]

    def _compute(self, rows: Sequence[Encoded], *, pad_id: int) -> Batch:
        """Compute one batch; where its parameters turn out not to be covered by taps, one at a time from now on."""
        if self._projection is None:
            return self._compute_forward(rows, pad_id=pad_id)
        if not self.one_at_a_time:
            batch = self._compute_together(rows, pad_id=pad_id)
            if batch is not None:
                return batch
        return self._compute_one_by_one(rows, pad_id=pad_id)

    @torch.no_grad()
    def _compute_forward(self, rows: Sequence[Encoded], *, pad_id: int) -> Batch:
        batch = self._batch(len(rows))
        inputs = self._inputs(rows, pad_id=pad_id)
        outputs = self._run(inputs)
        if outputs.output is not None:
            torch.autograd.grad(self._objective(outputs, inputs), outputs.output.states)
        with torch.no_grad():  # the output layer's gradient has turned gradients on
            batch.take_outputs(outputs, slice(0, len(rows)))
        return batch

    def _compute_together(self, rows: Sequence[Encoded], *, pad_id: int) -> Batch | None:
        inputs = self._inputs(rows, pad_id=pad_id)
        batch = self._batch(len(rows))
        with tapped(self._sites, inputs.layout, batch.take) as recorder:
            outputs = self._run(inputs)
            self._objective(outputs, inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        batch.take_outputs(outputs, slice(0, len(rows)))
        self.one_at_a_time = recorder.strays + drop_gradients(self.parameters)
        if not self.one_at_a_time and recorder.flattened:
            self.one_at_a_time = self._out_of_order(rows, recorder.flattened, pad_id=pad_id)
        if self.one_at_a_time:
            log.info("examples go one at a time", extra={"parameters": self.one_at_a_time[:5]})
            return None
        batch.take_zeros(self.parameters.keys() - batch.seen)
        return batch

    def _run(self, inputs: Inputs) -> Outputs:
        """Run the model forward for what the kinds are made of."""
        return run(self.model, inputs, hidden=self._poolings, logodds=self._logodds, output=self._output is not None)

    def _objective(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """Return the number whose gradient is taken: the examples' losses, or log-odds, together, scaled."""
        if outputs.logodds is not None:
            return outputs.logodds.sum() * self._scale
        losses = outputs.losses * inputs.counts if self._reduction == "sum" else outputs.losses
        return losses.sum() * self._scale

    def _out_of_order(self, rows: Sequence[Encoded], flattened: Mapping[str, Tensor], *, pad_id: int) -> list[str]:
        """Name the parameters whose flattened tokens were no rows in order: tested once, by the first example alone.

        A router that sorts tokens by their expert gives as many as there are, in another order; of an example alone
        all of them are its own.
        """
        if self._in_order or len(rows) == 1:
            return []
        inputs = self._inputs(rows[:1], pad_id=pad_id)
        with tapped(self._sites, inputs.layout, _drop) as alone:
            self._objective(self._run(inputs), inputs).backward()  # type: ignore[no-untyped-call]  # likewise
        drop_gradients(self.parameters)
        wrong = [
            name
            for name, together in flattened.items()
            if name not in alone.flattened
            or not same_gradient([together], [alone.flattened[name]], dtype=self.model.dtype)
        ]
        self._in_order = not wrong
        return wrong

    def _compute_one_by_one(self, rows: Sequence[Encoded], *, pad_id: int) -> Batch:
        batch = self._batch(len(rows))
        for position, row in enumerate(rows):
            here = slice(position, position + 1)
            inputs = self._inputs([row], pad_id=pad_id)
            outputs = self._run(inputs)
            states = [] if outputs.output is None else [outputs.output.states]
            gradients = torch.autograd.grad(
                self._objective(outputs, inputs),
                [*self.parameters.values(), *states],
                allow_unused=True,
                materialize_grads=True,
            )
            batch.take_outputs(outputs, here)
            for name, gradient in zip(self.parameters, gradients, strict=False):
                # autograd may give two parameters one tensor, and what is taken may be overwritten
                batch.take(name, gradient.flatten().clone().unsqueeze(0), here)
        return batch

    def _inputs(self, rows: Sequence[Encoded], *, pad_id: int) -> Inputs:
        """Put rows on the device as one batch; a row alone is the same packed and padded."""
        if self.packing and len(rows) > 1:
            return Inputs.packed(rows, device=self.device)
        return Inputs.of(rows, pad_id=pad_id, device=self.device)

    def _batch(self, examples: int) -> Batch:
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        make = partial(make_sums, examples, unscale=1 / self._scale)
        sums = output = None
        if self._projection is not None:
            sums = make(directions=self._directions, projection=self._projection)
        if self._output is not None and self._output_projection is not None:
            output = make(directions={self._output: sgd}, projection=self._output_projection)
        return Batch(examples, sizes, sums, output, device=self.device)


def _logodds(kinds: Sequence[Kind], reduction: Reduction) -> LogoddsForm | None:
    """Return the form of log-odds whose gradient is asked for, if any; raises ValueError where it is not the only one.

    One backward pass has one objective.
    """
    gradients = [kind for kind in kinds if kind.is_projected]
    found = [kind.logodds for kind in gradients if kind.name == "logodds"]
    if not found:
        return None
    if len(gradients) > 1:
        raise ValueError("logodds is the gradient of log-odds, and takes a pass without other kinds of gradients")
    if reduction == "sum":
        raise ValueError("the log-odds of an example are the mean of its tokens': they have no reduction=sum")
    return found[0]


def _drop(_name: str, _gradients: Tensor, _examples: slice) -> None:
    """Take in gradients for nothing."""


def _hidden_size(model: Model) -> int:
    """Return the width of what the output layer gets; raises ValueError where there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("the model has no output layer, whose input would be its hidden state")
    # what an adapter puts around it, or in its place where it is tied to embeddings, need not know its width
    linear = next((module for module in head.modules() if isinstance(module, nn.Linear)), head)
    return int(linear.in_features)
