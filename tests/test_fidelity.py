"""What the projections keep of real gradients: cosines, and which rows of a pool are best for a task.

The gradients are the engine's, at a small Llama after some Adam steps; the measurement is that of
`benchmarks/projections.py`, which prints the same numbers for larger models.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.projections import Gradients, cosines, main, make_gradients, measure
from benchmarks.workload import PRESETS
from worker.projection import ProjectionName

DIM = 8192
SEEDS: dict[ProjectionName, int] = {"blocks": 10, "sjlt": 10, "fft": 10, "rademacher": 2}


@pytest.fixture(scope="module")
def gradients() -> Gradients:
    tiny = PRESETS["tiny"]
    preset = replace(tiny, architecture=tiny.architecture | {"hidden_size": 64}, rank=16, shortest=16, longest=48)
    return make_gradients(preset, pool=48, each=8, device=torch.device("cpu"))


def test_the_gradients_are_those_of_a_pool_and_of_tasks_that_differ(gradients: Gradients) -> None:
    """Twice as many numbers as sums, and scores with something to tell apart: else there was nothing to keep."""
    table = cosines(gradients.pool, gradients.tasks)
    assert table.shape == (48, 64)
    assert gradients.pool.shape[1] == sum(shape.numel() for _, shape in gradients.shapes) == 2 * DIM
    means = torch.stack([table[:, task::8].mean(1) for task in range(8)], 1)
    assert means.std(0).min() > 1 / DIM**0.5
    assert not torch.equal(means[:, 0].argsort(), means[:, 1].argsort())


@pytest.mark.parametrize("name", SEEDS)
def test_cosines_are_off_by_no_more_than_they_must_and_nine_of_the_ten_best_rows_are_found(
    gradients: Gradients, name: ProjectionName
) -> None:
    line = measure(gradients, name, DIM, seeds=SEEDS[name])
    assert line.rmse_times_root <= 1.1
    assert line.top >= 0.9
    assert line.pearson >= 0.99


def test_the_measurement_sees_a_map_that_loses_inner_products(gradients: Gradients) -> None:
    """An eighth of the dimensions has √8 times the error."""
    line, coarse = (measure(gradients, "blocks", dim, seeds=5) for dim in (DIM, DIM // 8))
    assert coarse.rmse_times_root / (DIM // 8) ** 0.5 > 2 * line.rmse_times_root / DIM**0.5
    assert coarse.top < line.top
    assert coarse.pearson < line.pearson


def test_the_benchmark_prints_a_line_for_each_map_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert main(["--preset", "tiny", "--pool", "16", "--each", "2", "--seeds", "2", "--json", str(file)]) == 0
    lines = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert [line["projection"] for line in lines] == list(SEEDS)
    for line in lines:
        assert line["dim"] == PRESETS["tiny"].dims
        assert 0 < line["rmse_times_root"] <= line["largest_rmse_times_root"]
        assert f"| {line['projection']} | {line['dim']} | {line['rmse_times_root']:.3f} " in printed
