"""Faults while the API takes something in, killed in the middle or on a full disk: nothing is recorded by half."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from gradstore import GradientStore
from gradstore.types import GradientsRequest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from datastore.doctor import examine
from datastore.findings import mended
from datastore.schema import ChunkRow, DatasetRow, JobRow, ShardRow, SourceRow
from tests.processes import ServiceProcess, wait_for
from tests.serving import jsonl, problem_of, serving
from tests.stores import Store
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, which a test can fill: real ENOSPC."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("a file system of one's own needs root, and leave to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Write a file that leaves so many bytes of a disk."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        left = os.statvfs(disk)
        file.write(bytes(left.f_bavail * left.f_frsize - leave))
    return filler


def test_an_upload_to_a_full_disk_is_refused_with_what_to_do_and_leaves_nothing(small_disk: Path) -> None:
    with serving(small_disk / "store") as service:
        before = service.upload(jsonl(10))
        assert before.status_code == 201
        filler = fill(small_disk, leave=4 * MIB)
        problem = problem_of(service.upload(jsonl(100_000)), 507)
        assert "free some space" in problem.detail
        assert [each["id"] for each in service.http.get("/datasets").json()["data"]] == [before.json()["id"]]
        assert list(examine_of(service.backend.settings.data)) == []
        filler.unlink()
        assert service.upload(jsonl(100_000)).status_code == 201
        assert list(examine_of(service.backend.settings.data)) == []


def test_a_catalog_on_a_full_disk_is_said_to_be_on_one(small_disk: Path) -> None:
    with serving(small_disk / "store") as service:
        service.pool(name="pool")
        filler = fill(small_disk, leave=0)
        refused = [
            service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base", "seed": seed})
            for seed in range(40)
        ][-1]
        assert "free some space" in problem_of(refused, 507).detail
        filler.unlink()
        assert service.http.post("/finetunes", json={"dataset": "pool", "model": "org/base"}).status_code == 202


def examine_of(data: Path) -> Iterator[object]:
    store = Store.at(data)
    try:
        yield from examine(store, older_than=0, deep=True)
    finally:
        store.catalog.close()


@pytest.mark.slow
@pytest.mark.parametrize("catalog", ["beside", "elsewhere"])
def test_a_job_whose_worker_has_a_full_disk_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, catalog: str
) -> None:
    url = "" if catalog == "beside" else f"sqlite:///{tmp_path}/catalog.sqlite3"
    place = Workplace.at(small_disk, model=save_tiny_model(tmp_path / "base"), catalog=url, lease=1.0)
    asked = GradientsRequest(
        dataset=place.pool(numbered(range(1000))).id, checkpoints=[place.checkpoint().id], dims=[2048], dtype="float32"
    )  # 8 MiB
    job = place.start(asked)
    filler = fill(small_disk, leave=0)
    with suppress(OperationalError):  # where the catalog cannot even say that the disk is full
        place.work()
    if catalog == "elsewhere":
        failed = place.job(job.id)
        assert (failed.status, failed.error and failed.error.type) == ("failed", "not-enough-space")
        assert "free some space" in str(failed.error)
        filler.unlink()
        place.context.jobs.retry(job.id)
    else:
        assert place.job(job.id).status in {"queued", "running"}
        filler.unlink()
        time.sleep(1.0)  # the lease
        place.work()
    assert [finding for finding in examine(place.context, older_than=0, deep=True) if finding.kind != "leftover"] == []
    place.work()
    assert place.job(job.id).status == "succeeded"
    with place.context.catalog.reading() as session:
        rows = session.execute(select(ChunkRow.start, ChunkRow.stop)).all()
    assert rows == [(0, 1000)]
    assert list(examine(place.context, older_than=0, deep=True)) == []
    place.context.catalog.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service in a process of its own, without a worker."""
    with ServiceProcess(tmp_path / "store", "--no-worker", allow=tmp_path) as service:
        yield service


def counts(data: Path) -> dict[str, int]:
    store = Store.at(data)
    try:
        with store.catalog.reading() as session:
            tables = (DatasetRow, SourceRow, JobRow, ShardRow)
            return {each.__tablename__: session.scalar(select(func.count()).select_from(each)) or 0 for each in tables}
    finally:
        store.catalog.close()


@pytest.mark.slow
def test_a_file_larger_than_the_process_may_write_is_refused_like_one_for_a_full_disk(tmp_path: Path) -> None:
    limited = ServiceProcess(tmp_path / "store", "--no-worker", allow=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, before[1]))  # its child takes it over
    try:
        limited.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    try:
        with httpx.Client(base_url=limited.url, timeout=60) as http:
            answer = http.post("/datasets", files={"file": ("pool.jsonl", jsonl(100_000))})
            assert "free some space" in problem_of(answer, 507).detail
            assert http.get("/datasets").json()["data"] == []
        assert counts(limited.folder) == {"datasets": 0, "dataset_sources": 0, "jobs": 0, "shards": 0}
    finally:
        limited.stop()


@pytest.mark.slow
def test_an_api_that_is_killed_in_the_middle_of_an_upload_has_recorded_nothing_of_it(served: ServiceProcess) -> None:
    with served.client() as store:
        kept = store.datasets.upload(served.folder.parent / file_of(served, 10), name="kept")
    before = counts(served.folder)
    content, boundary = jsonl(200_000), "b" * 16
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="pool.jsonl"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{boundary}--\r\n".encode()
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        request = (
            f"POST /datasets HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
        )
        connection.sendall(request.encode() + body[: len(body) // 2])
        incoming = served.folder / "incoming"
        wait_for(lambda: any(path.stat().st_size > MIB for path in incoming.rglob("*") if path.is_file()))
        served.kill()
    served.start()
    assert counts(served.folder) == before
    store = Store.at(served.folder)
    left = [mended(finding) for finding in examine(store, older_than=0, deep=True)]
    assert [(each.kind, each.mended) for each in left] == [("leftover", True)], "half an upload, which is removed"
    assert left[0].bytes > MIB
    store.catalog.close()
    with served.client() as again:
        assert again.datasets.get("kept").rows == kept.rows
        assert again.datasets.upload(served.folder.parent / file_of(served, 200_000), name="pool").rows == 200_000


def file_of(served: ServiceProcess, rows: int) -> str:
    (served.folder.parent / f"{rows}.jsonl").write_bytes(jsonl(rows))
    return f"{rows}.jsonl"


@pytest.mark.slow
def test_an_api_that_is_killed_while_jobs_are_started_has_each_of_them_once(served: ServiceProcess) -> None:
    """The client's own retries, with the key that it sends, bring every job in the end, and none twice."""
    with served.client() as store:
        store.datasets.upload(served.folder.parent / file_of(served, 10), name="pool")
    wanted, started = 30, []
    errors: list[Exception] = []

    def start() -> None:
        with GradientStore(served.url, retries=60) as client:
            for seed in range(wanted):
                try:
                    started.append(client.finetunes.create(dataset="pool", model="org/base", seed=seed).id)
                except Exception as error:  # noqa: BLE001 - shown below
                    errors.append(error)

    client = threading.Thread(target=start)
    client.start()
    for reached in (5, 15):
        wait_for(lambda reached=reached: len(started) >= reached or bool(errors))
        served.kill()
        time.sleep(0.2)
        served.start()
    client.join()
    assert errors == []
    assert len(set(started)) == wanted
    assert counts(served.folder)["jobs"] == wanted
    assert counts(served.folder)["shards"] == wanted
