"""Datasets are named by their rows: packaging and number of uploads do not matter, and nothing is lost."""

from __future__ import annotations

import codecs
import datetime as dt
import fcntl
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore import parquet_rows
from datastore.datasets import LABELS_KEPT, REPORTED, Datasets, Ingested
from datastore.errors import Damaged, GradstoreError, InvalidDataset, NotFound, TooLarge
from datastore.rows import Example, Message

Row = dict[str, Any]


def row(number: int, **fields: object) -> Row:
    turns = [{"role": "user", "content": f"{number} + 1?\n"}, {"role": "assistant", "content": f"“{number + 1}” 👍"}]
    return {"dataset": "sums", "id": f"sum_{number}", "messages": turns, **fields}


def rows(count: int) -> list[Row]:
    return [row(number) for number in range(count)]


def jsonl(items: Sequence[object], **options: Any) -> bytes:
    return b"".join(json.dumps(item, ensure_ascii=False, **options).encode() + b"\n" for item in items)


def parquet(items: Sequence[Row], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_struct_array(pa.array(items)), sink, **options)
    return sink.getvalue()


def reordered(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: reordered(item[key]) for key in reversed(item)}
    return [reordered(part) for part in item] if isinstance(item, list) else item


def ingest(datasets: Datasets, content: bytes, filename: str = "pool.jsonl", **options: Any) -> Ingested:
    return datasets.ingest(io.BytesIO(content), filename=filename, **options)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def arriving(pieces: Iterator[bytes]) -> BinaryIO:
    """An upload that arrives piece by piece and never exists as a whole."""

    class Upload:
        def read(self, _size: int) -> bytes:
            return next(pieces, b"")

    return cast("BinaryIO", Upload())


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path / "datasets")


ROWS = rows(30)
PLAIN = jsonl(ROWS)
PACKAGINGS: dict[str, bytes] = {
    "gzip": gzip.compress(PLAIN),
    "two gzip members": gzip.compress(PLAIN[:1000]) + gzip.compress(PLAIN[1000:]),
    "byte-order mark": codecs.BOM_UTF8 + PLAIN,
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "no final line end": PLAIN.rstrip(b"\n"),
    "blank lines": b"\n \n" + PLAIN.replace(b"\n", b"\n\n\t\n"),
    "UTF-16, little-endian": codecs.BOM_UTF16_LE + PLAIN.decode().encode("utf-16-le"),
    "UTF-16, big-endian": codecs.BOM_UTF16_BE + PLAIN.decode().encode("utf-16-be"),
    "UTF-16 without a mark": PLAIN.decode().encode("utf-16-le"),
    "gzip of UTF-16": gzip.compress(codecs.BOM_UTF16_BE + PLAIN.decode().encode("utf-16-be")),
    "array": json.dumps(ROWS, ensure_ascii=False).encode(),
    "indented array": codecs.BOM_UTF8 + json.dumps(ROWS, indent=2).encode(),
    "gzip of an array": gzip.compress(json.dumps(ROWS).encode()),
    "other order of keys": jsonl([reordered(item) for item in ROWS]),
    "escapes": b"".join(json.dumps(item).encode() + b"\n" for item in ROWS),
    "other white space": jsonl(ROWS, separators=(" ,\t", ":  ")),
    "Parquet": parquet(ROWS),
    "Parquet in small row groups": parquet(ROWS, row_group_size=7, compression="zstd"),
}


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_the_same_rows_in_any_packaging_are_the_same_dataset(datasets: Datasets, packaging: str) -> None:
    plain = ingest(datasets, PLAIN)
    again = ingest(datasets, PACKAGINGS[packaging])
    assert (again.id, again.rows, again.created, again.report.skipped) == (plain.id, 30, False, 0)
    assert {source.sha256 for source in datasets.sources(plain.id)} == {
        sha256(content).hexdigest() for content in (PLAIN, PACKAGINGS[packaging])
    }


