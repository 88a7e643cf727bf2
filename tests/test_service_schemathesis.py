"""Schemathesis sends what the OpenAPI document allows, and what it does not, to every route over a filled store.

It looks for answers of 500 and more, answers that the document does not describe, wrong media types and headers, bad
requests that are accepted, and things that are there after they were deleted. That a request keeps to the document and
is refused all the same is no finding where the answer is 422: which fields go together no schema says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.serving import Service, serving
from tests.stores import Store

EXAMPLES = 12  # a route, in each phase
EXPECTED = '["2xx", "3xx", 401, 403, 404, 409, 422, 429]'
PREFIXES = ("datasets", "tasks", "checkpoints", "adapters", "runs", "gradients", "finetunes", "selections", "jobs")


def features(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    return np.random.default_rng(start).standard_normal((stop - start, dim), np.float32)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one of each noun that needs no model to be made."""
    folder = tmp_path_factory.mktemp("filled")
    with serving(folder / "store", select_wait=5) as service:
        service.pool(40, name="pool")
        service.task("target")
        service.adapter(name="mine")
        service.finetune(dataset="pool", name="warm-up")
        run = service.train(folder / "work")["result"]["run"]
        for owner in ({"dataset": "pool"}, {"task": "target"}):
            body = {**owner, "run": run, "kinds": ["sgd"], "dims": [16], "max_length": 64}
            answer = service.http.post("/gradients", json=body)
            assert answer.status_code == 202, answer.text
        Store.at(folder / "store").work(features)
        answer = service.http.get("/select", params={"task": "target", "k": 5})
        assert answer.status_code == 200, answer.text
        yield service


def known(service: Service) -> str:
    """Schemathesis's settings: for each noun's routes the id of one that is there."""
    settings = [f"[checks.positive_data_acceptance]\nexpected-statuses = {EXPECTED}\n"]
    for noun in PREFIXES:
        (newest, *_) = service.http.get(f"/{noun}").json()["data"]
        parameter = "selection" if noun == "selections" else "reference"
        settings.append(
            f'[[operations]]\ninclude-path-regex = "^/{noun}/{{{parameter}}}"\nexclude-method = "DELETE"\n'
            f'[operations.parameters]\n"path.{parameter}" = "{newest["id"]}"\n'
        )
    return "\n".join(settings)


@pytest.mark.slow
def test_schemathesis_finds_nothing(filled: Service, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(known(filled))
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", f"{filled.url}/openapi.json",
            "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", str(EXAMPLES), "--seed", "1",
            "--generation-deterministic", "--request-timeout", "60", "--no-color", "--warnings", "off",
            "--exclude-path", "/jobs/{reference}/events",  # a stream that ends with its job
            "--report-json-path", str(report),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert json.loads(report.read_text()), done.stdout
