"""The Triton kernel for GPUs: a gradient is read once, and out come its direction's sketch, its square and its peak.

What worker/sums.py does in several passes over memory (unscale, peak, Adam's map, norm, signs, a gather for each
dimension) happens in registers. A program owns some sums of some examples and goes through the runs of coordinates that
are added to them, in order; signs come from the words of their stream, made on the spot, once for all its examples.
Nothing is added atomically, so the same batch gives the same bits; different splits of the work would round
differently, so they depend on the dimension alone.

Per parameter one launch for each dimension. The first one reads the gradient from memory; the others mostly find it in
the L2 cache (16 examples of a 128 × 4,096 LoRA matrix in bfloat16 are 17 MB, an H200's cache is 50 MB). Adam's two
numbers per coordinate are read once for every `EXAMPLES` examples.

Why the outer products δᵀx are not made in here too, which would spare writing and reading the gradient: every run is
turned by its own offset, and in a LoRA A of 4,096 inputs a run of 8,192 coordinates is two rows. A program that owns
sums would have to load inputs anew for every two rows. On paper, for an example of 371 tokens at rank 128 on q, k, v, o
of 32 layers: 25 GB through the L2 cache, milliseconds, to spare 0.5 GB of bfloat16 through memory, 0.1 ms of an example
that takes 13 ms or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.directions import Adam, Direction, Kind, sgd, sign
from worker.projection.blocks import Blocks
from worker.sums import KindSums, Totals

EXAMPLES = 16  # that a program works on: so often a coordinate's sign and Adam's numbers are used
COLUMNS = 128  # sums that a program owns
PROGRAMS = 512  # for every `EXAMPLES` examples, at least where a dimension allows it; a GPU has 100 to 200 processors

_SGD, _SIGN, _ADAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NOTHING, _DIRECTION, _DIRECTION_AND_RAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class _Terms(NamedTuple):
    """A direction as the kernel takes it: (g + a) / (√(b + cg²) + d) where `form` is Adam's."""

    form: Any
    a: Tensor
    b: Tensor
    c: float
    d: float


class _Parts(NamedTuple):
    """The sums of one kind before their parts are added."""

    direction: Direction
    by_dim: dict[int, Tensor]
    """(splits, examples, dim) float32 for each dim."""
    squares: Tensor
    """(tiles of the first dim × its splits, examples) float64."""


class FusedSums:
    """The sums of one batch (`worker.sums.Sums`), by one kernel per parameter, kind and dimension."""

    def __init__(self, examples: int, directions: Mapping[Kind, Direction], projection: Blocks, unscale: float) -> None:
        device = projection.device
        dims = projection.dims
        self._projection = projection
        self._unscale = unscale
        measuring = (_splits(dims[0]) * _tiles(dims[0]), examples)
        self._raw_squares = torch.zeros(measuring, dtype=torch.float64, device=device)
        self._peaks = torch.zeros(measuring, device=device)
        self._parts = {
            kind: _Parts(
                direction,
                {dim: torch.zeros(_splits(dim), examples, dim, device=device) for dim in dims},
                torch.zeros_like(self._raw_squares),
            )
            for kind, direction in directions.items()
        }

    def totals(self) -> Totals:
        """Return what has come of all that was taken in."""
        by_kind = {
            kind: KindSums({dim: part.sum(0) for dim, part in parts.by_dim.items()}, parts.squares.sum(0))
            for kind, parts in self._parts.items()
        }
        return Totals(by_kind, self._raw_squares.sum(0), self._peaks.amax(0))

    def take(self, name: str, gradients: Tensor, examples: slice) -> None:
        """Take in one parameter's flat gradients (examples, size), of any floating type."""
        gradients = gradients.to(self._peaks.device).contiguous()
        with torch.cuda.device(gradients.device) if gradients.is_cuda else nullcontext():
            for number, parts in enumerate(self._parts.values()):
                terms = _terms(parts.direction, name, gradients)
                for position, dim in enumerate(parts.by_dim):
                    measured = _NOTHING if position else _DIRECTION if number else _DIRECTION_AND_RAW
                    self._launch(gradients, examples, parts, terms, self._projection.draws(name, dim), dim, measured)

    def _launch(
        self, gradients: Tensor, examples: slice, parts: _Parts, terms: _Terms, draws: Tensor, dim: int, measured: Any
    ) -> None:
        count, size = gradients.shape
        sums = parts.by_dim[dim]
        runs = triton.cdiv(size, dim)
        splits = min(runs, len(sums))
        _add[_tiles(dim), triton.cdiv(count, EXAMPLES), splits](
            gradients, terms.a, terms.b, draws,
            sums[:, examples], parts.squares[:, examples], self._raw_squares[:, examples], self._peaks[:, examples],
            count, size, dim, runs, triton.cdiv(runs, splits), sums.stride(0), self._peaks.stride(0),
            self._unscale, terms.c, terms.d,
            FORM=terms.form, MEASURED=measured, EXAMPLES=EXAMPLES, COLUMNS=COLUMNS,
            enable_fp_fusion=True,
        )  # fmt: skip


