"""An API and workers that share a catalog and a bucket and nothing else: each has an empty folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from gradstore import GradientStore
from gradstore.types import GradientsRequest
from obstore.store import from_url
from sqlalchemy import select

from datastore import bucket as buckets
from datastore.schema import ChunkRow
from tests.buckets import URL, BucketServer, leading_to
from tests.conftest import REPOSITORY
from tests.processes import ServiceProcess, end_process, wait_for
from tests.services import PostgresServer
from tests.serving import jsonl, problem_of, serving
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered
from worker.jobs import run

TRAINING: dict[str, Any] = {
    "lora": {"r": 2, "alpha": 4}, "epochs": 2, "batch_size": 8, "device_batch_size": 4, "max_length": 64,
}  # fmt: skip
ROWS = 2100  # three shards
LEASE = 3.0  # seconds


@dataclass
class Hosts:
    """What the hosts have in common, and what is started on them."""

    folder: Path
    model: Path
    settings: dict[str, Any]
    stack: ExitStack

    def api(self, name: str) -> ServiceProcess:
        """An API on a host without a worker."""
        return self.stack.enter_context(
            ServiceProcess(self.folder / name, allow=self.folder, embedded_worker=False, **self.settings)
        )

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        """A worker on a host of its own."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        given = {"data": home, "device": "cpu", "threads": 1, "poll_interval": 0.05, **self.settings}
        environment = {f"GRADSTORE_{key.upper()}": str(value) for key, value in given.items()}
        return self.stack.enter_context(_running(home / "worker.log", {**os.environ, **environment}))


@contextmanager
def _running(log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.command"], cwd=REPOSITORY, env=environment, stderr=output
        )
    try:
        yield process
    finally:
        end_process(process)


