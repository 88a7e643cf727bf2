"""Where the time goes, by a profiled pass: by the engine's parts, marked from outside, or by torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contestants import Contestant, Ours
from worker.batches import Encoded
from worker.layouts import Packed, Padded

FORWARD, BACKWARD, OUTER, MAP, PROJECTION, REST = STAGES = (
    "forward",
    "backward",
    "outer products",
    "Adam's map",
    "projection",
    "rest",
)
_MARK = "stage: "

WORK = {"products": ("mm", "mm_", "bmm", "linear"), "attention": ("attention",), "softmax": ("softmax",)}
"""What an operation of torch is counted as: what is in its name, for products its end. Others are `elementwise`."""


def shares(contestant: Ours, rows: Sequence[Encoded]) -> dict[str, float]:
    """Return the share of each stage in a pass over `rows`; they add up to 1.

    `backward` is what is left of it without the engine's own stages; `rest` the batches' making and keeping, the
    losses' sum, norms and checks. On a GPU the shares are those of its time at work, and `rest` is part of `backward`:
    kernels are known by the thread that launched them, and the backward pass has one of its own. Where one kernel does
    all that follows an outer product, it is the `projection`.
    """
    on_gpu = contestant.engine.device.type == "cuda"
    with _marked(contestant):
        events = _profiled(contestant, rows, on_gpu=on_gpu)
    spent = {
        event.key.removeprefix(_MARK): float(event.device_time_total if on_gpu else event.cpu_time_total)
        for event in events
        if event.key.startswith(_MARK) and event.device_type.name == "CPU"
    }
    parts = {stage: spent[stage] for stage in (FORWARD, OUTER, MAP, PROJECTION) if stage in spent}
    if on_gpu:
        total = sum(float(event.self_device_time_total) for event in events if not event.key.startswith(_MARK))
        parts[BACKWARD] = total - sum(parts.values())
    else:
        total = spent["all"]
        parts[BACKWARD] = spent[BACKWARD] - sum(spent[stage] for stage in (OUTER, MAP, PROJECTION))
        parts[REST] = total - spent[FORWARD] - spent[BACKWARD]
    return {stage: parts[stage] / total for stage in STAGES if stage in parts}


def by_operation(contestant: Contestant, rows: Sequence[Encoded], device: torch.device) -> dict[str, float]:
    """Return the share of each sort of operation in a pass over `rows`, and of all else: Python, and making calls.

    On a GPU of its time at work, where nothing else is left.
    """
    on_gpu = device.type == "cuda"
    spent = dict.fromkeys((*WORK, "elementwise", "calls"), 0.0)
    for event in _profiled(contestant, rows, on_gpu=on_gpu):
        own = float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        spent[_sort_of_work(event.key)] += own
    return {sort: time / sum(spent.values()) for sort, time in spent.items()}


def _sort_of_work(key: str) -> str:
    library, _, operation = key.rpartition("::")
    if library != "aten":
        return "calls"
    for sort, marks in WORK.items():
        if operation.endswith(marks) if sort == "products" else any(mark in operation for mark in marks):
            return sort
    return "elementwise"


def _profiled(contestant: Contestant, rows: Sequence[Encoded], *, on_gpu: bool) -> Any:
    """Return the profiler's sums of a pass over `rows`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler, record_function(_MARK + "all"):
        contestant.run(rows)
        if on_gpu:
            torch.cuda.synchronize()
    return profiler.key_averages()


@contextmanager
def _marked(contestant: Ours) -> Iterator[None]:
    """Mark the stages: the seams of the engine, and the function of torch that it calls for a stage alone."""
    engine: Any = contestant.engine
    seams: list[tuple[Any, str, str]] = [
        (engine.model, "forward", FORWARD),
        (torch.Tensor, "backward", BACKWARD),
        (Padded, "outer", OUTER),
        (Packed, "outer", OUTER),
        (engine._projection, "add", PROJECTION),
    ]
    if engine.device.type == "cuda" and find_spec("triton"):
        from worker.kernels import FusedSums  # noqa: PLC0415 - there is no Triton for most CPUs

        seams.append((FusedSums, "take", PROJECTION))
    directions = dict(engine._directions)
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in seams]
    try:
        for owner, name, stage in seams:
            setattr(owner, name, _timed(getattr(owner, name), stage))
        engine._directions.update({kind: _timed(direction, MAP) for kind, direction in directions.items()})
        yield
    finally:
        engine._directions.update(directions)
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        with record_function(_MARK + stage):
            return function(*arguments, **named)

    return timed
