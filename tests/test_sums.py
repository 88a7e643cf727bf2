"""What the gradients of a batch add up to, against the same sums written out in float64.

On a GPU one kernel does the same for `blocks`: tests/test_kernels.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import bruteforce
from worker.directions import Kind, Moments, make_direction
from worker.projection import make_projection
from worker.sums import PlainSums

SIZES = {"b.weight": 300, "a.weight": 70, "a.bias": 7}
KINDS = [Kind("adam", "less"), Kind("sign"), Kind("adam", "exact"), Kind("sgd")]
EXAMPLES = 5
DIMS = [16, 90]


def moments() -> Moments:
    generator = torch.Generator().manual_seed(1)
    return Moments(
        {name: torch.randn(size, generator=generator) * 1e-2 for name, size in SIZES.items()},
        {name: torch.rand(size, generator=generator) * 1e-4 for name, size in SIZES.items()},
        step=3,
    )


def gradients() -> dict[str, torch.Tensor]:
    """Of each parameter (examples, size); all that the first example has is zero or in the first parameter."""
    generator = torch.Generator().manual_seed(2)
    made = {name: torch.randn(EXAMPLES, size, generator=generator) * 1e-2 for name, size in SIZES.items()}
    for name in list(made)[1:]:
        made[name][0] = 0
    return made


def sums(given: dict[str, torch.Tensor], *, slices: list[slice], unscale: float = 1.0) -> PlainSums:
    """The sums of gradients that come parameter by parameter, each in slices of the batch."""
    shapes = {name: torch.zeros(size) for name, size in SIZES.items()}
    maps = {
        kind: make_direction(kind, moments=moments(), parameters=shapes, device=torch.device("cpu")) for kind in KINDS
    }
    projection = make_projection("blocks", dims=DIMS, parameters=[(n, p.shape) for n, p in shapes.items()], seed=3)
    made = PlainSums(len(next(iter(given.values()))), maps, projection, unscale)
    for name, values in given.items():
        for part in slices:
            made.take(name, values[part].clone(), part)
    return made


def directions(flat: NDArray[np.float64]) -> dict[Kind, NDArray[np.float64]]:
    found = moments()
    m, v = (np.concatenate([of[name].double().numpy() for name in SIZES]) for of in (found.exp_avg, found.exp_avg_sq))
    made = {kind: bruteforce.adam_step(flat, m, v, step=3, form=kind.adam) for kind in KINDS if kind.name == "adam"}
    return made | {Kind("sgd"): flat, Kind("sign"): np.sign(flat)}


@pytest.mark.parametrize("slices", [[slice(0, 5)], [slice(0, 2), slice(2, 4), slice(4, 5)]])
@pytest.mark.parametrize("together", [1, 300, 371, 1 << 15])
def test_gradients_taken_in_one_by_one_or_together_add_up_to_the_same(
    together: int, slices: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sums.TOGETHER", together)
    totals = sums(gradients(), slices=slices).totals()
    flat = torch.cat(list(gradients().values()), 1).double().numpy()
    np.testing.assert_allclose(totals.raw_squares, (flat**2).sum(1), rtol=1e-6)
    np.testing.assert_array_equal(totals.peaks, np.abs(flat).max(1).astype(np.float32))
    for kind, wanted in directions(flat).items():
        found = totals.by_kind[kind]
        np.testing.assert_allclose(found.squares, (wanted**2).sum(1), rtol=1e-5)
        for dim in DIMS:
            image = wanted @ bruteforce.matrix("blocks", dim, 3, SIZES)
            np.testing.assert_allclose(found.by_dim[dim], image, rtol=0, atol=1e-5 * np.abs(image).max())


@pytest.mark.parametrize("together", [1, 1 << 15])
def test_a_number_that_is_not_finite_shows_in_the_peak_of_its_example_alone(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sums.TOGETHER", together)
    given = gradients()
    given["b.weight"][1, 7] = float("nan")
    given["a.weight"][3, 7] = float("inf")
    totals = sums(given, slices=[slice(0, 5)]).totals()
    assert totals.peaks.isfinite().tolist() == [True, False, True, False, True]
    assert totals.by_kind[Kind("sgd")].by_dim[16][[0, 2, 4]].isfinite().all()


def test_a_gradient_whose_squares_vanish_in_float32_is_not_taken_for_zero() -> None:
    given = {name: torch.full((1, size), 1e-30) for name, size in SIZES.items()}
    assert sums(given, slices=[slice(0, 1)]).totals().peaks.tolist() == pytest.approx([1e-30], rel=1e-5, abs=0)


def test_a_scaled_gradient_of_half_precision_is_scaled_back_in_float32() -> None:
    """10⁻⁴ over 1,024 keeps one digit in float16."""
    given = {name: torch.full((1, size), 1e-4, dtype=torch.float16) for name, size in SIZES.items()}
    totals = sums(given, slices=[slice(0, 1)], unscale=1 / 1024).totals()
    value = float(given["a.bias"][0, 0]) / 1024
    assert totals.peaks.tolist() == pytest.approx([value], rel=1e-5, abs=0)
    assert totals.raw_squares.tolist() == pytest.approx([value**2 * sum(SIZES.values())], rel=1e-5, abs=0)
