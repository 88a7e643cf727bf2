"""Who is measured: the plain training step, this project's engine, and LESS's loop as published.

`run` does the work on some rows and keeps what the contestant would keep; `features` returns it as float32 for the
comparison with exact gradients. What a contestant makes once (moments, signs, cached matrices) is made before it is
timed; what it makes for every batch is part of its time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.workload import Workload, trainable
from worker.batches import Encoded
from worker.directions import BETA1, BETA2, EPSILON, Kind
from worker.gradients import GradientEngine
from worker.projection import ProjectionName

Exact = Literal["adam less", "adam exact", "sgd", "sign"]
"""The unprojected gradient that features stand for."""

ADAM = Kind("adam")

LESS_INTERVAL = 16  # gradients that LESS collects before it projects them
LESS_BLOCK = 128  # columns of its random matrix at a time, or as many as LESS_ELEMENTS allow
LESS_ELEMENTS = 1 << 32  # 16 GiB as float32


class Contestant(ABC):
    """Something that takes rows and, the plain step apart, makes a feature of each."""

    name: str
    exact: Exact | None = None
    """What its features are compared with; None where it makes none."""
    token_budget: int | None = None
    """Padded tokens of a batch; None where it has its own rule."""
    draws_matrix = False
    """Whether it draws a dense matrix for every batch, and so wants the largest one."""
    default_budget: int | None = None
    """The batch that such a one gets instead: the default of its own documentation."""

    def run(self, rows: Sequence[Encoded]) -> None:
        """Do the work on `rows` as the contestant does it in use."""
        self.features(rows)

    @abstractmethod
    def features(self, rows: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the feature of each row: (rows, dim)."""


class Plain(Contestant):
    """A training step without its optimizer: forward and backward of a batch to the parameters of LoRA.

    Batches are planned as for the engine, padded on the right without a mask, and every token's logits are made.
    """

    name = "plain"

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def run(self, rows: Sequence[Encoded]) -> None:
        """Do a step for each batch; the gradients are dropped, as after an optimizer's step."""
        assert self.token_budget is not None
        for batch in self._workload.batches(rows, self.token_budget):
            losses(self._workload, [rows[index] for index in batch]).sum().backward()  # type: ignore[no-untyped-call]
            self._workload.model.zero_grad()

    def features(self, rows: Sequence[Encoded]) -> NDArray[np.float32]:
        """Raise: a summed gradient is no feature."""
        raise NotImplementedError("the plain step makes no features")


def losses(workload: Workload, rows: Sequence[Encoded]) -> Tensor:
    """Return the mean cross-entropy of each row: (rows,)."""
    input_ids, labels = workload.inputs(rows)
    logits = workload.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    each = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return each.view(targets.shape).sum(1) / (targets >= 0).sum(1)


class Ours(Contestant):
    """This project's engine, with one kind of features or several from one pass; the first is compared."""

    def __init__(self, workload: Workload, *kinds: Kind, projection: ProjectionName) -> None:
        labels = [exact_of(kind) for kind in kinds]
        self.name = f"gradstore {' + '.join(labels)} {projection}"
        self.exact = labels[0]
        self.projection = projection
        self.draws_matrix = projection == "rademacher"
        self.kinds = kinds
        self._dim = workload.parameters if projection == "none" else workload.dims
        self.engine = GradientEngine(
            workload.model, kinds=kinds, moments=workload.moments, projection=projection, dims=[self._dim]
        )

    def features(self, rows: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the feature of each row: (rows, dim)."""
        assert self.token_budget is not None
        by_kind = self.engine.features(rows, pad_id=0, token_budget=self.token_budget)
        return by_kind[self.kinds[0]].by_dim[self._dim]


def exact_of(kind: Kind) -> Exact:
    """Name the unprojected gradient of a kind."""
    names: dict[Kind, Exact] = {
        ADAM: "adam less",
        Kind("adam", "exact"): "adam exact",
        Kind("sgd"): "sgd",
        Kind("sign"): "sign",
    }
    return names[kind]


class Less(Contestant):
    """LESS's published loop: one example at a time through autograd, Adam's map, a dense random ±1 matrix.

    The gradients of 16 examples are projected together, by a matrix drawn anew each time in blocks of columns, and kept
    as float16. Written from its description, on the device of the model.
    """

    name = "LESS's loop"
    exact = "adam less"

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def features(self, rows: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the feature of each row: (rows, dims)."""
        parts = []
        gradients: list[Tensor] = []
        for gradient in exact_gradients(self._workload, rows, "adam less"):
            gradients.append(gradient)
            if len(gradients) == LESS_INTERVAL:
                parts.append(self._project(torch.stack(gradients)))
                gradients.clear()
        if gradients:
            parts.append(self._project(torch.stack(gradients)))
        return torch.cat(parts).float().numpy()

    def _project(self, gradients: Tensor) -> Tensor:
        dims = self._workload.dims
        generator = torch.Generator(gradients.device).manual_seed(0)
        result = torch.empty(len(gradients), dims, device=gradients.device)
        block = min(LESS_BLOCK, LESS_ELEMENTS // gradients.shape[1])
        for start in range(0, dims, block):
            shape = (gradients.shape[1], min(block, dims - start))
            matrix = torch.empty(shape, device=gradients.device).bernoulli_(0.5, generator=generator)
            result[:, start : start + block] = gradients @ matrix.mul_(2).sub_(1)
        return result.div_(dims**0.5).to(torch.float16).cpu()


def exact_gradients(workload: Workload, rows: Sequence[Encoded], exact: Exact) -> Iterator[Tensor]:
    """Yield the unprojected gradient of each row, flat float32, by plain autograd one example at a time."""
    named = trainable(workload.model)
    direction = _direction(workload, list(named), exact)
    for row in rows:
        gradients = torch.autograd.grad(losses(workload, [row]).sum(), list(named.values()))
        yield direction(torch.cat([gradient.flatten().float() for gradient in gradients]))


def _direction(workload: Workload, names: Sequence[str], exact: Exact) -> Callable[[Tensor], Tensor]:
    if exact == "sgd":
        return lambda gradient: gradient
    if exact == "sign":
        return torch.sign
    moments = workload.moments
    mean = torch.cat([moments.exp_avg[name].flatten() for name in names])
    square = torch.cat([moments.exp_avg_sq[name].flatten() for name in names])
    step = moments.step + 1

    def adam(gradient: Tensor) -> Tensor:
        first = mean.lerp(gradient, 1 - BETA1)
        second = square.lerp(gradient.square(), 1 - BETA2)
        if exact == "adam less":
            return first / torch.sqrt(second + EPSILON)
        return (first / (1 - BETA1**step)) / (torch.sqrt(second / (1 - BETA2**step)) + EPSILON)

    return adam