@pytest.fixture(scope="module")
def hosts(
    bucket_server: BucketServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosts]:
    """Hosts over an empty bucket and an empty catalog."""
    folder = tmp_path_factory.mktemp("hosts")
    model = save_tiny_model(folder / "model", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    settings = {"catalog": postgres_server.database(), "store": URL, "lease": LEASE}
    bucket_server.empty()
    with leading_to(bucket_server), ExitStack() as stack:
        yield Hosts(folder, model, settings, stack)


def keys(prefix: str = "") -> list[str]:
    """What lies in the bucket."""
    objects = from_url(URL, client_options={"allow_http": True})
    return [str(item["path"]) for page in obstore.list(objects, prefix=prefix) for item in page]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.services
def test_the_whole_flow_over_hosts_that_share_a_catalog_and_a_bucket(hosts: Hosts, bucket_server: BucketServer) -> None:
    api = hosts.api("api")
    workers = [hosts.worker(name) for name in ("one", "two")]
    pool_file = written(hosts.folder / "pool" / "pool.jsonl", numbered(range(ROWS)))
    task_rows = [{**row, "subtask": name} for name in ("even", "odd") for row in numbered(range(3))]
    for split in ("validation", "test"):
        written(hosts.folder / "task" / f"{split}.jsonl", task_rows)
    training = {"model": str(hosts.model), **TRAINING}
    with api.client() as store:
        pool = store.datasets.upload(pool_file, name="pool")
        task = store.tasks.upload(hosts.folder / "task", kind="jsonl", name="target")
        warmup = store.finetunes.wait(store.finetunes.create(dataset="pool", rows=40, **training))
        of_run: dict[str, Any] = {"run": warmup.result.run}
        job = store.gradients.create(dataset="pool", dims=[64], token_budget=2048, **of_run)
        kill_who_works_on(store, job.id, workers)  # what it has committed is in the bucket
        hosts.worker("three")
        cut_off(bucket_server)
        of_task = store.gradients.wait(store.gradients.create(task="target", dims=[64], token_budget=2048, **of_run))
        gradients = store.gradients.wait(job.id).result
        assert (gradients.rows, gradients.total_excluded) == (ROWS, 0)
        question: dict[str, Any] = {"task": "target", "dataset": "pool", "pct": 0.02, **of_run}
        selection = store.select(**question)
        tuned = store.finetunes.wait(store.finetunes.create(selection=selection.id, **training))
        evaluation = store.evaluations.wait(store.evaluations.create(finetune=tuned.id, tasks=["target"]))
        lines = list(store.selections.lines(selection.id))
        features = [
            store.gradients.save_features(job.id, hosts.folder / "before.npy", feature_set=each.id).read_bytes()
            for each in gradients.feature_sets
        ]
    api.kill()

    with hosts.api("fresh").client() as store:  # an empty folder
        assert [found.id for found in store.datasets.list()] == [pool.id]
        assert store.datasets.download("pool", hosts.folder / "pool.back").read_bytes() == pool_file.read_bytes()
        again = store.select(**question)
        assert (again.id, again.data) == (selection.id, selection.data)
        assert list(store.selections.lines(selection.id)) == lines
        assert len(lines) == selection.count
        assert [
            store.gradients.save_features(job.id, hosts.folder / "after.npy", feature_set=each.id).read_bytes()
            for each in gradients.feature_sets
        ] == features
        assert store.finetunes.download(tuned.id, hosts.folder / "adapter").exists()
        assert store.evaluations.get(evaluation.id).result == evaluation.result

        store.evaluations.delete(evaluation.id)
        store.finetunes.delete(tuned.id)
        store.selections.delete(selection.id)
        for each in (job, of_task):
            store.gradients.delete(each.id)
        store.finetunes.delete(warmup.id)
        store.tasks.delete(task.id)
        store.datasets.delete(pool.id)
    assert keys() == []


def kill_who_works_on(store: GradientStore, job: str, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End a worker at once that has a shard of a job."""
    pids = {process.pid: process for process in workers}

    def at_work() -> set[int]:
        return {int(worker.id.rsplit("-", 2)[1]) for worker in store.ready().workers if worker.job == job} & set(pids)

    wait_for(lambda: bool(at_work()))
    process = pids[at_work().pop()]
    process.kill()
    process.wait()


def cut_off(server: BucketServer) -> None:
    """Cut all hosts off the bucket for seconds, while they are at a job."""
    server.stop()
    try:
        time.sleep(3)
    finally:
        server.start()


def digests(place: Workplace) -> dict[tuple[str, int], str]:
    with place.context.catalog.reading() as session:
        return {(chunk.segment_id, chunk.start): chunk.digest for chunk in session.scalars(select(ChunkRow))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return save_tiny_model(folder, hidden_size=16, intermediate_size=16, num_hidden_layers=1)


def test_features_in_a_bucket_have_the_bytes_of_those_on_a_disk(
    bucket: BucketServer, model: Path, tmp_path: Path
) -> None:
    found = []
    for name, settings in (("local", {}), ("bucket", {"store": URL})):
        place = Workplace.at(tmp_path / name, model=model, **settings)
        request = GradientsRequest(
            dataset=place.pool(numbered(range(1100))).id, checkpoints=[place.checkpoint().id], dims=[32],
            token_budget=2048,
        )  # fmt: skip
        (features,) = place.done(request)["feature_sets"]
        found.append((digests(place), place.stored(features["id"]).tobytes(), features["id"]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2


def test_a_bucket_that_is_away_is_a_503_and_a_shard_that_waits(
    bucket: BucketServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_RETRIES", 1)
    monkeypatch.setattr("worker.jobs.OUTAGE_PAUSE", 0.0)
    place = Workplace.at(tmp_path, model=model, store=URL)
    checkpoint = place.checkpoint()
    job = place.start(
        GradientsRequest(
            dataset=place.pool(numbered(range(20)), name="pool").id, checkpoints=[checkpoint.id], dims=[32],
            token_budget=2048,
        )
    )  # fmt: skip
    with serving(tmp_path / "api", catalog=place.context.settings.catalog_url, store=URL) as service:
        bucket.stop()
        try:
            assert run(place.claim(), place.context) == "stopped"
            problem = problem_of(service.upload(jsonl(3)), 503)
            assert "GRADSTORE_STORE" in problem.detail
            problem_of(service.http.get("/datasets/pool/content"), 503)
            assert service.http.get("/datasets/pool").status_code == 200
        finally:
            bucket.start()
        assert place.job(job.id).status == "running"
        assert place.work() == ["succeeded"]
        assert place.job(job.id).status == "succeeded"
        assert service.upload(jsonl(3)).status_code == 201
        assert len(service.http.get("/datasets/pool/content").content.splitlines()) == 20


def test_uploaded_features_are_imported_by_a_worker_of_another_host(
    bucket: BucketServer, model: Path, tmp_path: Path
) -> None:
    place = Workplace.at(tmp_path, model=model, store=URL)
    place.pool(numbered(range(20)), name="pool")
    checkpoint = place.checkpoint()
    numbers = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    np.save(tmp_path / "features.npy", numbers)
    with serving(tmp_path / "api", catalog=place.context.settings.catalog_url, store=URL) as service:
        fields = {"dataset": "pool", "checkpoint": checkpoint.id, "projection_id": "theirs", "dtype": "float32"}
        files = {"files": ("features.npy", (tmp_path / "features.npy").read_bytes())}
        job = service.http.post("/imports", data=fields, files=files)
        assert job.status_code == 202, job.text
        assert place.work() == ["succeeded"]
        result = place.job(job.json()["id"]).result
        assert result is not None
        np.testing.assert_array_equal(place.stored(result.model_dump()["feature_set"]["id"]), numbers)
        assert keys("imports/") == []
        assert service.http.delete(f"/imports/{job.json()['id']}").status_code == 204
    assert keys("features/") == []


def test_a_host_evicts_what_it_used_longest_ago_and_fetches_it_again(
    bucket: BucketServer, model: Path, tmp_path: Path
) -> None:
    place = Workplace.at(tmp_path, model=model, store=URL, cache_bytes=2000)
    dataset, checkpoint = place.pool(numbered(range(20))), place.checkpoint()
    data = place.context.settings.data
    things = [data / "datasets" / dataset.id, data / "checkpoints" / checkpoint.id]
    for path in things:
        os.utime(path, (0, 0))  # used last in 1970
    other = place.pool(numbered(range(30, 40)))
    assert not any(path.exists() for path in things)
    assert (data / "datasets" / other.id).exists(), "used just now, and so not evicted"
    result = place.done(GradientsRequest(dataset=dataset.id, checkpoints=[checkpoint.id], dims=[32], token_budget=2048))
    assert result["computed_rows"] == 20
    assert all(path.exists() for path in things)


def test_a_bucket_that_refuses_fails_the_job_in_words(bucket: BucketServer, model: Path, tmp_path: Path) -> None:
    place = Workplace.at(tmp_path, model=model, store=URL, max_attempts=1)
    request = GradientsRequest(
        dataset=place.pool(numbered(range(5))).id, checkpoints=[place.checkpoint().id], dims=[32], token_budget=2048
    )
    bucket.remove()
    job = place.start(request)
    assert place.work() == ["failed"]
    error = place.job(job.id).error
    assert error is not None
    assert (error.type, "there is no such bucket" in error.detail) == ("bucket-refused", True)