def test_the_id_of_a_dataset_never_changes(datasets: Datasets) -> None:
    """Features are stored under it: whoever changes what this hashes orphans every store there is."""
    assert ingest(datasets, PLAIN).id == "ds_cd6d3ba1551e27aae0611804"


@pytest.mark.parametrize(
    "other",
    [ROWS[:-1], ROWS[::-1], [*ROWS, ROWS[0]], [*ROWS[:-1], row(29, score=0.5)], [*ROWS[:-1], row(29, id="other")]],
)
def test_other_rows_are_another_dataset(datasets: Datasets, other: list[Row]) -> None:
    assert ingest(datasets, jsonl(other)).id != ingest(datasets, PLAIN).id


def test_the_first_upload_of_rows_decides_how_they_are_returned(datasets: Datasets) -> None:
    first = ingest(datasets, PLAIN, "first.jsonl")
    again = ingest(datasets, PACKAGINGS["escapes"], "again.jsonl")
    assert datasets.content(again.id).read_bytes() == PLAIN
    assert (again.bytes, again.origins) == (first.bytes, first.origins) == (len(PLAIN), {"sums": 30})


def test_an_upload_twice_is_one_source(datasets: Datasets) -> None:
    first = ingest(datasets, PLAIN, "first.jsonl")
    again = ingest(datasets, PLAIN, "again.jsonl")
    assert datasets.sources(first.id) == [first.source] == [again.source]


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_every_upload_is_kept_byte_for_byte(datasets: Datasets, packaging: str) -> None:
    found = ingest(datasets, PACKAGINGS[packaging], "folder\\sub/pool.bin")
    assert datasets.source(found.source.sha256).read_bytes() == PACKAGINGS[packaging]
    expected = "parquet" if "Parquet" in packaging else "json" if "array" in packaging else "jsonl"
    assert (found.source.format, found.source.bytes) == (expected, len(PACKAGINGS[packaging]))
    assert (found.source.filename, found.source.rows, found.source.skipped) == ("pool.bin", 30, 0)


def spaced(item: Row, spaces: tuple[str, str, str]) -> str:
    before, between, after = spaces
    return before + json.dumps(item, separators=("," + between, ":" + between), ensure_ascii=False) + after


SPACES = st.tuples(*(st.text(" \t", max_size=3) for _ in range(3)))


@settings(deadline=None, max_examples=30)
@given(st.lists(SPACES, min_size=1, max_size=8), st.booleans())
def test_lines_come_back_byte_for_byte(spaces: list[tuple[str, str, str]], closed: bool) -> None:
    originals = [spaced(row(number), space).encode() for number, space in enumerate(spaces)]
    with tempfile.TemporaryDirectory() as root:
        datasets = Datasets(Path(root))
        found = ingest(datasets, b"\n".join(originals) + (b"\n" if closed else b""))
        backwards = list(range(len(originals)))[::-1]
        assert list(datasets.lines(found.id, backwards)) == originals[::-1]
        assert datasets.content(found.id).read_bytes() == b"".join(line + b"\n" for line in originals)


@pytest.mark.parametrize("packaging", ["indented array", "Parquet", "UTF-16, big-endian"])
def test_rows_that_were_no_lines_come_back_as_one_line_each(datasets: Datasets, packaging: str) -> None:
    found = ingest(datasets, PACKAGINGS[packaging])
    lines = list(datasets.lines(found.id, range(30)))
    assert [json.loads(line) for line in lines] == ROWS
    assert not any(b"\n" in line for line in lines)


def test_a_row_that_does_not_exist_is_an_error(datasets: Datasets) -> None:
    found = ingest(datasets, PLAIN)
    for wrong in (30, -1):
        with pytest.raises(IndexError, match="has 30 rows"):
            list(datasets.lines(found.id, [0, wrong]))


def test_examples_are_read_by_range(datasets: Datasets) -> None:
    found = ingest(datasets, PLAIN)
    everything = list(datasets.examples(found.id))
    assert everything[3] == Example(
        id="sum_3", origin="sums", messages=(Message("user", "3 + 1?\n"), Message("assistant", "“4” 👍"))
    )
    for start, stop in ((0, 0), (0, 7), (7, 30), (29, None), (30, None), (20, 99)):
        assert list(datasets.examples(found.id, start, stop)) == everything[start:stop]


