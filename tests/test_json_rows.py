"""The readers see the same rows wherever the chunks fall, hold one row at a time, and say what is wrong where."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore import files
from datastore.files import gunzip, utf8
from datastore.json_rows import ROW_LIMIT, Cut, RawRow, Unreadable, elements, lines
from datastore.strict_json import NotJson, canonical, compact, parse

TEXT = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def cut(content: bytes, places: Sequence[int]) -> list[bytes]:
    """The content in pieces, cut at the places given (anywhere, in any order)."""
    ends = sorted({0, len(content), *(place % (len(content) + 1) for place in places)})
    return [content[start:stop] for start, stop in pairwise(ends)]


PLACES = st.lists(st.integers(0, 10_000), max_size=30)


def texts(rows: Iterator[RawRow | Unreadable]) -> list[object]:
    return [json.loads(row.text) if isinstance(row, RawRow) else row for row in rows]


@settings(deadline=None)
@given(st.lists(VALUES, max_size=6), PLACES, st.sampled_from([None, 1]), st.booleans())
def test_an_array_has_the_same_elements_however_it_is_cut(
    values: list[object], places: list[int], indent: int | None, escaped: bool
) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=escaped).encode()
    assert texts(elements(cut(content, places))) == values


@settings(deadline=None)
@given(st.lists(VALUES, max_size=6), PLACES, st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_lines_are_the_same_however_they_are_cut(
    values: list[object], places: list[int], end: bytes, closed: bool
) -> None:
    content = end.join(json.dumps(value, ensure_ascii=False).encode() for value in values) + (end if closed else b"")
    assert texts(lines(cut(content, places))) == values


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4), PLACES)
def test_gzip_members_follow_one_another_however_they_are_cut(members: list[bytes], places: list[int]) -> None:
    content = b"".join(gzip.compress(member, mtime=0) for member in members)
    assert b"".join(gunzip(cut(content, places), limit=1 << 20)) == b"".join(members)


@settings(deadline=None)
@given(TEXT, PLACES, st.sampled_from(["utf-16-le", "utf-16-be"]))
def test_utf_16_is_the_same_text_however_it_is_cut(text: str, places: list[int], encoding: str) -> None:
    assert b"".join(utf8(cut(text.encode(encoding), places), encoding)) == text.encode()  # type: ignore[arg-type]  # sampled


@settings(deadline=None)
@given(VALUES)
def test_the_canonical_text_depends_on_the_value_alone(value: object) -> None:
    spellings = [json.dumps(value, indent=2), json.dumps(value, ensure_ascii=False), compact(value).decode()]
    assert {canonical(parse(spelling.encode())) for spelling in spellings} == {canonical(value)}


def test_keys_in_another_order_are_the_same_value() -> None:
    assert canonical(parse(b'{"b": [1, {"d": 1, "c": 2}], "a": 1}')) == b'{"a":1,"b":[1,{"c":2,"d":1}]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"b": {"a": 1, "a": 1}}', "the key 'a' stands twice"),
        (b'{"a": "\\ud83d"}', "the lone surrogate \\ud83d"),
        (b'{"\\ude00": 1}', "the lone surrogate \\ude00"),
        (b'{"a": "\x01"}', "a raw control character in a string at character 8"),
        (b'{"a": "b\tc"}', "a raw control character"),
        (b'{"a": "\xe9"}', "byte 0xE9 at position 8 is not UTF-8"),
        (b"{'a': 1}", "single quotes at character 2"),
        (b'{"a": 1,}', "a comma before the closing bracket"),
        (b'{"a": [1,]}', "a comma before the closing bracket"),
        (b'{"a": 1} {"b": 2}', "more than one JSON value: a second one begins at character 10"),
        (b'{"a": "b', "the string that begins at character 7 never ends"),
        (b'{"a": 1', "the row ends too early"),
        (b"// exported", "a comment"),
        (b"# exported", "a comment"),
        (b'{"a": yes}', "not JSON at character 7"),
        (b"[" * 200_000, "nested deeper than 100 levels"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper than 100 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"\x00\x00\x00", "not JSON at character 1"),
    ],
)
def test_what_is_not_strict_json_is_refused_with_place_and_reason(text: bytes, reason: str) -> None:
    with pytest.raises(NotJson) as caught:
        canonical(parse(text))
    assert reason in str(caught.value)


def test_nesting_to_the_limit_is_taken_and_brackets_in_text_do_not_count() -> None:
    parse(b"[" * 100 + b"]" * 100)
    parse(b'["' + b"[{" * 1000 + b'"]')
    parse(b"[" + b",".join([b"{}"] * 1000) + b"]")


def test_a_repeated_key_is_found_among_many_without_delay() -> None:
    """Looking through all earlier keys for each one took minutes, in which nothing else was served."""
    pairs = b",".join(b'"%d":0' % number for number in range(200_000))
    began = time.monotonic()
    with pytest.raises(NotJson, match="the key '199999' stands twice"):
        parse(b"{" + pairs + b',"199999":1}')
    assert time.monotonic() - began < 10


def test_only_a_line_feed_ends_a_line() -> None:
    content = '{"a": "one\u2028two\u2029three\u0085four\x0b"}\r\n{"b": 1}'.encode()
    first, second = lines([content])
    assert (first, second) == (
        RawRow(1, '{"a": "one\u2028two\u2029three\u0085four\x0b"}'.encode()),
        RawRow(2, b'{"b": 1}', ended=False),
    )


def test_lines_are_counted_with_the_blank_ones() -> None:
    assert [row.line for row in lines([b"\n \t\r\n1\n\n2\n"])] == [3, 5]


def test_a_byte_order_mark_at_the_start_of_any_line_is_packaging() -> None:
    bom = b"\xef\xbb\xbf"
    assert [row.text for row in lines([bom + b"1\n", bom + b"2\n"]) if isinstance(row, RawRow)] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("content", "good", "place"),
    [
        (b"[1, {, }, 3]", [b"1", b"{, }", b"3"], None),
        (b"[1,, 3]", [b"1", b"3"], (2, "nothing stands before this comma")),
        (b"[1, 2,]", [b"1", b"2"], (3, "a comma stands before the closing bracket")),
        (b"[1, 2] [3]", [b"1", b"2"], (3, "more text follows the closing bracket")),
        (b"[1, 2", [b"1"], (2, "the file ends inside the array")),
        (b'[1, "a]', [b"1"], (2, "the file ends inside the array")),
        (b"[1, 2 }, 3]", [b"1", b"2 }", b"3"], None),
        (b"[]", [], None),
        (b"\xef\xbb\xbf\n [ ] \n", [], None),
    ],
)
def test_an_array_gives_what_can_be_got_and_the_place_that_is_wrong(
    content: bytes, good: list[bytes], place: tuple[int, str] | None
) -> None:
    for chunks in ([content], [bytes([byte]) for byte in content]):
        found = list(elements(chunks))
        assert [row.text for row in found if isinstance(row, RawRow)] == good
        wrong = [(row.line, row.detail) for row in found if isinstance(row, Unreadable)]
        assert len(wrong) == (place is not None)
        assert place is None or (wrong[0][0] == place[0] and wrong[0][1].startswith(place[1]))


def test_a_row_beyond_the_limit_is_left_out_alone() -> None:
    long = (b"a" * (1 << 20) for _ in range((ROW_LIMIT >> 20) + 1))
    jsonl = list(lines([b"1\n", *long, b"\n3\n"]))
    long = (b"a" * (1 << 20) for _ in range((ROW_LIMIT >> 20) + 1))
    array = list(elements([b"[1,", *long, b",3]"]))
    for rows in (jsonl, array):
        assert [type(row) for row in rows] == [RawRow, Unreadable, RawRow]
        assert rows[1] == Unreadable(2, "the row is longer than 64 MiB")


@pytest.mark.parametrize("read", [lines, elements])
def test_a_reader_never_holds_more_than_a_row(read: object) -> None:
    row = b'{"a": "' + b"x" * 1000 + b'"}'
    start, between = (b"[", b",") if read is elements else (b"", b"\n")

    def chunks() -> Iterator[bytes]:
        yield start
        for _ in range(300):
            yield (row + between) * 100

    tracemalloc.start()
    try:
        count = sum(isinstance(found, RawRow) for found in read(chunks()))  # type: ignore[operator]  # one of the two
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 30_000  # 30 MB went through
    assert peak < 2_000_000


def test_gzip_that_ends_early_gives_its_rows_and_then_says_so() -> None:
    content = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(20_000)), mtime=0)
    *rows, last = lines(gunzip([content[: len(content) // 2]], limit=1 << 30))
    assert len(rows) > 1000
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    assert isinstance(last, Unreadable)
    assert last.line == len(rows) + 1
    assert "end too early" in last.detail


def test_gzip_with_other_bytes_behind_it_is_damaged() -> None:
    with pytest.raises(Cut, match="damaged"):
        list(gunzip([gzip.compress(b"1\n") + b"rest"], limit=100))


def test_zero_bytes_behind_gzip_are_padding() -> None:
    assert b"".join(gunzip([gzip.compress(b"1\n") + bytes(512)], limit=100)) == b"1\n"


def test_utf_16_that_ends_inside_a_character_gives_its_rows_and_then_says_so() -> None:
    first, last = lines(utf8(["1\n2".encode("utf-16-le")[:-1]], "utf-16-le"))
    assert first == RawRow(1, b"1")
    assert last == Unreadable(2, "the UTF-16 text ends in the middle of a character: the file was cut off")


def test_a_lone_surrogate_in_utf_16_is_a_fault_of_its_row_only() -> None:
    content = '"a"\n"'.encode("utf-16-le") + b"\x3d\xd8" + '"\n"b"'.encode("utf-16-le")
    rows = [row.text for row in lines(utf8([content], "utf-16-le")) if isinstance(row, RawRow)]
    assert [rows[0], rows[2]] == [b'"a"', b'"b"']
    with pytest.raises(NotJson):
        parse(rows[1])


def test_many_empty_gzip_members_are_read_without_delay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a member is copied for each: with a MiB at a time, a few megabytes of them took minutes."""
    path = tmp_path / "pool.jsonl.gz"
    path.write_bytes(gzip.compress(b"") * 50_000 + gzip.compress(b"{}\n"))
    seconds = []
    for size in (files.PACKED, files.CHUNK):
        monkeypatch.setattr(files, "PACKED", size)
        began = time.process_time()
        assert texts(files.read(path, files.sniff(path))) == [{}]
        seconds.append(time.process_time() - began)
    assert seconds[0] < seconds[1] / 2
