"""How well each projection keeps what a selection needs, and what it costs, on the gradients of a small model.

    python -m benchmarks.projections --preset 256x6 --json out.json

Needs torch, transformers, peft and numpy alone. The rows of a workload are the pool and, of each of its topics, the
rows of a task; as LESS has it, the pool's gradients go through Adam's map and the tasks' do not. Every map then
projects the same gradients with several seeds, and what is compared with the unprojected ones is

* RMSE·√k: the error of the cosines of a pool row with a task row, its root mean square over rows and seeds, times √dim.
  A cosine c is off by about (1 − c²)/√k through any of these maps. Rows have much in common, and so have their errors:
  one seed may well be a quarter off the mean. The largest of a seed is printed too.
* Pearson: the correlation of these cosines with the unprojected ones.
* top 10: of the ten pool rows with the best scores for a task (mean cosine with its rows), how many the projection
  finds.
* ms: processor time to project an example, all parameters of it, the median over the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.workload import PRESETS, TOPICS, Preset, Workload, draw_lengths, make_workload, trainable
from worker.batches import Encoded
from worker.directions import Kind
from worker.gradients import GradientEngine
from worker.projection import Projection, ProjectionName, make_projection

MAPS: tuple[ProjectionName, ...] = ("blocks", "sjlt", "fft", "rademacher")
BEST = 10
AT_ONCE = 16  # examples projected together


@dataclass(frozen=True)
class Gradients:
    """Unprojected gradients, parameter after parameter."""

    pool: Tensor
    """(n, p) float32, after Adam's map."""
    tasks: Tensor
    """(m, p) float32; row i belongs to task i mod TOPICS."""
    shapes: list[tuple[str, torch.Size]]

    def projected(self, projection: Projection) -> tuple[Tensor, Tensor]:
        """Return pool and tasks through a map of one dimension: (n, dim) and (m, dim)."""
        (dim,) = projection.dims
        sizes = [shape.numel() for _, shape in self.shapes]
        images = []
        for flat in (self.pool, self.tasks):
            parts = []
            for start in range(0, len(flat), AT_ONCE):
                some = flat[start : start + AT_ONCE]
                named = zip([name for name, _ in self.shapes], some.split_with_sizes(sizes, dim=1), strict=True)
                parts.append(projection.project(named, examples=len(some))[dim])
            images.append(torch.cat(parts))
        return images[0], images[1]


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    projection: ProjectionName
    dim: int
    rmse_times_root: float
    largest_rmse_times_root: float
    """Of a single seed."""
    pearson: float
    top: float
    """Share of the best rows that are found."""
    milliseconds: float
    """Per example."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    preset, device = PRESETS[options.preset], torch.device(options.device)
    gradients = make_gradients(preset, pool=options.pool, each=options.each, device=device)
    rows, parameters = gradients.pool.shape
    print(f"{rows} rows of the pool, {len(gradients.tasks)} of {TOPICS} tasks, {parameters:,} parameters")
    lines = []
    print("\n| map | dim | RMSE·√k (largest) | Pearson | top 10 | ms |\n|---|---|---|---|---|---|")
    for dim in options.dim or [preset.dims]:
        for name in options.map or MAPS:
            line = measure(gradients, name, dim, seeds=options.seeds)
            lines.append(line)
            print(
                f"| {name} | {dim:,} | {line.rmse_times_root:.3f} ({line.largest_rmse_times_root:.3f}) "
                f"| {line.pearson:.4f} | {line.top:.3f} | {line.milliseconds:.3g} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.projections", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="256x6")
    parser.add_argument("--pool", type=int, default=128, help="rows of the pool")
    parser.add_argument("--each", type=int, default=8, help="rows of a task")
    parser.add_argument("--dim", type=int, action="append", help="may be repeated; the preset's by default")
    parser.add_argument("--map", choices=MAPS, action="append", help="may be repeated; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the lines of the table to this file")
    return parser.parse_args(arguments)


def make_gradients(preset: Preset, *, pool: int, each: int, device: torch.device) -> Gradients:
    """Compute the gradients of `pool` rows and of `each` rows of every topic, at a checkpoint of a few Adam steps."""
    lengths = draw_lengths(preset, examples=pool + TOPICS * each)
    workload = make_workload(preset, device=device, lengths=lengths)
    shapes = [(name, parameter.shape) for name, parameter in trainable(workload.model).items()]
    adam, sgd = _flat(workload, workload.rows[:pool], Kind("adam")), _flat(workload, workload.rows[pool:], Kind("sgd"))
    return Gradients(adam, sgd.roll(pool % TOPICS, 0), shapes)


def _flat(workload: Workload, rows: Sequence[Encoded], kind: Kind) -> Tensor:
    engine = GradientEngine(
        workload.model, kinds=[kind], moments=workload.moments, projection="none", dims=[workload.parameters]
    )
    found = engine.features(rows, pad_id=0, token_budget=2048)[kind]
    return torch.from_numpy(found.by_dim[workload.parameters]).to(workload.device)


def measure(gradients: Gradients, name: ProjectionName, dim: int, *, seeds: int) -> Line:
    """Project the gradients with each of the seeds, and compare."""
    exact = cosines(gradients.pool.double(), gradients.tasks.double())
    squares, pearsons, tops, times = [], [], [], []
    for seed in range(seeds):
        projection = make_projection(
            name, dims=[dim], parameters=gradients.shapes, seed=seed, device=gradients.pool.device
        )
        begin = time.process_time()
        images = gradients.projected(projection)
        times.append((time.process_time() - begin) / sum(map(len, images)))
        found = cosines(*images)
        squares.append(float((found - exact).square().mean()))
        pearsons.append(float(torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]))
        tops.append(_found(found, exact))
    return Line(
        projection=name,
        dim=dim,
        rmse_times_root=(sum(squares) / seeds * dim) ** 0.5,
        largest_rmse_times_root=(max(squares) * dim) ** 0.5,
        pearson=sum(pearsons) / seeds,
        top=sum(tops) / seeds,
        milliseconds=median(times) * 1000,
    )


def cosines(pool: Tensor, tasks: Tensor) -> Tensor:
    """Return the cosines of every pool row with every task row, (n, m) float64."""
    return normalize(pool.double(), dim=1) @ normalize(tasks.double(), dim=1).T


def _found(found: Tensor, exact: Tensor) -> float:
    """Return the share of each task's best rows by the exact cosines that are also its best by those found."""
    common = 0
    for task in range(TOPICS):
        best, ours = (table[:, task::TOPICS].mean(1).topk(BEST).indices.tolist() for table in (exact, found))
        common += len({*best} & {*ours})
    return common / (BEST * TOPICS)


if __name__ == "__main__":
    sys.exit(main())
