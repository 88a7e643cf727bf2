"""Workers as users see them, what they are asked to do, and how soon a cancelled job lets them go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer
from gradstore import GradientStore, cli
from gradstore.errors import NotFound
from gradstore.types import GradientsRequest, Memory
from sqlalchemy import func, select
from typer.testing import CliRunner

from datastore.leases import NewShard
from datastore.schema import ShardRow
from tests.processes import wait_for
from tests.serving import Service
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered, worker_process
from worker.command import KINDS
from worker.queues import QUEUES, kinds_of, queue_of


def announce(service: Service, name: str, **details: object) -> None:
    service.backend.jobs.announce(name, device="cuda:0", flops={}, **{"job": None, **details})  # type: ignore[arg-type]


def run(service: Service, *arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["--url", service.url, *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_worker_is_shown_with_what_it_is_and_what_it_is_at(service: Service) -> None:
    memory = Memory(used=3 << 30, total=8 << 30)
    announce(service, "gpu-1", job="grad_1", shard=7, host="gpu", kinds=["gradients", "finetune"], memory=memory)
    with GradientStore(service.url) as store:
        worker = store.workers.get("gpu-1")
        assert (worker.job, worker.shard, worker.host) == ("grad_1", 7, "gpu")
        assert (worker.kinds, worker.memory) == (["finetune", "gradients"], memory)
        assert worker.started_at is not None
        announce(service, "gpu-1")
        again = store.workers.get("gpu-1")
        assert (again.job, again.shard, again.started_at) == (None, None, worker.started_at)
        assert again.seen_at > worker.seen_at
        assert store.ready().workers == [again]
        service.backend.jobs.leave("gpu-1")
        with pytest.raises(NotFound, match="gpu-1"):
            store.workers.get("gpu-1")


def test_all_workers_are_listed_page_by_page(service: Service) -> None:
    names = [f"gpu-{number}" for number in range(5)]
    for name in reversed(names):
        announce(service, name)
    pages = [service.http.get("/workers", params={"limit": 3, "after": after}).json() for after in ("", "gpu-2")]
    assert [[worker["id"] for worker in page["data"]] for page in pages] == [names[:3], names[3:]]
    assert [page["has_more"] for page in pages] == [True, False]
    lines = run(service, "workers", "list", "--json").splitlines()
    assert [json.loads(line)["id"] for line in lines] == names
    assert json.loads(run(service, "workers", "show", "gpu-3", "--json"))["device"] == "cuda:0"


def test_a_claim_shows_at_once_what_its_worker_is_at(service: Service) -> None:
    announce(service, "test")
    jobs = service.backend.jobs
    jobs.create(id="ft_1", kind="finetune", request={}, plan={}, shards=[NewShard({}, 1)])
    claim = service.claim()
    worker = jobs.worker("test")
    assert (worker.job, worker.shard) == (claim.job, claim.number)


def test_a_job_is_put_before_others_by_the_api_and_the_command_line(service: Service) -> None:
    jobs = service.backend.jobs
    for number in range(2):
        jobs.create(id=f"ft_{number}", kind="finetune", request={}, plan={}, shards=[NewShard({}, 1)])
    assert service.http.get("/jobs/ft_1").json()["priority"] == 0
    assert service.http.patch("/jobs/ft_1", json={"priority": 3}).json()["priority"] == 3
    assert run(service, "jobs", "prioritise", "ft_0", "--", "-10") == "ft_0\n"
    assert [service.claim().job for _ in range(2)] == ["ft_1", "ft_0"]
    for wrong in ({"priority": 11}, {"priority": -11}, {}, {"priority": 1, "name": "other"}):
        assert service.http.patch("/jobs/ft_1", json=wrong).status_code == 422
    assert service.http.patch("/jobs/ft_9", json={"priority": 1}).status_code == 404


def test_the_queues_are_the_nouns_of_jobs_and_all_that_workers_do() -> None:
    assert kinds_of(",".join(QUEUES)) == list(KINDS)
    assert kinds_of("finetunes,gradients,finetunes") == ["finetune", "gradients"]
    assert [queue_of(kind) for kind in KINDS] == list(QUEUES)
    for wrong in ("gradient", "", "gradients,", "gradients finetunes"):
        with pytest.raises(typer.BadParameter, match="is no queue; there are gradients, conversions"):
            kinds_of(wrong)


def running(place: Workplace) -> int:
    """How many shards somebody works on."""
    with place.context.catalog.reading() as session:
        return session.scalar(select(func.count()).where(ShardRow.status == "running")) or 0


@pytest.mark.slow
def test_a_running_worker_says_what_it_does_and_a_cancelled_job_lets_it_go_within_seconds(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", hidden_size=32, intermediate_size=64, num_hidden_layers=4)
    place = Workplace.at(tmp_path, model=model, lease=60.0)  # whose third would be too late to learn of it
    dataset = place.pool(numbered(range(1024))).id
    request = GradientsRequest(dataset=dataset, checkpoints=[place.checkpoint().id], dims=[512], token_budget=32)
    job = place.start(request).id
    jobs = place.context.jobs
    with worker_process(place, "--queues", "gradients,imports"):
        wait_for(lambda: place.job(job).progress.done > 0)
        wait_for(lambda: [worker.job for worker in jobs.workers()] == [job])
        [worker] = jobs.workers()
        assert worker.kinds == ["gradients", "import"]
        assert worker.shard == 0
        assert worker.host == os.uname().nodename
        assert worker.memory is not None
        assert 0 < worker.memory.used < worker.memory.total
        jobs.cancel(job)
        wait_for(lambda: not running(place), patience=15)
    assert place.job(job).status == "cancelled"
