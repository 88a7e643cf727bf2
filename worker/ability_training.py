"""Training and use of an ability space: arrays in, a projector and its report out.

5,000 rows of 8,192 columns take minutes on a CPU (docs/cods.md has them measured). A projector holds what its rows
were standardised with, which is of the rows trained on alone: rows that come later are placed as those were, and the
rows that judge it have had no part in it. The same seed gives the same bytes on a CPU with the same number of threads.
Memory beside the streams: a batch, and 16 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from gradstore.types import ProjectorConfig, ProjectorEpoch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from datastore.errors import Conflict
from datastore.multilabel import sample_scores
from datastore.projectors import LEAST_ROWS, held_out
from datastore.selection.abilities import Places
from worker.ability_space import (
    TEMPERATURES,
    AbilitySpace,
    Dims,
    classification_loss,
    contrastive_loss,
    gram_error,
    repulsion_loss,
)

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
LARGEST_GRADIENT = 1.0
"""Norm to which the gradients of a step are clipped."""
LAST_RATE = 0.1
"""Part of the learning rate that is left at the end of a stage."""
AT_ONCE = 1024
"""Rows that are placed at a time."""
EPSILON = 1e-8


@dataclass(frozen=True)
class Streams:
    """What is known of rows: gradients, hidden states behind them (n, columns), and routing weights (n, experts)."""

    gradients: Floats
    routing: Floats | None = None

    def __len__(self) -> int:
        return len(self.gradients)


@dataclass(frozen=True)
class Standard:
    """What a stream is standardised with: a column's mean and standard deviation (columns,)."""

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, rows: Floats, counted: NDArray[np.intp]) -> Standard:
        """Of the counted rows of a stream: unbiased, plus 1e-8.

        A column that is the same in all of them is centred only: divided by 1e-8, a later row in which it is not would
        be nothing but that column. Raises `Conflict` where fewer than two rows count.
        """
        if len(counted) < 2:
            raise Conflict(
                "fewer than two rows to train on have a gradient that is not zero: there is nothing to learn"
            )
        total = np.zeros(rows.shape[1])
        for part in _parts(counted):
            total += rows[part].sum(axis=0, dtype=np.float64)
        mean = total / len(counted)
        squares = np.zeros(rows.shape[1])
        for part in _parts(counted):
            squares += np.square(rows[part] - mean).sum(axis=0)
        deviation = np.sqrt(squares / (len(counted) - 1))
        return cls(mean.astype(np.float32), np.where(deviation > 0, deviation + EPSILON, 1).astype(np.float32))

    def apply(self, rows: Floats) -> Floats:
        """The rows in standard deviations from the mean."""
        return (rows - self.mean) / self.deviation


