"""Checking, mending, collecting and backing up: the same of a store in a folder and of one in a bucket, and what only a
bucket has. Of a bucket it is the bucket that counts, whatever the cache of a machine has or lacks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from numpy.typing import NDArray
from obstore.store import from_url
from sqlalchemy import delete, update

from datastore import backups
from datastore.doctor import examine
from datastore.errors import Conflict
from datastore.findings import Finding, mended
from datastore.garbage import garbage
from datastore.leftovers import OLD
from datastore.schema import ChunkRow, DatasetRow, JobFeatureRow, JobRow, SegmentRow, ShardRow, TaskRow
from datastore.scores import TaskScores
from tests.buckets import URL, BucketServer
from tests.stores import Store, numbers, request

ROWS = 1030  # two chunks of features
NOW = -1.0  # seconds: older than what was put at this moment


class Shelf(ABC):
    """Where the bytes of a store are for good."""

    settings: dict[str, Any]

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """What lies there."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The bytes of one."""

    @abstractmethod
    def write(self, key: str, content: bytes) -> None:
        """Put one."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Lose one."""

    def find(self, beginning: str, ending: str) -> str:
        """The only key that begins and ends so."""
        (found,) = (key for key in self.names() if key.startswith(beginning) and key.endswith(ending))
        return found


@dataclass
class InFolder(Shelf):
    """A store's data folder."""

    data: Path
    settings: dict[str, Any]

    def names(self, prefix: str = "") -> list[str]:
        found = (str(path.relative_to(self.data)) for path in self.data.rglob("*") if path.is_file())
        return sorted(key for key in found if key.startswith(prefix) and not key.startswith("catalog"))

    def read(self, key: str) -> bytes:
        return (self.data / key).read_bytes()

    def write(self, key: str, content: bytes) -> None:
        (self.data / key).parent.mkdir(parents=True, exist_ok=True)
        (self.data / key).write_bytes(content)

    def remove(self, key: str) -> None:
        (self.data / key).unlink()


class InBucket(Shelf):
    """A bucket."""

    def __init__(self) -> None:
        self.settings = {"store": URL}

    def names(self, prefix: str = "") -> list[str]:
        listed = (str(item["path"]) for page in obstore.list(self._objects) for item in page)
        return sorted(key for key in listed if key.startswith(prefix))

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self._objects, key).bytes())

    def write(self, key: str, content: bytes) -> None:
        obstore.put(self._objects, key, content)

    def remove(self, key: str) -> None:
        obstore.delete(self._objects, key)

    @property
    def _objects(self) -> Any:
        return from_url(URL, client_options={"allow_http": True})