def labels_of(datasets: Datasets, id: str) -> list[tuple[str | None, str]]:
    """Id and origin of every row."""
    labels = datasets.label_columns(id)
    return [(own, labels.origins[code]) for own, code in zip(labels.ids.to_pylist(), labels.origin, strict=True)]


def test_labels_name_every_row_and_where_it_comes_from(datasets: Datasets) -> None:
    items = [row(0), {**row(1), "dataset": None}, {"prompt": "1", "completion": "2", "id": "line\nend"}]
    found = ingest(datasets, jsonl(items), "pool.jsonl")
    expected = [("sum_0", "sums"), ("sum_1", "pool.jsonl"), ("line\nend", "pool.jsonl")]
    assert labels_of(datasets, found.id) == expected
    origins = datasets.origins(found.id)
    assert (origins.names, origins.codes.tolist()) == (("pool.jsonl", "sums"), [1, 0, 0])
    assert found.origins == {"sums": 1, "pool.jsonl": 2}
    assert [(one.id, one.origin) for one in datasets.examples(found.id)] == expected


def test_labels_are_read_once_and_for_as_many_datasets_as_are_kept(
    datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.dataset_files.LABELS_AT_ONCE", 2)
    ids = [ingest(datasets, jsonl([row(n), row(n + 1), row(n + 2)]), "pool.jsonl").id for n in range(LABELS_KEPT + 2)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda id: labels_of(datasets, id), ids * 20))
    assert found == [[(f"sum_{n + m}", "sums") for m in range(3)] for n in range(len(ids))] * 20
    assert datasets.label_columns(ids[-1]) is datasets.label_columns(ids[-1])
    datasets.delete(ids[-1], keep_sources=())
    with pytest.raises(NotFound):
        datasets.label_columns(ids[-1])


# Appending ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 11), max_size=4))
def test_rows_appended_in_any_steps_are_the_dataset_of_one_file(ends: list[int]) -> None:
    items = rows(12)
    steps = sorted({0, *ends})
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        whole = ingest(Datasets(Path(one)), jsonl(items))
        datasets, last = Datasets(Path(many)), None
        for start, stop in zip(steps, [*steps[1:], 12], strict=True):
            last = ingest(datasets, jsonl(items[start:stop]), append_to=last and last.id)
        assert last is not None
        assert (last.id, last.rows, last.bytes, last.origins) == (whole.id, 12, whole.bytes, whole.origins)
        assert list(datasets.examples(last.id)) == list(Datasets(Path(one)).examples(whole.id))
        assert list(datasets.lines(last.id, range(12))) == list(Datasets(Path(one)).lines(whole.id, range(12)))
        assert labels_of(datasets, last.id) == labels_of(Datasets(Path(one)), whole.id)


def test_a_grown_dataset_keeps_its_beginning_and_all_its_uploads(datasets: Datasets) -> None:
    first = ingest(datasets, jsonl([{"prompt": "1", "completion": "2"}]), "first.jsonl")
    grown = ingest(datasets, jsonl([{"prompt": "3", "completion": "4"}]), "second.jsonl", append_to=first.id)
    assert (grown.prefix, grown.rows, grown.report.rows, grown.created) == (first.id, 2, 1, True)
    assert [one.origin for one in datasets.examples(grown.id)] == ["first.jsonl", "second.jsonl"]
    assert [source.filename for source in datasets.sources(grown.id)] == ["first.jsonl", "second.jsonl"]
    assert next(datasets.examples(first.id)).prompt == "1"


