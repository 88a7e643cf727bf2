"""Seeded Johnson–Lindenstrauss maps that are never stored: every worker draws the same one from a few integers.

Random numbers. A *stream* is SplitMix64 (Steele, Lea and Flood, 2014) seeded with a key; its word c is

    z = key + (c + 1) · 9E3779B97F4A7C15
    z = (z ^ z≫30) · BF58476D1CE4E5B9
    z = (z ^ z≫27) · 94D049BB133111EB
    word = z ^ z≫31

modulo 2⁶⁴, so any part of a stream is made without the rest, in integer arithmetic that is the same on every machine,
device and version of torch. The key is the first 8 bytes, little-endian, of SHA-256 over
`gradstore-projection|<version>|<seed>|<purpose>|<parameter name>`. Keyed by *name* and by the offset inside the
parameter, a coordinate's random bits do not depend on the order of the parameters or on the other ones.

Maps (x: the flat gradient of one example, k: the dimension):

* `blocks`: every parameter is cut into runs of k coordinates (the last one takes what is left). Coordinate c has the
  sign of bit c mod 64 of word ⌊c / 64⌋ of its stream (set: +1), whatever k is; run j is added to the k sums at the
  cyclic offset ⌊word_j · k / 2⁶⁴⌋ of the stream `offsets/<k>`. It reads the gradient once per dimension and multiplies
  by no matrix. Two coordinates of one run never meet and two of different runs meet with probability 1/k (to k/2⁶⁴),
  which is all that Count-Sketch's variance needs (Charikar, Chen and Farach-Colton, 2002): E⟨φx, φy⟩ = ⟨x, y⟩ and
  Var ≤ (‖x‖²‖y‖² + ⟨x, y⟩²) / k, no scale needed.
* `rademacher`: φx = xR / √k with R of independent ±1: row c has its column j from bit j mod 64 of word
  c · 2¹⁴ + ⌊j / 64⌋. The same mean, and the variance (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ x²y²) / k; its price is 2·p·k operations
  per example and the making of R, block by block, for every batch. A smaller dimension takes the first columns of a
  larger one.
* `none`: the flat gradient itself, the parameters one after another; its only dimension is their number p.

Memory: `blocks` keeps one byte per coordinate (p bytes, on the device of the gradients); `rademacher` keeps nothing and
holds `BLOCK_ELEMENTS` float32 numbers of R at a time.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

ProjectionName = Literal["blocks", "rademacher", "none"]

PROJECTION_VERSION = 1
"""Part of a feature set's identity: it changes when any map gives other numbers for the same seed."""

MAX_DIM = 1 << 20  # 2¹⁴ words of 64 bits for a row of R

BLOCK_ELEMENTS = 1 << 23  # of R at a time: 32 MiB as float32

_WORDS_PER_ROW = MAX_DIM // 64
_MASK = (1 << 64) - 1


def stream_key(seed: int, purpose: str, name: str) -> int:
    """Return the 64-bit key of a stream of random words."""
    text = f"gradstore-projection|{PROJECTION_VERSION}|{seed}|{purpose}|{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def random_words(key: int, counters: Tensor) -> Tensor:
    """Return the words of stream `key` at `counters` (int64, any shape), as the int64 with the same 64 bits."""
    z = (counters + 1) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned words; torch's own shift of int64 repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


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


class Blocks(Projection):
    """The streaming signed-block sketch."""

    name = "blocks"

    def _prepare(self) -> None:
        super()._prepare()
        self._signs = {name: self._draw_signs(name) for name in self.sizes}
        self._offsets = {(name, dim): self._draw_offsets(name, dim) for name in self.sizes for dim in self.dims}

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        signs = self._signs[name].to(torch.float32)
        for dim in self.dims:
            offsets = self._offsets[name, dim]
            if len(offsets) > self._most_runs_one_by_one(dim):
                _add_folded(gradients, signs, offsets, sums[dim])
            else:
                _add_runs(gradients, signs, offsets, sums[dim])

    def _most_runs_one_by_one(self, dim: int) -> int:
        """Above this number of runs their two operations each cost more than one gather of the whole gradient."""
        return 2 if self.device.type == "cuda" or dim < 512 else 1 << 30

    def _draw_signs(self, name: str) -> Tensor:
        size = self.sizes[name]
        words = random_words(
            stream_key(self.seed, "signs", name), torch.arange(math.ceil(size / 64), device=self.device)
        )
        return _bits(words).flatten()[:size].mul(2).sub_(1)

    def _draw_offsets(self, name: str, dim: int) -> list[int]:
        runs = torch.arange(math.ceil(self.sizes[name] / dim))
        words: list[int] = random_words(stream_key(self.seed, f"offsets/{dim}", name), runs).tolist()
        return [(word & _MASK) * dim >> 64 for word in words]


