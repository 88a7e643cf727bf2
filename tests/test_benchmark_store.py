"""The store's benchmark measures what docs/on-disk-format.md says it does."""

from __future__ import annotations

from pathlib import Path

from benchmarks.store import measure
from tests.conftest import REPOSITORY


def test_the_page_shows_what_the_command_prints(tmp_path: Path) -> None:
    found = list(measure(tmp_path, 2048, 64, 1))
    assert all(seconds > 0 for row in found for seconds in row.seconds)
    page = (REPOSITORY / "docs" / "on-disk-format.md").read_text().partition("## Measured")[2]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert shown == ["what", *(row.what for row in found)]
