"""Side by side: what a feature costs, measured against the plain training step, and how much of the gradient it keeps.

    python -m benchmarks.gradients --preset 256x6 --rounds 5 --json out.json

Needs torch, transformers, peft and numpy alone; bergson and dattri-llm take part where they are installed. Contestants
take turns in an order drawn anew each time, each on the same share of the rows. A ratio is always that of two rates of
one round; what is printed is the median over the rounds, with the smallest and the largest. Those much slower than the
plain step get fewer rows, of all lengths. A rate is in tokens, given as examples of the mean length. On a CPU with one
thread the clock is the process's CPU time, which neighbours on the machine disturb least; else it is the wall's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.contestants import ADAM, Contestant, Exact, Less, Ours, Plain, exact_gradients, exact_of
from benchmarks.counting import PeakMemory, product_rate
from benchmarks.results import DEFAULT, PARTS, Measured, lines_of, missed_targets, table
from benchmarks.stages import by_operation, shares
from benchmarks.workload import PRESETS, Workload, draw_lengths, make_workload, read_lengths
from worker.batches import Encoded
from worker.directions import Kind
from worker.projection import ProjectionName

BUDGETS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (4096, 8192, 16_384, 32_768, 65_536, 131_072)}
LARGE = 32_768
"""Tokens of a batch on a CPU for those that draw a matrix for each."""

SEARCH_ROWS = {"cpu": 64, "cuda": 512}
SEARCH_PASSES = {"cpu": 6, "cuda": 3}
"""Of which the first warms up, and the fastest counts."""

FEWEST = 16
"""Rows of a turn: as many gradients as LESS projects together."""

EXACT_BYTES = 16 << 30
"""Room for the unprojected gradients that fidelity is measured against."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""What has glibc return freed memory at once, so that a peak is what was held and not what was held before."""

Make = Callable[[], Contestant]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where `--target-check` finds a target missed, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.examples is not None and options.examples < PARTS:
        parser.error(f"--examples must be at least {PARTS}: a row for each turn")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.memory_of:
        print(_memory_alone(options, device))
        return 0
    workload = _workload(options, device)
    print(_heading(options, workload), flush=True)
    field_ = _field(workload, options)
    rate = product_rate(device)
    _find_budgets(field_, workload, options.token_budget)
    _find_shares(field_, workload, options.side_seconds)
    for number in range(options.rounds):
        _round(field_, workload, random.Random(number))  # noqa: S311
        print(f"round {number + 1}/{options.rounds}: {_ratio_of(field_)}", flush=True)
    if options.fidelity:
        _measure_fidelity(field_, workload, options.fidelity)
    if options.memory:
        _measure_memory(field_, workload, options)
    if options.profile:
        _profile(field_, workload)
    lines = lines_of(field_, workload, rate)
    print(table(lines, rate))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")
    missed = missed_targets(options.preset, lines) if options.target_check else []
    for fault in missed:
        print(f"target missed: {fault}")
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="256x6")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, help="rows; the preset's own number without it")
    parser.add_argument("--lengths", type=Path, metavar="FILE.jsonl", help="take the rows' lengths from this file's")
    parser.add_argument("--mean-tokens", type=float, help="scale the lengths of --lengths to this mean")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--adapter", choices=["float32", "model"], default="float32", help="type of LoRA's weights")
    parser.add_argument("--attention", choices=["sdpa", "eager", "flash_attention_2"], default="sdpa")
    parser.add_argument("--token-budget", type=int, metavar="N", help="tokens of a batch, instead of the best found")
    parser.add_argument("--only", action="append", metavar="NAME", help="contestants whose name holds this; repeatable")
    parser.add_argument("--side-seconds", type=float, default=8.0, help="of a round, for each of the others")
    parser.add_argument("--fidelity", type=int, default=64, metavar="ROWS", help="rows compared with exact; 0: none")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="measure the stages")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here as a list")
    parser.add_argument(
        "--target-check", action="store_true", help="exit with 1 where a target of the preset is missed"
    )
    parser.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def _workload(options: argparse.Namespace, device: torch.device, *, train: bool = True) -> Workload:
    preset = PRESETS[options.preset]
    examples = options.examples or preset.examples
    if options.lengths is None:
        lengths = draw_lengths(preset, examples=examples)
    else:
        lengths = read_lengths(options.lengths, examples=examples, mean_tokens=options.mean_tokens)
    return make_workload(
        preset, device=device, lengths=lengths, adapter=options.adapter, attention=options.attention, train=train
    )


