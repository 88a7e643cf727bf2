"""Things in a bucket: published before they have a place, fetched by whoever lacks them, evicted and deleted."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
import pytest
from gradstore.types import TrainingRecipe
from obstore.store import S3Store, from_url

from datastore.bucket import Bucket
from datastore.datasets import Datasets, Ingested
from datastore.depot import BucketDepot, Cache, Depot
from datastore.errors import Damaged, NotFound
from datastore.influence import TaskScores
from datastore.matrices import Matrices, Matrix
from datastore.projector_files import ProjectorFiles
from datastore.questions import QuestionFeature, Questions
from datastore.scores import ScoreCache
from datastore.tasks import Tasks
from datastore.trainings import Measured, Training, Trainings
from tests.buckets import URL, BucketServer

ROWS = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
OLD = 3600.0  # seconds


def depot(root: Path, *patterns: str, cache_bytes: int = 1 << 30) -> Depot:
    """What a machine has over a folder."""
    cache = Cache(bytes=cache_bytes)
    for pattern in patterns:
        cache.watch(root, pattern)
    return BucketDepot(Bucket(URL), root, cache=cache)


def objects() -> S3Store:
    return from_url(URL, client_options={"allow_http": True})


def keys() -> list[str]:
    return [str(item["path"]) for page in obstore.list(objects()) for item in page]


def folder(path: Path, content: bytes = b"content") -> Path:
    """A finished folder."""
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_bytes(content)
    (path / "empty").write_bytes(b"")
    return path


def datasets(home: Path) -> Datasets:
    """A machine's datasets."""
    return Datasets(home / "datasets", depot=depot(home / "datasets", "ds_*", "sources/*"))


def ingest(store: Datasets, content: bytes = ROWS, filename: str = "rows.jsonl") -> Ingested:
    return store.ingest(io.BytesIO(content), filename=filename)


@pytest.fixture(autouse=True)
def _in_a_bucket(bucket: BucketServer) -> None:
    """Every test has a bucket."""


def test_a_folder_is_whole_on_another_machine_and_its_second_publication_changes_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "things", tmp_path / "two" / "things"
    assert depot(one).keep(folder(one / "partial"), one / "x")
    before = keys()
    assert not depot(two).publish(folder(two / "other", b"other"), two / "x")
    assert keys() == before
    assert depot(two).ensure(two / "x")
    assert (two / "x" / "inner" / "file").read_bytes() == b"content"
    assert (two / "x" / "empty").read_bytes() == b""
    assert not depot(two).ensure(two / "y")
    assert depot(two).files(two / "x") == ["empty", "inner/file"]
    assert depot(two).names(two, "x*") == ["x"]
    assert depot(two).names(two, "x*", older_than=OLD) == depot(two).names(two, "y*") == []


def test_of_many_publishers_at_once_the_first_index_counts_and_the_others_leave_nothing(tmp_path: Path) -> None:
    def publish(number: int) -> bool:
        root = tmp_path / str(number) / "things"
        return depot(root).publish(folder(root / "partial", str(number).encode()), root / "x")

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(publish, range(8)))
    assert won.count(True) == 1
    assert len(keys()) == 3, "the index and two files"
    root = tmp_path / "reader" / "things"
    assert depot(root).ensure(root / "x")
    assert (root / "x" / "inner" / "file").read_bytes() == str(won.index(True)).encode()


def test_what_is_damaged_or_lost_in_the_bucket_gets_no_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "things", tmp_path / "two" / "things"
    depot(one).publish(folder(one / "partial"), one / "x")
    (key,) = (key for key in keys() if key.endswith("/inner/file"))
    obstore.put(objects(), key, b"kontent")
    with pytest.raises(Damaged, match="does not match its checksum"):
        depot(two).ensure(two / "x")
    obstore.delete(objects(), key)
    with pytest.raises(Damaged, match="is missing"):
        depot(two).ensure(two / "x")
    assert not (two / "x").exists()


def test_a_deleted_thing_is_gone_with_all_its_objects_and_may_come_again(tmp_path: Path) -> None:
    root = tmp_path / "things"
    place = depot(root)
    place.keep(folder(root / "partial"), root / "x", of=["seg_1", "seg_2"])
    assert place.users(root, "x*", "seg_1") == ["x"]
    assert place.users(root, "x*", "seg_3") == []
    place.delete(root / "x")
    place.delete(root / "x")
    assert keys() == []
    assert not place.exists(root / "x")
    assert place.keep(folder(root / "again", b"again"), root / "x"), "though the old one lies in its place"
    assert (root / "x" / "inner" / "file").read_bytes() == b"again"


