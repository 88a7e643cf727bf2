"""Several workers on one machine: a process for each device, its part of the cores, and the same bytes as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from gradstore.types import GradientsRequest
from sqlalchemy import select

from datastore.schema import ChunkRow, ShardRow
from tests.conftest import REPOSITORY
from tests.processes import alive, wait_for
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered, worker_process
from worker import command, jobs
from worker.devices import choose_device, threads, workers
from worker.loaded import Loaded

EIGHT = 8
FORKED = """
import os, sys
from worker.command import run  # what takes seconds to import is imported once
from worker.loop import work_until_left
from datastore.settings import Settings
children = []
for _ in range(int(sys.argv[1])):
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = run(Settings(), kinds=["gradients"], once=True)
        finally:
            os._exit(status)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
"""So many workers, each a process that does what waits and leaves."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    return save_tiny_model(folder, hidden_size=16, intermediate_size=16, num_hidden_layers=1)


def test_every_kind_that_the_command_offers_is_one_that_workers_do() -> None:
    """The command knows the names without the imports that the work needs."""
    assert set(command.KINDS) == set(jobs.KINDS)


def start(place: Workplace, rows: int) -> str:
    """A job over rows of one checkpoint, in shards of 1,024."""
    request = GradientsRequest(
        dataset=place.pool(numbered(range(rows))).id, checkpoints=[place.checkpoint().id], dims=[32], token_budget=2048
    )
    return place.start(request).id


def digests(place: Workplace) -> dict[tuple[str, int], str]:
    with place.context.catalog.reading() as session:
        return {(chunk.segment_id, chunk.start): chunk.digest for chunk in session.scalars(select(ChunkRow))}


def owners_of_shards(place: Workplace) -> set[str | None]:
    with place.context.catalog.reading() as session:
        return set(session.scalars(select(ShardRow.owner)))


@pytest.mark.slow
def test_eight_processes_on_disjoint_shards_give_the_bytes_of_one(tmp_path: Path, model: Path) -> None:
    rows = EIGHT * 1024 - 100
    one, several = (Workplace.at(tmp_path / name, model=model) for name in ("one", "several"))
    start(one, rows)
    one.work()
    job = start(several, rows)
    environment = {
        "GRADSTORE_DATA": str(several.context.settings.data), "GRADSTORE_DEVICE": "cpu", "GRADSTORE_THREADS": "1",
        "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
    }  # fmt: skip
    log = several.folder / "workers.log"
    with log.open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-c", FORKED, str(EIGHT)],
            cwd=REPOSITORY, env={**os.environ, **environment}, stderr=output,
        )  # fmt: skip
        owners: set[str | None] = set()
        while running.poll() is None:
            owners |= owners_of_shards(several)
            time.sleep(0.1)
    assert running.returncode == 0, log.read_text()[-2000:]
    assert several.job(job).status == "succeeded"
    assert len(owners - {None}) > EIGHT // 2, "a fast one may do two shards, and another none"
    assert digests(several) == digests(one)
    assert len(digests(one)) == EIGHT


@pytest.mark.slow
def test_one_command_keeps_a_worker_for_each_process_running_and_they_leave_with_it(
    tmp_path: Path, model: Path
) -> None:
    place = Workplace.at(tmp_path, model=model)

    def pids() -> set[int]:
        found = {int(worker.id.rsplit("-", 2)[1]) for worker in place.context.jobs.workers()}
        return {pid for pid in found if alive(pid)}

    with worker_process(place, "--concurrency", "2") as command:
        wait_for(lambda: len(pids()) == 2)
        before = pids()
        assert command.pid not in before
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(pids()) == 2 and pids() != before)
        job = start(place, 1500)
        wait_for(lambda: place.job(job).finished)
        left = pids()
        command.terminate()
        assert command.wait(60) == 0
        assert not any(alive(pid) for pid in left)
    assert place.job(job).status == "succeeded"


@pytest.mark.slow
def test_workers_that_are_to_leave_when_nothing_waits_end_their_command(tmp_path: Path, model: Path) -> None:
    place = Workplace.at(tmp_path, model=model)
    job = start(place, 10)
    with worker_process(place, "--device", "cpu,cpu", "--once") as command:
        assert command.wait(120) == 0
    assert place.job(job).status == "succeeded"


def test_each_device_gets_its_workers() -> None:
    assert workers("auto", 1) == ["auto"]
    assert workers("cpu", 3) == ["cpu"] * 3
    assert workers("cuda:0,cuda:1", 1) == ["cuda:0", "cuda:1"]
    assert workers("spread", 1) == ["spread"]


@pytest.mark.parametrize("asked", ["tpu", "cuda:", "cpu:1", "cuda:0;cuda:1", "", "cpu,", "spread,cpu", "cuda:-1"])
def test_what_is_no_device_is_refused_with_those_there_are(asked: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no device; there are auto, cpu, cuda"):
        workers(asked, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("asked", ["cuda", "cuda:7", "spread"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with pytest.raises(typer.BadParameter, match=f"there is no GPU '{asked}'"):
        choose_device(asked)
    with pytest.raises(typer.BadParameter, match="there is no GPU that torch"):
        workers("all", 1)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_the_cores_are_shared_out_and_never_given_twice() -> None:
    cores = len(os.sched_getaffinity(0))
    for processes in (1, 2, cores, 3 * cores):
        assert threads(0, processes) * processes <= max(cores, processes)
        assert threads(0, processes) >= 1
    assert threads(5, 8) == 5


def test_a_model_spread_over_devices_gives_the_features_of_one_in_one_piece(tmp_path: Path, model: Path) -> None:
    features = []
    for spread in (False, True):
        one = Workplace.at(tmp_path / str(spread), model=model)
        context = replace(one.context, loaded=Loaded(one.context.device, spread=spread))
        place = replace(one, context=context)
        job = start(place, 10)
        assert place.work() == ["succeeded"]
        result = place.job(job).result
        assert result is not None
        features.append(place.stored(result.model_dump()["feature_sets"][0]["id"]))
    np.testing.assert_array_equal(*features)
