"""Files of rows as people have them: JSONL, JSON arrays and Parquet, gzipped or not, in UTF-8 or UTF-16.

Everything is told by the bytes, never by the file's name, and everything is read as a stream: one row, one chunk
(`CHUNK`) or one Parquet batch is held at a time.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datastore import json_rows, parquet_rows
from datastore.archives import EXPANSION_LIMIT, allowance
from datastore.errors import InvalidDataset, TooLarge
from datastore.json_rows import BOM, Cut, RawRow, Unreadable

CHUNK = 1 << 20  # bytes read, or decompressed, at a time
PACKED = 1 << 16  # bytes of gzip at a time: what follows the end of a member is copied for every member

Format = Literal["jsonl", "json", "parquet"]
Encoding = Literal["utf-8", "utf-16-le", "utf-16-be"]

_REFUSED = {
    b"version https://git-lfs": "this is a Git-LFS pointer, not the data: run git lfs pull, then upload the file again",
    b"PK\x03\x04": "this is a zip archive: upload the files in it one by one",
    b"BZh": "bzip2 is not read: decompress the file, or compress it with gzip",
    b"\xfd7zXZ\x00": "xz is not read: decompress the file, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "zstd is not read: decompress the file, or compress it with gzip",
    b"PARE": "the Parquet file is encrypted: write it without encryption",
    b"ARROW1": "this is an Arrow file: save it as Parquet",
    b"\xff\xfe\x00\x00": "UTF-32 is not read: save the file as UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32 is not read: save the file as UTF-8",
}
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True)
class Packaging:
    """How the rows are packed."""

    format: Format
    compressed: bool = False
    encoding: Encoding = "utf-8"


def sniff(path: Path) -> Packaging:
    """How the file is packed, by its first bytes; raises InvalidDataset for what is no file of rows."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InvalidDataset("the file is empty (0 bytes)")
    _refuse(head)
    if head.startswith(_PARQUET):
        return Packaging("parquet")
    compressed = head.startswith(_GZIP)
    encoding = _encoding(_beginning(path, compressed=compressed) if compressed else head)
    packaging = Packaging("jsonl", compressed=compressed, encoding=encoding)
    return Packaging(_layout(_text(path, packaging)), compressed=compressed, encoding=encoding)


def read(path: Path, packaging: Packaging) -> Iterator[RawRow | Unreadable]:
    """Every row of the file in order, and every place where none could be read.

    Raises TooLarge where the file decompresses to implausibly much, InvalidDataset where it cannot be opened at all.
    """
    if packaging.format == "parquet":
        limit = allowance(path.stat().st_size)
        return _bounded(parquet_rows.rows(path, limit=limit), limit=limit)
    text = _text(path, packaging)
    return json_rows.elements(text) if packaging.format == "json" else json_rows.lines(text)


# Bytes --------------------------------------------------------------------------------------------------------------


def _refuse(head: bytes) -> None:
    for magic, advice in _REFUSED.items():
        if head.startswith(magic):
            raise InvalidDataset(advice)


def _text(path: Path, packaging: Packaging) -> Iterator[bytes]:
    """The file's text in UTF-8, decompressed."""
    chunks = _chunks(path, PACKED if packaging.compressed else CHUNK)
    if packaging.compressed:
        chunks = gunzip(chunks, limit=allowance(path.stat().st_size))
    return chunks if packaging.encoding == "utf-8" else utf8(chunks, packaging.encoding)


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the file decompresses to more than {limit:,} bytes, over {EXPANSION_LIMIT} times its size: "
        "decompress it and upload the text itself"
    )


def _bounded(rows: Iterator[RawRow | Unreadable], *, limit: int) -> Iterator[RawRow | Unreadable]:
    total = 0
    for row in rows:
        total += len(row.text) if isinstance(row, RawRow) else 0
        if total > limit:
            raise _too_large(limit)
        yield row


def gunzip(chunks: Iterable[bytes], *, limit: int) -> Iterator[bytes]:
    """The content of one or several gzip members; raises Cut where they end early or are damaged."""
    member = zlib.decompressobj(wbits=31)
    total = 0
    for chunk in chunks:
        data, full = chunk, False
        while data or full:
            if member.eof:
                data = data.lstrip(b"\0")  # tape and block padding, which gzip allows
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                out = member.decompress(data, CHUNK)
            except zlib.error as error:
                raise Cut(f"the gzip data are damaged from here on ({error})") from error
            total += len(out)
            if total > limit:
                raise _too_large(limit)
            if out:
                yield out
            full = len(out) == CHUNK and not member.eof
            data = member.unused_data if member.eof else member.unconsumed_tail
    if not member.eof:
        raise Cut("the gzip data end too early: the file was cut off on its way, so upload it again")


def utf8(chunks: Iterable[bytes], encoding: Encoding) -> Iterator[bytes]:
    """The text in UTF-8. A lone surrogate stays in its row as bytes that are no UTF-8, and is refused with that row."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
    try:
        rest = decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Cut("the UTF-16 text ends in the middle of a character: the file was cut off") from error
    if rest:
        yield rest.encode("utf-8", "surrogatepass")


# Sniffing -----------------------------------------------------------------------------------------------------------


def _beginning(path: Path, *, compressed: bool) -> bytes:
    try:
        first = next(_text(path, Packaging("jsonl", compressed=compressed)), b"")
    except Cut:
        return b""
    _refuse(first)
    if first.startswith(_GZIP):
        raise InvalidDataset("this is gzip inside gzip: decompress the file once")
    if first.startswith(_PARQUET):
        raise InvalidDataset("this is Parquet inside gzip: upload the Parquet file itself, which is compressed already")
    return first


def _encoding(head: bytes) -> Encoding:
    """By byte-order mark, else by where the zero bytes of the first, necessarily ASCII, character are."""
    if head.startswith(codecs.BOM_UTF16_LE) or (head[1:2] == b"\0" and head[:1] != b"\0"):
        return "utf-16-le"
    if head.startswith(codecs.BOM_UTF16_BE) or (head[:1] == b"\0" and head[1:2] != b"\0"):
        return "utf-16-be"
    return "utf-8"


def _layout(text: Iterator[bytes]) -> Literal["jsonl", "json"]:
    start = _first_text(text)
    first, _, rest = start.partition(b"\n")
    first = first.strip()
    if start.startswith(b"<"):
        raise InvalidDataset("this is an HTML or XML page, not rows: was an error or log-in page saved as the file?")
    if first == b"{" and rest.strip():
        raise InvalidDataset(
            "the file is one JSON object written over several lines: "
            "gradstore reads JSONL (one object per line) or a JSON array of objects"
        )
    a_bad_line = first.endswith(b"]") and rest.lstrip().startswith(b"{")
    return "json" if start.startswith(b"[") and not a_bad_line else "jsonl"


def _first_text(chunks: Iterator[bytes]) -> bytes:
    """The first chunk from its first visible character on."""
    try:
        for chunk in chunks:
            text = chunk.removeprefix(BOM).lstrip()
            if text:
                return text
    except Cut:
        pass  # the reader meets the same place again and reports it
    return b""