def test_what_was_used_longest_ago_is_evicted_and_fetched_again(tmp_path: Path) -> None:
    root = tmp_path / "things"
    place = depot(root, "x*", cache_bytes=2500)
    for name in ("x1", "x2"):
        place.keep(folder(root / f"partial-{name}", b"." * 1000), root / name)
    for name, age in (("x1", OLD), ("x2", 2 * OLD)):
        os.utime(root / name, (time.time() - age,) * 2)
    place.ensure(root / "x2")  # now used later than the other
    for number in (3, 4):
        place.keep(folder(root / f"partial-{number}", b"." * 1000), root / f"x{number}")
    assert sorted(path.name for path in root.glob("x*")) == ["x2", "x3", "x4"], "what was used just now stays"
    assert place.ensure(root / "x1")
    assert (root / "x1" / "inner" / "file").read_bytes() == b"." * 1000


def test_what_a_killed_publisher_left_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "things"
    place = depot(root)
    place.publish(folder(root / "partial"), root / "x", of=["seg_1"])
    sound = keys()
    obstore.put(objects(), f"things/x/{'0' * 16}/inner/file", b"left")
    obstore.put(objects(), f"things/y/{'1' * 16}", b"left")
    place.sweep(older_than=OLD)
    assert len(keys()) == len(sound) + 2
    place.sweep(older_than=-1)
    assert keys() == sound


def test_a_dataset_is_read_appended_to_and_deleted_on_another_machine(tmp_path: Path) -> None:
    one, two = datasets(tmp_path / "one"), datasets(tmp_path / "two")
    stored = ingest(one)
    assert list(two.examples(stored.id)) == list(one.examples(stored.id))
    assert two.content(stored.id).read_bytes() == ROWS
    assert two.source(stored.source.sha256).read_bytes() == ROWS
    grown = two.ingest(io.BytesIO(b'{"prompt": "e", "completion": "f"}\n'), filename="more.jsonl", append_to=stored.id)
    assert [example.id for example in one.examples(grown.id)] == [None] * 3
    two.delete(stored.id, keep_sources={stored.source.sha256})
    three = datasets(tmp_path / "three")
    with pytest.raises(NotFound):
        three.content(stored.id)
    assert three.source(stored.source.sha256).read_bytes() == ROWS
    three.delete(grown.id, keep_sources=())
    assert keys() == []


def test_an_upload_of_rows_that_another_machine_stored_is_recorded_with_them(tmp_path: Path) -> None:
    one, two = datasets(tmp_path / "one"), datasets(tmp_path / "two")
    first = ingest(one)
    packed = b"[" + ROWS.strip().replace(b"\n", b",") + b"]"
    second = ingest(two, packed, filename="rows.json")
    assert (second.id, second.created) == (first.id, False)
    wanted = {first.source.sha256, second.source.sha256}
    assert {source.sha256 for source in second.sources} == wanted
    for machine in (one, two, datasets(tmp_path / "three")):
        assert {source.sha256 for source in machine.sources(first.id)} == wanted
    datasets(tmp_path / "four").delete(first.id, keep_sources=())
    assert keys() == []


def test_a_dataset_that_another_machine_deleted_is_stored_again(tmp_path: Path) -> None:
    one, two = datasets(tmp_path / "one"), datasets(tmp_path / "two")
    stored = ingest(one)
    two.delete(stored.id, keep_sources=())
    with pytest.raises(NotFound):
        one.look(stored.id)
    assert ingest(one).created
    assert list(datasets(tmp_path / "three").lines(stored.id, [0, 1])) == ROWS.strip().split(b"\n")


def test_a_task_is_the_same_on_another_machine(tmp_path: Path) -> None:
    def tasks(home: str) -> Tasks:
        return Tasks(tmp_path / home / "tasks", depot=depot(tmp_path / home / "tasks", "task_*"))

    files = tmp_path / "files"
    files.mkdir()
    (files / "validation.jsonl").write_bytes(ROWS)
    stored = tasks("one").store("jsonl", files)
    assert tasks("two").validation(stored.id) == tasks("one").validation(stored.id)
    tasks("two").delete(stored.id)
    with pytest.raises(NotFound):
        tasks("one").look(stored.id)
    assert keys() == []


