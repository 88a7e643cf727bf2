"""The benchmarks of many workers do whole jobs, and measure what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.coordination import IN_LINE, measure
from benchmarks.simulation import simulate


@pytest.mark.slow
def test_every_call_of_every_shard_is_measured(tmp_path: Path) -> None:
    found, _ = measure(f"sqlite:///{tmp_path}/catalog.sqlite3", tmp_path, processes=2, shards=2, shard_seconds=0.05)
    assert [len(found[name]) for name in ("succeed", "files", "published", "shard")] == [4] * 4
    of_shards = sum(sum(found[name]) for name in ("upcoming", "succeed", "unpublished", "files", "published"))
    asked_too = sum(sum(found[name]) for name in IN_LINE)  # with each worker's last look, which finds no shard
    assert of_shards < sum(found["shard"]) < asked_too


@pytest.mark.slow
def test_a_simulation_does_shards_beside_small_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/catalog.sqlite3"
    simulate(url, rows=20_000, checkpoints=2, workers=4, processes=2, shard_seconds=0.1, duration=3)
    printed = capsys.readouterr().out
    assert printed.startswith("40 shards recorded")
    assert "| published |" in printed
