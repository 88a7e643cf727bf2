"""Rows out of JSON text that arrives in chunks: the lines of JSONL, the elements of one JSON array.

At most one row is held, and none longer than `ROW_LIMIT`. What cannot be read comes back as `Unreadable` in its place,
so that the caller decides whether the rows around it are wanted. The elements of an array are found by following
brackets and quotes, not by parsing: a malformed element is refused alone, and a byte is looked at once however the
chunks fall.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

ROW_LIMIT = 64 << 20  # bytes of one row; a longer one is a bad row
TOO_LONG = f"the row is longer than {ROW_LIMIT >> 20} MiB"
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class RawRow:
    """One row, not parsed yet."""

    line: int
    """Line of a JSONL file, else position of the row, from 1."""
    text: bytes
    """JSON, supposed to be UTF-8."""
    ended: bool = True
    """False for a last line without its line end."""


@dataclass(frozen=True)
class Unreadable:
    """A place where no row could be got out of the file."""

    line: int
    detail: str


class Cut(Exception):
    """The data stop before their end; what came before is sound."""


class _Pieces:
    """A row gathered over chunks; beyond ROW_LIMIT its bytes are dropped."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= ROW_LIMIT:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def take(self) -> bytes | None:
        """What was gathered, or None where it was too much."""
        text = None if self._size > ROW_LIMIT else b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        return text


def lines(chunks: Iterable[bytes]) -> Iterator[RawRow | Unreadable]:
    """The lines of JSONL: ended by \\n or \\r\\n and nothing else, blank ones left out."""
    number, pieces = 1, _Pieces()
    try:
        for chunk in chunks:
            *ended, rest = chunk.split(b"\n")
            for part in ended:
                pieces.add(part)
                yield from _line(number, pieces.take(), ended=True)
                number += 1
            pieces.add(rest)
    except Cut as cut:
        yield Unreadable(number, str(cut))
    else:
        yield from _line(number, pieces.take(), ended=False)


def _line(number: int, text: bytes | None, *, ended: bool) -> Iterator[RawRow | Unreadable]:
    if text is None:
        yield Unreadable(number, TOO_LONG)
        return
    text = text.removeprefix(BOM).removesuffix(b"\r")  # files joined by cat have a mark in their middle
    if text.strip():
        yield RawRow(number, text, ended=ended)


_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')


def elements(chunks: Iterable[bytes]) -> Iterator[RawRow | Unreadable]:
    """The elements of one JSON array, by position from 1."""
    scanner = _ArrayScanner()
    try:
        for chunk in chunks:
            yield from scanner.feed(chunk)
    except Cut as cut:
        yield Unreadable(scanner.position, str(cut))
    else:
        yield from scanner.end()


class _ArrayScanner:
    """Where the elements of an array begin and end, whatever is inside them."""

    def __init__(self) -> None:
        self.position = 1
        self._pieces = _Pieces()
        self._state: Literal["before", "inside", "after"] = "before"
        self._depth = 0
        self._in_string = False
        self._skip = 0  # bytes of the next chunk that a backslash at the end of this one has used up
        self._trailing = False

    def feed(self, chunk: bytes) -> Iterator[RawRow | Unreadable]:
        start = 0
        if self._state == "before":
            start = self._open(chunk)
        if self._state == "inside":
            start = yield from self._elements(chunk, start)
        if self._state == "after" and not self._trailing and chunk[start:].strip():
            self._trailing = True
            yield Unreadable(
                self.position,
                "more text follows the closing bracket of the array; in JSONL every line must be an object",
            )

    def end(self) -> Iterator[Unreadable]:
        if self._state != "after":
            yield Unreadable(self.position, "the file ends inside the array: was it cut off?")

    def _open(self, chunk: bytes) -> int:
        at = chunk.find(b"[")  # only a byte-order mark and white space stand before it
        if at >= 0:
            self._state = "inside"
        return at + 1

    def _elements(self, chunk: bytes, start: int) -> Generator[RawRow | Unreadable, None, int]:
        """Yields the elements that end in this chunk; returns where the unread rest begins."""
        at = start + self._skip
        self._skip = 0
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(chunk, at):
            mark, at = found[0], found.end()
            if mark == b"\\":
                at += 1
            elif mark == b'"':
                self._in_string = not self._in_string
            elif mark in (b"[", b"{"):
                self._depth += 1
            elif mark != b"," and self._depth:
                self._depth -= 1
            elif mark in (b",", b"]") and not self._depth:
                self._pieces.add(chunk[start : found.start()])
                yield from self._take(last=mark == b"]")
                start = at
                if mark == b"]":
                    self._state = "after"
                    return start
        self._pieces.add(chunk[start:])
        self._skip = max(0, at - len(chunk)) if self._in_string else 0
        return len(chunk)

    def _take(self, *, last: bool) -> Iterator[RawRow | Unreadable]:
        text = self._pieces.take()
        if text is None:
            yield Unreadable(self.position, TOO_LONG)
        elif text := text.strip():
            yield RawRow(self.position, text)
        elif not last:
            yield Unreadable(self.position, "nothing stands before this comma")
        elif self.position > 1:
            yield Unreadable(self.position, "a comma stands before the closing bracket of the array")
        self.position += 1
