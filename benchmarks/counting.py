"""What the work is on paper, and what the machine can do: operations, bytes, a large product's rate, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.workload import Workload, trainable

FLOAT32 = 4  # bytes


def operations(workload: Workload) -> float:
    """Return the floating-point operations of forward and backward for the mean row.

    4 for each base parameter and token (forward, and the gradient of the inputs), 6 for each of LoRA (its own gradient
    too), and attention in full, whatever a causal kernel skips: 12 · tokens² · width of all heads · layers. Embeddings
    are looked up, not multiplied.
    """
    lora = workload.parameters
    base = sum(_linear_size(module) for module in workload.model.modules()) - lora
    config: Any = workload.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = head * config.num_attention_heads * config.num_hidden_layers
    lengths = [len(row.input_ids) for row in workload.rows]
    total: float = sum((4 * base + 6 * lora) * n + 12 * n * n * width for n in lengths)
    return total / len(lengths)


def _linear_size(module: nn.Module) -> int:
    return module.weight.numel() if isinstance(module, nn.Linear) else 0


def projection_bytes(projection: str, workload: Workload) -> float:
    """Return the bytes that a projection reads and writes for a row, as its operations are written today.

    What all rows of a batch share is not counted: signs, places, chosen outputs, a dense matrix. Numbers are float32.

    `blocks` reads each number of the gradient, and reads and writes the sum it goes into: 3. `rademacher` and
    `reference` read the gradient: 1. `none` reads the gradient, and reads and writes the feature: 3. `sjlt` reads the
    gradient and writes and reads it with its signs, and reads and writes the sum each number goes into: 5; off the CPU
    the signed numbers are read and written once more for a zero at their end, and instead of the sums the numbers that
    the lists name are read, written and read: 7, were all lists equally long (the zeros that fill the shorter ones come
    on top).
    `fft` reads the gradient and writes it with its signs: 2 a number; where the transform is longer, it reads that and
    writes it with zeros behind: 1 a number and 1 an input of the transform; the transform reads its inputs and writes
    as many outputs, once each however often it passes over them: 2 an input; and the chosen outputs are read, written
    and read, and the sums read and written: 5 a dimension of each parameter.
    """
    sizes = [parameter.numel() for parameter in trainable(workload.model).values()]
    if projection == "fft":
        return float(FLOAT32 * sum(_fft_numbers(size, workload.dims) for size in sizes))
    sjlt = 5 if workload.device.type == "cpu" else 7
    each = {"blocks": 3, "sjlt": sjlt, "rademacher": 1, "reference": 1, "none": 3}
    return float(each[projection] * FLOAT32 * sum(sizes))


def _fft_numbers(size: int, dim: int) -> int:
    """Count the numbers that `fft` reads and writes for one parameter of a row."""
    length = 1 << (max(size, dim, 2) - 1).bit_length()
    padding = size + length if length > size else 0
    return 2 * size + padding + 2 * length + 5 * dim


def product_rate(device: torch.device) -> float:
    """Measure the floating-point operations per second of a large product: bfloat16 on a GPU, else float32."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = _now(device)
        for _ in range(4):
            left @ right
        best = min(best, (_now(device) - started) / 4)
    return 2 * size**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class PeakMemory:
    """The most memory that this process (on a GPU: its tensors) held between `start` and `above`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")  # Linux: forget the peak so far
        self._before = _resident()

    def above(self) -> int:
        """Return the bytes held at the peak, above what was held at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _peak() - self._before)  # the kernel counts in parts and may be some pages behind


def _resident() -> int:
    status = _status()
    return status.get("VmRSS", _peak())


def _peak() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return _status().get("VmHWM", largest * (1 if sys.platform == "darwin" else 1024))


def _status() -> dict[str, int]:
    file = Path("/proc/self/status")
    if not file.exists():
        return {}
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
