"""What every map of the family is to its caller: fed parameter by parameter, it adds to the sums of each dimension."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from worker.projection.words import MAX_DIM

ProjectionName = Literal["blocks", "sjlt", "fft", "rademacher", "reference", "none"]


class Projection(ABC):
    """A linear map from the gradients of all parameters to one or several dimensions, fed parameter by parameter.

    `parameters` are the names and shapes of the trainable parameters. Sums are float32.
    """

    name: ProjectionName

    def __init__(
        self,
        *,
        dims: Sequence[int],
        parameters: Sequence[tuple[str, torch.Size]],
        seed: int,
        device: torch.device,
    ) -> None:
        self.dims = tuple(dims)
        self.seed = seed
        self.device = device
        self.sizes = {name: shape.numel() for name, shape in parameters}
        if len(self.sizes) != len(parameters):
            raise ValueError("a parameter is named twice")
        self._prepare()

    def _prepare(self) -> None:
        """Check the dimensions, and draw what is kept."""
        if not self.dims or len(set(self.dims)) != len(self.dims) or not all(1 <= dim <= MAX_DIM for dim in self.dims):
            raise ValueError(f"dims are different numbers between 1 and {MAX_DIM}, not {list(self.dims)}")

    def zeros(self, examples: int) -> dict[int, Tensor]:
        """Return the sums to add to: (examples, dim) float32 zeros for each dim."""
        return {dim: torch.zeros(examples, dim, device=self.device) for dim in self.dims}

    @abstractmethod
    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""

    def project(self, named: Iterable[tuple[str, Tensor]], *, examples: int) -> dict[int, Tensor]:
        """Return the image of flat gradients that come parameter by parameter: (examples, dim) float32 for each dim."""
        sums = self.zeros(examples)
        for name, gradients in named:
            self.add(name, gradients, sums)
        return sums

    def lift(self, weights: Tensor) -> dict[str, Tensor]:
        """Return Pw of weights w (dim,), where the map is x ↦ xP: flat, (size,) float32, by parameter.

        `dim` is one of `dims`. The map is linear in what is added, so its transpose is its derivative: no map has to
        say twice what it is. Beside the result it holds what the derivative of one parameter needs; of a dense matrix
        that is the matrix, 4 · size · dim bytes.
        """
        dim = len(weights)
        return {name: self._lifted(name, size, dim, weights) for name, size in self.sizes.items()}

    @torch.enable_grad()
    def _lifted(self, name: str, size: int, dim: int, weights: Tensor) -> Tensor:
        place = torch.zeros(1, size, device=self.device, requires_grad=True)
        sums = self.zeros(1)
        self.add(name, place, sums)
        wanted = weights.to(device=self.device, dtype=sums[dim].dtype).unsqueeze(0)
        (found,) = torch.autograd.grad(sums[dim], place, wanted)
        return found.squeeze(0)