@dataclass(frozen=True)
class Split:
    """Which rows are trained on, and which judge."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]

    @classmethod
    def of(cls, rows: int, *, fraction: float, seed: int) -> Split:
        """A draw of `fraction` of the rows to judge by. Raises `Conflict` where there are too few."""
        if rows < LEAST_ROWS:
            raise Conflict(
                f"{rows} rows have an annotation and all streams: a projector is trained on at least {LEAST_ROWS}"
            )
        order = np.random.default_rng(seed).permutation(rows)
        judged = held_out(rows, fraction)
        return cls(np.sort(order[judged:]), np.sort(order[:judged]))


@dataclass(frozen=True)
class Projector:
    """A network and what its rows are standardised with."""

    space: AbilitySpace
    gradients: Standard
    routing: Standard | None

    def standardised(self, streams: Streams, rows: NDArray[np.intp] | slice) -> tuple[Tensor, Tensor | None]:
        """Some rows as the network reads them, on its device."""
        device = self.space.base.device
        gradients = torch.from_numpy(self.gradients.apply(streams.gradients[rows])).to(device)
        if self.routing is None or streams.routing is None:
            return gradients, None
        return gradients, torch.from_numpy(self.routing.apply(streams.routing[rows])).to(device)

    @torch.inference_mode()
    def place(self, streams: Streams, *, on_rows: Callable[[int], None] = lambda _done: None) -> Places:
        """Where rows are; `on_rows` hears of rows done."""
        self.space.eval()
        scale = float(self.space.temperature.clamp(*TEMPERATURES))
        found: list[tuple[Floats, ...]] = []
        for start in range(0, len(streams), AT_ONCE):
            placed = self.space(*self.standardised(streams, slice(start, start + AT_ONCE)))
            parts = (placed.embedding, placed.logits.sigmoid(), placed.similarity / scale)
            found.append(tuple(part.float().cpu().numpy() for part in parts))
            on_rows(min(start + AT_ONCE, len(streams)))
        u, probabilities, similarities = (np.concatenate(part) for part in zip(*found, strict=True))
        return Places(u, probabilities, similarities, np.ones(len(streams), bool))

    @torch.inference_mode()
    def logits(self, streams: Streams, rows: NDArray[np.intp]) -> Tensor:
        """What the network says of some rows (m, capabilities), on the CPU."""
        self.space.eval()
        return torch.cat([self.space(*self.standardised(streams, part)).logits.float().cpu() for part in _parts(rows)])


@dataclass(frozen=True)
class Trained:
    """A projector and how its training went."""

    projector: Projector
    split: Split
    zero_rows: int
    epochs: list[ProjectorEpoch]
    predicted: Bools
    """Capabilities of the validation rows, by a probability over 0.5 (m, capabilities)."""


def fit(
    streams: Streams,
    labels: Bools,
    config: ProjectorConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] = lambda _done: None,
    on_epoch: Callable[[ProjectorEpoch], None] = lambda _epoch: None,
) -> Trained:
    """Train a projector on labelled rows, in two stages; labels are (n, capabilities).

    `on_step` hears of steps done, `on_epoch` of every epoch as it ends. Raises `Conflict` where there are too few rows.
    """
    split = Split.of(len(streams), fraction=config.validation_fraction, seed=seed)
    counted = split.train[_not_zero(streams.gradients, split.train)]
    dims = Dims(streams.gradients.shape[1], _columns(streams.routing), labels.shape[1])
    with _seeded(seed, device):
        projector = Projector(
            AbilitySpace(dims, config).to(device),
            Standard.of(streams.gradients, counted),
            None if streams.routing is None else Standard.of(streams.routing, split.train),
        )
        epochs: list[ProjectorEpoch] = []
        training = _Training(projector, streams, labels, config, split, on_step)
        for epoch in training.run():
            epochs.append(epoch)
            on_epoch(epoch)
        predicted = (projector.logits(streams, split.validation) > 0).numpy()
    return Trained(projector, split, len(split.train) - len(counted), epochs, predicted)


class _Training:
    """The two stages."""

    def __init__(
        self,
        projector: Projector,
        streams: Streams,
        labels: Bools,
        config: ProjectorConfig,
        split: Split,
        on_step: Callable[[int], None],
    ) -> None:
        self._projector, self._space = projector, projector.space
        self._streams, self._config, self._split = streams, config, split
        self._labels = labels
        self._targets = torch.from_numpy(labels.astype(np.float32))
        self._on_step, self._steps = on_step, 0

    def run(self) -> Iterator[ProjectorEpoch]:
        """Every epoch as it ends."""
        yield from self._stage(1, self._config.epochs, self._config.learning_rate)
        yield from self._stage(2, self._config.adjustment_epochs, self._config.adjustment_learning_rate)

    def _stage(self, stage: int, epochs: int, rate: float) -> Iterator[ProjectorEpoch]:
        learning = self._space.learning(stage)
        optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=self._config.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1), eta_min=LAST_RATE * rate)
        for epoch in range(1, epochs + 1):
            self._space.train()
            sums = np.zeros(4)
            for rows in self._batches():
                losses = self._losses(rows, stage)
                optimizer.zero_grad(set_to_none=True)
                losses[0].backward()  # type: ignore[no-untyped-call]
                clip_grad_norm_(learning, LARGEST_GRADIENT)
                optimizer.step()
                self._space.straighten()
                sums += len(rows) * np.array([float(loss.detach()) for loss in losses])
                self._steps += 1
                self._on_step(self._steps)
            schedule.step()
            yield self._report(stage, epoch, sums / len(self._split.train))

    def _batches(self) -> Iterator[NDArray[np.intp]]:
        """The rows trained on, once in a random order."""
        order, size = self._split.train[torch.randperm(len(self._split.train)).numpy()], self._config.batch_size
        return (order[start : start + size] for start in range(0, len(order), size))

    def _losses(self, rows: NDArray[np.intp], stage: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss that is learned from, and its three parts."""
        config = self._config
        gradients, routing = self._projector.standardised(self._streams, rows)
        gradients = gradients + config.gradient_noise * torch.randn_like(gradients)
        if routing is not None:
            routing = routing + config.routing_noise * torch.randn_like(routing)
        labels = self._targets[rows].to(gradients.device)
        placed = self._space(gradients, routing)
        classification = classification_loss(placed.logits, labels, alpha=config.alpha)
        if stage == 1:
            zero = torch.zeros_like(classification)
            return classification, classification, zero, zero
        contrastive = contrastive_loss(placed.embedding, labels)
        repulsion = repulsion_loss(self._space.gram())
        total = classification + config.contrastive_weight * contrastive + config.repulsion_weight * repulsion
        return total, classification, contrastive, repulsion

    def _report(self, stage: int, epoch: int, means: NDArray[np.float64]) -> ProjectorEpoch:
        judged = self._split.validation
        logits = self._projector.logits(self._streams, judged)
        scores = sample_scores((logits > 0).numpy(), self._labels[judged])
        adjusted = stage == 2
        return ProjectorEpoch(
            stage=stage,
            epoch=epoch,
            loss=means[0],
            classification_loss=means[1],
            contrastive_loss=means[2] if adjusted else None,
            repulsion_loss=means[3] if adjusted else None,
            validation_loss=float(classification_loss(logits, self._targets[judged], alpha=self._config.alpha)),
            exact_match=scores.exact_match,
            precision=scores.precision,
            recall=scores.recall,
            f1=scores.f1,
            gram_error=gram_error(self._space.gram()),
            temperature=float(self._space.temperature.detach()),
        )


def _columns(stream: Floats | None) -> int:
    return 0 if stream is None else stream.shape[1]


def _not_zero(stream: Floats, rows: NDArray[np.intp]) -> Bools:
    """Which of the rows are not all zero (m,)."""
    return np.concatenate([stream[part].any(axis=1) for part in _parts(rows)])


def _parts(rows: NDArray[np.intp]) -> Sequence[NDArray[np.intp]]:
    return [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]


@contextmanager
def _seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Torch's generators drawn from a seed, and as they were at the end."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
