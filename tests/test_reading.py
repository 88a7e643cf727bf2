"""What a worker does beside computing: it reads the next rows by a guess, and writes what it has computed.

A right guess saves the reading, a wrong one or an error costs nothing but itself.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import GradientsRequest
from sqlalchemy import select

from datastore.gradients import FeatureStore
from datastore.schema import ShardRow
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered
from worker import loaded, reading
from worker.gradients import GradientEngine
from worker.jobs import KINDS, run
from worker.loop import work_until_left
from worker.models import load_model
from worker.reading import Ahead, Check, Rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    return save_tiny_model(folder, hidden_size=16, intermediate_size=16, num_hidden_layers=1)


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return Workplace.at(tmp_path, model=model)


def start(place: Workplace, rows: int, *, checkpoints: int = 1) -> str:
    found = [place.checkpoint(number).id for number in range(checkpoints)]
    dataset = place.pool(numbered(range(rows))).id
    return place.start(GradientsRequest(dataset=dataset, checkpoints=found, dims=[16], token_budget=4096)).id


# What is read ahead ---------------------------------------------------------------------------------------------------


def test_what_was_read_is_taken_once() -> None:
    ahead, rows = Ahead(), Rows()
    ahead.begin(7, "key", lambda _: rows)
    assert ahead.shard == 7
    assert ahead.take("key") is rows
    assert (ahead.take("key"), ahead.shard) == (None, None)


def test_what_is_wanted_is_waited_for() -> None:
    ahead, rows, go = Ahead(), Rows(), threading.Event()

    def work(_check: Check) -> Rows:
        go.wait(60)
        return rows

    ahead.begin(7, "key", work)
    threading.Timer(0.1, go.set).start()
    assert ahead.take("key") is rows


def test_what_is_not_wanted_is_given_up_at_once() -> None:
    ahead, tick = Ahead(), threading.Event()

    def work(check: Check) -> Rows:
        for _ in range(6000):
            check()
            tick.wait(0.01)
        return Rows()

    ahead.begin(7, "key", work)
    thread = next(each for each in threading.enumerate() if each.name == "reading-7")
    assert ahead.take("another") is None
    assert not thread.is_alive()


def test_an_error_while_reading_ahead_is_left_to_the_shard_it_belongs_to() -> None:
    def work(_check: Check) -> Rows:
        raise OSError("the disk is away")

    ahead = Ahead()
    ahead.begin(7, "key", work)
    assert ahead.take("key") is None


# In a worker ----------------------------------------------------------------------------------------------------------


def test_a_worker_reads_each_shard_but_its_first_while_another_is_computed(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[bool] = []

    def noted(*arguments: object, **options: object) -> Rows:
        readers.append(threading.current_thread() is threading.main_thread())
        return read(*arguments, **options)  # type: ignore[arg-type]

    read = reading.read
    monkeypatch.setattr("worker.kinds.gradients.read", noted)
    job = start(place, 3000)
    work_until_left(place.context, once=True)
    assert place.job(job).status == "succeeded"
    assert readers == [True, False, False]


def test_features_are_the_same_bytes_whether_read_ahead_or_in_time(place: Workplace, tmp_path: Path) -> None:
    other = Workplace.at(tmp_path / "other", model=place.model)
    features = []
    for each in (place, other):
        job = start(each, 2100)
        if each is other:
            while (claim := each.context.jobs.claim(each.context.owner, kinds=KINDS)) is not None:
                run(claim, each.context)
                each.context.ahead.drop()
        else:
            work_until_left(each.context, once=True)
        result = each.job(job).result
        assert result is not None
        features.append(each.stored(result.model_dump()["feature_sets"][0]["id"]))
    np.testing.assert_array_equal(*features)


def test_the_shard_that_was_read_for_is_claimed_if_it_still_waits(place: Workplace) -> None:
    start(place, 4000)
    jobs = place.context.jobs
    first = jobs.claim("me", kinds=KINDS)
    assert first is not None
    upcoming = jobs.upcoming(first)
    assert upcoming is not None
    assert upcoming[1]["start"] == 1024, "alone, it is the next one"
    chosen = jobs.claim("me", kinds=KINDS, prefer=first.shard + 2)
    assert chosen is not None
    assert chosen.shard == first.shard + 2
    taken = jobs.claim("another", kinds=KINDS, prefer=chosen.shard)
    assert taken is not None
    assert taken.shard == first.shard + 1, "what is taken already is not taken twice"
    guesses = {guess[0] for guess in (jobs.upcoming(first) for _ in range(20)) if guess}
    assert guesses == {first.shard + 3}
    last = jobs.claim("me", kinds=KINDS, prefer=first.shard + 3)
    assert last is not None
    assert jobs.upcoming(last) is None


def test_a_shard_is_written_while_the_next_is_computed_and_all_are_when_the_worker_leaves(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = threading.Event()
    seen: list[tuple[str, bool]] = []
    store, engine = type(place.context.store), GradientEngine
    write, features = store.write, engine.features

    def slow_write(self: FeatureStore, *given: object, **options: object) -> str:
        if options["start"] == 0:
            seen.append(("first written beside the second's computing", computed.wait(60)))
        return write(self, *given, **options)  # type: ignore[arg-type]

    def noted(self: GradientEngine, *given: object, **options: object) -> object:
        if seen:
            computed.set()
        found = features(self, *given, **options)  # type: ignore[arg-type]
        seen.append(("computed", True))
        return found

    monkeypatch.setattr(store, "write", slow_write)
    monkeypatch.setattr(engine, "features", noted)
    job = start(place, 2000)
    work_until_left(place.context, once=True)
    assert place.job(job).status == "succeeded"
    assert seen[0] == ("computed", True)
    assert ("first written beside the second's computing", True) in seen


def test_a_shard_that_cannot_be_written_is_tried_again_by_the_same_worker(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = type(place.context.store)
    write, failed = store.write, []

    def full(self: FeatureStore, *given: object, **options: object) -> str:
        if not failed:
            failed.append(options["start"])
            raise OSError("No space left on device")
        return write(self, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", full)
    job = start(place, 20)
    work_until_left(place.context, once=True)
    assert failed == [0]
    assert place.job(job).status == "succeeded"
    assert not [each for each in threading.enumerate() if each.name.startswith("heartbeat")]


def test_a_worker_that_is_asked_to_leave_commits_what_it_has_computed_and_gives_the_rest_back(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = type(place.context.store)
    write = store.write

    def leave(self: FeatureStore, *given: object, **options: object) -> str:
        place.context.leaving.set()
        return write(self, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", leave)
    start(place, 4000)
    work_until_left(place.context)
    with place.context.catalog.reading() as session:
        states = list(session.scalars(select(ShardRow.status).order_by(ShardRow.id)))
    assert states[0] == "succeeded"
    assert states[2:] == ["queued", "queued"]
    assert set(states) <= {"succeeded", "queued"}


def test_a_job_of_four_checkpoints_loads_its_base_model_once(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def counted(model: str, **options: object) -> object:
        loads.append(model)
        return load_model(model, **options)  # type: ignore[arg-type]

    job = start(place, 1100, checkpoints=4)  # two shards each
    monkeypatch.setattr(loaded, "load_model", counted)
    adapters = []
    load_adapter = loaded.load_adapter
    monkeypatch.setattr(loaded, "load_adapter", lambda *given: adapters.append(given[1]) or load_adapter(*given))
    work_until_left(place.context, once=True)
    assert place.job(job).status == "succeeded"
    assert loads == [str(place.model)]
    assert len(adapters) == len(set(adapters)) == 4, "a worker stays at a checkpoint until its shards are done"
