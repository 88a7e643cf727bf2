"""The images' health checks: a server and a worker that live, and none that do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from tests.conftest import REPOSITORY
from tests.services import free_port
from tests.serving import serving
from worker.context import worker_name


def check(module: str, **environment: str) -> tuple[int, str]:
    """Exit status and complaint of a health check."""
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=REPOSITORY, env={**os.environ, **environment}, stderr=subprocess.PIPE,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("key", [None, SecretStr("open sesame")], ids=["open", "locked"])
def test_an_api_that_answers_is_alive_whoever_may_come_in(tmp_path: Path, key: SecretStr | None) -> None:
    with serving(tmp_path, api_key=key) as service:
        port = str(urlsplit(service.url).port)
        assert check("service.alive", GRADSTORE_HOST="0.0.0.0", GRADSTORE_PORT=port) == (0, "")  # noqa: S104


def test_an_api_that_does_not_listen_is_dead() -> None:
    status, complaint = check("service.alive", GRADSTORE_PORT=str(free_port()))
    assert status == 1
    assert complaint.startswith("nothing answers at 127.0.0.1 port ")


def test_a_worker_is_alive_while_it_is_seen(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        status, complaint = check("worker.alive", GRADSTORE_DATA=str(tmp_path))
        assert (status, complaint.endswith("seen were: none\n")) == (1, True)
        service.backend.jobs.announce("another.host-1-abc", device="cpu", job=None, flops={})
        status, complaint = check("worker.alive", GRADSTORE_DATA=str(tmp_path))
        assert (status, complaint.endswith("seen were: another.host-1-abc\n")) == (1, True)
        service.backend.jobs.announce(worker_name(), device="cpu", job=None, flops={})
        assert check("worker.alive", GRADSTORE_DATA=str(tmp_path)) == (0, "")


def test_a_worker_without_a_catalog_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite3").mkdir()
    status, complaint = check("worker.alive", GRADSTORE_DATA=str(tmp_path))
    assert (status, complaint.startswith("the catalog does not answer")) == (1, True)
