"""Files that come from outside: zip archives unpacked safely, single files, and folders of the server.

A name in an archive decides only where inside the target folder its file goes: absolute names, `..`, drive letters,
links, and names that fall together on a file system that ignores case are refused before anything is written. What an
archive unpacks to is bounded by what it declares and, while unpacking, by what it really holds: in bytes, in bytes for
each byte that was sent, and in files, whose list is bounded before it is read. An archive within one stays as it is.
"""

from __future__ import annotations

import lzma
import os
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from datastore.errors import InvalidInput, PathNotAllowed, TooLarge

CHUNK = 1 << 20  # bytes copied at a time
LONGEST_NAME = 255  # bytes of one part of a path, on common file systems
LONGEST_PATH = 1024  # bytes
DEEPEST = 32  # parts of a path: every file could bring folders of its own, and a folder costs the disk more than a file

LONGEST_LIST = 32 << 20  # bytes of a zip's list of files: 100,000 of 300 bytes; all of it is held in memory
EXPANSION_LIMIT = 200  # unpacked bytes per byte of what is packed; text compresses 3 to 20 times
EXPANSION_FLOOR = 256 << 20  # unpacked bytes that any file may reach

_OTHER_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_LEFT_OUT = ("__MACOSX", ".DS_Store", "Thumbs.db")
"""What file managers put beside the files."""


@dataclass(frozen=True)
class Limits:
    """How much one upload may unpack to."""

    bytes: int = 16 * 2**30
    entries: int = 100_000


def unpack(upload: BinaryIO, filename: str, into: Path, *, limits: Limits | None = None) -> list[Path]:
    """Write an upload into the folder `into`: the files of a `.zip`, or the one file it is under its own name.

    Returns the files written. Raises InvalidInput for what is unsafe or damaged and TooLarge beyond `limits`; `into`
    may then hold some of the files, and is thrown away by the caller.
    """
    limits = limits or Limits()
    lowered = filename.lower()
    if lowered.endswith(_OTHER_ARCHIVES):
        raise InvalidInput(f"{filename!r} is an archive that is not read here: send a zip, or the files themselves")
    if lowered.endswith(".zip"):
        return _unpack_zip(upload, filename, into, limits)
    target = _free(into, safe_name(filename))
    _copy(upload, target, filename, at_most=limits.bytes)
    return [target]


def allowance(size: int) -> int:
    """The most bytes that so many packed ones may plausibly unpack to."""
    return max(EXPANSION_FLOOR, EXPANSION_LIMIT * size)


def safe_name(name: str) -> PurePosixPath:
    """The relative path that a name sent from outside means; raises InvalidInput where it is not one.

    >>> safe_name("dev\\\\anatomy_dev.csv"), safe_name("./a//b.json")
    (PurePosixPath('dev/anatomy_dev.csv'), PurePosixPath('a/b.json'))
    """
    path = PurePosixPath(name.replace("\\", "/"))
    parts = path.parts
    if not parts or path.is_absolute():
        raise InvalidInput(f"{name!r} is no relative file name: send files by names like dev/anatomy_dev.csv")
    if ".." in parts:
        raise InvalidInput(f"{name!r} leads out of its folder: send files by names like dev/anatomy_dev.csv")
    if ":" in parts[0][:2] or any(unicodedata.category(mark) in {"Cc", "Cs"} for mark in name):
        raise InvalidInput(f"{name!r} has a drive letter or a control character in it: rename the file")
    sizes = [len(part.encode()) for part in parts]
    if max(sizes) > LONGEST_NAME or sum(sizes) + len(sizes) > LONGEST_PATH:
        raise InvalidInput(f"the file name {name[:60]!r}… is too long: rename the file")
    if len(parts) > DEEPEST:
        raise InvalidInput(f"{name[:60]!r}… lies more than {DEEPEST} folders deep: pack the inner folder alone")
    return path


def allowed_path(path: str | Path, roots: Sequence[Path]) -> Path:
    """The server path that `path` leads to, links followed; raises PathNotAllowed unless it exists inside a root."""
    shown = ", ".join(str(root) for root in roots) or "there are none: serve --allow FOLDER names some"
    try:
        real = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, not readable, a NUL in the name, a loop of links
        real = None
    if real is None or not any(real.is_relative_to(root.resolve()) for root in roots):
        # one answer for both: whether a path outside the roots exists is nobody's business
        raise PathNotAllowed(f"{str(path)!r} is nothing inside the allowed folders ({shown})")
    return real