def _bits(words: Tensor) -> Tensor:
    """Return the bits of 64-bit words, lowest first: (…, 64) int8 of 0 and 1."""
    return ((words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1).to(torch.int8)


def _add_runs(gradients: Tensor, signs: Tensor, offsets: Sequence[int], sums: Tensor) -> None:
    """Add run after run, each in the two pieces that the end of the sums cuts it into."""
    dim = sums.shape[1]
    size = gradients.shape[1]
    for run, offset in enumerate(offsets):
        start = run * dim
        stop = min(start + dim, size)
        cut = min(stop, start + dim - offset)
        sums[:, offset : offset + cut - start].addcmul_(gradients[:, start:cut], signs[start:cut])
        if cut < stop:
            sums[:, : stop - cut].addcmul_(gradients[:, cut:stop], signs[cut:stop])


def _add_folded(gradients: Tensor, signs: Tensor, offsets: Sequence[int], sums: Tensor) -> None:
    """Add all runs at once: turn each by its offset with one gather, and sum over the runs.

    A gather and not a scatter: every sum is then made in one order, and so the same on every run.
    """
    examples, size = gradients.shape
    dim = sums.shape[1]
    runs = len(offsets)
    signed = torch.nn.functional.pad(gradients * signs, (0, runs * dim - size))
    device = gradients.device
    turned = torch.arange(dim, device=device) - torch.tensor(offsets, device=device).unsqueeze(1)
    source = turned.remainder_(dim) + dim * torch.arange(runs, device=device).unsqueeze(1)
    sums += signed.index_select(1, source.flatten()).view(examples, runs, dim).sum(1)


class Rademacher(Projection):
    """The dense random ±1 matrix of LESS, made anew in blocks of rows; the reference for the others."""

    name = "rademacher"

    def add(self, name: str, gradients: Tensor, sums: Mapping[int, Tensor]) -> None:
        """Add the image of one parameter's flat gradients, (examples, size) float32, to `sums`."""
        widest = max(self.dims)
        rows = max(1, BLOCK_ELEMENTS // widest)
        image = torch.zeros(gradients.shape[0], widest, device=gradients.device)
        for start in range(0, gradients.shape[1], rows):
            part = gradients[:, start : start + rows]
            image.addmm_(part, self.matrix(name, start, start + part.shape[1], widest))
        for dim in self.dims:
            sums[dim].add_(image[:, :dim], alpha=dim**-0.5)

    def matrix(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        """Return rows `start` to `stop` of the parameter's part of R: (stop − start, dim) float32 of ±1."""
        key = stream_key(self.seed, "matrix", name)
        rows = torch.arange(start, stop, device=self.device).unsqueeze(1) * _WORDS_PER_ROW
        words = random_words(key, rows + torch.arange(math.ceil(dim / 64), device=self.device))
        return _signs_of_bytes(words).flatten(1)[:, :dim]


def _signs_of_bytes(words: Tensor) -> Tensor:
    """Return the bits of 64-bit words as float32 ±1, lowest first: (rows, words, 64).

    By a table of the 256 bytes: eight times less memory than shifting words. It reads the words byte by byte, lowest
    first, as every processor that torch runs on keeps them.
    """
    table = _bits(torch.arange(256, device=words.device))[:, :8].to(torch.float32).mul_(2).sub_(1)
    octets = words.contiguous().view(torch.uint8)
    return table[octets.to(torch.int32)].view(*words.shape, 64)


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


_PROJECTIONS: dict[ProjectionName, type[Projection]] = {
    "blocks": Blocks,
    "rademacher": Rademacher,
    "none": Identity,
}


def make_projection(
    name: ProjectionName,
    *,
    dims: Sequence[int],
    parameters: Sequence[tuple[str, torch.Size]],
    seed: int,
    device: torch.device | str = "cpu",
) -> Projection:
    """Make the map called `name` onto each of `dims`; the same arguments give the same map anywhere.

    Raises ValueError where a dimension is out of range, or is not the number of parameters for `none`.
    """
    return _PROJECTIONS[name](dims=dims, parameters=parameters, seed=seed, device=torch.device(device))
