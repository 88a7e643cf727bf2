"""What the service does when it starts."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi.testclient import TestClient

from datastore.settings import Settings
from service.app import ABANDONED, create_app


def test_what_a_killed_server_left_half_done_is_deleted_after_a_day(tmp_path: Path) -> None:
    folders = [
        tmp_path / name for name in ("incoming/form-1", "tasks/unfinished/task_1.1", "scores/unfinished/score_1")
    ]
    for folder in folders:
        folder.mkdir(parents=True)
    for seconds, left in ((ABANDONED / 2, folders), (2 * ABANDONED, [])):
        for folder in folders:
            then = folder.stat().st_ctime - seconds
            os.utime(folder, (then, then))
        with TestClient(create_app(Settings(data=tmp_path))):
            assert [folder for folder in folders if folder.exists()] == left
