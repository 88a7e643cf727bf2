"""What is found of each row: its features, lengths and loss, or the reason why it has none; batch by batch.

A `Batch` takes in what comes of a pass over some rows, on the device. `store` writes it to their places in `Found`, on
the host, which becomes the `Features` of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker import taps
from worker.batches import IGNORED, Encoded, slices
from worker.directions import Kind
from worker.layouts import Pooling
from worker.losses import Outputs
from worker.sums import Sums, Totals

LOSS_NOT_FINITE = "loss is not finite"
GRADIENT_NOT_FINITE = "gradient is not finite"
GRADIENT_ZERO = "gradient is zero"
FEATURE_NOT_FINITE = "feature is not finite"
NOTHING_SUPERVISED = "no supervised token"
OUTPUT = "output"
"""What the output layer's gradient is called among parameters."""


@dataclass(frozen=True)
class Features:
    """The features of n examples of one kind, in the order they were given."""

    by_dim: dict[int, NDArray[np.float32]]
    """(n, dim) for each dim; zeros where there is a reason. Of hidden states the one dim is the hidden size."""
    norms: NDArray[np.float32]
    """(n,) length of the gradient after Adam's map or the sign, before the projection, or of the mean hidden state; 0
    where there is a reason."""
    reasons: list[str | None]
    """Why an example has no feature; None where it has one."""
    losses: NDArray[np.float32]
    """(n,) mean cross-entropy over the supervised tokens; 0 where it is not finite."""
    tokens: NDArray[np.int32]
    """(n,) supervised tokens."""
    raw_norms: NDArray[np.float32]
    """(n,) length of the gradient itself, 0 where it is not finite; of hidden states and of the output layer's gradient
    the same as `norms`."""
    logodds: NDArray[np.float32] | None = None
    """(n,) mean log-odds of the supervised tokens, 0 where they are not finite; None of other kinds than `logodds`."""


class Found:
    """The features of all rows of a call, filled batch by batch; `dims` are those of each kind."""

    def __init__(self, rows: Sequence[Encoded], *, dims: Mapping[Kind, Sequence[int]]) -> None:
        count = len(rows)
        self.tokens = np.array([_supervised_tokens(row) for row in rows], dtype=np.int32)
        self.losses = np.zeros(count, dtype=np.float32)
        self.raw_norms = np.zeros(count, dtype=np.float32)
        self.logodds = np.zeros(count, dtype=np.float32)
        self.features = {
            kind: {dim: np.zeros((count, dim), dtype=np.float32) for dim in own} for kind, own in dims.items()
        }
        self.norms = {kind: np.zeros(count, dtype=np.float32) for kind in dims}
        self.reasons = {kind: [None if tokens else NOTHING_SUPERVISED for tokens in self.tokens] for kind in dims}

    def put(
        self,
        kind: Kind,
        rows: Sequence[int],
        features: Mapping[int, Tensor],
        norms: Tensor,
        faults: Mapping[str, Tensor],
    ) -> None:
        """Write features of a batch to its rows; where one of `faults` is true, its name as the reason, and zeros.

        Of several faults the first is named.
        """
        faulty = {reason: found.tolist() for reason, found in faults.items()}
        reasons = [
            next((reason for reason, found in faulty.items() if found[example]), None) for example in range(len(rows))
        ]
        kept = torch.tensor([reason is None for reason in reasons], device=norms.device)
        for dim, values in features.items():
            self.features[kind][dim][rows] = torch.where(kept[:, None], values, 0).cpu().numpy()
        self.norms[kind][rows] = torch.where(kept, norms, 0).cpu().numpy()
        for row, reason in zip(rows, reasons, strict=True):
            self.reasons[kind][row] = reason

    def by_kind(self) -> dict[Kind, Features]:
        """Return what was found, kind by kind."""
        return {
            kind: Features(
                by_dim=by_dim,
                norms=self.norms[kind],
                reasons=self.reasons[kind],
                losses=self.losses,
                tokens=self.tokens,
                raw_norms=self.raw_norms if kind.needs_gradient else self.norms[kind],
                logodds=self.logodds if kind.name == "logodds" else None,
            )
            for kind, by_dim in self.features.items()
        }


