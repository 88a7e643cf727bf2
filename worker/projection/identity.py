"""No projection: the gradients themselves, for small models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from worker.projection.interface import Projection


class Identity(Projection):
    """The flat gradient itself."""

    name = "none"

    def _prepare(self) -> None:
        total = sum(self.sizes.values())
        if self.dims != (total,):
            raise ValueError(
                f"without a projection a feature has one number per parameter: "
                f"dims must be [{total}], not {list(self.dims)}"
            )
        starts = [0]
        for size in self.sizes.values():
            starts.append(starts[-1] + size)
        self._starts = dict(zip(self.sizes, starts, strict=False))

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Put one parameter's flat gradients, (examples, size) float32, in their place."""
        start = self._starts[name]
        sums[self.dims[0]][:, start : start + gradients.shape[1]] += gradients
