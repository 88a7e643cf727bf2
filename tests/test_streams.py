"""Streams: numbers for rows, joined by the rows' ids, whatever order they come in."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import AnnotationRequest, GradientsRequest, StreamRequest, StreamResult
from numpy.typing import NDArray
from safetensors.numpy import save_file

from datastore import backups
from datastore.doctor import examine
from datastore.errors import Conflict, Damaged, InUse, InvalidInput
from datastore.garbage import garbage
from datastore.matrices import Matrix
from datastore.schema import DatasetRow
from tests.workplace import Workplace, numbered

ROWS = 7


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace.at(tmp_path)


def with_ids(count: int) -> list[dict[str, Any]]:
    return [{"id": f"row-{number}", **row} for number, row in enumerate(numbered(range(count)))]


def sent(folder: Path, rows: NDArray[Any], ids: Sequence[str | int] | None) -> Path:
    """A folder as an upload comes."""
    folder.mkdir()
    np.save(folder / "rows.npy", rows)
    if ids is not None:
        (folder / "ids.json").write_text(json.dumps(ids))
    return folder


def result_of(workplace: Workplace, id: str) -> StreamResult:
    job = workplace.job(id)
    assert job.status == "succeeded", job.error
    return StreamResult.model_validate(job.result.model_dump() if job.result else None)


def numbers(count: int = ROWS, dim: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)


def read(workplace: Workplace, stream: str, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a stream as they are sent."""
    found = workplace.context.streams.numbers(stream)
    return np.concatenate([*found.blocks(start, stop), np.empty((0, found.dim), np.float32)])


def test_sent_rows_are_joined_by_id_in_whatever_order_they_come(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(ROWS))
    values = numbers()
    order = np.random.default_rng(1).permutation(ROWS)
    found = []
    for name, chosen in (("straight", np.arange(ROWS)), ("permuted", order)):
        folder = sent(tmp_path / name, values[chosen], [f"row-{row}" for row in chosen])
        job, works = workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)
        assert not works
        rows, present = workplace.context.streams.matrix(job.id)
        assert present.all()
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, values)
        found.append(result_of(workplace, job.id))
    assert found[0] == found[1]
    assert (found[0].dim, found[0].present_rows, found[0].zero_rows, found[0].total_absent) == (3, ROWS, 0, 0)


def test_absent_and_zero_rows_are_counted_and_told(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(ROWS))
    values = numbers()[[4, 1, 6]]
    values[1] = 0
    folder = sent(tmp_path / "files", values, ["row-4", "row-1", "row-6"])
    job, _ = workplace.context.streams.upload(StreamRequest(dataset=pool.id, name="some"), folder)
    rows, present = workplace.context.streams.matrix("some")
    assert np.flatnonzero(present).tolist() == [1, 4, 6]
    np.testing.assert_array_equal(rows[[4, 1, 6]], values)
    assert not rows[~present].any()
    result = result_of(workplace, job.id)
    assert (result.present_rows, result.zero_rows, result.total_absent) == (3, 1, 4)
    assert [(row.row, row.id) for row in result.absent] == [(row, f"row-{row}") for row in (0, 2, 3, 5)]


def test_a_row_of_numbers_goes_to_every_row_that_has_its_id(workplace: Workplace, tmp_path: Path) -> None:
    rows = with_ids(4)
    rows[3]["id"] = "row-0"
    pool = workplace.pool(rows)
    values = numbers(2)
    job, _ = workplace.context.streams.upload(
        StreamRequest(dataset=pool.id), sent(tmp_path / "files", values, ["row-0", "row-1"])
    )
    found, present = workplace.context.streams.matrix(job.id)
    assert present.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(found[[0, 3, 1]], values[[0, 0, 1]])


