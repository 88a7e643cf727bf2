"""Features in a bucket: a real S3 API gives what the disk gives, through a bounded cache, and one attempt wins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import S3Store, from_url

from datastore import bucket as buckets
from datastore.bucket import RANGE_BYTES, Bucket
from datastore.bucket_features import BucketFeatureStore
from datastore.chunk_files import ChunkCache
from datastore.errors import BucketRefused, BucketUnreachable, Conflict, Damaged, NotFound
from datastore.gradients import Block, FeatureStore
from datastore.scores import ScoreCache, Target, score
from datastore.segments import Rows
from tests.buckets import URL, BucketServer

DIM = 16
POOL = "seg_pool"


def block(rows: int, *, dim: int = DIM, seed: int = 0) -> Block:
    """Random features; one row has none, for a reason in words."""
    ones = np.ones(rows, np.float32)
    reasons = ["the moon was full" if row == 5 else None for row in range(rows)]
    features = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return Block(features, ones, ones, ones, ones.astype(np.int32), reasons)


def create(store: FeatureStore, name: str, rows: int, *, dim: int = DIM) -> None:
    store.create(name, rows=rows, dim=dim, dtype="int8", attributes={"kind": "sgd"})


def fill(store: FeatureStore, name: str, rows: int, *, dim: int = DIM, seed: int = 0) -> None:
    create(store, name, rows, dim=dim)
    for start in range(0, rows, 1024):
        part = block(min(1024, rows - start), dim=dim, seed=seed + start)
        store.publish(name, start=start, attempt=1, digest=store.write(name, start=start, attempt=1, block=part))


def remote(folder: Path, *, cache_bytes: int = 1 << 30) -> BucketFeatureStore:
    """A machine's view of the bucket."""
    reached = Bucket(URL)
    cache = ChunkCache(reached, folder / "cache", bytes=cache_bytes)
    return BucketFeatureStore(folder / "features", bucket=reached, cache=cache)


def objects() -> S3Store:
    return from_url(URL, client_options={"allow_http": True})


def keys(prefix: str = "") -> dict[str, bytes]:
    """All that lies in the bucket."""
    found = [item["path"] for page in obstore.list(objects(), prefix=prefix) for item in page]
    return {key: bytes(obstore.get(objects(), key).bytes()) for key in found}


@pytest.fixture
def local(tmp_path: Path) -> FeatureStore:
    """A store on the disk."""
    store = FeatureStore(tmp_path / "local")
    fill(store, POOL, 2500)
    fill(store, "seg_task", 9, seed=1)
    return store


@pytest.fixture
def writer(tmp_path: Path, bucket: BucketServer) -> BucketFeatureStore:
    """The same in the bucket, written by a machine of its own."""
    store = remote(tmp_path / "writer")
    fill(store, POOL, 2500)
    fill(store, "seg_task", 9, seed=1)
    bucket.requests.seen.clear()
    return store


def scores_of(store: FeatureStore, cache: Path) -> tuple[np.ndarray, Rows]:
    pool, task = store.view([POOL]), store.view(["seg_task"])
    target = Target([task], ["a"] * 4 + ["b"] * 5)
    (found,) = score([pool], [target], weights=[1.0], aggregate="less", cache=ScoreCache(cache))
    return found.score, pool


def test_the_bytes_in_a_bucket_are_those_of_the_disk(local: FeatureStore, writer: BucketFeatureStore) -> None:
    found = {key.removeprefix("features/"): content for key, content in keys("features/").items()}
    assert len(found.pop(f"{POOL}/born")) == len(found.pop("seg_task/born")) == 16
    on_disk = {str(path.relative_to(local.root)): path for path in local.root.rglob("*") if path.is_file()}
    assert found == {name: path.read_bytes() for name, path in on_disk.items()}
    assert keys("attempts/") == {}
    assert not list(writer.root.rglob("*.json")), "nothing stays where it was written"


