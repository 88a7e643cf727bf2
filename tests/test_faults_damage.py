"""A damaged chunk, seen by whoever reads it over the API, mended by the doctor beside the running service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from gradstore.types import GradientsRequest

from tests.processes import ServiceProcess, wait_for
from tests.serving import problem_of
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered

pytestmark = [pytest.mark.slow]


def test_a_flipped_bit_is_told_by_the_answer_and_computed_again_on_request(tmp_path: Path) -> None:
    place = Workplace.at(tmp_path, model=save_tiny_model(tmp_path / "base"))
    pool, checkpoint = place.pool(numbered(range(40)), name="pool"), place.checkpoint()
    job = place.start(GradientsRequest(dataset=pool.id, checkpoints=[checkpoint.id], dims=[16], kinds=["sgd"])).id
    with ServiceProcess(place.context.settings.data, allow=tmp_path) as service:
        wait_for(lambda: place.job(job).status == "succeeded")
        (chunk,) = place.context.settings.features.glob("seg_*/data.zarr/features/c.0.0")
        sound = chunk.read_bytes()
        with httpx.Client(base_url=service.url, timeout=60) as http:
            rows = http.get(f"/gradients/{job}/features")
            assert rows.status_code == 200, rows.text
            flipped = bytearray(sound)
            flipped[100] ^= 4
            chunk.write_bytes(flipped)
            problem = problem_of(http.get(f"/gradients/{job}/features"), 500)
            assert "does not match its checksum" in problem.detail
            assert "gradstore doctor --deep --repair" in problem.detail
            command = [Path(sys.executable).with_name("gradstore"), "doctor", "--deep", "--repair", "--json"]
            done = subprocess.run(
                [*command, "--data", place.context.settings.data], capture_output=True, text=True, check=True
            )
            (line,) = done.stdout.splitlines()
            assert json.loads(line)["repair"] == f"taken back: {job} computes the rows again"
            wait_for(lambda: place.job(job).status == "succeeded")
            assert chunk.read_bytes() == sound
            assert http.get(f"/gradients/{job}/features").content == rows.content
    place.context.catalog.close()