def test_rows_that_are_not_finite_and_ids_that_are_strange_or_come_twice_are_refused_by_place(
    workplace: Workplace, tmp_path: Path
) -> None:
    pool = workplace.pool(with_ids(ROWS))
    values = numbers(5)
    values[2, 1] = np.nan
    folder = sent(tmp_path / "files", values, ["row-0", "stranger", "row-2", "row-0", "row-4"])
    with pytest.raises(InvalidInput, match="3 rows cannot be taken") as refused:
        workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)
    assert [error.line for error in refused.value.errors] == [2, 3, 4]
    assert not list((workplace.context.settings.matrices).glob("matrix_*"))

    job, _ = workplace.context.streams.upload(StreamRequest(dataset=pool.id, on_error="skip"), folder)
    result = result_of(workplace, job.id)
    assert result.total_problems == 3
    assert [problem.line for problem in result.problems] == [2, 3, 4]
    rows, present = workplace.context.streams.matrix(job.id)
    assert np.flatnonzero(present).tolist() == [0, 4]
    np.testing.assert_array_equal(rows[[0, 4]], values[[0, 4]])
    assert {row.row: row.reason for row in result.absent}[2] == "not finite"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.bool_])
def test_a_safetensors_file_brings_its_ids_in_its_metadata(workplace: Workplace, tmp_path: Path, dtype: type) -> None:
    pool = workplace.pool(with_ids(ROWS))
    folder = tmp_path / "files"
    folder.mkdir()
    values: NDArray[Any] = (numbers() * 3).astype(dtype)
    ids = json.dumps([f"row-{row}" for row in range(ROWS)])
    save_file({"rows": values, "other": np.zeros(1, np.float32)}, folder / "a.safetensors", metadata={"ids": ids})
    job, _ = workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)
    np.testing.assert_array_equal(workplace.context.streams.matrix(job.id)[0], values.astype(np.float32))


def test_rows_with_a_dimension_of_one_in_the_middle_are_taken(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(2))
    values = numbers(2)
    job, _ = workplace.context.streams.upload(
        StreamRequest(dataset=pool.id), sent(tmp_path / "files", values[:, None], ["row-0", "row-1"])
    )
    np.testing.assert_array_equal(workplace.context.streams.matrix(job.id)[0], values)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.npz", b"PK\x03\x04", "can run code"),
        ("rows.pkl", b"\x80\x04.", "can run code"),
        ("rows.npy", b"\x80\x04N.", "no .npy file of numbers"),
        ("rows.safetensors", b"\x80\x04N.", "no safetensors file"),
        ("rows.csv", b"1,2", "send one .npy or .safetensors"),
    ],
)
def test_what_is_no_array_is_refused(
    workplace: Workplace, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    pool = workplace.pool(with_ids(1))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / "ids.json").write_text('["row-0"]')
    with pytest.raises(InvalidInput, match=said):
        workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)


def test_an_array_of_objects_is_not_unpickled(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(1))
    folder = tmp_path / "files"
    folder.mkdir()
    np.save(folder / "rows.npy", np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    (folder / "ids.txt").write_text("row-0\n")
    with pytest.raises(InvalidInput, match=r"no \.npy file of numbers") as told:
        workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)
    assert "allow_pickle=False" in str(told.value)
    assert "trust" not in str(told.value)  # as numpy advises


@pytest.mark.parametrize(
    ("kept", "said"),
    [(30, "no .npy file of numbers"), (-1, "it has 15 of 16 bytes of numbers; send it again"), (128, "has 0 of 16")],
)
def test_an_array_that_was_cut_off_is_told_as_that(workplace: Workplace, tmp_path: Path, kept: int, said: str) -> None:
    pool = workplace.pool(with_ids(2))
    folder = sent(tmp_path / "files", np.ones((2, 2), np.float32), ["row-0", "row-1"])
    [file] = folder.glob("*.npy")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InvalidInput, match=said):
        workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)


def test_rows_without_ids_and_ids_without_rows_are_refused(workplace: Workplace, tmp_path: Path) -> None:
    pool, nameless = workplace.pool(with_ids(2)), workplace.pool(numbered(range(3)))
    streams = workplace.context.streams
    with pytest.raises(InvalidInput, match="ids of the rows once"):
        streams.upload(StreamRequest(dataset=pool.id), sent(tmp_path / "none", numbers(2), None))
    with pytest.raises(InvalidInput, match="2 rows and there are 1 ids"):
        streams.upload(StreamRequest(dataset=pool.id), sent(tmp_path / "few", numbers(2), ["row-0"]))
    with pytest.raises(InvalidInput, match="have no ids"):
        streams.upload(StreamRequest(dataset=nameless.id), sent(tmp_path / "all", numbers(2), ["row-0", "row-1"]))