def test_scores_from_a_bucket_are_those_of_the_disk_bit_for_bit_and_the_second_time_from_the_cache(
    local: FeatureStore, writer: BucketFeatureStore, bucket: BucketServer, tmp_path: Path
) -> None:
    wanted, of_disk = scores_of(local, tmp_path / "scores-local")
    found, view = scores_of(remote(tmp_path), tmp_path / "scores-remote")
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    assert len(bucket.requests.seen) > 20
    assert view.reasons == of_disk.reasons
    assert view.reasons[5] == "the moon was full"
    for name in ("norms", "scales", "lengths", "tokens", "reason"):
        np.testing.assert_array_equal(view.column(name), of_disk.column(name))
    np.testing.assert_array_equal(view.stored(1000, 1100), of_disk.stored(1000, 1100))
    some = np.array([3, 1023, 1024, 2499])
    np.testing.assert_array_equal(view.stored_rows(some), of_disk.stored_rows(some))
    bucket.requests.seen.clear()
    again, _ = scores_of(remote(tmp_path), tmp_path / "scores-again")
    np.testing.assert_array_equal(again, wanted)
    assert len(bucket.requests.seen) == 2, "whether the two segments are still those"
    assert all("/born " in line for line in bucket.requests.seen)


def test_log_odds_go_through_a_bucket_with_the_features_that_they_are_of(bucket: BucketServer, tmp_path: Path) -> None:
    writer, logodds = remote(tmp_path / "writer"), np.linspace(-9, 9, 1500).astype(np.float32)
    writer.create("seg_odds", rows=1500, dim=DIM, dtype="int8", attributes={"kind": "logodds"})
    whole = replace(block(1500), logodds=logodds, reasons=[None] * 1500)
    digest = writer.write("seg_odds", start=0, attempt=1, block=whole)
    writer.publish("seg_odds", start=0, attempt=1, digest=digest)
    reader = remote(tmp_path / "reader")
    np.testing.assert_array_equal(reader.view(["seg_odds"]).part("logodds", 0, 1500), logodds)
    assert not list(reader.faults("seg_odds", [(0, 1500)], deep=False))
    obstore.delete(objects(), "features/seg_odds/data.zarr/logodds/c.1")
    ((start, stop, fault),) = reader.faults("seg_odds", [(0, 1500)], deep=False)
    assert (start, stop) == (0, 1500)
    assert "logodds/c.1 is missing" in fault


def test_the_cache_never_exceeds_its_bound(writer: BucketFeatureStore, local: FeatureStore, tmp_path: Path) -> None:
    def size_of(cache: Path) -> int:
        return sum(path.stat().st_size for path in cache.iterdir())

    wanted = local.open(POOL).stored(0, 2500)
    bound = 1024 * DIM + 4 + 9000  # one chunk of features and some metadata
    store = remote(tmp_path, cache_bytes=bound)
    for start in (0, 1100, 2100, 0):
        segment = store.open(POOL)
        np.testing.assert_array_equal(segment.stored(start, start + 300, check=True), wanted[start : start + 300])
        assert 0 < size_of(tmp_path / "cache") <= bound
    kept = store.open(POOL).stored(0, 1024)
    store.open(POOL).stored(1024, 2048)  # and what was mapped before stays readable
    np.testing.assert_array_equal(kept, wanted[:1024])
    none = remote(tmp_path / "other", cache_bytes=0)
    np.testing.assert_array_equal(none.open(POOL).stored(0, 2500, check=True), wanted)
    assert not (tmp_path / "other" / "cache").exists()


