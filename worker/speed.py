"""How fast this worker's device multiplies matrices: what durations are estimated from before a job has finished."""

from __future__ import annotations

import time

import torch

from worker.models import DTYPES, Precision

CPU_SIDE, GPU_SIDE = 256, 4096  # rows and columns: large enough for the device to be busy
ROUNDS = 10  # the best of so many is hardly disturbed by what else the machine does
ENOUGH = 0.1  # seconds for a precision; float16 on a CPU needs a fifth of that for one product


def measure(device: torch.device) -> dict[Precision, float]:
    """Operations a second (FLOP/s) of a product of two square matrices, by precision; those it cannot do are left out.

    Less than half a second in all: the best of some rounds, after one that warms up.
    """
    rates: dict[Precision, float] = {}
    for precision, dtype in DTYPES.items():
        try:
            rates[precision] = _rate(device, dtype)
        except RuntimeError:  # no such product on this device, or no memory left on it
            continue
    return rates


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    matrix = torch.full((side, side), 1 / side, dtype=dtype, device=device)
    _seconds(matrix)
    best, spent = float("inf"), 0.0
    for _ in range(ROUNDS):
        seconds = _seconds(matrix)
        best, spent = min(best, seconds), spent + seconds
        if spent > ENOUGH:
            break
    return 2 * side**3 / best


def _seconds(matrix: torch.Tensor) -> float:
    """Seconds that the product of a matrix with itself takes."""
    began = time.perf_counter()
    matrix @ matrix
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - began
