"""Products of stored rows with queries, by torch: integer products of int8 rows on CPUs, any dtype on a GPU.

On a CPU every thread has its own block and multiplies it alone: two threads that share each product wait for each
other more than they gain where other work wants the cores (57 queries of 8,192 dims: 1.6 to 4 times the CPU time).

An int8 row times a query is a sum of integers, exact in 32 bits, and CPUs with instructions for it (VNNI, AMX) have it
several times faster than in float32. The query keeps its precision by being split into two numbers of 7 bits each: a
cosine is off by about 1e-5 at 8,192 dims. The CPU decides, not a stopwatch, so that a machine always gives the same
scores; with AVX2 alone, which has no such instruction, the two are nearly equal and float32 is used.

Float16 and bfloat16 products are not used on a CPU: without hardware for them they are 50 to 250 times slower than
float32, and with it their sums come back rounded to 8 or 11 bits.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gradstore.types import FeatureDtype
from numpy.typing import NDArray

from datastore.dtypes import decode
from datastore.influence import Floats
from datastore.products import Products
from datastore.segments import BLOCK_BYTES
from datastore.shards import CHUNK_ROWS

DIGIT = 63
"""Largest number of a query's digit: products of pairs then fit into 16 bits, as AVX2 adds them."""
MOST_INTEGER_DIM = 1 << 17
"""Dims up to which the sums fit into 32 bits: 255 · 63 · 2^17 is just below 2^31."""
LEAST_INTEGER_DIM = 1 << 10
"""Dims below which float32 is fast enough, and the digits' rounding would be seen."""
INTEGER_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
INTEGER_ROWS = 256
"""Rows of an integer product: their bytes stay in the cache between the two passes over them."""
SIGN_BIT = 128
COPIES = 2  # blocks on their way to a GPU and in it

with warnings.catch_warnings():  # torch says once that it could write to what lies in a file: nothing here does
    warnings.simplefilter("ignore", UserWarning)
    _locked = np.zeros(1, np.int8)
    _locked.flags.writeable = False
    torch.from_numpy(_locked)


class TorchKernel:
    """Products on the device of a worker."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def threads(self) -> int:
        """See `Kernel.threads`: a CPU's cores that torch may use, or enough to keep a GPU busy."""
        return torch.get_num_threads() if self._device.type == "cpu" else COPIES

    def begin_thread(self) -> None:
        """Have this thread multiply alone. `one_thread_each` is around it."""
        if self._device.type == "cpu":
            torch.set_num_threads(1)

    def products(self, queries: Floats, *, dtype: FeatureDtype) -> Products:
        """See `Kernel.products`."""
        integers = dtype == "int8" and self._device.type == "cpu" and has_integer_products()
        if integers and LEAST_INTEGER_DIM <= queries.shape[1] <= MOST_INTEGER_DIM:
            return IntegerProducts(queries)
        return FloatProducts(queries, dtype=dtype, device=self._device)


def has_integer_products() -> bool:
    """Whether this CPU multiplies integers of 8 bits several times faster than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in INTEGER_INSTRUCTIONS)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Give torch its threads back afterwards: what one thread sets is every new thread's beginning."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FloatProducts:
    """Float32 products on any device."""

    def __init__(self, queries: Floats, *, dtype: FeatureDtype, device: torch.device) -> None:
        self._dtype = dtype
        self._dim = queries.shape[1]
        self._device = device
        self._queries = torch.from_numpy(queries).to(device)
        self._rows = max(1, BLOCK_BYTES // (4 * self._dim)) if device.type == "cpu" else CHUNK_ROWS
        self._own = threading.local()

    def __call__(self, stored: NDArray[Any]) -> Floats:
        """See `Products`."""
        found = np.empty((len(stored), len(self._queries)), np.float32)
        for start in range(0, len(stored), self._rows):
            product = self._decoded(stored[start : start + self._rows]) @ self._queries.T
            found[start : start + self._rows] = product.cpu().numpy()
        return found

    def _decoded(self, rows: NDArray[Any]) -> torch.Tensor:
        if self._dtype in {"int4", "binary"}:
            return torch.from_numpy(decode(rows, self._dtype, self._dim)).to(self._device)
        numbers = torch.from_numpy(rows)
        if self._dtype == "bfloat16":
            numbers = numbers.view(torch.bfloat16)
        if self._device.type != "cpu":
            return numbers.to(self._device).float()
        return self._scratch()[: len(rows)].copy_(numbers)

    def _scratch(self) -> torch.Tensor:
        """This thread's block of float32 rows."""
        if not hasattr(self._own, "block"):
            self._own.block = torch.empty(self._rows, self._dim)
        block: torch.Tensor = self._own.block
        return block


class IntegerProducts:
    """Products of int8 rows with queries in two digits: query = coarse step · first digit + fine step · second digit.

    Both digits are columns of one integer product, whose scale is the column's step (oneDNN; the rows' sums are exact).
    The instructions take bytes without a sign on the left, so rows go in as x + 128, which oneDNN takes off again: for
    bytes with a sign it has its reference's loop only, 120 times slower (an EPYC with AVX-512 VNNI, torch 2.13).
    """

    def __init__(self, queries: Floats) -> None:
        coarse, rest = _digits(queries.astype(np.float64))
        fine, _ = _digits(rest)
        digits = np.concatenate([coarse[0], fine[0]]).astype(np.int8)
        steps = np.concatenate([coarse[1], fine[1]]).astype(np.float32)
        self._queries = len(queries)
        self._steps = torch.from_numpy(steps)
        self._zeros = torch.zeros(len(steps), dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(torch.from_numpy(digits), None)
        self._own = threading.local()

    def __call__(self, stored: NDArray[Any]) -> Floats:
        """See `Products`."""
        found = np.empty((len(stored), self._queries), np.float32)
        for start in range(0, len(stored), INTEGER_ROWS):
            product = self._product(stored[start : start + INTEGER_ROWS])
            np.add(product[:, : self._queries], product[:, self._queries :], out=found[start : start + INTEGER_ROWS])
        return found

    def _product(self, rows: NDArray[Any]) -> Floats:
        """Rows times both digits, (n, 2q)."""
        raised = np.bitwise_xor(rows.view(np.uint8), SIGN_BIT, out=self._scratch(rows.shape[1])[: len(rows)])
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            torch.from_numpy(raised), 1.0, SIGN_BIT, self._packed, self._steps, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product.numpy()

    def _scratch(self, dim: int) -> NDArray[np.uint8]:
        """This thread's block of bytes without a sign."""
        if not hasattr(self._own, "block"):
            self._own.block = np.empty((INTEGER_ROWS, dim), np.uint8)
        block: NDArray[np.uint8] = self._own.block
        return block


def _digits(
    queries: NDArray[np.float64],
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]:
    """The nearest whole numbers up to `DIGIT` (q, dim) under each query's step (q,), and what they leave (q, dim)."""
    largest = np.abs(queries).max(axis=1, initial=0)
    steps = np.where(largest > 0, largest, 1) / DIGIT
    digits = np.rint(queries / steps[:, None])
    return (digits, steps), queries - digits * steps[:, None]
