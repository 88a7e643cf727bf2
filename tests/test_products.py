"""Products of stored rows with queries: every kernel gives the float64 products of the decoded rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from gradstore.types import FeatureDtype
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore.dtypes import decode, encode
from datastore.products import NUMPY, Kernel
from worker.products import (
    DIGIT,
    LEAST_INTEGER_DIM,
    MOST_INTEGER_DIM,
    FloatProducts,
    IntegerProducts,
    TorchKernel,
    has_integer_products,
    one_thread_each,
)

DTYPES: tuple[FeatureDtype, ...] = get_args(FeatureDtype)
CPU = torch.device("cpu")
KERNELS: dict[str, Callable[[], Kernel]] = {"numpy": lambda: NUMPY, "torch": lambda: TorchKernel(CPU)}


def rows_of(dtype: FeatureDtype, *, rows: int, dim: int, seed: int = 0) -> NDArray[np.generic]:
    """Rows as they are stored."""
    return encode(np.random.default_rng(seed).standard_normal((rows, dim), np.float32), dtype)[0]


def unit(count: int, dim: int, *, seed: int = 1) -> NDArray[np.float32]:
    queries = np.random.default_rng(seed).standard_normal((count, dim))
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def exact(stored: NDArray[np.generic], queries: NDArray[np.float32], dtype: FeatureDtype) -> NDArray[np.float64]:
    decoded = decode(stored, dtype, queries.shape[1]).astype(np.float64)
    return np.einsum("nd,qd->nq", decoded, queries.astype(np.float64))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "count"), [(1500, 7), (33, 1)])
def test_products_are_those_of_the_decoded_rows(kernel: str, dtype: FeatureDtype, dim: int, count: int) -> None:
    stored, queries = rows_of(dtype, rows=301, dim=dim), unit(count, dim)
    found = KERNELS[kernel]().products(queries, dtype=dtype)(stored)
    wanted = exact(stored, queries, dtype)
    assert found.dtype == np.float32
    lengths = np.linalg.norm(decode(stored, dtype, dim), axis=1, keepdims=True)
    np.testing.assert_allclose(found / lengths, wanted / lengths, atol=3e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_rows_products_do_not_depend_on_the_rows_beside_it(kernel: str) -> None:
    stored, queries = rows_of("int8", rows=700, dim=2048), unit(5, 2048)
    products = KERNELS[kernel]().products(queries, dtype="int8")
    whole = products(stored)
    parts = np.concatenate([products(stored[:3]), products(stored[3:400]), products(stored[400:])])
    np.testing.assert_allclose(parts, whole, atol=1e-4 * 127)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_cannot_be_written_to_are_read_without_a_warning(kernel: str) -> None:
    stored = rows_of("int8", rows=4, dim=1024)
    stored.flags.writeable = False
    assert KERNELS[kernel]().products(unit(2, 1024), dtype="int8")(stored).shape == (4, 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(1, 300), count=st.integers(1, 5), spread=st.floats(-20, 3))
def test_integer_products_are_off_by_no_more_than_their_two_digits(
    seed: int, dim: int, count: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    queries = (rng.standard_normal((count, dim)) * np.exp(spread * rng.random(dim))).astype(np.float32)
    stored = rng.integers(-127, 128, (5, dim)).astype(np.int8)
    found = IntegerProducts(queries)(stored)
    step = np.abs(queries).max(axis=1) / DIGIT / 2 / DIGIT  # of the second digit
    bound = np.abs(stored.astype(np.float64)).sum(axis=1)[:, None] * (step / 2 + 1e-6 * np.abs(queries).max(axis=1))
    assert (np.abs(found - exact(stored, queries, "int8")) <= bound).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int) -> None:
    dim = MOST_INTEGER_DIM
    stored = np.full((3, dim), 127, np.int8)
    queries = np.full((2, dim), sign, np.float32)
    np.testing.assert_allclose(IntegerProducts(queries)(stored), sign * 127.0 * dim, rtol=1e-6)


def test_a_query_of_zeros_has_products_of_zero() -> None:
    queries = np.zeros((2, 64), np.float32)
    queries[1] = 1
    assert (IntegerProducts(queries)(rows_of("int8", rows=3, dim=64))[:, 0] == 0).all()


def test_the_processor_decides_which_products_int8_rows_get(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = TorchKernel(CPU)

    def made(dim: int, dtype: FeatureDtype = "int8") -> type[object]:
        return type(kernel.products(np.ones((1, dim), np.float32), dtype=dtype))

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not has_integer_products()
    assert made(LEAST_INTEGER_DIM) is FloatProducts
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": True})
    assert made(LEAST_INTEGER_DIM) is IntegerProducts
    assert made(LEAST_INTEGER_DIM, "int4") is FloatProducts
    assert {made(LEAST_INTEGER_DIM - 1), made(MOST_INTEGER_DIM + 1)} == {FloatProducts}


def test_threads_that_multiply_alone_leave_torch_its_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread_each():
            TorchKernel(CPU).begin_thread()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_same_products(dtype: FeatureDtype) -> None:
    stored, queries = rows_of(dtype, rows=1100, dim=1500), unit(7, 1500)
    products = TorchKernel(torch.device("cuda")).products(queries, dtype=dtype)
    np.testing.assert_allclose(products(stored), exact(stored, queries, dtype), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not has_integer_products(), reason="this CPU has no 8-bit dot products")
def test_integer_products_are_not_left_to_the_reference_loop_of_onednn() -> None:
    program = (
        "import numpy as np\nfrom worker.products import IntegerProducts\n"
        "IntegerProducts(np.ones((3, 2048), np.float32))(np.ones((4, 2048), np.int8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (product,) = (line for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line)
    assert ",ref" not in product
