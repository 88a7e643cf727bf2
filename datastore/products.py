"""Products of stored rows with queries, (n, dim) with (q, dim): the arithmetic that every score is made of.

A kernel multiplies blocks; segments, lengths and weights are its caller's (datastore/scores.py). numpy's is here: rows
become float32 in blocks that the caches hold, and OpenBLAS multiplies them with all cores. torch's, for integer
products of int8 rows and for GPUs, is in worker/products.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from gradstore.types import FeatureDtype
from numpy.typing import NDArray

from datastore.dtypes import decode, widened
from datastore.influence import Floats
from datastore.segments import BLOCK_BYTES

_HALF_EXPONENT = np.float32(2.0**112)


class Products(Protocol):
    """Multiplies rows of one dtype and dim with the same queries, again and again."""

    def __call__(self, stored: NDArray[Any]) -> Floats:
        """Products of rows as they are stored (n, width), decoded but not scaled, with every query (n, q)."""


class Kernel(Protocol):
    """A way to multiply, on the device that it knows."""

    @property
    def threads(self) -> int:
        """How many blocks are multiplied at a time, each in a thread of its own."""

    def begin_thread(self) -> None:
        """Called once in each of these threads, before its first block."""

    def products(self, queries: Floats, *, dtype: FeatureDtype) -> Products:
        """Take the queries (q, dim), whose numbers are at most 1, for rows of this dtype. May be called by threads."""


class NumpyKernel:
    """Float32 products, one block after the other: OpenBLAS itself takes all cores."""

    threads = 1

    def begin_thread(self) -> None:
        """Do nothing."""

    def products(self, queries: Floats, *, dtype: FeatureDtype) -> Products:
        """See `Kernel.products`."""
        return _FloatProducts(queries, dtype)


class _FloatProducts:
    """Float32 products.

    Float16 rows are widened by moving their bits (`dtypes.widened`); the factor of 2^112 that is missing then is the
    queries'. Three passes over a block in the cache, 11 GB/s on a core where numpy's own conversion gives 1.5, and not
    a bit different.
    """

    def __init__(self, queries: Floats, dtype: FeatureDtype) -> None:
        self._dtype = dtype
        self._dim = queries.shape[1]
        columns = queries * (_HALF_EXPONENT if dtype == "float16" else np.float32(1))
        self._columns = np.ascontiguousarray(columns.T)
        self._scratch = np.empty((max(1, BLOCK_BYTES // (4 * self._dim)), self._dim), np.float32)

    def __call__(self, stored: NDArray[Any]) -> Floats:
        found = np.empty((len(stored), self._columns.shape[1]), np.float32)
        for start in range(0, len(stored), len(self._scratch)):
            rows = stored[start : start + len(self._scratch)]
            np.matmul(self._decoded(rows), self._columns, out=found[start : start + len(rows)])
        return found

    def _decoded(self, rows: NDArray[Any]) -> Floats:
        block = self._scratch[: len(rows)]
        if self._dtype == "float16":
            return widened(rows, block)
        return decode(rows, self._dtype, self._dim, out=block)


NUMPY = NumpyKernel()
