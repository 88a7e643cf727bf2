"""Jobs and shards: nothing is lost, nothing is done twice, and who lost a lease changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast, get_args

import pytest
from gradstore import types
from gradstore.types import AnyJob, JobKind, Problem
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from datastore.catalog import Catalog
from datastore.errors import Conflict, InUse, NameTaken, NotFound
from datastore.leases import MAKE_FEATURES, Claim, Jobs, NewChunk, NewShard
from datastore.schema import JobRow, SegmentRow, WorkerRow
from tests.services import PostgresServer

PROBLEM = Problem(type="broken", title="Broken", status=500, detail="it broke")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/catalog.sqlite3"
    else:
        url = request.getfixturevalue("postgres_server").database()
    catalog = Catalog(url)
    catalog.migrate()
    yield catalog
    catalog.close()


@pytest.fixture
def many_hosts(postgres_server: PostgresServer) -> Iterator[Catalog]:
    """A catalog that hosts with clocks of their own may share."""
    catalog = Catalog(postgres_server.database())
    catalog.migrate()
    yield catalog
    catalog.close()


@pytest.fixture
def jobs(catalog: Catalog) -> Jobs:
    return Jobs(catalog, lease=30, max_attempts=3)


def start(jobs: Jobs, id: str = "ft_1", shards: int = 3, **options: object) -> None:
    new = [NewShard({"number": number}, units=10) for number in range(shards)]
    jobs.create(id=id, kind="finetune", request={"id": id}, plan={}, shards=new, **options)  # type: ignore[arg-type]


def claim(jobs: Jobs, owner: str = "worker") -> Claim:
    found = jobs.claim(owner, kinds=["finetune"])
    assert found is not None
    return found


def with_segment(segment: SegmentRow, session: Session, job: JobRow) -> list[NewShard]:
    """What a gradients job records beside itself."""
    session.merge(segment)
    return []


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Call all at the same moment; their results."""
    ready = threading.Barrier(len(calls))

    def called(call: Callable[[], object]) -> object:
        ready.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(called, calls))


def test_the_same_id_starts_one_job(jobs: Jobs) -> None:
    start(jobs, shards=2)
    job, started = jobs.create(id="ft_1", kind="finetune", request={}, plan={}, shards=[NewShard({}, 1)])
    assert (job.progress.total, started) == (20, False)
    assert len(jobs.page(limit=10).data) == 1


def test_a_job_without_work_has_succeeded(jobs: Jobs) -> None:
    job, started = jobs.create(id="ft_1", kind="finetune", request={}, plan={}, shards=[])
    assert (job.status, started) == ("succeeded", False)