def test_the_gradients_of_the_store_are_a_stream_that_protects_them(workplace: Workplace) -> None:
    pool = workplace.pool(with_ids(5))
    checkpoint = workplace.checkpoint()
    gradients = workplace.start(GradientsRequest(dataset=pool.id, checkpoints=[checkpoint.id], dims=[16]))
    streams = workplace.context.streams
    with pytest.raises(Conflict, match="queued"):
        streams.start(StreamRequest(kind="gradients", gradients=gradients.id))
    workplace.work()
    job, works = streams.start(StreamRequest(kind="gradients", gradients=gradients.id))
    assert not works
    result = result_of(workplace, job.id)
    rows, present = streams.matrix(job.id)
    assert present.all()
    assert result.present_rows == 5
    assert result.dim == 16
    np.testing.assert_array_equal(rows, workplace.stored(result.feature_set or ""))
    np.testing.assert_array_equal(read(workplace, job.id, 1, 4), rows[1:4])
    with pytest.raises(InUse):
        workplace.context.features.remove(gradients.id)
    with pytest.raises(InUse):
        workplace.context.catalog.remove(DatasetRow, pool.id)
    streams.remove(job.id)
    workplace.context.features.remove(gradients.id)


def test_any_range_of_rows_is_read_over_the_shards(tmp_path: Path) -> None:
    workplace = Workplace.at(tmp_path, shard_rows=1024)
    pool, checkpoint = workplace.pool(with_ids(2500)), workplace.checkpoint()
    streams, jobs = workplace.context.streams, workplace.context.jobs
    job, _ = streams.start(StreamRequest(kind="hidden", dataset=pool.id, checkpoint=checkpoint.id))
    random = np.random.default_rng(0)
    while (claim := jobs.claim("test", kinds=["stream"])) is not None:
        start, stop = claim.payload["start"], claim.payload["stop"]
        dim = 0 if start == 1024 else 3  # of the second shard nothing could be read
        present = (random.random(stop - start) < 0.9) & (dim > 0)
        rows = random.normal(size=(stop - start, dim)).astype(np.float32) * present[:, None]
        assert streams.finish(claim, Matrix(rows, present))
    wanted, present = streams.matrix(job.id)
    assert 0 < present.sum() < 1500
    wanted[~present] = np.nan
    for start, stop in [(0, 2500), (0, 0), (5, 1024), (1000, 2100), (1024, 2048), (2047, 2049), (2499, 2500)]:
        np.testing.assert_array_equal(read(workplace, job.id, start, stop), wanted[start:stop])
    assert streams.ids(job.id)[2499] == "row-2499"


def test_reading_rows_holds_a_block_of_them(workplace: Workplace, tmp_path: Path) -> None:
    rows, dim = 1024, 1 << 14
    pool = workplace.pool(with_ids(rows))
    folder = sent(tmp_path / "large", numbers(rows, dim), [f"row-{row}" for row in range(rows)])
    job, _ = workplace.context.streams.upload(StreamRequest(dataset=pool.id), folder)
    found = workplace.context.streams.numbers(job.id)
    tracemalloc.start()
    try:
        total = sum(block.nbytes for block in found.blocks(0, rows))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 4 * rows * dim
    assert peak < total / 2


def test_the_same_rows_are_the_same_stream_and_go_with_it(workplace: Workplace, tmp_path: Path) -> None:
    pool = workplace.pool(with_ids(2))
    streams = workplace.context.streams
    first = sent(tmp_path / "one", numbers(2), ["row-0", "row-1"])
    second = sent(tmp_path / "two", numbers(2), ["row-0", "row-1"])
    job, _ = streams.upload(StreamRequest(dataset=pool.id), first)
    again, _ = streams.upload(StreamRequest(dataset=pool.id), second)
    assert job.id == again.id
    (matrix,) = workplace.context.settings.matrices.glob("matrix_*")
    (matrix / "rows.npy").write_bytes(b"damaged")
    with pytest.raises(Damaged):
        streams.matrix(job.id)
    streams.remove(job.id)
    assert not matrix.exists()