@pytest.fixture(params=["folder", "bucket"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    """Both kinds."""
    if request.param == "folder":
        return InFolder(tmp_path / "store", {})
    request.getfixturevalue("bucket")
    return InBucket()


@pytest.fixture
def in_bucket(bucket: BucketServer) -> InBucket:
    return InBucket()


def opened(folder: Path, shelf: Shelf) -> Store:
    """A machine's store; machines with a bucket share the catalog of the first."""
    catalog = f"sqlite:///{folder.parent / 'catalog.sqlite3'}"
    return Store.at(folder, catalog=catalog, **shelf.settings)


@pytest.fixture
def store(tmp_path: Path, shelf: Shelf) -> Iterator[Store]:
    yield from filled(tmp_path, shelf)


@pytest.fixture
def remote(tmp_path: Path, in_bucket: InBucket) -> Iterator[Store]:
    yield from filled(tmp_path, in_bucket)


def filled(folder: Path, shelf: Shelf) -> Iterator[Store]:
    """A store with a pool, a task, features of the pool and scores made of them."""
    store = opened(folder / "store", shelf)
    store.checkpoint(0)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="warm-up")
    store.task({"a": 3}, folder=folder / "files")
    store.features.start(request(dataset=store.pool(ROWS, name="pool").id))
    store.work(numbers)
    scores = TaskScores(np.zeros(ROWS, np.float32), np.zeros(ROWS, np.int16), np.ones(ROWS, np.bool_))
    made_from = {"rows": [[segment(store), 0, ROWS]], "target_segments": []}
    store.scoring.cache.put("score_used", scores, made_from=made_from)
    yield store
    store.catalog.close()


def segment(store: Store) -> str:
    (name,) = store.store.names()
    return name


def read(store: Store) -> NDArray[np.float32]:
    """The features of the pool."""
    return store.store.open(segment(store)).features(0, ROWS)


def found(store: Store, *, deep: bool = True, older_than: float = OLD) -> list[Finding]:
    """What is wrong; the checkpoint's record never had files."""
    every = examine(store, older_than=older_than, deep=deep)
    return [each for each in every if each.place != "checkpoints/ck_0"]


def flipped(shelf: Shelf, key: str) -> None:
    content = bytearray(shelf.read(key))
    content[len(content) // 2] ^= 1
    shelf.write(key, bytes(content))


def cut(shelf: Shelf, key: str) -> None:
    shelf.write(key, shelf.read(key)[:-9])


def lost(shelf: Shelf, key: str) -> None:
    shelf.remove(key)


def lost_with_all_others(shelf: Shelf, key: str) -> None:
    for each in shelf.names(key.partition("/data.zarr")[0]):
        shelf.remove(each)
    if isinstance(shelf, InFolder):
        shutil.rmtree(shelf.data / key.partition("/data.zarr")[0])


def test_a_sound_store_has_nothing_to_find_and_nothing_to_collect(store: Store, shelf: Shelf) -> None:
    before = shelf.names()
    assert found(store, older_than=NOW) == []
    assert collect(store) == []
    assert shelf.names() == before


@pytest.mark.parametrize(
    ("harm", "name", "said", "deep"),
    [
        (flipped, "data.zarr/features/c.0.0", "does not match its checksum", True),
        (flipped, "data.zarr/losses/c.1", "does not match its checksum", True),
        (cut, "data.zarr/features/c.1.0", "bytes instead of", False),
        (lost, "data.zarr/features/c.0.0", "is missing", False),
        (lost, "data.zarr/tokens/c.1", "is missing", False),
        (lost, "receipts/1024.json", "receipt of these rows is missing", False),
        (cut, "data.zarr/features/zarr.json", "cannot be read", False),
        (lost_with_all_others, "data.zarr/features/c.0.0", "the segment is missing", False),
    ],
    ids=["flipped", "column-flipped", "cut", "lost", "column-lost", "receipt", "metadata", "segment"],
)
def test_damaged_features_are_found_and_computed_again_as_they_were(
    store: Store, shelf: Shelf, harm: Callable[[Shelf, str], None], name: str, said: str, deep: bool
) -> None:
    before, name_of_segment = read(store), segment(store)
    sound = {key: shelf.read(key) for key in shelf.names(f"features/{name_of_segment}/") if not key.endswith("/born")}
    harm(shelf, f"features/{name_of_segment}/{name}")
    assert deep or found(store, deep=False)
    (finding,) = found(store, deep=deep)
    assert finding.kind == "damaged"
    assert said in finding.detail
    after = mended(finding)
    assert after.mended, after.repair
    store.work(numbers)
    assert found(store, older_than=NOW) == []
    again = {key: shelf.read(key) for key in shelf.names(f"features/{name_of_segment}/") if not key.endswith("/born")}
    assert again == sound
    np.testing.assert_array_equal(read(store), before)


def test_bytes_that_the_catalog_does_not_know_make_room(store: Store, shelf: Shelf) -> None:
    name = segment(store)
    with store.catalog.transaction() as session:  # a catalog that is older than the store
        session.execute(delete(ChunkRow).where(ChunkRow.start == 1024))
        session.execute(update(SegmentRow).values(complete=False))
        session.execute(update(ShardRow).where(ShardRow.number == 1).values(status="queued", done=0))
        session.execute(update(JobRow).values(status="queued", result=None, done=1024))
    (finding,) = found(store)
    assert (finding.kind, finding.place) == ("unregistered", f"features/{name}/receipts/1024.json")
    assert mended(finding).mended
    assert f"features/{name}/data.zarr/features/c.1.0" not in shelf.names()
    store.work(numbers)
    assert found(store, older_than=NOW) == []


@pytest.mark.parametrize("bytes_are_lost", [False, True])
def test_a_committed_chunk_that_nobody_published_is_published_or_computed_again(
    store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, bytes_are_lost: bool
) -> None:
    job = store.features.start(request(dataset=store.pool(6, first=9000).id))[0]
    with monkeypatch.context() as patch:  # its worker is killed here
        patch.setattr(type(store.store), "publish", lambda *_, **__: None)
        patch.setattr(type(store.jobs), "published", lambda *_: None)
        store.work(numbers)
    (one,) = store.jobs.unpublished()
    assert found(store) == []
    if bytes_are_lost:
        store.store.discard(one.segment, start=one.start, attempt=one.attempt)
    (finding,) = (each for each in found(store, older_than=NOW) if each.kind != "leftover")
    assert finding.kind == "unpublished"
    said = mended(finding).repair or ""
    assert said.startswith("taken back" if bytes_are_lost else "published")
    store.work(numbers)
    assert store.jobs.get(job.id).status == "succeeded"
    assert found(store, older_than=NOW) == []


def test_what_killed_processes_left_is_removed_with_its_size(store: Store, shelf: Shelf) -> None:
    name = segment(store)
    attempt = f"features/{name}/attempts/0-77" if isinstance(shelf, InFolder) else f"attempts/{name}/0-77"
    shelf.write(f"{attempt}/manifest.json", b"1234")
    shelf.write("features/seg_unknown/data.zarr/zarr.json", b"1234")
    assert found(store) == []
    findings = [mended(finding) for finding in found(store, older_than=NOW)]
    assert {(each.kind, each.place, each.bytes) for each in findings} == {
        ("leftover", attempt, 4),
        ("orphan", "features/seg_unknown", 4),
    }
    assert all(each.mended for each in findings)
    assert not [key for key in shelf.names() if key.startswith((attempt, "features/seg_unknown"))]
    assert found(store, older_than=NOW) == []


def test_what_has_no_record_is_removed(store: Store, shelf: Shelf) -> None:
    pool = store.pool(5, first=5000)
    with store.catalog.transaction() as session:
        session.execute(delete(TaskRow))
        session.delete(session.get_one(DatasetRow, pool.id))
    left = sorted(each.place for each in collect(store) if each.kind == "orphan")
    assert [place.split("/")[0] for place in left] == ["datasets", "datasets", "tasks"], (
        "the rows, their upload, the task"
    )
    assert shelf.names("tasks/") == []
    assert not [key for key in shelf.names("datasets/") if pool.id in key]
    assert found(store, older_than=NOW) == []


def collect(store: Store) -> list[Any]:
    found = list(garbage(store, older_than=NOW))
    for each in found:
        each.remove()
    return found


def test_features_that_no_job_answers_with_go_and_then_what_was_made_of_them(store: Store, shelf: Shelf) -> None:
    place = f"features/{segment(store)}"
    with store.catalog.transaction() as session:
        session.execute(delete(JobFeatureRow))
    (features,) = collect(store)
    assert (features.place, features.bytes > 16 * ROWS) == (place, True)
    assert shelf.names("features/seg_") == []
    (scores,) = collect(store)
    assert (scores.place, scores.bytes > 4 * ROWS) == ("scores/score_used", True)
    assert shelf.names("scores/score_") == []
    assert collect(store) == []


def test_a_dataset_whose_rows_are_lost_is_stored_anew_from_its_upload(store: Store, shelf: Shelf) -> None:
    id = store.catalog.dataset("pool").id
    before = list(store.datasets.lines(id, range(3)))
    shelf.remove(shelf.find(f"datasets/{id}", "/keys.u64"))
    if isinstance(shelf, InBucket):
        shutil.rmtree(store.settings.datasets / id)  # else this machine's copy mends it
    (finding,) = found(store, deep=False)
    assert (finding.kind, finding.place) == ("damaged", f"datasets/{id}")
    assert mended(finding).repair == "stored anew from its upload"
    assert list(store.datasets.lines(id, range(3))) == before
    assert found(store, older_than=NOW) == []


# A bucket ---------------------------------------------------------------------------------------------------------


def test_a_cache_proves_nothing(remote: Store, in_bucket: InBucket, tmp_path: Path) -> None:
    read(remote)
    shutil.rmtree(remote.settings.data)
    fresh = opened(tmp_path / "fresh", in_bucket)
    assert found(fresh, older_than=NOW) == [], "an empty cache lacks nothing"
    read(fresh)
    flipped(in_bucket, f"features/{segment(fresh)}/data.zarr/features/c.0.0")
    read(fresh)
    assert [each.kind for each in found(fresh)] == ["damaged"], "the cache still has it"
    fresh.catalog.close()


def test_another_machines_cache_does_not_mix_what_was_computed_again(
    remote: Store, in_bucket: InBucket, tmp_path: Path
) -> None:
    other = opened(tmp_path / "other", in_bucket)
    before = read(other)
    flipped(in_bucket, f"features/{segment(remote)}/data.zarr/features/c.0.0")
    (finding,) = found(remote)
    assert mended(finding).mended
    remote.work(lambda *given: -numbers(*given))  # a GPU whose numbers are others
    np.testing.assert_array_equal(read(other)[:1024], -before[:1024])
    np.testing.assert_array_equal(read(other)[1024:], before[1024:])
    other.catalog.close()


@pytest.mark.parametrize(("harm", "deep"), [(flipped, True), (cut, False), (lost, False)])
def test_a_thing_is_put_again_from_a_machines_sound_copy(
    remote: Store, in_bucket: InBucket, harm: Callable[[Shelf, str], None], deep: bool
) -> None:
    task = remote.catalog.task("target").id
    key = in_bucket.find(f"tasks/{task}", "/validation.jsonl")
    before = in_bucket.read(key)
    harm(in_bucket, key)
    assert found(remote, deep=False) == [] if deep else True
    (finding,) = found(remote, deep=deep)
    assert (finding.kind, finding.place) == ("damaged", f"tasks/{task}")
    assert mended(finding).repair == "put again from this machine's copy"
    assert in_bucket.read(key) == before
    assert found(remote, older_than=NOW) == []


def test_a_thing_of_which_nobody_has_a_copy_makes_room_for_its_next_upload(
    remote: Store, in_bucket: InBucket, tmp_path: Path
) -> None:
    task = remote.catalog.task("target").id
    shutil.rmtree(remote.settings.tasks / task)
    in_bucket.write(f"tasks/{task}.index.json", b"{")
    (finding,) = found(remote)
    after = mended(finding)
    assert not after.mended
    assert "upload the same again" in (after.repair or "")
    assert in_bucket.names(f"set-aside/{task}.")
    assert [each.kind for each in found(remote)] == ["missing"]
    assert remote.tasks.store("jsonl", tmp_path / "files").id == task
    assert found(remote, older_than=NOW) == []


@pytest.mark.parametrize("name", ["scores/score_used/", "scores/score_used.index.json"], ids=["file", "index"])
def test_damaged_scores_go_and_are_made_again(remote: Store, in_bucket: InBucket, name: str) -> None:
    key = name if name.endswith(".json") else in_bucket.find(name, "/score.npy")
    in_bucket.write(key, in_bucket.read(key)[:-20])
    (finding,) = found(remote, deep=False)
    assert (finding.place, mended(finding).mended) == ("scores/score_used", True)
    assert remote.scoring.cache.get("score_used") is None
    collect(remote)  # what an unreadable index has named
    assert in_bucket.names("scores/score_") == []


def test_unfinished_publications_are_leftovers_with_their_size(remote: Store, in_bucket: InBucket) -> None:
    in_bucket.write(f"checkpoints/ck_left/{'0' * 16}/model/model.safetensors.index.json", b"12345")
    in_bucket.write(f"scores/score_used/{'1' * 16}/score.npy", b"123")
    assert found(remote) == []
    findings = [mended(each) for each in found(remote, older_than=NOW)]
    assert sorted((each.kind, each.bytes) for each in findings) == [("leftover", 3), ("leftover", 5)]
    assert found(remote, older_than=NOW) == []
    assert in_bucket.names("checkpoints/") == []


def test_a_record_whose_thing_is_not_there_is_found(remote: Store, in_bucket: InBucket) -> None:
    id = remote.catalog.dataset("pool").id
    for key in in_bucket.names(f"datasets/{id}"):
        in_bucket.remove(key)
    (finding,) = found(remote, deep=False)
    assert (finding.kind, finding.place) == ("missing", f"datasets/{id}")
    assert mended(finding).mended
    assert found(remote, older_than=NOW) == []


def test_a_backup_is_the_catalog_and_goes_over_a_copy_of_the_bucket(
    remote: Store, in_bucket: InBucket, tmp_path: Path
) -> None:
    before, kept = read(remote), tmp_path / "backup"
    copied = backups.backup(remote, kept)
    assert (copied.files, copied.bucket) == (0, URL)
    assert backups.backup(remote, kept) == copied
    again = Store.at(tmp_path / "again", store=f"{URL}-copy")
    with pytest.raises(Conflict, match="copy the objects there first"):
        backups.restore(again, kept)
    copy = from_url(f"{URL}-copy", client_options={"allow_http": True})
    for key in in_bucket.names():
        obstore.put(copy, key, in_bucket.read(key))
    assert backups.restore(again, kept).rows == copied.rows
    assert found(again, older_than=NOW) == []
    np.testing.assert_array_equal(read(again), before)
    with pytest.raises(Conflict, match="restore into an empty one"):
        backups.restore(again, kept)
    again.catalog.close()


def test_a_backup_of_one_kind_is_not_mixed_with_the_other(remote: Store, tmp_path: Path) -> None:
    local = Store.at(tmp_path / "local")
    local.pool(3)
    backups.backup(local, tmp_path / "of-folder")
    backups.backup(remote, tmp_path / "of-bucket")
    for store, folder in ((local, "of-bucket"), (remote, "of-folder")):
        with pytest.raises(Conflict, match="name another folder"):
            backups.backup(store, tmp_path / folder)
    empty, empty_remote = Store.at(tmp_path / "empty"), Store.at(tmp_path / "empty-remote", store=URL)
    with pytest.raises(Conflict, match="set GRADSTORE_STORE to that bucket"):
        backups.restore(empty, tmp_path / "of-bucket")
    with pytest.raises(Conflict, match="unset GRADSTORE_STORE"):
        backups.restore(empty_remote, tmp_path / "of-folder")
    for each in (local, empty, empty_remote):
        each.catalog.close()


def test_the_commands_work_over_a_bucket_and_refuse_an_empty_catalog(
    remote: Store, in_bucket: InBucket, tmp_path: Path
) -> None:
    catalog = {"GRADSTORE_CATALOG": remote.settings.catalog_url}
    flipped(in_bucket, f"features/{segment(remote)}/data.zarr/features/c.0.0")
    status, lines = command("doctor", "--deep", "--repair", data=tmp_path / "cache", **catalog)
    assert (status, [line["kind"] for line in lines if line["mended"]]) == (3, ["damaged"]), (
        "a checkpoint without files"
    )
    status, lines = command("gc", "--dry-run", data=tmp_path / "cache", **catalog)
    assert (status, lines) == (0, [])
    status, (line,) = command("backup", str(tmp_path / "kept"), data=tmp_path / "cache", **catalog)
    assert (status, line["bucket"]) == (0, URL)
    before = in_bucket.names()
    for name in ("doctor", "gc"):
        assert command(name, "--older-than", "0", data=tmp_path / "empty") == (1, [])
    kept = str(tmp_path / "kept")
    assert command("backup", kept, data=tmp_path / "empty") == (1, [])
    assert in_bucket.names() == before


def command(name: str, *options: str, data: Path, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    words = [str(Path(sys.executable).with_name("gradstore")), name, *options, "--data", str(data), "--json"]
    given = {**os.environ, "GRADSTORE_STORE": URL, **environment}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=given)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]