def test_a_whole_upload_finds_the_longest_stored_beginning(datasets: Datasets) -> None:
    known = {}
    for count in (5, 20, 30, 40):
        found = ingest(datasets, jsonl(rows(count)))
        known[found.id] = count
    five, twenty, thirty, _ = known
    assert ingest(datasets, jsonl(rows(35)), known=known).prefix == thirty
    assert ingest(datasets, jsonl(rows(30)), known=known).prefix == twenty
    assert ingest(datasets, jsonl(rows(5)), known=known).prefix is None
    assert ingest(datasets, jsonl([*rows(6), row(99)]), known=known).prefix == five
    assert ingest(datasets, jsonl([row(99), *rows(30)]), known=known).prefix is None


def test_appending_meets_longer_stored_beginnings(datasets: Datasets) -> None:
    five, ten = (ingest(datasets, jsonl(rows(count))) for count in (5, 10))
    grown = ingest(datasets, jsonl(rows(15)[5:]), append_to=five.id, known={five.id: 5, ten.id: 10})
    assert grown.prefix == ten.id


def test_appending_to_nothing_stores_nothing(datasets: Datasets, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="ds_000000000000000000000000"):
        ingest(datasets, PLAIN, append_to="ds_" + "0" * 24)
    assert tree(tmp_path) == {}


def test_repeats_of_rows_appended_to_are_noted(datasets: Datasets) -> None:
    first = ingest(datasets, jsonl(rows(5)))
    grown = ingest(datasets, jsonl([row(7), row(2)]), append_to=first.id)
    assert [(note.line, note.detail) for note in grown.report.notes] == [
        (2, "id and text of row 3 of the dataset appended to again")
    ]


# Bad rows -----------------------------------------------------------------------------------------------------------


def test_one_bad_row_refuses_the_file_and_leaves_nothing(datasets: Datasets, tmp_path: Path) -> None:
    ingest(datasets, jsonl(rows(3)))
    before = tree(tmp_path)
    with pytest.raises(InvalidDataset, match=r"1 row of pool\.jsonl cannot be taken, so nothing was stored") as caught:
        ingest(datasets, PLAIN + b"{\n" + PLAIN)
    assert [(item.line, item.detail) for item in caught.value.errors] == [
        (31, "the row ends too early, at character 2: a bracket or a value is missing")
    ]
    assert "skip to take the other 60" in str(caught.value)
    assert tree(tmp_path) == before


def test_bad_rows_can_be_left_out(datasets: Datasets) -> None:
    found = ingest(datasets, PLAIN + b"{\n" + jsonl([row(30)]) + b"3\n", on_error="skip")
    assert found.id == ingest(datasets, jsonl(rows(31))).id
    assert [(problem.line, problem.detail) for problem in found.report.problems] == [
        (31, "the row ends too early, at character 2: a bracket or a value is missing"),
        (33, "the row is a number; an object is needed"),
    ]
    assert (found.rows, found.report.rows, found.report.skipped, found.source.skipped) == (31, 31, 2, 2)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_without_a_good_row_is_refused(datasets: Datasets, tmp_path: Path, on_error: str) -> None:
    with pytest.raises(InvalidDataset, match=r"2 rows of pool\.jsonl cannot be taken"):
        ingest(datasets, b"1\n2\n", on_error=on_error)
    assert tree(tmp_path) == {}


def test_problems_are_reported_up_to_a_limit_and_all_counted(datasets: Datasets) -> None:
    with pytest.raises(InvalidDataset) as caught:
        ingest(datasets, b"1\n" * 250 + PLAIN)
    assert (len(caught.value.errors), caught.value.total_errors) == (REPORTED, 250)
    found = ingest(datasets, b"1\n" * 250 + PLAIN, on_error="skip")
    assert (len(found.report.problems), found.report.skipped) == (REPORTED, 250)


def test_a_reason_does_not_quote_a_whole_row(datasets: Datasets) -> None:
    turns = [{"role": "x" * 10_000, "content": "?"}]
    with pytest.raises(InvalidDataset) as caught:
        ingest(datasets, jsonl([{"messages": turns}]))
    assert len(caught.value.errors[0].detail) == 400


