"""Faults that are really done, to a job in the middle of a shard: they cost time, and not a row more or less.

Each test does harm to a team of processes (tests/faults.py), waits for the job, and compares its chunks, byte for byte,
with those of a run that nobody disturbed. Seconds to recovery, which `--log-cli-level=INFO` prints, are from the harm's
end to the job's; docs/reliability.md has them.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import LEASE, ROWS, SHARDS, Clock, Team, Wire
from tests.processes import wait_for
from tests.services import PostgresServer, RedisServer
from tests.tiny import save_tiny_model

log = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow]

Harm = Callable[[Team], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    return save_tiny_model(folder, hidden_size=16, intermediate_size=16, num_hidden_layers=1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Team]:
    """A service and two workers over SQLite."""
    with Team(tmp_path_factory.mktemp("alone"), model=model) as team:
        team.ready(team.hire(), team.hire())
        undisturbed(team)
        yield team


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Team]:
    """A service and two workers, of which the second is far, over a PostgreSQL and a Redis of their own."""
    folder = tmp_path_factory.mktemp("team")
    with (
        PostgresServer() as postgres,
        RedisServer(folder / "redis") as redis,
        Team(folder, model=model, postgres=postgres, redis=redis) as team,
    ):
        team.ready(team.hire(), team.hire(far=True))
        undisturbed(team)
        yield team


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test that failed has left is not there for the next: its job would have succeeded before it began."""
    yield
    for name in {"alone", "team"} & set(request.fixturenames):
        request.getfixturevalue(name).forget_all()


def undisturbed(team: Team) -> None:
    """Do the job once without harm: what all others are compared with."""
    job = team.begin()
    team.finish(job)
    team.undisturbed = team.digests()
    assert len(team.undisturbed) == SHARDS
    team.forget(job)


def check(team: Team, job: str, *, since: float) -> None:
    """The job comes to what it came to undisturbed, each row is there once, and the doctor finds nothing."""
    team.finish(job)
    found, seconds = team.rows(job), time.monotonic() - since
    log.info("rows expected %d, found %d, recovered after %.1f s", ROWS, found, seconds)
    assert found == ROWS
    assert team.digests() == team.undisturbed
    assert team.findings() == []
    team.forget(job)


# Workers ----------------------------------------------------------------------------------------------------------


def kill_a_worker(team: Team) -> None:
    team.mid_shard(team.workers[0])
    team.workers[0].kill()
    team.workers[0] = team.hire()


def kill_all_workers(team: Team) -> None:
    team.mid_shard()
    for worker in team.workers:
        worker.kill()
    team.workers[:] = [team.hire(), team.hire()]


def kill_the_api(team: Team) -> None:
    team.mid_shard()
    team.service.kill()
    team.service.start()


@pytest.mark.parametrize("harm", [kill_a_worker, kill_all_workers, kill_the_api])
def test_one_host(alone: Team, harm: Harm) -> None:
    job = alone.begin()
    harm(alone)
    check(alone, job, since=time.monotonic())


def test_a_worker_that_stalls_and_writes_after_another_has_committed_changes_nothing(alone: Team) -> None:
    stalled = alone.workers[0]
    job = alone.begin()
    alone.mid_shard(stalled)
    stalled.signal(signal.SIGSTOP)
    began = time.monotonic()
    alone.finish(job)
    before, digests = stalled.log.read_text(), alone.digests()
    stalled.signal(signal.SIGCONT)
    wait_for(lambda: any(word in stalled.log.read_text()[len(before) :] for word in ("shard lost", "shard stopped")))
    assert alone.digests() == digests
    check(alone, job, since=began)


def test_a_host_whose_clock_jumps_loses_no_row(tmp_path: Path, model: Path) -> None:
    """An hour ahead all leases seem to have ended, and workers put back what others hold; then an hour back again."""
    try:
        clock = Clock(tmp_path / "clock")
    except LookupError as error:
        pytest.skip(str(error))
    with Team(tmp_path, model=model) as team:
        workers = [team.hire(clock=clock), team.hire(clock=clock)]
        team.ready(*workers)
        undisturbed(team)
        for jump in (3600, 0):
            job = team.begin()
            team.mid_shard()
            clock.jump_to(jump)
            check(team, job, since=time.monotonic())
        assert any("shards put back" in worker.log.read_text() for worker in workers)


# Servers and the network ------------------------------------------------------------------------------------------


def kill_redis(team: Team) -> None:
    team.mid_shard()
    team.redis.kill()
    team.redis.start()


def lose_redis(team: Team) -> None:
    """The broker comes back with nothing of what it had."""
    team.mid_shard()
    team.redis.kill()
    team.redis.forget()
    team.redis.start()


def kill_postgres(team: Team, *, away: float = 1) -> None:
    team.mid_shard()
    team.postgres.kill()
    time.sleep(away)
    team.postgres.start()


def stay_without_postgres(team: Team) -> None:
    """For longer than a lease."""
    kill_postgres(team, away=LEASE + 1)


def lose(wire: Wire, how: Callable[[], None]) -> None:
    """For longer than a lease."""
    how()
    time.sleep(LEASE + 1)
    wire.heal()


def cut_off_redis(team: Team) -> None:
    team.mid_shard()
    lose(team.to_redis, team.to_redis.cut)


def swallow_redis(team: Team) -> None:
    """The same, and nobody tells it."""
    team.mid_shard()
    lose(team.to_redis, team.to_redis.swallow)


def cut_off_postgres(team: Team) -> None:
    """One of the two workers loses the catalog."""
    team.mid_shard(team.workers[1])
    lose(team.to_postgres, team.to_postgres.cut)


def swallow_postgres(team: Team) -> None:
    """The same, and nobody tells it."""
    team.mid_shard(team.workers[1])
    lose(team.to_postgres, team.to_postgres.swallow)


@pytest.mark.services
@pytest.mark.parametrize(
    "harm",
    [
        kill_redis, lose_redis, cut_off_redis, swallow_redis,
        kill_postgres, stay_without_postgres, cut_off_postgres, swallow_postgres,
    ],
)  # fmt: skip
def test_servers(team: Team, harm: Harm) -> None:
    job = team.begin()
    harm(team)
    check(team, job, since=time.monotonic())
    team.all_at_work_again()