def test_a_chunk_is_fetched_by_ranges(bucket: BucketServer, tmp_path: Path) -> None:
    store, dim = remote(tmp_path / "writer"), 20_000  # 20 MB a chunk
    fill(store, POOL, 1024, dim=dim)
    on_disk = FeatureStore(tmp_path / "local")
    fill(on_disk, POOL, 1024, dim=dim)
    bucket.requests.seen.clear()
    found = remote(tmp_path).open(POOL).stored(0, 1024, check=True)
    np.testing.assert_array_equal(found, on_disk.open(POOL).stored(0, 1024))
    chunk = [text for text in bucket.requests.seen if "features/c.0.0" in text and "GET" in text]
    assert len(chunk) == -(-(1024 * dim + 4) // RANGE_BYTES) == 3


def test_cut_damaged_and_missing_objects_are_told_and_not_kept(
    writer: BucketFeatureStore, local: FeatureStore, tmp_path: Path
) -> None:
    key = f"features/{POOL}/data.zarr/features/c.1.0"
    content = keys(key.rpartition("/")[0])[key]
    wrong = bytearray(content)
    wrong[100] ^= 1
    for bad, words in ((content[:-7], "bytes instead of"), (bytes(wrong), "does not match its checksum")):
        obstore.put(objects(), key, bad)
        with pytest.raises(Damaged, match=words):
            remote(tmp_path).open(POOL).stored(1024, 1030)
    obstore.put(objects(), key, content)
    wanted = local.open(POOL).stored(1024, 1030)
    np.testing.assert_array_equal(remote(tmp_path).open(POOL).stored(1024, 1030), wanted)
    (kept,) = (tmp_path / "cache").glob("*features__c.1.0.*")
    kept.write_bytes(bytes(wrong))  # a disk that forgets costs another fetch
    np.testing.assert_array_equal(remote(tmp_path).open(POOL).stored(1024, 1030, check=True), wanted)
    obstore.delete(objects(), f"features/{POOL}/data.zarr/features/c.0.0")
    with pytest.raises(Damaged, match="is missing"):
        remote(tmp_path).open(POOL).stored(0, 10)


def test_of_two_attempts_at_the_same_rows_one_is_published_and_the_late_one_changes_nothing(
    bucket: BucketServer, tmp_path: Path
) -> None:
    one, two = remote(tmp_path / "one"), remote(tmp_path / "two")
    create(one, POOL, 1024)
    create(two, POOL, 1024)
    first = one.write(POOL, start=0, attempt=1, block=block(1024, seed=1))
    second = two.write(POOL, start=0, attempt=2, block=block(1024, seed=2))
    assert {(left.start, left.attempt) for left in one.attempts()} == {(0, 1), (0, 2)}
    with pytest.raises(Damaged, match="is missing"):
        remote(tmp_path / "reader").open(POOL).stored(0, 10)
    two.publish(POOL, start=0, attempt=2, digest=second)
    published = keys("features/")
    for _ in range(2):
        with pytest.raises(Conflict, match="another attempt"):
            one.publish(POOL, start=0, attempt=1, digest=first)
    one.discard(POOL, start=0, attempt=1)
    one.publish(POOL, start=0, attempt=2, digest=second)  # anybody may repeat it
    assert keys() == published
    assert one.attempts() == []


def test_many_that_publish_two_attempts_at_once_leave_the_bytes_of_one(bucket: BucketServer, tmp_path: Path) -> None:
    stores = [remote(tmp_path / str(number)) for number in range(2)]
    create(stores[0], POOL, 1024)
    digests = [
        store.write(POOL, start=0, attempt=number, block=block(1024, seed=number))
        for number, store in enumerate(stores)
    ]
    alone = []
    for number in range(2):
        own = FeatureStore(tmp_path / f"alone-{number}")
        create(own, POOL, 1024)
        own.publish(
            POOL, start=0, attempt=number,
            digest=own.write(POOL, start=0, attempt=number, block=block(1024, seed=number)),
        )  # fmt: skip
        alone.append(own.open(POOL).stored(0, 1024).tobytes())

    def publish(turn: int) -> bool:
        number = turn % 2
        try:
            stores[number].publish(POOL, start=0, attempt=number, digest=digests[number])
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(publish, range(8)))
    winners = {turn % 2 for turn, found in enumerate(won) if found}
    assert len(winners) == 1
    found = remote(tmp_path / "reader").open(POOL).stored(0, 1024, check=True)
    assert found.tobytes() == alone[winners.pop()]


