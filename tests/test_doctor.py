"""The doctor: what is wrong with a store is found, said, and mended; a sound store is left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import AnyJob, GradientsRequest
from sqlalchemy import delete, select, update

from datastore.doctor import examine
from datastore.errors import InUse
from datastore.findings import Finding, mended
from datastore.leftovers import OLD
from datastore.schema import ChunkRow, DatasetRow, JobRow, SegmentRow, ShardRow, UseRow
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered

ROWS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Iterator[Workplace]:
    """A store with a dataset, a task, a checkpoint and the features of both."""
    place = Workplace.at(tmp_path, model=model)
    place.checkpoint()
    place.pool(numbered(range(ROWS)), name="pool")
    place.task()
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        place.done(request(place, **owner))
    yield place
    place.context.catalog.close()


def request(place: Workplace, **owner: str) -> GradientsRequest:
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    return GradientsRequest(checkpoints=[checkpoint], dims=[16], dtype="float32", kinds=["sgd"], **owner)


def found(place: Workplace, *, deep: bool = True, older_than: float = OLD) -> list[Finding]:
    return list(examine(place.context, older_than=older_than, deep=deep))


def segment_of(place: Workplace) -> str:
    """The segment of the pool's features."""
    with place.context.catalog.reading() as session:
        return session.scalars(select(SegmentRow.id).where(SegmentRow.rows == ROWS)).one()


def chunk(place: Workplace, name: str = "features/c.0.0") -> Path:
    return place.context.settings.features / segment_of(place) / "data.zarr" / name


def features_job(place: Workplace) -> AnyJob:
    return next(job for job in place.context.jobs.page(kind="gradients", limit=9).data if job.request.dataset)


def result(job: AnyJob) -> dict[str, Any]:
    """A job's result without the time that it took."""
    assert job.result is not None
    return {name: value for name, value in job.result.model_dump().items() if name != "seconds"}


def feature_set(job: AnyJob) -> str:
    found: str = result(job)["feature_sets"][0]["id"]
    return found


