"""Stored dtypes: what is decoded is the nearest number that the dtype has, worked out here one number at a time."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from gradstore.types import FeatureDtype
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dtypes import STORAGE, decode, encode, lengths, power_of_two_scales

DTYPES: list[FeatureDtype] = ["float16", "float32", "bfloat16", "int8", "int4", "binary"]
PACKED = {"int4": 2, "binary": 8}
LEVELS = {"int8": 127, "int4": 7}
DIMS = [1, 2, 3, 7, 8, 9, 24, 31]


def rows_of(rows: int, dim: int, *, seed: int = 0, size: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, dim)) * size).astype(np.float32)


def decoded_number(stored: bytes, dtype: FeatureDtype, position: int) -> float:
    """One number of a stored row, from its bytes alone."""
    if dtype == "int4":
        nibble = stored[position // 2] >> 4 * (position % 2) & 15
        return nibble - 16 if nibble > 7 else nibble
    if dtype == "binary":
        return 1 if stored[position // 8] >> position % 8 & 1 else -1
    if dtype == "bfloat16":
        (found,) = struct.unpack_from("<f", b"\0\0" + stored[2 * position : 2 * position + 2])
    else:
        (found,) = struct.unpack_from(
            {"float16": "<e", "float32": "<f", "int8": "<b"}[dtype], stored, position * WIDTHS[dtype]
        )
    return float(found)


WIDTHS = {"float16": 2, "float32": 4, "int8": 1}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_reads_each_number_from_its_own_bits(dtype: FeatureDtype, dim: int) -> None:
    stored, _ = encode(rows_of(5, dim), dtype)
    assert stored.dtype == STORAGE[dtype].dtype
    assert stored.shape == (5, -(-dim // PACKED.get(dtype, 1))) == (5, STORAGE[dtype].width(dim))
    wanted = [[decoded_number(row.tobytes(), dtype, position) for position in range(dim)] for row in stored]
    found = decode(stored, dtype, dim)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)
    out = np.full((5, dim), np.nan, np.float32)
    np.testing.assert_array_equal(decode(stored, dtype, dim, out=out), wanted)
    np.testing.assert_array_equal(decode(stored[1:4], dtype, dim), wanted[1:4])


@pytest.mark.parametrize("dtype", ["int4", "binary"])
def test_what_is_left_of_the_last_byte_is_zero_bits(dtype: FeatureDtype) -> None:
    stored, _ = encode(-np.abs(rows_of(4, 9)) - 1, dtype)
    used = 4 if dtype == "int4" else 1
    assert (stored[:, -1] >> used == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_sixteen_bits_is_decoded_as_itself(dtype: FeatureDtype) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "float16":
        stored = patterns.view(np.float16)
        stored = stored[np.isfinite(stored)]
        wanted = np.array([struct.unpack("<e", number.tobytes())[0] for number in stored], np.float32)
    else:
        stored = patterns[(patterns & 0x7F80) != 0x7F80]
        wanted = np.array([struct.unpack("<f", b"\0\0" + number.tobytes())[0] for number in stored], np.float32)
    found = decode(stored[None], dtype, len(stored))[0]
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(row=st.lists(FINITE, min_size=1, max_size=9), dtype=st.sampled_from(["int8", "int4"]))
def test_a_quantised_number_is_the_nearest_step(row: list[float], dtype: FeatureDtype) -> None:
    features = np.array([row], np.float32)
    stored, scales = encode(features, dtype)
    codes = decode(stored, dtype, len(row))[0]
    largest = max(abs(Fraction(float(x))) for x in features[0])
    if largest == 0:
        assert not codes.any()
        return
    assert np.abs(codes).max() == LEVELS[dtype]
    step = largest / LEVELS[dtype]
    assert scales[0] == pytest.approx(float(step), rel=1e-6, abs=1.5e-45)
    for code, number in zip(codes, features[0], strict=True):
        assert abs(int(code) - Fraction(float(number)) / step) <= Fraction(1, 2) + Fraction(1, 10**4)


@settings(max_examples=60, deadline=None)
@given(row=st.lists(FINITE, min_size=1, max_size=19))
def test_a_binary_row_keeps_the_signs_and_their_mean_size(row: list[float]) -> None:
    features = np.array([row], np.float32)
    stored, scales = encode(features, "binary")
    np.testing.assert_array_equal(decode(stored, "binary", len(row))[0], [math.copysign(1, x) for x in row])
    mean = math.fsum(abs(float(x)) for x in features[0]) / len(row)
    if mean:
        assert scales[0] == pytest.approx(mean, rel=1e-6, abs=1.5e-45)


@settings(max_examples=60, deadline=None)
@given(row=st.lists(FINITE, min_size=1, max_size=9))
def test_a_bfloat16_is_the_nearest_one_and_of_two_the_even_one(row: list[float]) -> None:
    features = np.array([row], np.float32)
    stored, scales = encode(features, "bfloat16")
    for code, number in zip(stored[0].tolist(), features[0] / scales[0], strict=True):
        magnitude = code & 0x7FFF
        near = [
            Fraction(struct.unpack("<f", struct.pack("<I", each << 16))[0])
            for each in range(max(magnitude - 1, 0), magnitude + 2)
        ]
        gaps = [abs(each - abs(Fraction(float(number)))) for each in near]
        own = gaps[-2]
        assert own == min(gaps)
        assert gaps.count(own) == 1 or magnitude % 2 == 0
        assert bool(code >> 15) == bool(np.signbit(number))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(exponent=st.integers(-90, 90), seed=st.integers(0, 99))
def test_a_power_of_two_changes_the_scale_and_nothing_else(dtype: FeatureDtype, exponent: int, seed: int) -> None:
    rows = rows_of(4, 21, seed=seed)
    stored, scales = encode(rows, dtype)
    again, others = encode(np.ldexp(rows, exponent), dtype)
    np.testing.assert_array_equal(stored, again)
    np.testing.assert_array_equal(np.ldexp(scales, exponent), others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 5e37])
def test_no_size_of_a_row_costs_its_direction(dtype: FeatureDtype, size: float) -> None:
    rows = rows_of(50, 64, size=size)
    stored, scales = encode(rows, dtype)
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    decoded = decode(stored, dtype, 64).astype(np.float64)
    exact = rows.astype(np.float64)
    cosines = (decoded * exact).sum(1) / np.linalg.norm(decoded, axis=1) / np.linalg.norm(exact, axis=1)
    least = {
        "float16": 0.9999999,
        "float32": 0.99999999,
        "bfloat16": 0.99998,
        "int8": 0.9998,
        "int4": 0.97,
        "binary": 0.6,
    }
    assert cosines.min() > least[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_again_what_was_decoded_gives_the_same_numbers(dtype: FeatureDtype) -> None:
    """So a conversion to a wider dtype and back loses nothing; a row rounded up to 2 gets the next scale."""
    stored, scales = encode(rows_of(30, 33), dtype)
    once = decode(stored, dtype, 33) * scales[:, None]
    again, others = encode(once, dtype)
    np.testing.assert_allclose(decode(again, dtype, 33) * others[:, None], once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), dim=st.integers(1, 70))
def test_rows_that_agree_within_the_error_of_computing_differ_by_a_step(
    dtype: FeatureDtype, seed: int, dim: int
) -> None:
    """Rule 5 of the store (docs/decisions/a-feature-within-one-step.md); a sign flips only where it says nothing."""
    rows, noise = rows_of(20, dim, seed=seed), rows_of(20, dim, seed=seed + 1000)
    error = 1e-5 * np.linalg.norm(rows, axis=1, keepdims=True)
    others = rows + noise * error / np.linalg.norm(noise, axis=1, keepdims=True)
    (one, scales), (other, _) = encode(rows, dtype), encode(others, dtype)
    found, expected = decode(other, dtype, dim), decode(one, dtype, dim)
    if dtype == "binary":
        assert (np.abs(rows[found != expected]) <= np.broadcast_to(error, rows.shape)[found != expected]).all()
        return
    steps = (
        np.ones_like(rows)
        if dtype in LEVELS
        else np.abs(expected) * 2.0 ** -{"float16": 10, "bfloat16": 7}.get(dtype, 23)
    )
    _, again = encode(others, dtype)
    gaps = np.abs(found * again[:, None] - expected * scales[:, None])
    assert (gaps <= 1.001 * (steps * scales[:, None] + error)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_length_of_a_decoded_row_is_its_norm_to_the_last_bit_of_float32(dtype: FeatureDtype) -> None:
    stored, _ = encode(rows_of(20, 1001), dtype)
    decoded = decode(stored, dtype, 1001)
    wanted = [math.sqrt(sum(Fraction(float(x)) ** 2 for x in row)) for row in decoded]
    np.testing.assert_array_equal(lengths(decoded).astype(np.float32), np.array(wanted, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_encoded_the_same_in_any_company(dtype: FeatureDtype) -> None:
    rows = rows_of(40, 19)
    together, scales = encode(rows, dtype)
    for row in (0, 13, 39):
        alone, scale = encode(rows[row : row + 1], dtype)
        np.testing.assert_array_equal(alone[0], together[row])
        assert scale[0] == scales[row]


def test_rows_of_zeros_are_encoded_without_a_warning() -> None:
    for dtype in DTYPES:
        stored, scales = encode(np.zeros((2, 5), np.float32), dtype)
        assert np.isfinite(scales).all()
        assert np.isfinite(decode(stored, dtype, 5)).all()
    np.testing.assert_array_equal(power_of_two_scales(np.zeros((2, 5), np.float32)), 1)