def test_a_publication_that_was_cut_is_finished_by_another_machine(bucket: BucketServer, tmp_path: Path) -> None:
    one, two = remote(tmp_path / "one"), remote(tmp_path / "two")
    create(one, POOL, 1024)
    digest = one.write(POOL, start=0, attempt=1, block=block(1024))
    source = f"attempts/{POOL}/0-1"
    obstore.copy(objects(), f"{source}/manifest.json", f"features/{POOL}/receipts/0.json")
    obstore.copy(objects(), f"{source}/features.c.0.0", f"features/{POOL}/data.zarr/features/c.0.0")
    with pytest.raises(Conflict, match="publish it again"):
        two.discard(POOL, start=0, attempt=1)
    two.publish(POOL, start=0, attempt=1, digest=digest)
    assert keys("attempts/") == {}
    assert two.open(POOL).stored(0, 1024, check=True).shape == (1024, DIM)


def test_rows_whose_bytes_are_lost_are_given_up_and_another_attempt_takes_them(
    bucket: BucketServer, tmp_path: Path
) -> None:
    store = remote(tmp_path)
    create(store, POOL, 1024)
    digest = store.write(POOL, start=0, attempt=1, block=block(1024))
    source = f"attempts/{POOL}/0-1"
    obstore.copy(objects(), f"{source}/manifest.json", f"features/{POOL}/receipts/0.json")
    obstore.delete(objects(), f"{source}/features.c.0.0")
    with pytest.raises(Damaged, match="is lost"):
        store.publish(POOL, start=0, attempt=1, digest=digest)
    store.give_up(POOL, start=0, attempt=1)
    with pytest.raises(Conflict):
        store.publish(POOL, start=0, attempt=1, digest=digest)
    second = store.write(POOL, start=0, attempt=2, block=block(1024, seed=2))
    store.publish(POOL, start=0, attempt=2, digest=second)
    assert store.open(POOL).stored(0, 1024, check=True).shape == (1024, DIM)


def test_a_segment_made_again_after_its_deletion_is_not_read_from_an_old_cache(
    writer: BucketFeatureStore, tmp_path: Path
) -> None:
    reader = remote(tmp_path / "reader")
    before = reader.open(POOL).stored(0, 2500).copy()
    writer.delete(POOL)
    with pytest.raises(NotFound):
        reader.open(POOL)
    with pytest.raises(NotFound):
        reader.write(POOL, start=0, attempt=9, block=block(1024))
    assert writer.names() == ["seg_task"]
    fill(writer, POOL, 2500, seed=77)
    after = reader.open(POOL).stored(0, 2500, check=True)
    assert (after != before).any()
    np.testing.assert_array_equal(after, writer.open(POOL).stored(0, 2500))


def test_a_name_with_another_shape_is_refused(writer: BucketFeatureStore) -> None:
    with pytest.raises(Conflict, match="another shape"):
        create(writer, POOL, 99)
    create(writer, POOL, 2500)  # again


def test_a_bucket_that_does_not_answer_is_named_and_one_that_is_not_there(
    bucket: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BucketRefused, match="no such bucket"):
        Bucket("s3://another").put("key", b"")
    with pytest.raises(BucketRefused, match="no such bucket"):
        Bucket("s3://another").reach()
    monkeypatch.setattr(buckets, "_RETRIES", 1)
    Bucket(URL).reach()
    bucket.stop()
    try:
        with pytest.raises(BucketUnreachable, match="cannot be reached"):
            Bucket(URL).reach()
        with pytest.raises(BucketUnreachable, match="GRADSTORE_STORE"):
            remote(tmp_path).open(POOL)
    finally:
        bucket.start()
    Bucket(URL).reach()