def flip(path: Path) -> None:
    """Turn over one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def age(path: Path) -> None:
    """Make a file or folder look as if nobody had touched it for a day."""
    then = time.time() - 86400
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


def test_a_sound_store_has_nothing_to_find(place: Workplace) -> None:
    assert found(place, older_than=0) == []


def test_an_adapter_may_need_its_checkpoint(place: Workplace) -> None:
    adapter, _ = place.context.adapters.add(place.context.catalog.checkpoints(limit=1).data[0].id)
    assert found(place) == []
    with place.context.catalog.transaction() as session:
        session.add(UseRow(user=features_job(place).id, used=adapter.id))
    assert found(place) == []
    with pytest.raises(InUse, match=features_job(place).id):
        place.context.adapters.remove(adapter.id)


@pytest.mark.parametrize(
    ("harm", "name", "said", "deep"),
    [
        (flip, "features/c.0.0", "does not match its checksum", True),
        (cut, "features/c.0.0", "bytes instead of", False),
        (Path.unlink, "features/c.0.0", "is missing", False),
        (flip, "losses/c.0", "does not match its checksum", False),
        (cut, "features/zarr.json", "cannot be read", False),
        (lambda path: shutil.rmtree(path.parent.parent.parent), "features/c.0.0", "the segment is missing", False),
    ],
    ids=["bit-flipped", "truncated", "deleted", "column", "metadata", "folder"],
)
def test_a_damaged_chunk_is_found_and_computed_again_as_it_was(
    place: Workplace, harm: Callable[[Path], None], name: str, said: str, deep: bool
) -> None:
    job = features_job(place)
    before = place.stored(feature_set(job))
    sound = {path: path.read_bytes() for path in sorted(chunk(place).parent.parent.rglob("c.*"))}
    path = chunk(place, name)
    harm(path)
    (finding,) = found(place, deep=deep)
    assert finding.kind == "damaged"
    assert said in finding.detail
    after = mended(finding)
    assert after.mended
    assert job.id in (after.repair or "")
    assert place.job(job.id).status == "queued"
    place.work()
    assert place.job(job.id).status == "succeeded"
    assert {path: path.read_bytes() for path in sorted(chunk(place).parent.parent.rglob("c.*"))} == sound
    np.testing.assert_array_equal(place.stored(feature_set(job)), before)
    assert result(place.job(job.id)) == result(job)
    assert found(place, older_than=0) == []


def test_a_flipped_bit_is_seen_only_by_who_reads_the_bytes(place: Workplace) -> None:
    flip(chunk(place))
    assert found(place, deep=False) == []
    assert [finding.kind for finding in found(place)] == ["damaged"]


def test_rows_whose_job_was_deleted_are_computed_by_one_that_answers_with_them(place: Workplace) -> None:
    first = features_job(place)
    again = place.start(request(place, dataset="pool").model_copy(update={"kinds": ["sgd", "sign"]}))
    place.work()
    place.context.features.remove(first.id)
    before = place.stored(feature_set(first))
    flip(chunk_of(place, feature_set(first)))
    (finding,) = found(place)
    assert again.id in (mended(finding).repair or "")
    place.work()
    assert place.job(again.id).status == "succeeded"
    np.testing.assert_array_equal(place.stored(feature_set(first)), before)
    assert found(place) == []


def chunk_of(place: Workplace, feature_set: str) -> Path:
    (segment,) = place.context.features.segments(feature_set)
    return place.context.settings.features / segment / "data.zarr/features/c.0.0"


def test_what_killed_processes_left_is_removed_once_it_is_old(place: Workplace) -> None:
    data = place.context.settings.data
    left = [data / "features" / segment_of(place) / "attempts/0-77"]
    left += [data / name for name in ("features/seg_unknown/data.zarr", "features/unfinished/seg_1.0-1.x")]
    left += [data / name for name in ("checkpoints/ck_unknown", "datasets/ds_unknown", "work/ft_gone")]
    left += [data / name for name in ("incoming/form-1", "scores/unfinished/score_1")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(b"1234")
    assert found(place) == []
    for folder in left:
        age(folder.parent if folder.name == "data.zarr" else folder)
    findings = [mended(finding) for finding in found(place)]
    assert len(findings) == len(left)
    assert {finding.kind for finding in findings} == {"leftover", "orphan"}
    assert all(finding.mended and finding.bytes == 4 for finding in findings), findings
    assert not any(folder.exists() for folder in left)
    assert found(place, older_than=0) == []


def test_bytes_that_the_catalog_does_not_know_make_room_for_those_it_will(place: Workplace) -> None:
    job, segment = features_job(place), segment_of(place)
    with place.context.catalog.transaction() as session:  # a catalog that is older than the store
        session.execute(delete(ChunkRow).where(ChunkRow.segment_id == segment))
        session.execute(update(SegmentRow).where(SegmentRow.id == segment).values(complete=False))
        shard = ShardRow.job_id == job.id
        session.execute(update(ShardRow).where(shard).values(status="queued", done=0))
        session.execute(update(JobRow).where(JobRow.id == job.id).values(status="queued", result=None, done=0))
    (finding,) = found(place)
    assert (finding.kind, finding.place) == ("unregistered", f"features/{segment}/receipts/0.json")
    assert mended(finding).mended
    assert not chunk(place).exists()
    place.work()
    assert place.job(job.id).status == "succeeded"
    assert found(place) == []


def test_a_committed_chunk_that_nobody_published_is_published_or_computed_again(place: Workplace) -> None:
    for lost in (False, True):
        rows = numbered(range(100 * (1 + lost), 100 * (1 + lost) + ROWS // 2))
        job = place.start(request(place, dataset=place.pool(rows).id))
        claim = place.claim()
        chunks = written(place, claim)
        assert place.context.jobs.succeed(claim, chunks=chunks)  # and its worker is killed here
        attempt = place.context.store.root / chunks[0].segment / f"attempts/0-{claim.token}"
        if lost:
            shutil.rmtree(attempt)
        else:
            assert found(place) == []
            age(attempt)
        (finding,) = found(place)
        assert finding.kind == "unpublished"
        said = mended(finding).repair or ""
        assert said.startswith("taken back" if lost else "published")
        assert place.job(job.id).status == ("running" if lost else "succeeded")
        place.work()
        assert place.job(job.id).status == "succeeded"
    assert found(place) == []


def written(place: Workplace, claim: object) -> list:
    """What a worker writes of a shard before it commits."""
    from worker import chunks as worker_chunks
    from worker.heartbeat import Heartbeat
    from worker.kinds import gradients

    kept: list = []
    original = worker_chunks.commit
    try:
        worker_chunks.commit = lambda _claim, _context, chunks: bool(kept.extend(chunks)) or True
        with Heartbeat(place.context.jobs, claim, leaving=place.context.leaving) as heartbeat:
            gradients.work(claim, place.context, heartbeat)()
    finally:
        worker_chunks.commit = original
    return kept


def test_a_shard_of_a_worker_that_is_gone_is_put_back_where_no_worker_runs(place: Workplace) -> None:
    job = place.start(request(place, dataset=place.pool(numbered(range(50, 56))).id))
    place.claim()
    assert found(place) == []
    with place.context.catalog.transaction() as session:
        session.execute(update(ShardRow).where(ShardRow.job_id == job.id).values(leased_until=time.time() - 2 * OLD))
    (finding,) = found(place)
    assert finding.kind == "lease"
    assert mended(finding).mended
    assert place.work() == ["succeeded"]
    assert found(place) == []


def test_a_dataset_whose_rows_have_changed_is_stored_anew_from_its_upload(place: Workplace) -> None:
    id = place.context.catalog.dataset("pool").id
    lines = place.context.datasets.content(id)
    before = lines.read_bytes()
    lines.write_bytes(before.replace(b"Add 3", b"Add 4", 1))
    assert found(place, deep=False) == []
    (finding,) = found(place)
    assert "content hash" in finding.detail
    assert mended(finding).repair == "stored anew from its upload"
    assert place.context.datasets.content(id).read_bytes() == before
    assert found(place) == []


def test_a_damaged_task_makes_room_for_its_next_upload(place: Workplace) -> None:
    task = place.context.catalog.task("target").id
    path = place.context.settings.tasks / task / "test.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    (finding,) = found(place)
    assert (finding.kind, finding.place) == ("damaged", f"tasks/{task}")
    after = mended(finding)
    assert not after.mended
    assert [each.kind for each in found(place)] == ["missing"]
    stored = place.context.tasks.store("jsonl", place.folder / "task-target")
    assert stored.id == task
    assert found(place) == []


def test_a_checkpoint_whose_tensors_have_changed_is_found_by_its_hash(place: Workplace) -> None:
    checkpoint = place.context.catalog.checkpoints(limit=1).data[0].id
    flip(place.context.settings.checkpoints / checkpoint / "adapter/adapter_model.safetensors")
    assert found(place, deep=False) == []
    (finding,) = found(place)
    assert "adapter_model.safetensors does not match its content hash" in finding.detail


def test_records_that_name_what_is_gone_are_found(place: Workplace) -> None:
    pool = place.context.catalog.dataset("pool").id
    with place.context.catalog.transaction() as session:
        session.add(UseRow(user="grad_gone", used=pool))
        session.execute(update(DatasetRow).where(DatasetRow.id == pool).values(prefix="ds_gone"))
    findings = [mended(finding) for finding in found(place)]
    assert [finding.kind for finding in findings] == ["dangling", "dangling"]
    assert all(finding.mended for finding in findings)
    assert found(place) == []


def test_the_command_prints_a_line_of_json_each_and_says_by_its_status_how_it_stands(place: Workplace) -> None:
    data = place.context.settings.data
    assert doctor(data) == (0, [], "the store and its catalog agree\n")
    flip(chunk(place))
    status, lines, said = doctor(data, "--deep")
    assert (status, said) == (3, "1 found, 0 mended\n")
    assert [line["kind"] for line in lines] == ["damaged"]
    status, lines, said = doctor(data, "--deep", "--repair")
    assert (status, said) == (0, "1 found, 1 mended\n")
    assert lines[0]["repair"].startswith("taken back: grad_")
    assert doctor(data.with_name("nowhere"))[0] == 1


def doctor(data: Path, *options: str) -> tuple[int, list[dict[str, object]], str]:
    command = [str(Path(sys.executable).with_name("gradstore")), "doctor", "--data", str(data), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr
