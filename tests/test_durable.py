"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from datastore.durable import beside, replacing, sweep_files


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in ("one", "two"):
        before = path.read_text() if path.exists() else None
        with replacing(path) as partial:
            partial.write_text(content)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        _fill_the_disk(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_beside_a_file_is_swept_when_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    names = []
    for age in (0, 7200):
        with beside(path) as partial:
            names.append(partial)
        partial.write_text("half")  # as where the end of the block was never reached
        os.utime(partial, (time.time() - age,) * 2)
    os.utime(path, (0, 0))
    assert sweep_files(tmp_path, older_than=3600) == 1
    assert set(tmp_path.iterdir()) == {path, names[0]}
    assert sweep_files(tmp_path / "missing", older_than=3600) == 0


def _fill_the_disk(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