def test_scores_are_found_elsewhere_and_deleted_with_what_they_were_made_from(tmp_path: Path) -> None:
    def cache(home: str) -> ScoreCache:
        return ScoreCache(tmp_path / home / "scores", depot=depot(tmp_path / home / "scores", "score_*"))

    scores = TaskScores(np.arange(3, dtype=np.float32), np.zeros(3, np.int16), np.ones(3, np.bool_))
    made_from = {"rows": [["seg_1", 0, 3]], "target_segments": ["seg_2"], "texts": ["ds_1"]}
    cache("one").put("score_1", scores, made_from=made_from)
    found = cache("two").get("score_1")
    assert found is not None
    np.testing.assert_array_equal(found.score, scores.score)
    assert cache("three").delete("seg_3") == 0
    assert cache("three").delete("seg_2") == 1
    assert cache("four").get("score_1") is None
    assert keys() == []


def test_matrices_are_found_elsewhere(tmp_path: Path) -> None:
    def matrices(home: str) -> Matrices:
        return Matrices(tmp_path / home / "matrices", depot=depot(tmp_path / home / "matrices", "matrix_*"))

    made = Matrix(np.eye(3, 2, dtype=np.float32), np.array([True, True, False]), {2: "why"}, {"layers": [1]})
    matrices("one").put("matrix_1", made, made_from={})
    found = matrices("two").get("matrix_1")
    assert found.rows.tolist() == made.rows.tolist()
    assert (found.present.tolist(), found.reasons, found.notes) == ([True, True, False], {2: "why"}, {"layers": [1]})
    other = Matrix(np.zeros((3, 2), np.float32), made.present)
    matrices("three").put("matrix_1", other, made_from={})
    assert matrices("three").get("matrix_1").rows.tolist() == made.rows.tolist(), "the first one's is kept"
    assert matrices("four").keys(older_than=-1) == {"matrix_1"}
    matrices("four").delete(["matrix_1"])
    assert keys() == []
    with pytest.raises(Damaged):
        matrices("five").get("matrix_1")


def test_questions_and_trainings_are_found_elsewhere(tmp_path: Path) -> None:
    def questions(home: str) -> Questions:
        return Questions(tmp_path / home / "questions", depot=depot(tmp_path / home / "questions", "question_*"))

    def trainings(home: str) -> Trainings:
        return Trainings(tmp_path / home / "trainings", depot=depot(tmp_path / home / "trainings", "training_*"))

    questions("one").put("question_1", QuestionFeature(np.arange(4, dtype=np.float32), 0.5, 7))
    found = questions("two").get("question_1")
    assert found is not None
    assert (found.feature.tolist(), found.loss, found.tokens) == ([0, 1, 2, 3], 0.5, 7)
    recipe = TrainingRecipe.model_construct()
    training = Training("ds_1", [1, 2], recipe, "task_1", "test")
    measured = Measured([0.5, None], rows=2, tokens=8, seconds=1.0)
    assert trainings("one").put(training, measured) == measured
    later = Measured([0.6, None], rows=2, tokens=8, seconds=2.0)
    assert trainings("two").put(training, later) == measured, "the first one's is kept"
    assert trainings("three").keys(older_than=-1) == {training.key}
    forget: list[Callable[[], None]] = [
        lambda: trainings("three").delete([training.key]),
        lambda: questions("three").delete(["question_1"]),
    ]
    for each in forget:
        each()
    assert keys() == []


def test_a_projector_is_read_on_another_machine_and_the_first_one_stays(tmp_path: Path) -> None:
    one, two = (ProjectorFiles(root, depot=depot(root, "proj_*")) for root in (tmp_path / "one/p", tmp_path / "two/p"))
    one.keep("proj_1", {"capabilities": ["law"]}, lambda path: path.write_bytes(b"first"))
    two.keep("proj_1", {"capabilities": ["poetry"]}, lambda path: path.write_bytes(b"second"))
    assert two.exists("proj_1")
    assert two.weights("proj_1").read_bytes() == one.weights("proj_1").read_bytes() == b"first"
    assert two.manifest("proj_1")["capabilities"] == ["law"]
    two.delete(["proj_1"])
    assert not one.exists("proj_1")
    with pytest.raises(Damaged):
        two.manifest("proj_1")
