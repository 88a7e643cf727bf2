"""Backups: made while a job runs, restored after everything is gone, and the job goes on as if nothing had been."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import GradientsRequest
from sqlalchemy import func, select

from datastore import backups
from datastore.doctor import examine
from datastore.errors import Conflict, InvalidInput
from datastore.leases import Claim, NewShard
from datastore.schema import JobFeatureRow, ShardRow, Table
from tests.services import PostgresServer
from tests.stores import Store, numbers
from tests.test_predictors import World as Learning
from tests.test_predictors import asked
from tests.test_subset_estimates import World as Estimating
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered
from worker.jobs import run

CATALOGS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.services)]
Database = Callable[[str], str]


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Database:
    """The URL of a new catalog of a kind; of SQLite, which lies in the data folder, an empty one."""

    def new(kind: str) -> str:
        if kind == "sqlite":
            return ""
        server: PostgresServer = request.getfixturevalue("postgres_server")
        return server.database()

    return new


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("catalog", CATALOGS)
@pytest.mark.parametrize("restored", CATALOGS)
def test_a_store_that_is_destroyed_while_a_job_runs_comes_back_and_the_job_goes_on(
    catalog: str, restored: str, database: Database, tmp_path: Path, model: Path
) -> None:
    place = Workplace.at(tmp_path / "first", model=model, catalog=database(catalog))
    done, halted, claim = filled(place)
    before = place.stored(feature_set(place, done))
    kept = tmp_path / "backup"
    copied = backups.backup(place.context, kept)
    assert copied.copied == copied.files > 0
    counted = counts(place)
    run(claim, place.context)
    undisturbed = place.stored(feature_set(place, halted))
    place.context.catalog.close()
    shutil.rmtree(place.context.settings.data)

    again = Workplace.at(tmp_path / "second", model=model, catalog=database(restored))
    assert backups.restore(again.context, kept).rows == copied.rows
    assert counts(again) == {**counted, "workers": 0}
    assert list(examine(again.context, older_than=0, deep=True)) == []
    assert again.job(halted).status == "running"
    assert np.array_equal(again.stored(feature_set(again, done)), before)
    again.work()
    assert again.job(halted).status == "succeeded", again.job(halted).error
    assert np.array_equal(again.stored(feature_set(again, halted)), undisturbed)
    assert list(examine(again.context, older_than=0, deep=True)) == []
    new_shards = ids_of_shards(again)
    again.start(request(again, again.pool(numbered(range(70, 76))).id))
    assert min(set(ids_of_shards(again)) - set(new_shards)) > max(new_shards), "a shard's number is given once"
    again.context.catalog.close()


def filled(place: Workplace) -> tuple[str, str, Claim]:
    """A job that is done, and one of two shards of which one is done and the other at work."""
    place.checkpoint()
    place.task()
    done = place.start(request(place, place.pool(numbered(range(6)), name="small").id)).id
    place.work()
    assert place.job(done).status == "succeeded"
    halted = place.start(request(place, place.pool(numbered(range(100, 1130)), name="pool").id)).id
    run(place.claim(), place.context)
    claim = place.claim()
    assert place.job(halted).status == "running"
    return done, halted, claim


def request(place: Workplace, dataset: str) -> GradientsRequest:
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    return GradientsRequest(dataset=dataset, checkpoints=[checkpoint], dims=[16], kinds=["sgd"], token_budget=2048)


def feature_set(place: Workplace, job: str) -> str:
    with place.context.catalog.reading() as session:
        return session.scalars(select(JobFeatureRow.feature_set_id).where(JobFeatureRow.job_id == job)).one()


def counts(place: Workplace) -> dict[str, int]:
    """Rows of every table."""
    with place.context.catalog.reading() as session:
        tables = Table.metadata.sorted_tables
        return {table.name: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}


def ids_of_shards(place: Workplace) -> list[int]:
    with place.context.catalog.reading() as session:
        return list(session.scalars(select(ShardRow.id)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.at(tmp_path / "store")
    store.checkpoint(0)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="warm-up")
    yield store
    store.catalog.close()


def compute(store: Store, rows: int, *, first: int = 0) -> str:
    """Features of a pool of its own."""
    asked = GradientsRequest(dataset=store.pool(rows, first=first).id, run="warm-up", dims=[16], dtype="float16")
    job = store.features.start(asked)[0]
    store.work(numbers)
    return job.id


def test_a_second_backup_copies_only_what_is_new_and_forgets_what_is_deleted(store: Store, tmp_path: Path) -> None:
    first = compute(store, 10)
    kept = tmp_path / "backup"
    once = backups.backup(store, kept)
    files = below(kept)
    assert backups.backup(store, kept) == backups.Copied(once.rows, once.files, 0, 0)
    compute(store, 20, first=100)
    more = backups.backup(store, kept)
    assert 0 < more.copied < more.files
    store.features.remove(first)
    less = backups.backup(store, kept)
    assert less.copied == 0
    assert less.files < more.files
    assert files - below(kept), "what was deleted is still there"


def below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_a_deletion_while_files_are_copied_begins_the_backup_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = compute(store, 10)
    compute(store, 20, first=100)
    copying = backups.copy_file
    calls: list[Path] = []

    def copy(source: Path, target: Path) -> None:
        if not calls:
            store.features.remove(job)
        calls.append(source)
        copying(source, target)

    monkeypatch.setattr(backups, "copy_file", copy)
    backups.backup(store, tmp_path / "backup")
    again = Store.at(tmp_path / "again")
    backups.restore(again, tmp_path / "backup")
    assert [each.id for each in again.jobs.page(limit=9).data] == [each.id for each in store.jobs.page(limit=9).data]
    assert not [each for each in examine(again, older_than=0, deep=True) if each.place.startswith("features")]
    again.catalog.close()


def test_a_chunk_that_moves_while_it_is_copied_is_in_the_backup(store: Store, tmp_path: Path) -> None:
    """Committed when the catalog was copied, and published while the files are."""
    asked = GradientsRequest(dataset=store.pool(10).id, run="warm-up", dims=[16], dtype="float16")
    job = store.features.start(asked)[0].id
    publish, kept_back = store.store.publish, []
    object.__setattr__(store.store, "publish", lambda *given, **named: kept_back.append((given, named)))
    published = store.jobs.published
    object.__setattr__(store.jobs, "published", lambda _: None)
    store.work(numbers)
    object.__setattr__(store.jobs, "published", published)
    ((given, named),) = kept_back
    copying = backups.copy_file

    def copy(source: Path, target: Path) -> None:
        if "attempts" in source.parts and kept_back:
            kept_back.clear()
            publish(*given, **named)
        copying(source, target)

    backups.copy_file = copy
    try:
        backups.backup(store, tmp_path / "backup")
    finally:
        backups.copy_file = copying
    assert not kept_back, "nothing was moved"
    again = Store.at(tmp_path / "again")
    backups.restore(again, tmp_path / "backup")
    (one,) = again.jobs.unpublished()
    again.store.publish(one.segment, start=one.start, attempt=one.attempt, digest=one.digest)
    again.jobs.published([one])
    assert again.jobs.get(job).status == "succeeded"
    assert not [each for each in examine(again, older_than=0, deep=True) if each.place.startswith("features")]
    again.catalog.close()


def test_only_an_empty_store_is_filled(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no backup"):
        backups.restore(store, tmp_path / "nothing")
    compute(store, 10)
    backups.backup(store, tmp_path / "backup")
    with pytest.raises(Conflict, match="restore into an empty one"):
        backups.restore(store, tmp_path / "backup")


def test_the_commands_back_up_and_restore(store: Store, tmp_path: Path) -> None:
    compute(store, 10)
    kept, again = tmp_path / "backup", tmp_path / "again"
    assert "files, of which" in command("backup", kept, store.settings.data).stdout
    assert command("restore", kept, again).returncode == 0
    refused = command("restore", kept, again)
    assert (refused.returncode, "restore into an empty one" in refused.stderr) == (1, True)
    assert command("doctor", None, again).returncode == 3, "the run's checkpoint never had files"


def command(name: str, folder: Path | None, data: Path) -> subprocess.CompletedProcess[str]:
    words: list[Any] = [Path(sys.executable).with_name("gradstore"), name, *([folder] if folder else [])]
    return subprocess.run([*words, "--data", data], capture_output=True, text=True, check=False)


def test_what_a_predictor_has_learned_and_a_projectors_network_come_back(tmp_path: Path) -> None:
    there = Learning.at(tmp_path / "before")
    there.learn()
    store, shard = there.store, NewShard({}, units=1, finished=True)
    request = {"annotations": "labels", "streams": {"gradients": "of-pool"}}
    store.jobs.create(id="proj_1", kind="projector", request=request, plan={}, shards=[shard], uses=[])
    store.projectors.files.keep("proj_1", {}, lambda path: path.write_bytes(b"network") and None)
    again = restored(store, tmp_path)
    found = again.predictors.predicted(store.predictors.start(asked())[0].id)
    assert found is not None
    assert np.array_equal(found.score, there.predicted())
    assert again.projectors.files.weights("proj_1").read_bytes() == b"network"


def test_what_was_estimated_comes_back(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    there = Estimating.at(tmp_path / "before")
    id, _ = there.done(count=5)
    again = restored(there.store, tmp_path)
    page = {"after": 0, "limit": 5}
    assert again.estimates.subsets(id, **page) == there.store.estimates.subsets(id, **page)


def restored(store: Store, folder: Path) -> Store:
    """Another store, from a backup of this one."""
    backups.backup(store, folder / "backup")
    after = Store.at(folder / "after")
    backups.restore(after, folder / "backup")
    return after