def _tiles(dim: int) -> int:
    """Return the number of programs that own the sums of an example."""
    return -(-dim // COLUMNS)


def _splits(dim: int) -> int:
    """Return into how many parts the runs are split, to keep a whole GPU at work with small dimensions too."""
    return max(1, PROGRAMS // _tiles(dim))


def _terms(direction: Direction, name: str, anything: Tensor) -> _Terms:
    """Return what the kernel needs of a direction; where it reads no tensors it gets `anything`."""
    if isinstance(direction, Adam):
        return _Terms(_ADAM, *direction.terms([name]))
    if direction not in {sgd, sign}:
        raise TypeError(f"the kernel does not know the direction {direction}")
    return _Terms(_SGD if direction is sgd else _SIGN, anything, anything, 0.0, 0.0)


# In the kernel --------------------------------------------------------------------------------------------------------


@triton.jit
def _signs(key, coordinates):
    """Return the signs ±1 of coordinates (int64): the bits of SplitMix64's words (worker/projection/words.py)."""
    z = (coordinates // 64 + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return ((z >> (coordinates % 64).to(tl.uint64)) & 1).to(tl.float32) * 2 - 1


@triton.jit
def _add(
    gradients, a, b, draws, parts, squares, raw_squares, peaks,
    count, size, dim, runs, runs_per_split, part_stride, measure_stride,
    unscale, c, d,
    FORM: tl.constexpr, MEASURED: tl.constexpr, EXAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add `EXAMPLES` examples' gradients (count, size) to `COLUMNS` sums of one part: the runs of one split.

    `draws`: the key of the signs, then the runs' offsets. `parts`: (splits, examples, dim), from the first of the
    examples on; `squares`, `raw_squares` and `peaks` likewise (tiles of sums × splits, examples).
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    sums = tile * COLUMNS + tl.arange(0, COLUMNS)
    examples = tl.program_id(1) * EXAMPLES + tl.arange(0, EXAMPLES)
    starts = examples.to(tl.int64)[:, None] * size
    key = tl.load(draws).to(tl.uint64)
    total = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
    square = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
    raw_square = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
    peak = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
    for run in range(split * runs_per_split, min((split + 1) * runs_per_split, runs)):
        turned = sums - tl.load(draws + 1 + run).to(tl.int32)
        turned = tl.where(turned < 0, turned + dim, turned)
        coordinates = turned + (tl.zeros((COLUMNS,), tl.int64) + run) * dim
        inside = (sums < dim) & (coordinates < size)
        both = inside[None, :] & (examples < count)[:, None]
        values = tl.load(gradients + starts + coordinates[None, :], both, 0.0).to(tl.float32) * unscale
        if MEASURED == _DIRECTION_AND_RAW:  # a comparison with infinity is false for what is not a number
            sizes = tl.where(tl.abs(values) < float("inf"), tl.abs(values), float("inf"))
            peak = tl.maximum(peak, sizes)
            raw_square += values * values
        if FORM == _ADAM:
            first = tl.load(a + coordinates, inside, 0.0)[None, :]
            second = tl.load(b + coordinates, inside, 1.0)[None, :]
            values = (values + first) / (tl.sqrt(values * values * c + second) + d)
        if FORM == _SIGN:
            values = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, values))
        values = tl.where(both, values, 0.0)  # Adam moves a coordinate that is not there, too
        if MEASURED != _NOTHING:
            square += values * values
        total += values * _signs(key, coordinates)[None, :]
    ours = (examples < count)[:, None] & (sums < dim)[None, :]
    places = parts + split.to(tl.int64) * part_stride + examples.to(tl.int64)[:, None] * dim + sums[None, :]
    tl.store(places, tl.load(places, ours) + total, ours)
    ours = examples < count
    places = (tile * tl.num_programs(2) + split).to(tl.int64) * measure_stride + examples
    if MEASURED != _NOTHING:
        tl.store(squares + places, tl.load(squares + places, ours) + tl.sum(square, 1), ours)
    if MEASURED == _DIRECTION_AND_RAW:
        tl.store(raw_squares + places, tl.load(raw_squares + places, ours) + tl.sum(raw_square, 1), ours)
        tl.store(peaks + places, tl.maximum(tl.load(peaks + places, ours), tl.max(peak, 1)), ours)
