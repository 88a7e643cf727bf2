"""Every awkward file does what docs/datasets.md says, and the page says something about every one."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from datastore.datasets import Datasets, Ingested
from datastore.errors import InvalidDataset, TooLarge

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "datasets.md"
GOOD = b'{"prompt": "2 + 2 =", "completion": "4"}\n'


@dataclass(frozen=True)
class Case:
    """What becomes of a file: rows taken with on_error=skip, bad lines, lines with notes; 0 rows is refused whole."""

    documented: tuple[str, ...]
    rows: int
    bad: tuple[int, ...] = ()
    noted: tuple[int, ...] = ()


CASES = {
    "alpaca_array.json": Case(("JSON array",), 30, noted=(1,)),
    "alpaca_rows.jsonl": Case(("Mixed shapes",), 30, noted=(1,)),
    "bad_messages.jsonl": Case(
        ("Wrong messages",), 11, bad=(*range(2, 13), 17, 23), noted=(13, 14, 14, 15, 16, 18, 19)
    ),
    "content_parts.jsonl": Case(("Content parts",), 18, noted=(1, 16, 16, 17, 17, 18, 18, 18)),
    "cut_json.json": Case(("One JSON object over several lines",), 0),
    "cut_last_line.jsonl": Case(("Cut-off last line",), 5, bad=(6,)),
    "duplicate_ids.jsonl": Case(("Repeated ids and rows",), 13, noted=(3, 5, 6, 7, 12)),
    "emoji.jsonl": Case(("Emoji, right-to-left, zero-width",), 15),
    "empty.jsonl": Case(("Empty file",), 0),
    "empty_completions.jsonl": Case(("Empty completions",), 2, bad=(1, 2, 3, 4, 5), noted=(6,)),
    "git_lfs_pointer.jsonl": Case(("Git-LFS pointer",), 0),
    "line_separators.jsonl": Case(("Line separators inside strings",), 4),
    "malformed_lines.jsonl": Case(("Malformed lines",), 4, bad=(2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18)),
    "mixed_schemas.jsonl": Case(("Mixed shapes",), 16, noted=(2, 2, 6, 10, 14)),
    "multi_turn_system.jsonl": Case(("System, tool and several turns",), 33, noted=(4,)),
    "odd_ids.jsonl": Case(("Odd ids",), 18, noted=(3,)),
    "only_blank_lines.jsonl": Case(("Empty file",), 0),
    "plain_named_gz.jsonl.gz": Case(("A wrong name",), 60),
    "prompt_completion.jsonl": Case(("Mixed shapes", "Template markers"), 30, noted=(1, *range(1, 31))),
    "rtl_zero_width.jsonl": Case(("Emoji, right-to-left, zero-width",), 16),
    "same60.json": Case(("JSON array",), 60),
    "same60.jsonl.gz": Case(("Gzip",), 60),
    "same60_blank_lines.jsonl": Case(("Blank lines",), 60),
    "same60_bom.jsonl": Case(("Byte-order mark",), 60),
    "same60_bom_crlf.jsonl": Case(("Byte-order mark", "CRLF"), 60),
    "same60_crlf.jsonl": Case(("CRLF",), 60),
    "same60_cut.jsonl.gz": Case(("Cut-off gzip, array or Parquet",), 35, bad=(36,)),
    "same60_gzip_without_suffix.jsonl": Case(("Gzip", "A wrong name"), 60),
    "same60_keys_reordered.jsonl": Case(("Keys in another order, other escapes",), 60),
    "same60_no_final_newline.jsonl": Case(("No final line end",), 60),
    "same60_plain.jsonl": Case((), 60),
    "same60_two_members.jsonl.gz": Case(("Gzip",), 60),
    "same60_utf16.jsonl": Case(("UTF-16",), 60),
    "sharegpt.json": Case(("JSON array", "Mixed shapes"), 22, noted=(1, 1, 4, 7, 8, 11, 12)),
    "template_markers.jsonl": Case(("Template markers",), 8, noted=tuple(range(1, 9))),
    "unicode_multilingual.escaped.jsonl": Case(("Keys in another order, other escapes",), 66),
    "unicode_multilingual.jsonl": Case(("Emoji, right-to-left, zero-width",), 66),
    "very_long.jsonl": Case(("Very long rows",), 5),
}
MADE_HERE = {"Parquet", "Rows beyond 64 MiB", "Damaged gzip or Parquet", "Decompression bomb", "Other packagings"}
"""Rows of the table that no file of the folder shows; tests here and in test_datasets.py make them."""


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path / "datasets")


@pytest.fixture(scope="session")
def awkward(shared_data: Path) -> Path:
    return shared_data / "awkward"


def ingest(datasets: Datasets, file: Path, **options: str) -> Ingested:
    with file.open("rb") as upload:
        return datasets.ingest(upload, filename=file.name, **options)  # type: ignore[arg-type]  # on_error alone


def send(datasets: Datasets, content: bytes, **options: str) -> Ingested:
    return datasets.ingest(io.BytesIO(content), filename="pool", **options)  # type: ignore[arg-type]  # on_error alone


def rows_on_disk(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*") if path.is_file()}


def documented() -> set[str]:
    table = DOCUMENT.read_text().partition("## Awkward files")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", table, flags=re.MULTILINE)
    return set(rows) - {"what"}


def test_the_page_says_what_every_awkward_file_does(awkward: Path) -> None:
    assert {path.name for path in awkward.iterdir()} == {*CASES, "FACTS.json"}


def test_every_row_of_the_page_is_tested() -> None:
    assert documented() == MADE_HERE.union(*(case.documented for case in CASES.values()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_an_awkward_file_gives_the_rows_that_are_good(datasets: Datasets, awkward: Path, name: str) -> None:
    case, found = CASES[name], ingest(datasets, awkward / name, on_error="skip")
    assert found.rows == case.rows
    assert tuple(problem.line for problem in found.report.problems) == case.bad
    assert tuple(note.line for note in found.report.notes) == case.noted
    assert len(list(datasets.examples(found.id))) == case.rows


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bad or not case.rows])
def test_a_file_with_anything_bad_is_refused_as_a_whole(
    datasets: Datasets, awkward: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InvalidDataset) as caught:
        ingest(datasets, awkward / name)
    assert tuple(item.line for item in caught.value.errors) == CASES[name].bad
    assert caught.value.total_errors == len(CASES[name].bad)
    assert rows_on_disk(tmp_path) == set()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.bad and case.rows])
def test_a_file_with_nothing_bad_is_taken_as_a_whole(datasets: Datasets, awkward: Path, name: str) -> None:
    assert ingest(datasets, awkward / name).report.skipped == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.rows])
def test_a_file_without_rows_is_refused_however_it_is_sent(datasets: Datasets, awkward: Path, name: str) -> None:
    with pytest.raises(InvalidDataset):
        ingest(datasets, awkward / name, on_error="skip")


def test_sixty_rows_in_any_packaging_are_one_dataset(datasets: Datasets, awkward: Path) -> None:
    files = [path for path in awkward.iterdir() if re.match(r"same60(?!_cut)|plain_named", path.name)]
    assert len(files) == 13
    assert len({ingest(datasets, path).id for path in files}) == 1


def test_escapes_and_characters_are_the_same_text(datasets: Datasets, awkward: Path) -> None:
    escaped = ingest(datasets, awkward / "unicode_multilingual.escaped.jsonl")
    assert ingest(datasets, awkward / "unicode_multilingual.jsonl").id == escaped.id


def test_an_array_of_rows_is_the_dataset_of_its_lines(datasets: Datasets, awkward: Path) -> None:
    assert ingest(datasets, awkward / "alpaca_array.json").id == ingest(datasets, awkward / "alpaca_rows.jsonl").id


def test_cut_gzip_gives_the_beginning_of_the_whole(datasets: Datasets, awkward: Path) -> None:
    cut = ingest(datasets, awkward / "same60_cut.jsonl.gz", on_error="skip")
    with (awkward / "same60_plain.jsonl").open("rb") as whole:
        assert datasets.ingest(whole, filename="whole.jsonl", known={cut.id: 35}).prefix == cut.id


@pytest.mark.parametrize(
    "name", ["emoji.jsonl", "rtl_zero_width.jsonl", "unicode_multilingual.jsonl", "line_separators.jsonl"]
)
def test_unusual_text_comes_back_unchanged(datasets: Datasets, awkward: Path, name: str) -> None:
    found = ingest(datasets, awkward / name)
    originals = (awkward / name).read_bytes().split(b"\n")[:-1]
    assert list(datasets.lines(found.id, range(found.rows))) == originals
    for example, original in zip(datasets.examples(found.id), originals, strict=True):
        turns = [(turn["role"], turn["content"]) for turn in json.loads(original)["messages"]]
        assert [(message.role, message.content) for message in example.messages] == turns


def test_odd_ids_are_kept_as_they_were_written(datasets: Datasets, awkward: Path) -> None:
    found = ingest(datasets, awkward / "odd_ids.jsonl")
    ids = datasets.label_columns(found.id).ids.to_pylist()
    assert ids[:7] == ["7", "7.0", "7", "007", "true", "", " "]
    assert ids[8:15] == ["../../../outside", "a/b\\c", "two\nlines", "nul\0byte", "caf\u00e9", "cafe\u0301", "😀"]


@pytest.mark.parametrize("size", ["mixed/mixed_4000.jsonl", "processed/p3_t0/p3_t0_data.jsonl"])
def test_ordinary_pools_have_nothing_bad(datasets: Datasets, shared_data: Path, size: str) -> None:
    found = ingest(datasets, shared_data / "train" / size)
    assert found.rows == len((shared_data / "train" / size).read_bytes().splitlines())
    assert found.report.skipped == 0


# Made here ----------------------------------------------------------------------------------------------------------


def packed(content: bytes, name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, content)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (packed(GOOD, "pool.jsonl"), "zip archive"),
        (bz2.compress(GOOD), "bzip2"),
        (lzma.compress(GOOD), "xz"),
        (b"\x28\xb5\x2f\xfd" + GOOD, "zstd"),
        (b"ARROW1\0\0", "save it as Parquet"),
        (gzip.compress(gzip.compress(GOOD)), "gzip inside gzip"),
        (b"PARE" + bytes(40) + b"PARE", "is encrypted"),
        (b"\xff\xfe\0\0" + GOOD.decode().encode("utf-32-le"), "UTF-32"),
        (b"\n<!DOCTYPE html>\n<html></html>", "HTML"),
        (gzip.compress(b"PAR1" + bytes(100)), "upload the Parquet file itself"),
        (gzip.compress(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (b'{\n "prompt": "2 + 2 =",\n "completion": "4"\n}\n', "one JSON object written over several lines"),
        (b"[]", "holds no rows"),
        (b"\xef\xbb\xbf\n", "holds no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",  # which have the time in them
)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_other_packagings_are_refused_with_advice(
    datasets: Datasets, tmp_path: Path, content: bytes, advice: str, on_error: str
) -> None:
    with pytest.raises(InvalidDataset, match=advice):
        send(datasets, content, on_error=on_error)
    assert rows_on_disk(tmp_path) == set()


def test_a_decompression_bomb_is_refused_before_it_fills_the_disk(datasets: Datasets, tmp_path: Path) -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(300)), packer.flush()])
    with pytest.raises(TooLarge, match="over 200 times its size"):
        send(datasets, bomb, on_error="skip")
    assert rows_on_disk(tmp_path) == set()


def test_a_row_beyond_the_limit_is_bad_and_the_others_are_taken(datasets: Datasets) -> None:
    long = json.dumps({"prompt": "?", "completion": "a" * (64 << 20)}).encode()
    for content in (GOOD + long + b"\n" + GOOD, b"[" + b",".join([GOOD, long, GOOD]) + b"]"):
        found = send(datasets, content, on_error="skip")
        assert [(problem.line, problem.detail) for problem in found.report.problems] == [
            (2, "the row is longer than 64 MiB")
        ]
        assert found.rows == 2


def test_an_array_that_was_cut_off_gives_its_whole_elements(datasets: Datasets) -> None:
    found = send(datasets, b"[" + GOOD + b"," + GOOD + b"," + GOOD[:-10], on_error="skip")
    assert (found.rows, [problem.line for problem in found.report.problems]) == (2, [3])


def test_a_bad_first_line_in_brackets_does_not_make_jsonl_an_array(datasets: Datasets) -> None:
    found = send(datasets, b"[1, 2]\n" + GOOD + GOOD, on_error="skip")
    assert (found.rows, [problem.line for problem in found.report.problems]) == (2, [1])


def test_damaged_gzip_gives_the_rows_before_the_damage(datasets: Datasets) -> None:
    checks = (zlib.crc32(b"%d" % number) for number in range(50_000))
    rows = [b'{"prompt": "%d", "completion": "%d"}\n' % (number, check) for number, check in enumerate(checks)]
    content = bytearray(gzip.compress(b"".join(rows)))
    content[-2000:-1000] = bytes(1000)
    found = send(datasets, bytes(content), on_error="skip")
    assert 20_000 < found.rows < 50_000
    assert [problem.line for problem in found.report.problems] == [found.rows + 1]
    assert "damaged" in found.report.problems[0].detail


def test_gzip_cut_before_its_first_row_is_refused(datasets: Datasets) -> None:
    with pytest.raises(InvalidDataset) as caught:
        send(datasets, gzip.compress(GOOD)[:12], on_error="skip")
    assert "end too early" in caught.value.errors[0].detail
