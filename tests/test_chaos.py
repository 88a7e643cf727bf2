"""The chaos run, for seconds: the same dice as for minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import chaos

pytestmark = [pytest.mark.services, pytest.mark.slow]


def test_harm_at_random_for_some_seconds_leaves_every_job_right(tmp_path: Path) -> None:
    assert chaos(tmp_path, seconds=15, seed=3)