def test_remarks_are_in_the_order_of_the_file_up_to_a_limit_and_all_counted(datasets: Datasets) -> None:
    odd = [row(number, tools=[{"name": "add"}]) for number in range(150)]
    found = ingest(datasets, jsonl([row(0), row(0), *odd, {"prompt": "", "completion": "1"}]))
    assert len(found.report.notes) == REPORTED
    assert found.report.total_notes == 1 + 150 + 1 + 2  # repeats of 0, tools, and the last row's prompt and id
    places = [note.line for note in found.report.notes]
    assert places == sorted(places)
    assert found.report.notes[0].detail == "id and text of line 1 again"


def test_a_last_line_that_was_cut_off_is_told_from_a_bad_one(datasets: Datasets) -> None:
    for content, hinted in ((PLAIN[:-20], True), (PLAIN[:-20] + b"\n", False)):
        with pytest.raises(InvalidDataset) as caught:
            ingest(datasets, content)
        assert ("was it cut off?" in caught.value.errors[0].detail) == hinted


# Parquet ------------------------------------------------------------------------------------------------------------


def test_columns_that_only_some_rows_have_do_not_change_the_other_rows(datasets: Datasets) -> None:
    named = [{"role": "user", "content": "?", "name": "bob"}, {"role": "assistant", "content": "!", "extra": [None]}]
    items = [row(0), row(1, messages=named, score=0.5), {"prompt": "1", "completion": "2"}]
    assert ingest(datasets, parquet(items)).id == ingest(datasets, jsonl(items)).id


def test_parquet_values_without_json_form_become_text_or_nothing(datasets: Datasets) -> None:
    day = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
    item = row(0, seen=day, day=day.date(), score=float("nan"), raw="é".encode(), blank=None)
    found = ingest(datasets, parquet([item]))
    (line,) = datasets.lines(found.id, [0])
    expected = row(0, seen="2024-05-01T12:00:00+00:00", day="2024-05-01", raw="é")
    assert json.loads(line) == expected


@pytest.mark.parametrize(
    ("value", "reason"), [(b"\xff\xfe", "bytes that are no text"), (float("inf"), "an infinite number")]
)
def test_parquet_values_that_json_cannot_hold_refuse_their_row(datasets: Datasets, value: object, reason: str) -> None:
    found = ingest(datasets, parquet([row(0), row(1, value=value)]), on_error="skip")
    (problem,) = found.report.problems
    assert (found.rows, problem.line) == (1, 2)
    assert reason in problem.detail


