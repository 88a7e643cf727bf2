"""How many tokens share a batch, with their padding: found on the shard at hand, once for a model, and remembered.

More tokens keep a device busier up to a point, and take memory without end. So the budget is doubled while a doubling
still pays and fits, timing two batches of real rows each time, and what they computed is thrown away: 2 % of a shard
of 1,024 rows of 371 tokens on a CPU, which gains nothing beyond some 1,024 tokens. Rows that would not pay for the
search get the usual budget.

What is found depends on the machine and its load: it is recorded on the job (worker/kinds/gradients.py), whose batch
plans follow from its record, and changes features by rounding only.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from worker.batches import Encoded, plan
from worker.loaded import Engine

GAIN = 1.03  # a doubling that is not at least so much faster is the last
MEMORY_SHARE = 0.85  # of the memory that torch can get: the next shard may hold longer rows
LONGEST_TRIAL = 10.0  # seconds: after a trial that took longer, no larger one is tried
WORTHWHILE = 16  # a search is for rows that make so many batches of the usual budget

Measure = Callable[[int], "Trial"]


@dataclass(frozen=True)
class Range:
    """The budgets that come into question on a device, in tokens with their padding."""

    least: int
    usual: int
    most: int


RANGES: dict[Literal["cpu", "cuda"], Range] = {
    "cpu": Range(least=512, usual=2048, most=8192),
    "cuda": Range(least=2048, usual=8192, most=65536),
}


@dataclass(frozen=True)
class Trial:
    """What some batches of a budget took."""

    tokens: int
    seconds: float
    share: float = 0.0
    """What it took at the highest of the memory that torch could get, on the device that is fullest; 0: not known."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Budgets:
    """The budgets that a worker has found, and those that were too large for its memory."""

    _found: dict[Hashable, int] = field(default_factory=dict)
    _limits: dict[str, int] = field(default_factory=dict)

    def found(self, key: Hashable, find: Callable[[], int | None], *, usual: int) -> int:
        """The budget remembered for a model as it is used, else the one that `find` finds, else the usual one."""
        if key not in self._found:
            budget = find()
            if budget is None:
                return usual
            self._found[key] = budget
        return self._found[key]

    def limit(self, job: str, budget: int, *, key: Hashable = None) -> None:
        """Remember that a larger budget than this does not fit the memory in this job, nor in later ones of a model."""
        self._limits[job] = budget
        if key in self._found:
            self._found[key] = min(self._found[key], budget)

    def within_limit(self, job: str, budget: int) -> int:
        """The budget, or what of it fits the memory."""
        return min(budget, self._limits.get(job, budget))


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory was full."""
    # torch's allocator has an error of its own; a CPU's, the driver and the libraries beside it raise a RuntimeError
    full = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in full)


def range_of(device: torch.device) -> Range:
    """The budgets that come into question on a device."""
    return RANGES["cuda" if device.type == "cuda" else "cpu"]


def find(
    engine: Engine, rows: Sequence[Encoded], *, pad_id: int, check: Callable[[], None] = lambda: None
) -> int | None:
    """Find the budget that the engine does these rows fastest with; None where there are too few to tell.

    `check` is called between batches; its exception ends the search.
    """
    limits, total = range_of(engine.device), sum(len(row.input_ids) for row in rows)
    if total < WORTHWHILE * limits.usual:
        return None
    check()
    measure = _Measure(engine, rows, pad_id, check)
    least = max(limits.least, *(len(row.input_ids) for row in rows))
    try:
        measure(least)  # the first batch of a process is slow
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return least
    return search(measure, least=least, most=min(limits.most, total // 2))


def search(measure: Measure, *, least: int, most: int) -> int:
    """Double the budget from `least` while that is faster, fits the memory and stays in bounds.

    >>> search(lambda tokens: Trial(tokens, 0.1 + tokens / 10_000), least=500, most=64_000)
    32000
    >>> search(lambda tokens: Trial(tokens, 1, share=tokens / 3000), least=500, most=64_000)
    2000
    """
    budget, trial = least, measure(least)
    while 2 * budget <= most and trial.seconds <= LONGEST_TRIAL:
        # A batch's memory is some part that is always there and one that grows with its tokens: at most twice as much.
        if 2 * trial.share > MEMORY_SHARE:
            break
        try:
            larger = measure(2 * budget)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if larger.rate < GAIN * trial.rate:
            break
        budget, trial = 2 * budget, larger
    return budget


@dataclass(frozen=True)
class _Measure:
    """Times the first batch of a plan, that of the longest rows, and the one in its middle."""

    engine: Engine
    rows: Sequence[Encoded]
    pad_id: int
    check: Callable[[], None]

    def __call__(self, budget: int) -> Trial:
        """Do the two batches."""
        batches = plan([len(row.input_ids) for row in self.rows], token_budget=budget, packed=self.engine.packing)
        chosen = [[self.rows[index] for index in batch] for batch in (batches[0], batches[len(batches) // 2])]
        memory = _Memory(self.engine)
        began = time.perf_counter()
        for rows in chosen:
            self.engine.features(rows, pad_id=self.pad_id, token_budget=budget)
            self.check()
        seconds = time.perf_counter() - began  # the features are on the host: nothing is left to wait for
        tokens = sum(len(row.input_ids) for rows in chosen for row in rows)
        return Trial(tokens, seconds, share=memory.share())


class _Memory:
    """The memory of the model's GPUs from now on; a CPU's is not torch's alone, and not watched."""

    def __init__(self, engine: Engine) -> None:
        gc.collect()
        places = {parameter.device for parameter in engine.model.parameters()}
        self._gpus = [place for place in places if place.type == "cuda"]
        self._before = [torch.cuda.memory_allocated(gpu) for gpu in self._gpus]
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def share(self) -> float:
        """The largest share of what torch could get that was taken since."""
        return max(map(_share, self._gpus, self._before), default=0.0)


def _share(gpu: torch.device, before: int) -> float:
    free, _ = torch.cuda.mem_get_info(gpu)
    reachable = free + torch.cuda.memory_reserved(gpu) - before
    return (torch.cuda.max_memory_allocated(gpu) - before) / max(reachable, 1)
