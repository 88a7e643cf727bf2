"""Features in a bucket: a real S3 API on a loopback port gives what the disk gives, through a bounded cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import from_url

from datastore.chunk_files import RANGE_BYTES, Bucket
from datastore.errors import BucketUnreachable, Damaged, NotFound
from datastore.gradients import Block, FeatureStore
from datastore.scores import ScoreCache, Target, score
from datastore.segments import Rows

URL = "s3://features/some/prefix"
DIM = 16
POOL = "seg_pool"


class Requests(logging.Handler):
    """Counts what the server was asked for."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "/some/prefix/" in text:
            self.seen.append(text)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def requests(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    """An empty bucket, and what is asked of it from now on."""
    for name, value in (
        ("ENDPOINT_URL", server), ("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    import httpx

    httpx.post(f"{server}/moto-api/reset").raise_for_status()
    httpx.put(f"{server}/features").raise_for_status()
    log, handler = logging.getLogger("werkzeug"), Requests()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)


def fill(store: FeatureStore, name: str, rows: int, *, dim: int = DIM, seed: int = 0) -> None:
    """A segment with a row that has no feature, for a reason in words."""
    store.create(name, rows=rows, dim=dim, dtype="int8", attributes={"kind": "sgd"})
    rng = np.random.default_rng(seed)
    for start in range(0, rows, 1024):
        count = min(1024, rows - start)
        ones = np.ones(count, np.float32)
        reasons = ["the moon was full" if row == 5 else None for row in range(count)]
        features = rng.standard_normal((count, dim)).astype(np.float32)
        block = Block(features, ones, ones, ones, ones.astype(np.int32), reasons)
        store.publish(name, start=start, attempt=1, digest=store.write(name, start=start, attempt=1, block=block))


def upload(store: FeatureStore) -> None:
    """Copy the store's files up, as `aws s3 sync` does."""
    objects = from_url(URL, client_options={"allow_http": True})
    for path in store.root.rglob("*"):
        if path.is_file():
            obstore.put(objects, str(path.relative_to(store.root)), path.read_bytes())


def replace(key: str, content: bytes) -> None:
    obstore.put(from_url(URL, client_options={"allow_http": True}), key, content)


def remote(folder: Path, *, cache_bytes: int = 1 << 30) -> FeatureStore:
    """A store without files of its own."""
    return FeatureStore(folder / "empty", bucket=Bucket(URL, cache=folder / "cache", cache_bytes=cache_bytes))


@pytest.fixture
def local(tmp_path: Path, requests: Requests) -> FeatureStore:
    store = FeatureStore(tmp_path / "features")
    fill(store, POOL, 2500)
    fill(store, "seg_task", 9, seed=1)
    upload(store)
    return store


def scores_of(store: FeatureStore, cache: Path) -> tuple[np.ndarray, Rows]:
    pool, task = store.view([POOL]), store.view(["seg_task"])
    target = Target([task], ["a"] * 4 + ["b"] * 5)
    (found,) = score([pool], [target], weights=[1.0], aggregate="less", cache=ScoreCache(cache))
    return found.score, pool


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir())


def test_scores_from_a_bucket_are_those_of_the_disk_bit_for_bit_and_the_second_time_from_the_cache(
    local: FeatureStore, requests: Requests, tmp_path: Path
) -> None:
    wanted, of_disk = scores_of(local, tmp_path / "scores-local")
    requests.seen.clear()
    found, view = scores_of(remote(tmp_path), tmp_path / "scores-remote")
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    assert len(requests.seen) > 20
    assert view.reasons == of_disk.reasons
    assert view.reasons[5] == "the moon was full"
    for name in ("norms", "scales", "lengths", "tokens", "reason"):
        np.testing.assert_array_equal(view.column(name), of_disk.column(name))
    np.testing.assert_array_equal(view.stored(1000, 1100), of_disk.stored(1000, 1100))
    some = np.array([3, 1023, 1024, 2499])
    np.testing.assert_array_equal(view.stored_rows(some), of_disk.stored_rows(some))
    requests.seen.clear()
    again, _ = scores_of(remote(tmp_path), tmp_path / "scores-again")
    np.testing.assert_array_equal(again, wanted)
    assert requests.seen == []


def test_a_segment_on_the_disk_is_read_there_and_an_unknown_one_is_not_found(
    local: FeatureStore, requests: Requests, tmp_path: Path
) -> None:
    both = FeatureStore(local.root, bucket=Bucket(URL, cache=tmp_path / "cache", cache_bytes=1 << 30))
    requests.seen.clear()
    scores_of(both, tmp_path / "scores")
    assert requests.seen == []
    with pytest.raises(NotFound):
        both.open("seg_nothing")


def test_the_cache_never_exceeds_its_bound(local: FeatureStore, tmp_path: Path) -> None:
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


def test_a_chunk_is_fetched_by_ranges(requests: Requests, tmp_path: Path) -> None:
    store, dim = FeatureStore(tmp_path / "features"), 20_000  # 20 MB a chunk
    fill(store, POOL, 1024, dim=dim)
    upload(store)
    requests.seen.clear()
    found = remote(tmp_path).open(POOL).stored(0, 1024, check=True)
    np.testing.assert_array_equal(found, store.open(POOL).stored(0, 1024))
    chunk = [text for text in requests.seen if "features/c.0.0" in text and "GET" in text]
    assert len(chunk) == -(-(1024 * dim + 4) // RANGE_BYTES) == 3


def test_cut_damaged_and_missing_objects_are_told_and_not_kept(local: FeatureStore, tmp_path: Path) -> None:
    key = f"{POOL}/data.zarr/features/c.1.0"
    content = (local.root / key).read_bytes()
    wrong = bytearray(content)
    wrong[100] ^= 1
    for bad, words in ((content[:-7], "bytes instead of"), (bytes(wrong), "does not match its checksum")):
        replace(key, bad)
        with pytest.raises(Damaged, match=words):
            remote(tmp_path).open(POOL).stored(1024, 1030)
    replace(key, content)
    np.testing.assert_array_equal(remote(tmp_path).open(POOL).stored(1024, 1030), local.open(POOL).stored(1024, 1030))
    (kept,) = (tmp_path / "cache").glob("*features__c.1.0")
    kept.write_bytes(bytes(wrong))  # a disk that forgets costs another fetch
    found = remote(tmp_path).open(POOL).stored(1024, 1030, check=True)
    np.testing.assert_array_equal(found, local.open(POOL).stored(1024, 1030))
    obstore.delete(from_url(URL, client_options={"allow_http": True}), f"{POOL}/data.zarr/features/c.0.0")
    with pytest.raises(Damaged, match="is missing"):
        remote(tmp_path).open(POOL).stored(0, 10)


def test_a_bucket_that_does_not_answer_is_named(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nothing listens there
    monkeypatch.setattr("datastore.chunk_files._RETRIES", 1)
    with pytest.raises(BucketUnreachable, match="GRADSTORE_FEATURES_URL"):
        remote(tmp_path).open(POOL)