def test_every_shard_is_claimed_once_by_many_threads(jobs: Jobs) -> None:
    start(jobs, shards=40)
    taken: list[int] = []

    def work(owner: str) -> None:
        while (found := jobs.claim(owner, kinds=["finetune"])) is not None:
            taken.append(found.number)

    threads = [threading.Thread(target=work, args=(f"worker {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(40))


def test_the_same_request_sent_twice_at_once_starts_one_job(jobs: Jobs) -> None:
    for number in range(10):
        new = partial(jobs.create, id=f"ft_{number}", kind="finetune", request={}, plan={}, shards=[NewShard({}, 1)])
        answers = cast("list[tuple[AnyJob, bool]]", at_once(new, new))
        assert {job.id for job, _ in answers} == {f"ft_{number}"}
    assert len(jobs.page(limit=100).data) == 10


def test_a_job_is_done_when_its_last_two_chunks_are_published_at_once(jobs: Jobs) -> None:
    for number in range(10):
        segment = SegmentRow(id=f"seg_{number}", rows=2048, dim=4, dtype="float16", shard_rows=1024, complete=False)
        jobs.create(
            id=f"grad_{number}", kind="gradients", request={}, plan={"segments": [segment.id]},
            shards=[NewShard({}, 1024), NewShard({}, 1024)], before=partial(with_segment, segment),
        )  # fmt: skip
        for start_row in (0, 1024):
            held = jobs.claim("worker", kinds=["gradients"])
            assert held is not None
            assert jobs.succeed(held, chunks=[NewChunk(segment.id, start_row, start_row + 1024, "digest")])
        at_once(*(partial(jobs.published, [chunk]) for chunk in jobs.unpublished()))
        assert jobs.get(f"grad_{number}").status == "succeeded"


def with_a_chunk(jobs: Jobs, id: str, chunk: NewChunk | None) -> Claim | None:
    """A gradients job of one shard of one chunk, done with that chunk, or not yet done."""
    segment = SegmentRow(id="seg_1", rows=1024, dim=4, dtype="float16", shard_rows=1024, complete=False)
    payload = {"start": 2048, "stop": 3072, "outputs": [{"segment": segment.id, "base": 2048}]}
    jobs.create(
        id=id, kind="gradients", request={}, plan={"segments": [segment.id]},
        shards=[NewShard(payload, 1024, finished=chunk is None)], before=partial(with_segment, segment),
    )  # fmt: skip
    held = jobs.claim("worker", kinds=["gradients"])
    if held is not None and chunk is not None:
        assert jobs.succeed(held, chunks=[chunk])
    return held


def nothing() -> None:
    """What a discarded chunk leaves: here there are no bytes."""


def refused() -> None:
    raise AssertionError("bytes were discarded that are somebody's")


def test_a_lost_chunk_is_computed_again_for_all_jobs_that_waited_for_it(jobs: Jobs) -> None:
    with_a_chunk(jobs, "grad_1", NewChunk("seg_1", 0, 1024, "digest"))
    with_a_chunk(jobs, "grad_2", None)
    [chunk] = jobs.unpublished()
    assert jobs.lost(chunk, PROBLEM, discard=nothing)
    assert jobs.unpublished() == []
    for id in ("grad_1", "grad_2"):
        assert (jobs.get(id).status, jobs.get(id).progress.done) in {("running", 0), ("queued", 0)}
        again = jobs.claim("worker", kinds=["gradients"], job=id)
        assert again is not None
        assert jobs.succeed(again, chunks=[NewChunk("seg_1", 0, 1024, "other digest")])
    jobs.published(jobs.unpublished())
    assert [jobs.get(id).status for id in ("grad_1", "grad_2")] == ["succeeded", "succeeded"]


def test_a_chunk_that_is_lost_too_often_fails_its_job(jobs: Jobs) -> None:
    for attempt in range(jobs.max_attempts):
        with_a_chunk(jobs, "grad_1", NewChunk("seg_1", 0, 1024, f"digest {attempt}"))
        assert jobs.lost(jobs.unpublished()[0], PROBLEM, discard=nothing)
    assert (jobs.get("grad_1").status, jobs.get("grad_1").error) == ("failed", PROBLEM)


def test_who_looks_for_bytes_of_another_attempt_changes_nothing(jobs: Jobs) -> None:
    with_a_chunk(jobs, "grad_1", NewChunk("seg_1", 0, 1024, "digest"))
    [late] = jobs.unpublished()
    assert jobs.lost(late, PROBLEM, discard=nothing)
    with_a_chunk(jobs, "grad_1", NewChunk("seg_1", 0, 1024, "digest"))
    jobs.published([late])
    assert not jobs.lost(late, PROBLEM, discard=refused)
    [chunk] = jobs.unpublished()
    assert chunk.attempt != late.attempt
    jobs.published([chunk])
    assert not jobs.lost(chunk, PROBLEM, discard=refused)
    assert jobs.get("grad_1").status == "succeeded"


def test_a_chunk_whose_bytes_cannot_be_discarded_stays_committed(jobs: Jobs) -> None:
    with_a_chunk(jobs, "grad_1", NewChunk("seg_1", 0, 1024, "digest"))
    waiting = jobs.unpublished()
    with pytest.raises(AssertionError, match="discarded"):
        jobs.lost(waiting[0], PROBLEM, discard=refused)
    assert jobs.unpublished() == waiting


def test_a_job_that_is_cancelled_while_it_is_claimed_stays_cancelled(jobs: Jobs) -> None:
    for number in range(10):
        start(jobs, id=f"ft_{number}", shards=1)
        at_once(partial(jobs.claim, "worker", kinds=["finetune"]), partial(jobs.cancel, f"ft_{number}"))
        assert jobs.get(f"ft_{number}").status == "cancelled"


def test_a_job_succeeds_with_its_last_shard(jobs: Jobs) -> None:
    start(jobs, shards=2)
    first, second = claim(jobs), claim(jobs)
    assert jobs.succeed(second)
    assert jobs.get("ft_1").status == "running"
    assert jobs.succeed(first, result={"run": "run_1"})
    job = jobs.get("ft_1")
    assert (job.status, job.progress.done) == ("succeeded", 20)
    assert job.result is not None
    assert job.result.model_dump() == {"run": "run_1"}


def test_progress_follows_the_heartbeats(jobs: Jobs) -> None:
    start(jobs, shards=2)
    held = claim(jobs)
    assert jobs.renew(held, done=4)
    assert jobs.get("ft_1").progress.done == 4
    assert jobs.renew(held, done=6, total=15)
    progress = jobs.get("ft_1").progress
    assert (progress.done, progress.total) == (6, 25)


def test_a_lost_lease_gives_the_shard_to_another_and_its_old_owner_changes_nothing(catalog: Catalog) -> None:
    jobs = Jobs(catalog, lease=0.01, max_attempts=3)
    start(jobs, shards=1)
    stalled = claim(jobs, "stalled")
    jobs.renew(stalled, done=5)
    time.sleep(0.05)
    assert jobs.sweep() == 1
    assert jobs.get("ft_1").progress.done == 0
    second = claim(jobs, "second")
    assert second.attempt == stalled.attempt + 1
    assert not jobs.renew(stalled, done=9)
    assert not jobs.succeed(stalled, result={"by": "stalled"})
    assert not jobs.fail(stalled, PROBLEM, permanent=True)
    jobs.release(stalled)
    assert jobs.succeed(second, result={"by": "second"})
    result = jobs.get("ft_1").result
    assert result is not None
    assert result.model_dump() == {"by": "second"}


def test_the_worker_of_a_deleted_job_changes_no_other_job(jobs: Jobs) -> None:
    start(jobs, id="ft_1", shards=1)
    stalled = claim(jobs, "stalled")
    jobs.cancel("ft_1")
    jobs.remove("ft_1", kind="finetune")
    start(jobs, id="ft_2", shards=1)
    second = claim(jobs, "second")
    assert second.token != stalled.token
    assert not jobs.renew(stalled, done=1)
    assert not jobs.succeed(stalled, result={"by": "stalled"})
    assert jobs.succeed(second, result={"by": "second"})


def test_a_lease_that_is_renewed_is_not_swept(catalog: Catalog) -> None:
    jobs = Jobs(catalog, lease=0.2)
    start(jobs, shards=1)
    held = claim(jobs)
    for _ in range(4):
        time.sleep(0.1)
        assert jobs.renew(held, done=0)
        assert jobs.sweep() == 0


def set_the_clock(monkeypatch: pytest.MonkeyPatch, *, wrong_by: float) -> None:
    """Have this host's clock go wrong by so many seconds."""
    right = time.time

    def wrong() -> float:
        return right() + wrong_by

    monkeypatch.setattr(time, "time", wrong)
    for module in ("catalog", "leases"):
        monkeypatch.setattr(f"datastore.{module}.utc_now", lambda: datetime.fromtimestamp(wrong(), UTC))


@pytest.mark.services
@pytest.mark.parametrize("wrong_by", [-3600.0, 3600.0])
def test_a_host_whose_clock_is_wrong_neither_takes_nor_loses_a_lease(
    many_hosts: Catalog, monkeypatch: pytest.MonkeyPatch, wrong_by: float
) -> None:
    jobs = Jobs(many_hosts, lease=30)
    start(jobs, shards=2)
    held = claim(jobs, "right")
    jobs.announce("right", device="cpu", job="ft_1", flops={})
    with monkeypatch.context() as context:
        set_the_clock(context, wrong_by=wrong_by)
        assert jobs.sweep() == 0
        wrong = claim(jobs, "wrong")
        assert jobs.renew(wrong, done=1)
        jobs.announce("wrong", device="cpu", job="ft_1", flops={})
        assert [worker.id for worker in jobs.workers()] == ["right", "wrong"]
    assert jobs.sweep() == 0
    assert [worker.id for worker in jobs.workers()] == ["right", "wrong"]
    assert jobs.renew(held, done=1)
    assert jobs.renew(wrong, done=2)


@pytest.mark.services
def test_a_lease_of_a_host_whose_clock_is_ahead_ends_like_any_other(
    many_hosts: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(many_hosts, lease=0.01)
    start(jobs, shards=1)
    with monkeypatch.context() as context:
        set_the_clock(context, wrong_by=3600)
        claim(jobs, "ahead")
    time.sleep(0.05)
    assert jobs.sweep() == 1


def test_a_shard_that_loses_its_worker_every_time_fails_the_job(catalog: Catalog) -> None:
    jobs = Jobs(catalog, lease=0, max_attempts=2)
    start(jobs, shards=1)
    for _ in range(2):
        claim(jobs, "unlucky")
        time.sleep(0.01)
        jobs.sweep()
    job = jobs.get("ft_1")
    assert job.status == "failed"
    assert job.error is not None
    assert "unlucky" in job.error.detail


def test_a_passing_error_is_tried_again_and_a_lasting_one_is_not(jobs: Jobs) -> None:
    start(jobs, shards=1)
    assert not jobs.fail(claim(jobs), PROBLEM, permanent=False)
    assert jobs.get("ft_1").status == "running"
    assert jobs.fail(claim(jobs), PROBLEM, permanent=True)
    job = jobs.get("ft_1")
    assert (job.status, job.error) == ("failed", PROBLEM)
    assert jobs.claim("worker", kinds=["finetune"]) is None


def test_every_attempt_knows_how_long_those_before_it_have_worked(catalog: Catalog) -> None:
    jobs = Jobs(catalog, lease=0.6, max_attempts=9)
    start(jobs, shards=1)
    ends: list[Callable[[Claim], object]] = [
        jobs.release,
        lambda held: jobs.fail(held, PROBLEM, permanent=False),
        lambda held: (jobs.cancel(held.job), jobs.retry(held.job)),  # before its worker has noticed
        lambda held: (jobs.cancel(held.job), jobs.release(held), jobs.retry(held.job)),
        lambda _: time.sleep(0.7),  # its worker is dead; its last sign of life counts
    ]
    for number, end in enumerate(ends):
        held = claim(jobs)
        assert held.worked == pytest.approx(0.2 * number, abs=0.1 * (number + 1))
        time.sleep(0.2)
        assert jobs.renew(held, done=1)
        end(held)
        jobs.sweep()
        time.sleep(0.1)  # nobody works
    last = claim(jobs)
    assert 0.2 * len(ends) <= last.worked < 0.2 * len(ends) + 0.5
    assert jobs.succeed(last, result={})


def test_a_retry_goes_on_after_the_finished_shards(jobs: Jobs) -> None:
    start(jobs, shards=3)
    jobs.succeed(claim(jobs))
    jobs.fail(claim(jobs), PROBLEM, permanent=True)
    job = jobs.retry("ft_1")
    assert (job.status, job.error, job.progress.done) == ("queued", None, 10)
    numbers = [claim(jobs).number, claim(jobs).number]
    assert numbers == [1, 2]


def test_asking_again_for_a_failed_job_goes_on_with_it(jobs: Jobs) -> None:
    start(jobs, shards=1)
    jobs.fail(claim(jobs), PROBLEM, permanent=True)
    job, started = jobs.create(id="ft_1", kind="finetune", request={}, plan={}, shards=[NewShard({}, 10)])
    assert (job.status, started) == ("queued", True)


def test_a_failed_job_goes_on_as_it_is_asked_for_now_and_keeps_what_was_settled_where_nothing_is_new(
    jobs: Jobs,
) -> None:
    def ask(**request: object) -> AnyJob:
        plan = {"batch": request.get("batch"), "kept": "kept"}
        return jobs.create(id="ft_1", kind="finetune", request=request, plan=plan, shards=[NewShard({}, 10)])[0]

    ask()
    held = claim(jobs)
    jobs.settle(held, "batch", 64)
    jobs.fail(held, PROBLEM, permanent=True)
    ask()
    held = claim(jobs)
    assert held.plan == {"batch": 64, "kept": "kept"}
    assert ask(batch=8).request.model_dump() == {}, "a job at work is what it was"
    jobs.fail(held, PROBLEM, permanent=True)
    assert ask(batch=8).request.model_dump() == {"batch": 8}
    assert claim(jobs).plan == {"batch": 8, "kept": "kept"}


def test_a_cancelled_job_stops_at_the_next_heartbeat(jobs: Jobs) -> None:
    start(jobs, shards=2)
    held = claim(jobs)
    assert jobs.cancel("ft_1").status == "cancelled"
    assert jobs.claim("other", kinds=["finetune"]) is None
    assert not jobs.renew(held, done=5)
    assert not jobs.succeed(held, result={})
    jobs.release(held)
    assert jobs.retry("ft_1").status == "queued"
    assert claim(jobs).number == held.number


def test_only_what_has_not_finished_is_cancelled_and_only_what_has_failed_is_retried(jobs: Jobs) -> None:
    start(jobs, shards=1)
    with pytest.raises(Conflict, match="queued"):
        jobs.retry("ft_1")
    jobs.succeed(claim(jobs))
    with pytest.raises(Conflict, match="succeeded"):
        jobs.cancel("ft_1")


def test_a_name_belongs_to_one_job_of_a_kind(jobs: Jobs) -> None:
    start(jobs, name="best")
    with pytest.raises(NameTaken):
        start(jobs, id="ft_2", name="best")
    jobs.create(id="grad_1", kind="gradients", request={}, plan={"reused": 0}, shards=[], name="best")
    assert jobs.get("best", kind="finetune").id == "ft_1"
    with pytest.raises(Conflict, match="different kinds"):
        jobs.get("best")
    with pytest.raises(NotFound):
        jobs.get("worst")


def test_the_same_request_under_another_name_keeps_the_first(jobs: Jobs) -> None:
    start(jobs, name="mine")
    start(jobs)
    with pytest.raises(Conflict, match="called 'mine' already"):
        start(jobs, name="yours")
    assert jobs.get("mine").id == "ft_1"


def test_what_is_used_or_at_work_is_not_deleted(jobs: Jobs) -> None:
    start(jobs, shards=1)
    start(jobs, id="ft_2", shards=1, uses=["ft_1"])
    with pytest.raises(Conflict, match="cancel"):
        jobs.remove("ft_1", kind="finetune")
    jobs.succeed(claim(jobs))
    jobs.succeed(claim(jobs))
    with pytest.raises(InUse, match="ft_2"):
        jobs.remove("ft_1", kind="finetune")
    jobs.remove("ft_2", kind="finetune")
    assert jobs.remove("ft_1", kind="finetune") == "ft_1"
    with pytest.raises(NotFound):
        jobs.get("ft_1")


def test_pages_hold_every_job_once_newest_first(jobs: Jobs) -> None:
    for number in range(5):
        start(jobs, id=f"ft_{number}", shards=1)
    seen: list[str] = []
    after = None
    while True:
        page = jobs.page(limit=2, after=after)
        seen += [job.id for job in page.data]
        after = seen[-1]
        if not page.has_more:
            break
    assert seen == [f"ft_{number}" for number in reversed(range(5))]


def test_workers_are_listed_while_they_live(jobs: Jobs) -> None:
    jobs.announce("worker-1", device="cpu", job=None, flops={})
    jobs.announce("worker-1", device="cpu", job="ft_1", flops={"float32": 2.0})
    assert [(worker.id, worker.job) for worker in jobs.workers()] == [("worker-1", "ft_1")]
    jobs.leave("worker-1")
    assert jobs.workers() == []


def test_the_worker_seen_last_is_known_until_another_comes(jobs: Jobs) -> None:
    assert jobs.known_workers() == []
    for name in ("worker-1", "worker-2"):
        jobs.announce(name, device="cpu", job=None, flops={"float32": 2.0})
        assert [worker.id for worker in jobs.known_workers()] == [name]
        jobs.leave(name)
    assert [(worker.id, worker.flops) for worker in jobs.known_workers()] == [("worker-2", {"float32": 2.0})]
    with jobs.catalog.reading() as session:
        assert session.scalar(select(func.count()).select_from(WorkerRow)) == 1


def test_the_kinds_that_make_features_are_those_whose_results_have_feature_sets() -> None:
    results = {kind: f"{kind.title().replace('-', '')}Result" for kind in get_args(JobKind)}
    fields = {kind: set(getattr(types, name).model_fields) for kind, name in results.items()}
    found = {kind for kind, names in fields.items() if names & {"feature_set", "feature_sets"}}
    assert found == {*MAKE_FEATURES, "stream"}  # a stream may be one that there is