class Batch:
    """What is known of one batch while its gradients come in, parameter by parameter."""

    def __init__(
        self, examples: int, sizes: Mapping[str, int], sums: Sums | None, output: Sums | None, *, device: torch.device
    ) -> None:
        self.seen: set[str] = set()
        self._sizes = sizes
        self._sums = sums
        self._output = output
        self._losses = torch.zeros(examples, device=device)
        self._logodds = torch.zeros(examples, device=device)
        self._hidden: dict[Pooling, Tensor] = {}

    def take(self, name: str, gradients: Tensor, examples: slice) -> None:
        """Take in the flat gradients (examples, size) of one parameter; they may be overwritten."""
        self.seen.add(name)
        if self._sums is not None:
            self._sums.take(name, gradients, examples)

    def take_zeros(self, names: set[str]) -> None:
        """Take in parameters that the loss did not depend on: Adam moves these too."""
        for name in sorted(names):
            for examples in slices(len(self._losses), self._sizes[name], elements=taps.GRADIENT_ELEMENTS):
                zeros = torch.zeros(examples.stop - examples.start, self._sizes[name], device=self._losses.device)
                self.take(name, zeros, examples)

    def take_outputs(self, outputs: Outputs, examples: slice) -> None:
        """Take in the losses, log-odds, hidden states and output layer's gradients of some of the batch's examples."""
        self._losses[examples] = outputs.losses.detach()
        if outputs.logodds is not None:
            self._logodds[examples] = outputs.logodds.detach()
        for pooling, means in outputs.hidden.items():
            if pooling not in self._hidden:
                self._hidden[pooling] = torch.zeros(len(self._losses), means.shape[1], device=self._losses.device)
            self._hidden[pooling][examples] = means
        if outputs.output is not None and self._output is not None:
            for part, gradients in outputs.output.gradients():
                self._output.take(OUTPUT, gradients, slice(examples.start + part.start, examples.start + part.stop))

    def finite(self) -> bool:
        """Whether nothing in it is NaN or infinite."""
        parts = [self._losses, self._logodds, *self._hidden.values()]
        parts += [sums.totals().peaks for sums in (self._sums, self._output) if sums is not None]
        return all(bool(part.isfinite().all()) for part in parts)

    def store(self, found: Found, rows: Sequence[int]) -> None:
        """Write the batch to its rows, with a reason and zeros for what is no feature."""
        found.losses[rows] = torch.where(self._losses.isfinite(), self._losses, 0).cpu().numpy()
        found.logodds[rows] = torch.where(self._logodds.isfinite(), self._logodds, 0).cpu().numpy()
        if self._sums is not None:
            totals = self._sums.totals()
            raw = totals.raw_squares.sqrt().float()
            found.raw_norms[rows] = torch.where(raw.isfinite(), raw, 0).cpu().numpy()
            self._store_gradients(totals, found, rows)
        if self._output is not None:
            self._store_gradients(self._output.totals(), found, rows)
        for kind in found.features:
            if kind.pooling is None:
                continue
            means = self._hidden[kind.pooling]
            norms = torch.linalg.vector_norm(means.double(), dim=1).float()
            faults = {LOSS_NOT_FINITE: ~self._losses.isfinite(), FEATURE_NOT_FINITE: ~norms.isfinite()}
            found.put(kind, rows, {means.shape[1]: means}, norms, faults)

    def _store_gradients(self, totals: Totals, found: Found, rows: Sequence[int]) -> None:
        peaks = totals.peaks
        for kind, of_kind in totals.by_kind.items():
            norms = of_kind.squares.sqrt().float()
            faults = {
                LOSS_NOT_FINITE: ~(self._losses.isfinite() & self._logodds.isfinite()),
                GRADIENT_NOT_FINITE: ~(peaks.isfinite() & norms.isfinite()),
                GRADIENT_ZERO: peaks == 0,
            }
            found.put(kind, rows, of_kind.by_dim, norms, faults)


def _supervised_tokens(row: Encoded) -> int:
    """Count the tokens that are predicted and supervised; nothing predicts the first one."""
    return sum(label != IGNORED for label in row.labels[1:])