def written(columns: dict[str, pa.Array], **options: Any) -> bytes:
    """A Parquet file of two good rows with more columns."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], **columns}), sink, **options)
    return sink.getvalue()


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
)


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array([1, 2**62], pa.timestamp("us")), id="a time beyond the year 9999"),
        pytest.param(pa.array([1, 2**31 - 1], pa.date32()), id="a day beyond the year 9999"),
        pytest.param(NOT_UTF8, id="text that is no UTF-8"),
    ],
)
def test_a_parquet_value_that_python_cannot_hold_refuses_its_row_alone(datasets: Datasets, column: pa.Array) -> None:
    found = ingest(datasets, written({"value": column}), on_error="skip")
    (problem,) = found.report.problems
    assert (found.rows, problem.line) == (1, 2)
    assert "a value has no form in JSON" in problem.detail


def test_a_struct_with_two_fields_of_one_name_refuses_its_rows(datasets: Datasets) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"])
    with pytest.raises(InvalidDataset) as caught:
        ingest(datasets, written({"value": twice}))
    assert [problem.line for problem in caught.value.errors] == [1, 2]


def test_nanoseconds_of_parquet_are_cut_to_microseconds_with_and_without_pandas(datasets: Datasets) -> None:
    moment = 1_700_000_000_123_456_789
    columns = {
        "seen": pa.array([moment, None], pa.timestamp("ns", "UTC")),
        "took": pa.array([1_500_000_001, None], pa.duration("ns")),
        "at": pa.array([[{"clock": 1_001}], None], pa.list_(pa.struct([("clock", pa.time64("ns"))]))),
    }
    found = ingest(datasets, written(columns))
    (line,) = datasets.lines(found.id, [0])
    assert json.loads(line) == {
        "prompt": "a",
        "completion": "c",
        "seen": "2023-11-14T22:13:20.123456+00:00",
        "took": "0:00:01.500000",
        "at": [{"clock": "00:00:00.000001"}],
    }


def test_values_that_stand_for_many_rows_are_decoded_a_few_at_a_time(tmp_path: Path) -> None:
    """A file of kilobytes whose rows share one long value took as much memory as 32 copies of it, and more."""
    text = pa.array(["x" * 8_000_000] * 64).dictionary_encode()
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"prompt": text}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    found = parquet_rows.rows(path, limit=32_000_000)
    next(found)
    assert pa.total_allocated_bytes() - before < 100_000_000
    with pytest.raises(TooLarge, match="send its rows as JSONL"):
        next(parquet_rows.rows(path, limit=1_000_000))


def test_cut_parquet_is_refused(datasets: Datasets, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="cannot be opened"):
        ingest(datasets, parquet(ROWS)[:-100])
    assert tree(tmp_path) == {}


def test_damaged_parquet_gives_the_rows_before_the_damage(datasets: Datasets) -> None:
    items = rows(2000)
    content = bytearray(parquet(items, row_group_size=1000, compression="gzip"))
    middle = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(1).column(0).data_page_offset
    content[middle : middle + 200] = bytes(200)
    found = ingest(datasets, bytes(content), on_error="skip")
    assert 0 < found.rows < 2000
    assert found.report.problems[0].line == found.rows + 1
    assert "damaged" in found.report.problems[0].detail


def test_two_columns_of_one_name_are_refused(datasets: Datasets) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(["1"]), pa.array(["2"]), pa.array(["3"])], ["prompt", "prompt", "output"]), sink)
    with pytest.raises(InvalidDataset, match="several columns called 'prompt'"):
        ingest(datasets, sink.getvalue())


def test_parquet_that_unpacks_to_implausibly_much_is_refused(datasets: Datasets, tmp_path: Path) -> None:
    text = pa.array(["x" * 1_000_000] * 300).dictionary_encode()
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": text, "completion": text}), sink, compression="zstd")
    with pytest.raises(TooLarge, match="decompress it"):
        ingest(datasets, sink.getvalue())
    assert tree(tmp_path) == {}


# The store ----------------------------------------------------------------------------------------------------------


def test_deleting_takes_the_uploads_that_nothing_else_needs(datasets: Datasets, tmp_path: Path) -> None:
    found = ingest(datasets, PLAIN)
    again = ingest(datasets, PACKAGINGS["gzip"])
    datasets.delete(found.id, keep_sources={again.source.sha256})
    assert datasets.source(again.source.sha256).exists()
    with pytest.raises(NotFound):
        datasets.source(found.source.sha256)
    with pytest.raises(NotFound):
        datasets.label_columns(found.id)
    datasets = Datasets(tmp_path / "datasets")
    assert ingest(datasets, PLAIN).created
    datasets.delete(found.id, keep_sources=())
    assert set(tree(tmp_path)) == {f"datasets/sources/{again.source.sha256}"}


@pytest.mark.parametrize("name", ["ds_" + "0" * 24, "sources", "../datasets", "", "ds_\0", "a/../b"])
def test_no_name_reaches_outside_the_datasets(datasets: Datasets, name: str) -> None:
    ingest(datasets, PLAIN)
    calls: list[Callable[[], object]] = [
        lambda: datasets.examples(name),
        lambda: datasets.label_columns(name),
        lambda: datasets.lines(name, [0]),
        lambda: datasets.content(name),
        lambda: datasets.source(name),
        lambda: datasets.delete(name, keep_sources=()),
        lambda: ingest(datasets, PLAIN, append_to=name),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()


def test_rows_that_changed_on_disk_are_not_served(datasets: Datasets) -> None:
    found = ingest(datasets, PLAIN)
    with datasets.content(found.id).open("ab") as file:
        file.write(b"more\n")
    with pytest.raises(Damaged, match="upload its file again"):
        datasets.examples(found.id)


def test_the_same_upload_many_times_at_once_is_stored_once(datasets: Datasets, tmp_path: Path) -> None:
    together, found = threading.Barrier(6), []

    def work() -> None:
        own = Datasets(tmp_path / "datasets")
        together.wait()
        found.append(ingest(own, PLAIN))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.created for one in found) == [False] * 5 + [True]
    assert all((one.id, one.source) == (found[0].id, found[0].source) for one in found)
    assert [one.id for one in datasets.examples(found[0].id)] == [item["id"] for item in ROWS]
    assert list((tmp_path / "datasets" / "incoming").iterdir()) == []


def test_a_reader_error_of_the_upload_leaves_nothing(datasets: Datasets, tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield PLAIN
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        datasets.ingest(arriving(pieces()), filename="pool.jsonl")
    assert tree(tmp_path) == {}


def test_what_a_killed_process_left_is_swept_away(datasets: Datasets, tmp_path: Path) -> None:
    incoming = tmp_path / "datasets" / "incoming"
    code = "import sys; from pathlib import Path; from datastore.datasets import Datasets; " + (
        "Datasets(Path(sys.argv[1])).ingest(sys.stdin.buffer, filename='pool.jsonl')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "datasets")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (left := list(incoming.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert len(left) == 1
    ingest(datasets, PLAIN)
    assert left[0].exists()  # too young to be told from one whose lock is about to come
    os.utime(left[0], (0, 0))
    ingest(datasets, PLAIN)
    assert list(incoming.iterdir()) == []


def test_an_upload_in_progress_is_not_swept_away(datasets: Datasets, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "incoming" / "working"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.utime(folder, (0, 0))
        ingest(datasets, PLAIN)
        assert folder.exists()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("start", "between", "end"), [(b"", b"\n", b""), (b"[", b",", b"]")])
def test_memory_does_not_grow_with_the_upload(datasets: Datasets, start: bytes, between: bytes, end: bytes) -> None:
    def pieces() -> Iterator[bytes]:
        for number in range(4000):
            yield (between if number else start) + json.dumps(row(number, text="x" * 4000)).encode()
        yield end

    tracemalloc.start()
    try:
        found = datasets.ingest(arriving(pieces()), filename="pool")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found.rows, found.source.bytes > 16_000_000) == (4000, True)
    assert peak < 8_000_000


def test_a_file_name_is_only_a_name(datasets: Datasets) -> None:
    for given_name, kept in (("../../a.jsonl", "a.jsonl"), ("C:\\x\\b.jsonl", "b.jsonl"), ("c\0\n.jsonl", "c.jsonl")):
        found = ingest(datasets, jsonl([{"prompt": given_name, "completion": "1"}]), given_name)
        assert (found.source.filename, found.origins) == (kept, {kept: 1})
    assert ingest(datasets, jsonl([{"prompt": "", "completion": "1"}]), "/").origins == {"upload": 1}


def test_every_refusal_is_an_error_of_the_datastore(datasets: Datasets, tmp_path: Path) -> None:
    for content in (b"", b"\n", b"[]", b"<html>", b"PAR1", b"\x1f\x8b", b"\x1f\x8b\x08", b"[", b"{", bytes(100)):
        for on_error in ("fail", "skip"):
            with pytest.raises(GradstoreError):
                ingest(datasets, content, on_error=on_error)
    assert tree(tmp_path) == {}


def test_a_file_object_of_any_kind_can_be_uploaded(datasets: Datasets, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_bytes(PLAIN)
    with (tmp_path / "pool.jsonl").open("rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(PLAIN)
        spooled.seek(0)
        assert datasets.ingest(file, filename="a").id == datasets.ingest(spooled, filename="b").id  # type: ignore[arg-type]  # what FastAPI hands over