def _heading(options: argparse.Namespace, workload: Workload) -> str:
    device = torch.cuda.get_device_name() if workload.device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    clock = "CPU time" if _cpu_clock(workload.device) else "wall time"
    return (
        f"{options.preset} on {device}; torch {torch.__version__}; {len(workload.rows)} rows of "
        f"{workload.mean_tokens:.0f} tokens on average; {workload.parameters:,} trainable numbers to "
        f"{workload.dims:,} dims; clock: {clock}"
    )


# Who takes part ------------------------------------------------------------------------------------------------------


def _field(workload: Workload, options: argparse.Namespace) -> list[Measured]:
    """Make the contestants; the plain step comes first and always takes part."""
    contestants: list[Contestant] = []
    for name, make in _makers(workload):
        if name == "plain" or not options.only or any(part in name for part in options.only):
            made = make()
            assert made.name == name, (made.name, name)
            contestants.append(made)
    for peer in peers.NEEDED:
        if lacking := peers.missing(peer):
            print(f"{peer} is left out: {', '.join(lacking)} not installed")
    return [Measured(contestant) for contestant in contestants]


def _makers(workload: Workload) -> Iterator[tuple[str, Make]]:
    """Name the contestants that can run here, with how to make each."""
    yield "plain", lambda: Plain(workload)
    yield DEFAULT, lambda: Ours(workload, ADAM, projection="blocks")
    for kind in (Kind("adam", "exact"), Kind("sgd"), Kind("sign")):
        yield f"gradstore {exact_of(kind)} blocks", partial(Ours, workload, kind, projection="blocks")
    yield (
        f"{DEFAULT.removesuffix(' blocks')} + sgd blocks",
        partial(Ours, workload, ADAM, Kind("sgd"), projection="blocks"),
    )
    for projection in get_args(ProjectionName):
        fits = projection != "none" or workload.parameters * len(workload.rows) * 4 <= EXACT_BYTES
        if projection != "blocks" and fits:
            yield (
                f"gradstore adam less {projection}",
                partial(Ours, workload, ADAM, projection=projection),
            )
    yield "LESS's loop", lambda: Less(workload)
    if not peers.missing("bergson"):
        yield "bergson global", lambda: peers.Bergson(workload, "global")
        yield "bergson global, large batch", lambda: peers.Bergson(workload, "global", large=True)
        yield "bergson per-module", lambda: peers.Bergson(workload, "per-module")
        yield "bergson adam global", lambda: peers.Bergson(workload, "global", adam=True)
    if not peers.missing("dattri-llm"):
        yield "dattri-llm dense", lambda: peers.DattriLlm(workload, "dense")
        yield "dattri-llm mask", lambda: peers.DattriLlm(workload, "mask")
        yield "dattri-llm adam dense", lambda: peers.DattriLlm(workload, "dense", adam=True)


# Time ----------------------------------------------------------------------------------------------------------------


