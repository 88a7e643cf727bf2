"""What is sent as a file: a path, an open file, or a folder that is zipped while it is being sent.

A source is opened anew for every attempt, so that a retry sends the whole file again. A folder is never written to a
temporary zip: its entries are stored uncompressed, in sorted order and with a fixed date, so that the same files give
the same bytes; the price is that its length is not known beforehand and travels in chunks.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from gradstore.errors import ConnectionFailed

_READ_SIZE = 1 << 20  # bytes read of a folder's file at a time

PathOrFile = str | os.PathLike[str] | BinaryIO


class Readable(Protocol):
    """The part of a binary file that sending needs."""

    def read(self, size: int = -1, /) -> bytes: ...


class Source(Protocol):
    """Something that can be sent, more than once where it can be read again."""

    @property
    def filename(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def open(self) -> AbstractContextManager[Readable]: ...


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The body of a multipart request: form fields and one file."""

    source: Source
    field: str
    """Name of the form field that holds the file."""
    form: Mapping[str, str]
    progress: bool = False


@dataclass(frozen=True)
class StoredFile:
    """A file of this machine."""

    path: Path
    filename: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        """Open it at its beginning."""
        return self.path.open("rb")


class OpenFile:
    """A file somebody else opened: read from where it stands, left open, and rewound for a retry if it can be."""

    def __init__(self, file: BinaryIO, filename: str) -> None:
        self.filename = filename
        self._file = file
        self._start = file.tell() if _seekable(file) else None
        self._used = False

    @property
    def size(self) -> int | None:
        """Bytes from where it stands to its end; None for a pipe."""
        if self._start is None:
            return None
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(self._start)
        return end - self._start

    def open(self) -> AbstractContextManager[Readable]:
        """Rewind it; ConnectionFailed where a pipe has been read already."""
        if self._start is not None:
            self._file.seek(self._start)
        elif self._used:
            raise ConnectionFailed(
                f"the connection broke while {self.filename} was being sent, and a pipe cannot be read again: "
                "save it to a file and upload that"
            )
        self._used = True
        return _LeftOpen(self._file)


@dataclass(frozen=True)
class Folder:
    """A folder, sent as a zip of its files; hidden files stay out."""

    path: Path

    @property
    def filename(self) -> str:
        """Name of the zip."""
        return f"{self.path.resolve().name}.zip"

    @property
    def size(self) -> None:
        """Not known before it is sent."""
        return

    def open(self) -> AbstractContextManager[Readable]:
        """Begin zipping; ValueError where the folder holds no file."""
        files = self.files()
        if not files:
            raise ValueError(f"{self.path} holds no files")
        return _ZipReader(self.path, files)

    def files(self) -> list[Path]:
        """The files that are sent, in order."""
        return sorted(
            path
            for path in self.path.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        )


def source(file: PathOrFile, *, filename: str | None = None) -> Source:
    """Take a path of a file or folder, or an open binary file."""
    if isinstance(file, str | os.PathLike):
        path = Path(file)
        return Folder(path) if path.is_dir() else StoredFile(path, filename or path.name)
    if isinstance(file, io.TextIOBase):
        raise TypeError("open the file in binary mode ('rb'): it is sent byte for byte")
    named = getattr(file, "name", None)
    return OpenFile(file, filename or (Path(named).name if isinstance(named, str) else "upload"))


class CountedReads:
    """A file whose reads are told to somebody, with its length where it is known."""

    def __init__(self, file: Readable, size: int | None, read: Callable[[int], object]) -> None:
        self._file = file
        self._size = size
        self._told = read

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data = self._file.read(size)
        self._told(len(data))
        return data

    def tell(self) -> int:
        """Where the reading begins."""
        return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Answer the one question that seeking is used for here: how long the file is."""
        if self._size is None:
            raise io.UnsupportedOperation("the length is not known")
        return self._size if whence == os.SEEK_END else offset


class _LeftOpen(AbstractContextManager["_LeftOpen"]):
    """Reads a file without closing it."""

    def __init__(self, file: Readable) -> None:
        self.read = file.read

    def __exit__(self, *_: object) -> None:
        return None


class _ZipReader(AbstractContextManager["_ZipReader"]):
    """The bytes of a zip, made while they are read."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        self._pieces = _zip(root, files)
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; empty at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        taken = self._rest if size < 0 else self._rest[:size]
        self._rest = self._rest[len(taken) :]
        return taken

    def __exit__(self, *_: object) -> None:
        self._pieces.close()


class _Pipe(io.RawIOBase):
    """What a ZipFile writes to; it can only go forward."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # RawIOBase promises any buffer; bytes is what comes
        self._pieces.append(bytes(data))
        return len(data)

    def drain(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


def _zip(root: Path, files: list[Path]) -> Generator[bytes, None, None]:
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # ZIP_STORED: adapters and text rows are small or incompressible
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())  # dated 1980
            entry.file_size = path.stat().st_size  # beyond 2 GiB zipfile chooses Zip64 by this
            with path.open("rb") as content, archive.open(entry, "w") as member:
                while chunk := content.read(_READ_SIZE):
                    member.write(chunk)
                    yield pipe.drain()
    yield pipe.drain()


def _seekable(file: BinaryIO) -> bool:
    try:
        return file.seekable()
    except AttributeError:
        return False
