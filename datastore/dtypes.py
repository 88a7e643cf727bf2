"""How a row of numbers is stored: six dtypes, each with a scale per row, and the way back to float32.

    feature = decoded × scale        direction = decoded / length

| dtype    | stored as            | decoded               | scale             | decoding, 10⁹ numbers/s |
|----------|----------------------|-----------------------|-------------------|-------------------------|
| float32  | float32              | the number itself     | power of two      | in place                |
| bfloat16 | uint16               | a bfloat16            | power of two      | 4.4                     |
| float16  | float16              | a float16             | power of two      | 2.2                     |
| int8     | int8                 | -127 … 127            | largest / 127     | 8.1                     |
| int4     | uint8, two a byte    | -7 … 7                | largest / 7       | 1.9                     |
| binary   | uint8, eight a byte  | -1, 1                 | mean of the sizes | 3.9                     |

The speeds are of one thread of a 2-core AMD EPYC without AVX512, blocks of 8 MiB (`benchmarks/dtypes.py` prints them);
numpy's own conversion of a float16 gives 0.5, its unpackbits 2.5, shifting nibbles apart 1.0 to 1.7.
Zarr has no bfloat16, no nibbles and no bits, so that these are stored as unsigned integers, least significant first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from gradstore.types import FeatureDtype
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_SMALLEST_EXPONENT = -126  # of a normal float32
_SMALLEST_SCALE = np.finfo(np.float32).smallest_subnormal
_LEVELS: Final[Mapping[FeatureDtype, int]] = {"int8": 127, "int4": 7}
"""Steps on either side of zero. The lowest number of the type is left out: it marks what nobody has written."""
_HALF_EXPONENT = np.float32(2.0**112)


@dataclass(frozen=True)
class Storage:
    """What the numbers of a dtype lie in: the array's type, how many share an item, and what stands where none are."""

    dtype: np.dtype[Any]
    fill: float
    numbers: int = 1

    def width(self, dim: int) -> int:
        """Items of a row of `dim` numbers; what is left of the last item is zero bits."""
        return -(-dim // self.numbers)


STORAGE: Final[Mapping[FeatureDtype, Storage]] = {
    "float16": Storage(np.dtype("<f2"), np.nan),
    "float32": Storage(np.dtype("<f4"), np.nan),
    "bfloat16": Storage(np.dtype("<u2"), 0x7FC0),  # NaN
    "int8": Storage(np.dtype("i1"), -128),
    "int4": Storage(np.dtype("u1"), 0x88, numbers=2),  # -8 twice
    "binary": Storage(np.dtype("u1"), 0, numbers=8),
}


def encode(features: Floats, dtype: FeatureDtype) -> tuple[NDArray[Any], Floats]:
    """Round finite rows (n, dim) to the dtype: the stored rows (n, width), and what a decoded row is multiplied with.

    Every number goes to the nearest that the dtype has under the row's scale, halves to the even one; of a binary row
    the signs are kept, that of a zero too. Multiplying a row by a power of two changes nothing but its scale.
    """
    powers = power_of_two_scales(features)
    near_one = features * np.reciprocal(powers)[:, None]
    if dtype in _LEVELS:
        codes, steps = _quantised(near_one, _LEVELS[dtype])
        return codes if dtype == "int8" else _packed(codes), _times(powers, steps)
    if dtype == "binary":
        return np.packbits(~np.signbit(features), axis=1, bitorder="little"), _times(powers, _mean_sizes(near_one))
    return (_rounded(near_one) if dtype == "bfloat16" else near_one.astype(STORAGE[dtype].dtype)), powers


def decode(stored: NDArray[Any], dtype: FeatureDtype, dim: int, *, out: Floats | None = None) -> Floats:
    """The numbers of stored rows (n, width), not yet multiplied with their scales: float32 (n, dim).

    `out`, C-contiguous and of that shape, is filled and returned; float32 rows are returned as they lie. Blocks that
    fit a core's caches are decoded twice as fast as large ones.
    """
    if dtype == "float32":
        return cast("Floats", stored.astype(np.float32, copy=False))
    numbers = STORAGE[dtype].numbers
    if dim % numbers:
        whole = decode(stored, dtype, STORAGE[dtype].width(dim) * numbers)[:, :dim]
        if out is None:
            return np.ascontiguousarray(whole)
        np.copyto(out, whole)
        return out
    found = np.empty((len(stored), dim), np.float32) if out is None else out
    _DECODERS[dtype](np.ascontiguousarray(stored), found)
    return found


def lengths(decoded: Floats) -> NDArray[np.float64]:
    """L2 norms of decoded rows, summed in float64 (n,)."""
    return np.array([np.sqrt(np.square(row, dtype=np.float64).sum()) for row in decoded], np.float64)


def power_of_two_scales(features: Floats) -> Floats:
    """Per row the power of two that brings its largest number into [1, 2): dividing by it rounds nothing. (n,)

    1 for a row of zeros. Rows below 1e-38 keep the smallest scale, 2^-126.
    """
    _, exponents = np.frexp(np.abs(features).max(axis=1, initial=0))
    scales = np.ldexp(np.float32(1), np.maximum(exponents - 1, _SMALLEST_EXPONENT))
    return np.where(features.any(axis=1), scales, 1).astype(np.float32)


# Encoding ---------------------------------------------------------------------------------------------------------


def _quantised(rows: Floats, levels: int) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Rows as integers from -levels to levels, and the size of a step (n,); 1/levels for a row of zeros."""
    largest = np.abs(rows).max(axis=1, initial=0)
    largest = np.where(largest > 0, largest, np.float32(1))
    codes = np.rint(rows * (np.float32(levels) / largest)[:, None]).astype(np.int8)
    return codes, largest / np.float64(levels)


def _packed(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two numbers a byte, in two's complement: the first in the lower four bits."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    nibbles = codes.view(np.uint8) & np.uint8(0xF)
    packed: NDArray[np.uint8] = nibbles[:, 0::2] + np.uint8(16) * nibbles[:, 1::2]
    return packed


def _mean_sizes(rows: Floats) -> NDArray[np.float64]:
    return np.array([np.abs(row).mean(dtype=np.float64) for row in rows], np.float64)


def _rounded(rows: Floats) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to the nearest, halves to even."""
    bits = rows.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _times(powers: Floats, steps: NDArray[np.float64]) -> Floats:
    """Products as float32, never 0: not even of a row whose numbers are the smallest that there are."""
    return np.maximum((powers * steps).astype(np.float32), _SMALLEST_SCALE)


# Decoding: each fills `out` (n, dim) -------------------------------------------------------------------------------


def _decode_float16(stored: NDArray[Any], out: Floats) -> None:
    """Move sign, exponent and fraction to their places in a float32; what is missing is a factor of 2^112."""
    np.multiply(widened(stored, out), _HALF_EXPONENT, out=out)


def widened(stored: NDArray[Any], out: Floats) -> Floats:
    """Fill `out` with finite float16 numbers times 2^-112, exactly: three passes, several times faster than numpy."""
    bits = out.view(np.int32)
    np.copyto(bits, stored.view("<i2"))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x7000_2000), out=bits)  # 0x8fff_e000: sign, five bits of exponent, ten of fraction
    return out


def _decode_bfloat16(stored: NDArray[Any], out: Floats) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    np.left_shift(bits, 16, out=bits)


def _decode_int8(stored: NDArray[Any], out: Floats) -> None:
    np.copyto(out, stored)


def _decode_int4(stored: NDArray[Any], out: Floats) -> None:
    np.take(_NIBBLES, stored, out=out.view(np.uint64), mode="clip")


def _decode_binary(stored: NDArray[Any], out: Floats) -> None:
    np.take(_BITS, stored.reshape(-1), axis=0, out=out.reshape(-1, 8), mode="clip")


_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_NIBBLES = (((_BYTES >> np.array([0, 4], np.uint8) & 0xF) ^ 8).astype(np.float32) - 8).view(np.uint64).reshape(256)
"""The two numbers of each byte, as the 8 bytes of two float32."""
_BITS = np.unpackbits(_BYTES, axis=1, bitorder="little").astype(np.float32) * 2 - 1
"""The eight numbers of each byte (256, 8)."""
_DECODERS: Final = {
    "float16": _decode_float16,
    "bfloat16": _decode_bfloat16,
    "int8": _decode_int8,
    "int4": _decode_int4,
    "binary": _decode_binary,
}