def _cpu_clock(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def _seconds(contestant: Contestant, rows: Sequence[Encoded], device: torch.device) -> float:
    """Time a run over `rows`."""
    clock = time.process_time if _cpu_clock(device) else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    contestant.run(rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def _spread(rows: Sequence[Encoded], stride: int, start: int = 0) -> list[Encoded]:
    """Take every `stride`-th of the rows by length: a share with the lengths of all."""
    return sorted(rows, key=lambda row: len(row.input_ids))[start::stride]


def _find_budgets(field_: Sequence[Measured], workload: Workload, given: int | None) -> None:
    """Give the plain step and the engine each its own best batch, or the `given` one; the others get the same.

    Those that draw a dense matrix for each batch get the default of their own, or a large one.
    """
    kind = "cuda" if workload.device.type == "cuda" else "cpu"
    rows = _spread(workload.rows, max(1, len(workload.rows) // SEARCH_ROWS[kind]))
    plain = given or _best_budget(field_[0].contestant, rows, workload.device)
    ours = given
    for entry in field_:
        if entry.contestant.draws_matrix:
            entry.contestant.token_budget = entry.contestant.default_budget or (LARGE if kind == "cpu" else plain)
        elif isinstance(entry.contestant, Ours):
            ours = ours or _best_budget(entry.contestant, rows, workload.device)
            entry.contestant.token_budget = ours
        elif not isinstance(entry.contestant, Less):
            entry.contestant.token_budget = plain
    print(f"batches of at most {plain:,} tokens (plain step), {ours or 0:,} (engine)", flush=True)


def _best_budget(contestant: Contestant, rows: Sequence[Encoded], device: torch.device) -> int:
    kind = "cuda" if device.type == "cuda" else "cpu"
    times: dict[int, float] = {}
    total = sum(len(row.input_ids) for row in rows)
    for _ in range(SEARCH_PASSES[kind]):
        for budget in BUDGETS[kind]:
            if budget > 2 * total and times:
                break  # one batch holds them all already
            contestant.token_budget = budget
            try:
                times[budget] = min(times.get(budget, math.inf), _seconds(contestant, rows, device))
            except torch.OutOfMemoryError:
                times.pop(budget, None)
                torch.cuda.empty_cache()
                break
    return min(times, key=times.__getitem__)


def _find_shares(field_: list[Measured], workload: Workload, side_seconds: float) -> None:
    """Let those that are slow have fewer turns and rows; the plain step and the engine's default get them all.

    Those that draw a dense matrix for each batch get all rows in one turn.
    """
    few = _spread(workload.rows, max(1, len(workload.rows) // FEWEST))
    for entry in list(field_):
        if entry.contestant.draws_matrix:
            entry.turns = 1
            if workload.device.type == "cpu":
                continue  # its first turn is long enough to warm up in
        try:
            entry.contestant.run(few[:2])
            seconds = _seconds(entry.contestant, few, workload.device) * len(workload.rows) / len(few)
        except torch.OutOfMemoryError:
            print(f"{entry.contestant.name} is left out: out of memory")
            field_.remove(entry)
            continue
        if entry.contestant.name not in {"plain", DEFAULT} and not entry.contestant.draws_matrix:
            a_turn = seconds / PARTS
            entry.turns = min(PARTS, max(1, int(side_seconds / a_turn)))
            entry.stride = min(max(1, len(workload.rows) // (PARTS * FEWEST)), max(1, int(a_turn / side_seconds)))


def _round(field_: Sequence[Measured], workload: Workload, order: random.Random) -> None:
    """Give every contestant its turns, and note its rate."""
    tokens = dict.fromkeys(range(len(field_)), 0)
    seconds = dict.fromkeys(range(len(field_)), 0.0)
    plays = [set(order.sample(range(PARTS), entry.turns)) for entry in field_]
    for part in range(PARTS):
        rows = _spread(workload.rows, PARTS, part)
        gc.collect()
        for index in order.sample(range(len(field_)), len(field_)):
            if part in plays[index]:
                share = _share(field_[index], rows, workload)
                seconds[index] += _seconds(field_[index].contestant, share, workload.device)
                tokens[index] += sum(len(row.input_ids) for row in share)
    for index, entry in enumerate(field_):
        entry.rates.append(tokens[index] / seconds[index])


def _share(entry: Measured, rows: list[Encoded], workload: Workload) -> list[Encoded]:
    """Return the rows of a turn, of those that the turn is for."""
    return workload.rows if entry.contestant.draws_matrix else _spread(rows, entry.stride, entry.stride // 2)


def _ratio_of(field_: Sequence[Measured]) -> str:
    plain = field_[0]
    return ", ".join(f"{entry.contestant.name} {entry.rates[-1] / plain.rates[-1]:.3f}" for entry in field_[1:])


# Fidelity, memory, stages --------------------------------------------------------------------------------------------


def _measure_fidelity(field_: Sequence[Measured], workload: Workload, rows: int) -> None:
    """Compare the cosines of all pairs of rows with those of the unprojected gradients of the same kind."""
    size = workload.parameters * 4
    chosen = _spread(workload.rows, max(1, len(workload.rows) // min(rows, len(workload.rows))))[: EXACT_BYTES // size]
    if len(chosen) < 8:
        print(f"fidelity is not measured: {len(chosen)} unprojected gradients fit into {EXACT_BYTES >> 30} GiB")
        return
    exact: dict[Exact, NDArray[np.float64]] = {}
    for entry in field_:
        kind = entry.contestant.exact
        if kind is None:
            continue
        if kind not in exact:
            exact[kind] = _cosines(torch.stack([row.cpu() for row in exact_gradients(workload, chosen, kind)]))
        cosines = _cosines(torch.from_numpy(entry.contestant.features(chosen)))
        entry.pearson = float(np.corrcoef(cosines, exact[kind])[0, 1])


def _cosines(features: torch.Tensor) -> NDArray[np.float64]:
    """Return the cosines of all pairs of rows."""
    unit = torch.nn.functional.normalize(features, dim=1)
    pairs = np.triu_indices(len(features), 1)
    cosines: NDArray[np.float64] = (unit @ unit.T).double().numpy()[pairs]
    return cosines


def _measure_memory(field_: Sequence[Measured], workload: Workload, options: argparse.Namespace) -> None:
    """Measure every contestant's peak in the batches of the plain step, or in its own where it is one example's.

    On a CPU in a process of its own, where nothing was freed before.
    """
    budget = field_[0].contestant.token_budget
    for entry in field_:
        own = entry.contestant.token_budget
        if workload.device.type == "cuda":
            entry.contestant.token_budget = budget if own else None
            entry.memory = _memory(entry.contestant, workload)
            entry.contestant.token_budget = own
            continue
        command = [
            *(sys.executable, "-m", "benchmarks.gradients", "--preset", options.preset, "--device", "cpu"),
            *("--threads", str(options.threads), "--adapter", options.adapter, "--examples", str(len(workload.rows))),
            *("--attention", options.attention),
            *("--memory-of", entry.contestant.name),
            *(("--token-budget", str(budget)) if own else ()),
            *(("--lengths", str(options.lengths)) if options.lengths else ()),
            *(("--mean-tokens", str(options.mean_tokens)) if options.mean_tokens else ()),
        ]
        done = subprocess.run(command, env=os.environ | GIVE_BACK, capture_output=True, text=True, check=True)
        entry.memory = int(done.stdout.split()[-1])


def _memory_alone(options: argparse.Namespace, device: torch.device) -> int:
    """Return the peak of one contestant, made and run in this process alone."""
    workload = _workload(options, device, train=False)
    make = dict(_makers(workload))[options.memory_of]

    def run(rows: int | None) -> None:
        contestant = make()
        contestant.token_budget = options.token_budget
        contestant.run(_longest(workload, contestant)[:rows])

    run(2)  # what is imported on the way is no part of the peak
    gc.collect()
    peak = PeakMemory(device)
    peak.start()
    run(None)
    return peak.above()


def _memory(contestant: Contestant, workload: Workload) -> int:
    peak = PeakMemory(workload.device)
    peak.start()
    contestant.run(_longest(workload, contestant))
    return peak.above()


def _longest(workload: Workload, contestant: Contestant) -> list[Encoded]:
    """Return the rows of the two largest batches."""
    if contestant.token_budget is None:
        return _spread(workload.rows, 1)[-FEWEST:]
    batches = list(workload.batches(workload.rows, contestant.token_budget))[:2]
    return [workload.rows[index] for batch in batches for index in batch]


def _profile(field_: Sequence[Measured], workload: Workload) -> None:
    rows = _spread(workload.rows, max(1, len(workload.rows) // 64))
    for entry in field_:
        if isinstance(entry.contestant, Ours) and entry.contestant.projection != "rademacher":
            entry.shares = shares(entry.contestant, rows)
        if entry.contestant.name in (Plain.name, DEFAULT):
            entry.work = by_operation(entry.contestant, rows, workload.device)


if __name__ == "__main__":
    sys.exit(main())
