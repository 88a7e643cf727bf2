"""Whose turn it is: urgent jobs first, then keys and jobs alike, and none waits for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from datastore.catalog import Catalog
from datastore.leases import Claim, Jobs, NewShard
from datastore.schema import JobRow, ShardRow
from datastore.turns import Turns
from tests.services import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def jobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Jobs]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/catalog.sqlite3"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.database()
    catalog = Catalog(url)
    catalog.migrate()
    yield Jobs(catalog)
    catalog.close()


def start(jobs: Jobs, id: str, shards: int, *, key: str | None = None) -> None:
    """A job of some shards, started with an API key."""
    new = [NewShard({}, units=number + 1) for number in range(shards)]
    jobs.create(id=id, kind="gradients", request={}, plan={}, shards=new)
    with jobs.catalog.transaction() as session:
        session.get_one(JobRow, id).api_key = key


def claim(jobs: Jobs, owner: str, turns: Turns | None = None, **options: int) -> Claim:
    found = jobs.claim(owner, kinds=["gradients"], turns=turns, **options)
    assert found is not None
    return found


def served(jobs: Jobs, shards: int, turns: Turns) -> list[str]:
    """The jobs that a worker alone does so many shards of."""
    order = []
    for _ in range(shards):
        held = claim(jobs, "alone", turns)
        assert jobs.succeed(held)
        order.append(held.job)
    return order


def at(jobs: Jobs, workers: int) -> Counter[str]:
    """Where so many new workers go."""
    return Counter(claim(jobs, f"worker {number}").job for number in range(workers))


def test_workers_share_themselves_out_among_keys_and_then_among_their_jobs(jobs: Jobs) -> None:
    start(jobs, "grad_week", 50, key="key_1")
    start(jobs, "grad_day", 50, key="key_1")
    start(jobs, "grad_hour", 50, key="key_2")
    start(jobs, "grad_nobodys", 50)
    assert at(jobs, 12) == {"grad_week": 2, "grad_day": 2, "grad_hour": 4, "grad_nobodys": 4}


def test_a_small_job_does_not_wait_for_a_large_one_that_came_first(jobs: Jobs) -> None:
    start(jobs, "grad_week", 100)
    assert at(jobs, 4) == {"grad_week": 4}
    start(jobs, "grad_small", 1)
    assert claim(jobs, "next").job == "grad_small"


def test_one_worker_alone_goes_round_all_jobs(jobs: Jobs) -> None:
    for number in range(3):
        start(jobs, f"grad_{number}", 10)
    assert served(jobs, 7, Turns(stay=0)) == [f"grad_{number % 3}" for number in range(7)]


def test_keys_take_turns_however_many_jobs_one_of_them_has(jobs: Jobs) -> None:
    start(jobs, "grad_long", 10, key="key_1")
    for number in range(5):
        start(jobs, f"grad_{number}", 1, key="key_2")
    assert Counter(served(jobs, 6, Turns(stay=0)))["grad_long"] == 3


def test_a_worker_stays_with_its_job_for_a_while_and_not_for_ever(jobs: Jobs) -> None:
    for number in range(2):
        start(jobs, f"grad_{number}", 30)
    turns = Turns(stay=3600)
    assert served(jobs, 5, turns) == ["grad_0"] * 5
    turns.stay = 0
    assert served(jobs, 1, turns) == ["grad_1"]


def test_a_shard_that_was_read_for_waits_where_another_jobs_turn_has_come(jobs: Jobs) -> None:
    for number in range(2):
        start(jobs, f"grad_{number}", 3)
    turns = Turns(stay=0)
    first = claim(jobs, "alone", turns)
    ahead = jobs.upcoming(first)
    assert ahead is not None
    assert jobs.succeed(first)
    assert claim(jobs, "alone", turns, prefer=ahead[0]).job == "grad_1"
    turns.stay = 3600
    other = claim(jobs, "alone", turns)
    assert claim(jobs, "alone", turns, prefer=other.shard + 1).shard == other.shard + 1


def test_an_urgent_job_goes_first_and_the_priority_of_a_running_one_changes(jobs: Jobs) -> None:
    start(jobs, "grad_1", 10)
    start(jobs, "grad_2", 10)
    turns = Turns(stay=3600)
    assert claim(jobs, "worker", turns).job == "grad_1"
    assert jobs.prioritise("grad_2", 5).priority == 5
    assert [claim(jobs, "worker", turns).job for _ in range(3)] == ["grad_2"] * 3, "also where a worker would stay"
    jobs.prioritise("grad_2", -1)
    assert [claim(jobs, "worker", turns).job for _ in range(3)] == ["grad_1"] * 3


def test_the_shards_of_a_job_have_ids_in_one_piece_in_the_order_of_their_numbers(jobs: Jobs) -> None:
    """Those in a state are looked for between the first and the last."""
    for number in range(2):
        start(jobs, f"grad_{number}", 1500)
    with jobs.catalog.reading() as session:
        found = session.execute(select(ShardRow.job_id, ShardRow.number).order_by(ShardRow.id)).all()
    assert [tuple(one) for one in found] == [(f"grad_{job}", number) for job in range(2) for number in range(1500)]


def test_every_shard_is_found_whatever_is_done_failed_or_cancelled_around_it(jobs: Jobs) -> None:
    for number in range(3):
        start(jobs, f"grad_{number}", 4)
    jobs.cancel("grad_1")
    assert jobs.waiting(kinds=["gradients"])
    assert Counter(served(jobs, 8, Turns(stay=0))) == {"grad_0": 4, "grad_2": 4}
    assert not jobs.waiting(kinds=["gradients"])
    assert jobs.claim("worker", kinds=["gradients"]) is None
    jobs.retry("grad_1")
    assert not jobs.waiting(kinds=["finetune"])
    assert jobs.claim("worker", kinds=["gradients"], most_units=0) is None
    assert claim(jobs, "worker", most_units=1).number == 0
    assert jobs.claim("worker", kinds=["gradients"], most_units=1) is None
    assert [claim(jobs, "worker").number for _ in range(3)] == [1, 2, 3]
