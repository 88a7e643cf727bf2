"""What the products of stored rows with queries cost on one thread: our kernels, and those that were not taken.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.products --dim 8192 --queries 57 --rounds 5

A block of 1,024 rows is multiplied again and again; printed is the smallest of the rounds, as seconds for 200,000 rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from gradstore.types import FeatureDtype

from benchmarks.scoring import timed
from datastore.dtypes import encode
from datastore.products import NUMPY
from datastore.shards import CHUNK_ROWS
from worker.models import use_cpu_threads
from worker.products import FloatProducts, IntegerProducts

ROWS = 200_000
CPU = torch.device("cpu")


def contestants(dim: int, queries: int) -> dict[str, Callable[[], object]]:
    """Each of them multiplies a block of rows."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((CHUNK_ROWS, dim), np.float32)
    asked = rng.standard_normal((queries, dim), np.float32) / np.float32(np.sqrt(dim))
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, dtype: FeatureDtype, products: Callable[[np.ndarray], object]) -> None:
        stored, _ = encode(features, dtype)
        found[f"{dtype}: {name}"] = lambda: products(stored)

    dtypes: tuple[FeatureDtype, ...] = ("float16", "bfloat16", "int8", "int4", "binary")
    for dtype in dtypes:
        add("numpy, float32 blocks", dtype, NUMPY.products(asked, dtype=dtype))
        add("torch, float32 blocks", dtype, FloatProducts(asked, dtype=dtype, device=CPU))
    add("oneDNN, integers, two digits", "int8", IntegerProducts(asked))
    digits = torch.from_numpy(rng.integers(-63, 64, (dim, queries)).astype(np.int8))
    add("torch._int_mm, one digit", "int8", lambda stored: torch._int_mm(torch.from_numpy(stored), digits))
    narrow = torch.from_numpy(asked).bfloat16().T.contiguous()
    add("bfloat16 product", "bfloat16", lambda stored: torch.from_numpy(stored).view(torch.bfloat16) @ narrow)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--queries", type=int, default=57)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch; numpy has all cores")
    parser.add_argument("--only", default="", help="contestants whose names have this text")
    options = parser.parse_args()
    use_cpu_threads(options.threads)
    print(f"| {options.queries} queries, {options.dim:,} dims | seconds for {ROWS:,} rows |\n|---|---|")
    for name, work in contestants(options.dim, options.queries).items():
        if options.only in name:
            work()
            seconds = min(timed(work) for _ in range(options.rounds)) * ROWS / CHUNK_ROWS
            print(f"| {name} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