def allowed_folder(path: str | Path, roots: Sequence[Path]) -> Path:
    """Like `allowed_path`, for a folder all of whose files are read: no link in it may lead out of the roots."""
    folder = allowed_path(path, roots)
    for file in folder.rglob("*"):
        if file.is_symlink():
            allowed_path(file, roots)
    return folder


# Zip -----------------------------------------------------------------------------------------------------------------

_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
"""What zipfile raises over damage: OSError from bz2, ValueError for a place before the file or a name not in UTF-8."""


def _unpack_zip(upload: BinaryIO, filename: str, into: Path, limits: Limits) -> list[Path]:
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Bounded(upload, filename))) as archive:
            entries = _entries(archive, filename, limits, size=upload.seek(0, os.SEEK_END))
            return [_extract(archive, entry, _free(into, path), filename) for entry, path in entries]
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of bz2
            raise
        raise InvalidInput(f"{filename!r} is damaged or no zip archive ({error}): pack and send it again") from error
    except (NotImplementedError, RuntimeError) as error:  # an unknown compression
        raise InvalidInput(f"{filename!r} cannot be unpacked ({error}): pack it as an ordinary zip") from error


class _Bounded:
    """A zip file whose list of files, which zipfile reads in one piece, is not too long to be held."""

    def __init__(self, file: BinaryIO, filename: str) -> None:
        self._file = file
        self._filename = filename

    def read(self, size: int = -1) -> bytes:
        """Read; no other part of an archive is asked for in pieces as large as a list that is too long."""
        if size > LONGEST_LIST:
            raise TooLarge(
                f"the list of files in {self._filename!r} has {size:,} bytes; at most {LONGEST_LIST:,} are read"
            )
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _entries(
    archive: zipfile.ZipFile, filename: str, limits: Limits, *, size: int
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of an archive of `size` bytes and where they go; everything that can be checked before writing is."""
    infos = archive.infolist()
    if len(infos) > limits.entries:
        raise TooLarge(f"{filename!r} holds {len(infos):,} files; at most {limits.entries:,} are unpacked")
    declared = sum(info.file_size for info in infos)
    allowed = min(limits.bytes, allowance(size))
    if declared > allowed:
        raise TooLarge(f"{filename!r} unpacks to {declared:,} bytes; of its size at most {allowed:,} are allowed")
    files = [info for info in infos if not info.filename.endswith(("/", "\\"))]
    for info in files:
        _refuse_special(info, filename)
    named = [(info, safe_name(info.filename)) for info in files]
    kept = [(info, path) for info, path in named if not any(part in _LEFT_OUT for part in path.parts)]
    if not kept:
        raise InvalidInput(f"{filename!r} holds no file")
    _refuse_collisions((path for _, path in kept), filename)
    return kept


def _refuse_special(info: zipfile.ZipInfo, filename: str) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in {0, stat.S_IFREG}:
        raise InvalidInput(f"{info.filename!r} in {filename!r} is a link or a device: pack the files themselves")
    if info.flag_bits & 0x1:
        raise InvalidInput(f"{info.filename!r} in {filename!r} is encrypted: pack it without a password")


def _refuse_collisions(paths: Iterable[PurePosixPath], filename: str) -> None:
    """Refuse two names that are one file, or a file and a folder, where case and Unicode form do not count."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        key = _folded(path)
        parents = {_folded(parent) for parent in path.parents}
        if key in seen | folders or parents & seen:
            raise InvalidInput(f"{str(path)!r} stands twice in {filename!r}, perhaps in another spelling: rename one")
        seen.add(key)
        folders |= parents


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(path).casefold())


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, filename: str) -> Path:
    with archive.open(info) as source:
        _copy(source, target, f"{info.filename!r} in {filename!r}", at_most=info.file_size)
    return target


# Files ---------------------------------------------------------------------------------------------------------------


def _free(into: Path, name: PurePosixPath) -> Path:
    target = into / name
    if target.exists() or target.is_symlink():
        raise InvalidInput(f"two uploaded files are called {str(name)!r}: rename one")
    return target


def _copy(source: IO[bytes], target: Path, label: str, *, at_most: int) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInput(f"{label} stands in a folder that is also a file: rename one") from error
    written = 0
    with target.open("xb") as file:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > at_most:
                raise TooLarge(f"{label} holds more than {at_most:,} bytes")
            file.write(chunk)
