"""What comes out of the benchmark: what was measured of each contestant, the table of it, and the targets missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.contestants import Contestant, Ours
from benchmarks.counting import operations, projection_bytes
from benchmarks.workload import Workload

DEFAULT = "gradstore adam less blocks"
"""The engine as it is used unless asked otherwise."""

PARTS = 8
"""Turns of the plain step and the engine's default in a round, each with other rows of all lengths."""


@dataclass(frozen=True)
class Targets:
    """What the engine's default must reach."""

    times: dict[str, float]
    """How many times a contestant's rate."""
    share_of_product: float = 0.0
    """Of the plain step's operations, in what a large product reaches on the device."""
    examples_per_second: float = 0.0


TARGETS = {
    "256x6": Targets({"plain": 0.97, "LESS's loop": 20, "bergson global": 7}),
    "512x8": Targets({"plain": 0.96, "LESS's loop": 16, "bergson global": 5.3}),
    "qwen3-0.6b": Targets({"plain": 0.95}),
    "llama-3.2-1b": Targets({"plain": 0.95}),
    "llama-2-7b": Targets({"plain": 0.95}, share_of_product=0.6, examples_per_second=45),
}


@dataclass
class Measured:
    """What is known of a contestant."""

    contestant: Contestant
    turns: int = PARTS
    """In a round."""
    stride: int = 1
    """It gets every so many-th row of a turn."""
    rates: list[float] = field(default_factory=list)
    """Tokens per second of each round."""
    pearson: float | None = None
    memory: int | None = None
    """Bytes above the loaded model."""
    shares: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    name: str
    examples_per_second: float
    ratio_to_plain: float
    lowest_ratio: float
    highest_ratio: float
    pearson: float | None
    token_budget: int | None
    rows: int
    memory_mib: float | None
    memory_to_plain: float | None
    flops: float
    """Floating-point operations per second, by the count of `counting.operations`."""
    share_of_product: float
    """Those over what a large product reaches on the device."""
    projection_mb: float | None
    """Megabytes that the projection moves for each example."""
    stages: dict[str, float]
    """Share of the time by the engine's parts."""
    work: dict[str, float]
    """Share of the time by operation."""


def lines_of(field_: Sequence[Measured], workload: Workload, rate: float) -> list[Line]:
    """Return the table's lines; `rate` is that of a large product, in operations per second."""
    plain = field_[0]
    each = operations(workload)
    return [_line(entry, plain, workload, each, rate) for entry in field_]


def _line(entry: Measured, plain: Measured, workload: Workload, each: float, rate: float) -> Line:
    ratios = [own / other for own, other in zip(entry.rates, plain.rates, strict=True)]
    examples = median(entry.rates) / workload.mean_tokens
    moved = projection_bytes(entry.contestant.projection, workload) if isinstance(entry.contestant, Ours) else None
    return Line(
        name=entry.contestant.name,
        examples_per_second=examples,
        ratio_to_plain=median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        pearson=entry.pearson,
        token_budget=entry.contestant.token_budget,
        rows=len(workload.rows) * (PARTS if entry.contestant.draws_matrix else entry.turns) // (PARTS * entry.stride),
        memory_mib=None if entry.memory is None else entry.memory / 2**20,
        memory_to_plain=None if entry.memory is None or not plain.memory else entry.memory / plain.memory,
        flops=examples * each,
        share_of_product=examples * each / rate,
        projection_mb=None if moved is None else moved / 1e6,
        stages=entry.shares,
        work=entry.work,
    )


def table(lines: Sequence[Line], rate: float) -> str:
    """Return the table in Markdown, and below it where the time went."""
    out = [
        "",
        "| what | examples/s | ÷ plain (min–max) | Pearson | tokens a batch | rows | peak MiB (÷ plain) "
        "| TFLOP/s (share) | MB moved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        memory = "–" if line.memory_mib is None else f"{line.memory_mib:,.0f} ({line.memory_to_plain or 0:.2f})"
        moved = "–" if line.projection_mb is None else f"{line.projection_mb:.1f}"
        out.append(
            f"| {line.name} | {line.examples_per_second:.3g} | {line.ratio_to_plain:.3f} "
            f"({line.lowest_ratio:.3f}–{line.highest_ratio:.3f}) | {_number(line.pearson)} "
            f"| {line.token_budget or '–'} | {line.rows} | {memory} "
            f"| {line.flops / 1e12:.3g} ({line.share_of_product:.0%}) | {moved} |"
        )
    out += ["", f"A large product reaches {rate / 1e12:.3g} TFLOP/s here. Peaks are those above the loaded model.", ""]
    for line in lines:
        for shares_ in (line.stages, line.work):
            if shares_:
                out.append(f"{line.name}: " + ", ".join(f"{part} {share:.1%}" for part, share in shares_.items()))
    return "\n".join(out)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def missed_targets(preset: str, lines: Sequence[Line]) -> list[str]:
    """Say which targets of the preset are missed, by the medians."""
    by_name = {line.name: line for line in lines}
    if DEFAULT not in by_name:
        return [f"{DEFAULT} took no part"]
    ours, plain, targets = by_name[DEFAULT], by_name["plain"], TARGETS.get(preset, Targets({}))
    faults = []
    for name, wanted in targets.times.items():
        if name in by_name and (times := ours.ratio_to_plain / by_name[name].ratio_to_plain) < wanted:
            faults.append(f"{DEFAULT} is {times:.3f} times {name}, not {wanted}")
    if plain.share_of_product < targets.share_of_product:
        faults.append(
            f"plain reaches {plain.share_of_product:.0%} of a large product, not {targets.share_of_product:.0%}"
        )
    if ours.examples_per_second < targets.examples_per_second:
        faults.append(f"{ours.examples_per_second:.1f} examples/s, not {targets.examples_per_second:g}")
    return faults