def test_the_validation_rows_of_a_task_have_streams_too(workplace: Workplace, tmp_path: Path) -> None:
    folder = workplace.folder / "task"
    folder.mkdir()
    rows = [{**row, "subtask": subtask} for row, subtask in zip(with_ids(4), "baab", strict=True)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = workplace.context.tasks.store("jsonl", folder)
    task = workplace.context.catalog.add_task(
        id=stored.id, name="target", kind="jsonl", subtasks=stored.subtasks, notes=[], replace=False
    )
    values = numbers(4)
    files = sent(tmp_path / "files", values, [f"row-{row}" for row in range(4)])
    job, _ = workplace.context.streams.upload(StreamRequest(task="target"), files)
    ids = [row.example.id for row in workplace.context.tasks.validation(task.id)]
    assert ids == ["row-1", "row-2", "row-0", "row-3"]
    np.testing.assert_array_equal(workplace.context.streams.matrix(job.id)[0], values[[1, 2, 0, 3]])
    assert result_of(workplace, job.id).task == task.id


# Upkeep -----------------------------------------------------------------------------------------------------------


def uploaded(workplace: Workplace, folder: Path) -> tuple[str, Path]:
    """A stream and the folder of its rows."""
    pool = workplace.pool(with_ids(3))
    job, _ = workplace.context.streams.upload(
        StreamRequest(dataset=pool.id), sent(folder, numbers(3), [f"row-{row}" for row in range(3)])
    )
    (matrix,) = workplace.context.settings.matrices.glob("matrix_*")
    return job.id, matrix


def test_rows_that_nothing_has_are_garbage_and_others_are_not(workplace: Workplace, tmp_path: Path) -> None:
    job, matrix = uploaded(workplace, tmp_path / "files")
    orphan = matrix.with_name("matrix_0123")
    shutil.copytree(matrix, orphan)
    found = [each for each in garbage(workplace.context, older_than=0) if each.place.startswith("matrices/")]
    assert [each.place for each in found] == ["matrices/matrix_0123"]
    assert "its stream, annotation or embedding" in found[0].detail
    for each in found:
        each.remove()
    assert not orphan.exists()
    shutil.copytree(matrix, orphan)
    workplace.context.streams.sweep(older_than=3600)
    assert orphan.exists()
    workplace.context.streams.sweep(older_than=-1)
    assert not orphan.exists()
    assert workplace.context.streams.matrix(job)[1].all()


def test_the_doctor_tells_rows_that_are_damaged_or_missing(workplace: Workplace, tmp_path: Path) -> None:
    _, matrix = uploaded(workplace, tmp_path / "files")
    assert list(examine(workplace.context, older_than=0, deep=True)) == []
    (matrix / "rows.npy").write_bytes(b"damaged")
    found = list(examine(workplace.context, older_than=0, deep=True))
    assert [(each.kind, each.place) for each in found] == [("damaged", f"matrices/{matrix.name}")]
    shutil.rmtree(matrix)
    for deep in (False, True):
        found = list(examine(workplace.context, older_than=0, deep=deep))
        assert [(each.kind, each.place) for each in found] == [("missing", f"matrices/{matrix.name}")]
        assert "make it again" in found[0].detail


def test_a_backup_has_the_rows_and_labels_and_a_restore_brings_them_back(workplace: Workplace, tmp_path: Path) -> None:
    job, _ = uploaded(workplace, tmp_path / "files")
    pool = workplace.pool(with_ids(3))
    (tmp_path / "labels.jsonl").write_text('{"id": "row-1", "categories": ["OCR"]}\n')
    labels, _ = workplace.context.annotations.upload(AnnotationRequest(dataset=pool.id), tmp_path / "labels.jsonl")
    orphan = workplace.context.settings.matrices / "matrix_0123"
    orphan.mkdir()
    backups.backup(workplace.context, tmp_path / "backup")
    again = Workplace.at(tmp_path / "again", model=workplace.model)
    backups.restore(again.context, tmp_path / "backup")
    np.testing.assert_array_equal(again.context.streams.matrix(job)[0], numbers(3))
    for before, now in zip(
        workplace.context.annotations.labels(labels.id), again.context.annotations.labels(labels.id), strict=True
    ):
        np.testing.assert_array_equal(before, now)
    assert not (again.context.settings.matrices / "matrix_0123").exists()
    assert list(examine(again.context, older_than=0, deep=True)) == []
