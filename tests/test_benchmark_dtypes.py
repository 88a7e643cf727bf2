"""The benchmark of dtypes measures what it says, on gradients made up for the purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.dtypes import DTYPES, TASKS, Gradients, best, decoding_speed, exact_scores, measure


def made_up(rows: int = 200) -> Gradients:
    """Rows with a few common directions, as gradients have them."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((5, 60))

    def some(count: int) -> np.ndarray:
        return (rng.standard_normal((count, 5)) @ common + rng.standard_normal((count, 60))).astype(np.float32)

    tasks = {name: some(6) for name in TASKS}
    return Gradients(some(rows), tasks, {name: ["a", "b"] * 3 for name in TASKS}, [("w", torch.Size([6, 10]))])


def test_unprojected_features_in_float32_lose_nothing_and_narrower_ones_little(tmp_path: Path) -> None:
    lines = {line.dtype: line for line in measure(made_up(), ["none"], [60], 300, str(tmp_path))}
    assert lines.keys() == {*DTYPES}
    assert (lines["float32"].top, lines["float32"].top_unprojected) == (1, 1)
    assert lines["float32"].pearson > 0.999999
    assert lines["int8"].top > 0.8
    assert lines["float32"].pearson > lines["int8"].pearson > lines["int4"].pearson > lines["binary"].pearson
    assert [lines[dtype].bytes_per_row for dtype in ("float32", "float16", "int8", "int4")] == [265, 145, 85, 55]
    assert all(line.seconds > 0 for line in lines.values())


def test_the_best_rows_are_those_of_brute_force() -> None:
    gradients = made_up()
    scores = []
    for row in gradients.pool.astype(np.float64):
        means = []
        for subtask in "ab":
            of = [
                v
                for v, name in zip(gradients.tasks["mmlu"], gradients.subtasks["mmlu"], strict=True)
                if name == subtask
            ]
            means.append(np.mean([row @ v / np.linalg.norm(row) / np.linalg.norm(v) for v in of]))
        scores.append(max(means))
    np.testing.assert_allclose(exact_scores(gradients, "mmlu"), scores, atol=1e-5)
    assert best(np.array(scores, np.float32)) == set(np.argsort(scores)[-10:].tolist())


def test_decoding_has_a_speed() -> None:
    assert all(decoding_speed(dtype, rows=8, dim=64) > 0 for dtype in DTYPES)
