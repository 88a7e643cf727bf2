"""The kernels against torch's operations: on a GPU, or in Triton's interpreter where Triton alone is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from worker.directions import Direction, Kind, Moments, make_direction
from worker.projection import make_projection
from worker.sums import PlainSums, Sums, make_sums

pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="needs Triton, which comes with torch for CUDA; scripts/test-kernels brings it",
    ),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [Kind("adam"), Kind("adam", "exact"), Kind("sgd"), Kind("sign")]
UNSCALE = 0.25


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("worker.kernels")


def directions(kinds: list[Kind], sizes: dict[str, int]) -> dict[Kind, Direction]:
    parameters = {name: torch.zeros(size) for name, size in sizes.items()}
    generator = torch.Generator().manual_seed(1)
    moments = Moments(
        {name: torch.randn(size, generator=generator) * 1e-3 for name, size in sizes.items()},
        {name: torch.rand(size, generator=generator).pow(4) * 1e-5 for name, size in sizes.items()},
        step=9,
    )
    return {kind: make_direction(kind, moments=moments, parameters=parameters, device=DEVICE) for kind in kinds}


def both(
    kernels: ModuleType, examples: int, sizes: dict[str, int], dims: list[int], kinds: list[Kind]
) -> tuple[Sums, Sums]:
    projection = make_projection(
        "blocks", dims=dims, parameters=[(n, torch.Size([s])) for n, s in sizes.items()], seed=3, device=DEVICE
    )
    maps = directions(kinds, sizes)
    return kernels.FusedSums(examples, maps, projection, UNSCALE), PlainSums(examples, maps, projection, UNSCALE)


def gradients(examples: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(examples, size, generator=torch.Generator().manual_seed(size)) * 1e-2).to(DEVICE, dtype)


def assert_same(fused_sums: Sums, plain_sums: Sums) -> None:
    fused, plain = fused_sums.totals(), plain_sums.totals()
    assert torch.equal(fused.peaks, plain.peaks)
    assert torch.allclose(fused.raw_squares, plain.raw_squares, rtol=1e-5)
    for kind, wanted in plain.by_kind.items():
        got = fused.by_kind[kind]
        assert torch.allclose(got.squares, wanted.squares, rtol=1e-5)
        for dim, sums in wanted.by_dim.items():
            errors = (got.by_dim[dim] - sums).norm(dim=1) / wanted.squares.sqrt()
            assert float(errors.max()) < 1e-6, (kind, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("examples", "size", "dims"),
    [
        (1, 1, [1]),
        (1, 700, [37]),
        (3, 1000, [130, 64]),
        (17, 129, [600, 97]),
        (16, 2048, [256]),
        (5, 129, [4096]),
    ],
)
def test_the_kernel_gives_the_sums_of_torchs_operations(
    kernels: ModuleType, examples: int, size: int, dims: list[int], dtype: torch.dtype
) -> None:
    sizes = {"a.lora_A.weight": size, "a.bias": 7}
    fused, plain = both(kernels, examples, sizes, dims, KINDS)
    for name, numbers in sizes.items():
        for part in (slice(0, examples // 2), slice(examples // 2, examples)):
            if part.start < part.stop:
                given = gradients(examples, numbers, dtype)[part]
                fused.take(name, given.clone(), part)
                plain.take(name, given.clone(), part)
    assert_same(fused, plain)


def test_more_runs_than_programs_are_added_by_few_programs(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits that do not divide the number of runs, and a last one with nothing left to do."""
    for programs in (1, 3, 5, 100):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        fused, plain = both(kernels, 2, {"a": 1300}, [130], [Kind("sgd")])
        given = gradients(2, 1300)
        fused.take("a", given.clone(), slice(0, 2))
        plain.take("a", given.clone(), slice(0, 2))
        assert_same(fused, plain)


def test_the_same_batch_gives_the_same_bits_and_an_example_does_not_depend_on_the_others(kernels: ModuleType) -> None:
    given = gradients(18, 900)

    def sums(of: torch.Tensor) -> torch.Tensor:
        fused, _ = both(kernels, len(of), {"a": 900}, [128], [Kind("adam")])
        fused.take("a", of.clone(), slice(0, len(of)))
        return fused.totals().by_kind[Kind("adam")].by_dim[128]

    together = sums(given)
    assert torch.equal(sums(given), together)
    assert torch.equal(sums(given[17:]), together[17:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, dividing infinities
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_shows_in_the_peak_of_its_example_alone(
    kernels: ModuleType, kind: Kind, broken: float
) -> None:
    fused, _ = both(kernels, 3, {"a": 100}, [64], [kind])
    given = gradients(3, 100)
    given[1, 70] = broken
    fused.take("a", given, slice(0, 3))
    totals = fused.totals()
    assert totals.peaks.isfinite().tolist() == [True, False, True]
    assert totals.by_kind[kind].by_dim[64][[0, 2]].isfinite().all()


def test_gradients_of_zero_have_a_peak_of_zero_and_adam_still_moves(kernels: ModuleType) -> None:
    found = []
    for sums in both(kernels, 2, {"a": 100}, [64], KINDS):
        sums.take("a", torch.zeros(2, 100, device=DEVICE), slice(0, 2))
        found.append(sums.totals())
    fused, plain = found
    assert fused.peaks.tolist() == [0, 0]
    assert fused.raw_squares.tolist() == [0, 0]
    assert fused.by_kind[Kind("sgd")].by_dim[64].abs().max() == 0
    assert torch.allclose(fused.by_kind[KINDS[0]].by_dim[64], plain.by_kind[KINDS[0]].by_dim[64], rtol=1e-5)


def test_only_blocks_on_a_gpu_goes_through_the_kernel() -> None:
    parameters = [("a", torch.Size([10]))]
    for name in ("blocks", "rademacher"):
        projection = make_projection(name, dims=[4], parameters=parameters, seed=0, device=DEVICE)
        chosen = make_sums(2, directions=directions([Kind("sgd")], {"a": 10}), projection=projection)
        assert isinstance(chosen, PlainSums) == (DEVICE.type == "cpu" or name != "blocks")
