"""What comes from outside is unpacked inside its folder, bounded, or refused."""

from __future__ import annotations

import errno
import io
import re
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datastore.archives import Limits, allowed_folder, allowed_path, safe_name, unpack
from datastore.errors import InvalidInput, PathNotAllowed, TooLarge


def archive(*files: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as packed:
        for name, content in files:
            packed.writestr(name, content)
    buffer.seek(0)
    return buffer


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_zip_is_unpacked_with_its_folders(tmp_path: Path) -> None:
    packed = archive(("mmlu/dev/a.csv", b"1"), ("mmlu/test/a.csv", b"2"), ("mmlu/empty/", b""))
    written = unpack(packed, "MMLU.ZIP", tmp_path)
    assert tree(tmp_path) == {"mmlu/dev/a.csv": b"1", "mmlu/test/a.csv": b"2"}
    assert sorted(written) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_a_zip_from_windows_with_backslashes_has_the_same_folders(tmp_path: Path) -> None:
    unpack(archive(("mmlu\\dev\\", b""), ("mmlu\\dev\\a.csv", b"1")), "a.zip", tmp_path)
    assert tree(tmp_path) == {"mmlu/dev/a.csv": b"1"}


def test_what_file_managers_add_is_left_out(tmp_path: Path) -> None:
    packed = archive(("a.csv", b"1"), ("__MACOSX/._a.csv", b"x"), (".DS_Store", b"x"))
    unpack(packed, "a.zip", tmp_path)
    assert tree(tmp_path) == {"a.csv": b"1"}


def test_a_single_file_is_kept_under_its_name_whatever_it_holds(tmp_path: Path) -> None:
    content = archive(("inside", b"1")).getvalue()  # as torch's .pt files: zip archives that are meant as they are
    assert unpack(io.BytesIO(content), "run/optimizer.pt", tmp_path) == [tmp_path / "run" / "optimizer.pt"]
    assert tree(tmp_path) == {"run/optimizer.pt": content}


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    [
        "../out.csv",
        "a/../../out.csv",
        "/etc/out.csv",
        "\\\\host\\out.csv",
        "..\\out.csv",
        "C:\\out.csv",
        "C:out.csv",
        "a\nb.csv",
        "x" * 300,
        "/".join(["y" * 200] * 6),
    ],
)
def test_a_name_that_leads_outside_is_refused_in_a_zip_and_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "into"
    folder.mkdir()
    with pytest.raises(InvalidInput):
        unpack(archive(("fine.csv", b"1"), (name, b"2")), "a.zip", folder)
    with pytest.raises(InvalidInput):
        unpack(io.BytesIO(b"2"), name, folder)
    assert tree(tmp_path) == {}  # checked before anything is written


@pytest.mark.parametrize(
    "names",
    [
        ("a.csv", "a.csv"),
        ("a.csv", "A.csv"),
        ("é.csv", "e\u0301.csv"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("a/b", "./a//b"),
        ("A/x", "a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # zipfile's own, while the test packs
def test_names_that_may_be_one_file_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="stands twice"):
        unpack(archive(*((name, b"1") for name in names)), "a.zip", tmp_path)
    assert tree(tmp_path) == {}


def test_links_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="link or a device"):
        unpack(archive((link("passwd"), b"/etc/passwd")), "a.zip", tmp_path)


def test_two_uploads_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    unpack(io.BytesIO(b"1"), "a.csv", tmp_path)
    with pytest.raises(InvalidInput, match="two uploaded files"):
        unpack(io.BytesIO(b"2"), "a.csv", tmp_path)
    with pytest.raises(InvalidInput, match="also a file"):
        unpack(io.BytesIO(b"2"), "a.csv/b.csv", tmp_path)
    assert tree(tmp_path) == {"a.csv": b"1"}


def test_a_zip_that_declares_too_much_is_refused_before_unpacking(tmp_path: Path) -> None:
    packed = archive(("zeros", bytes(1 << 20)))
    assert len(packed.getvalue()) < 2000
    with pytest.raises(TooLarge, match="1,048,576 bytes"):
        unpack(packed, "a.zip", tmp_path, limits=Limits(bytes=1 << 19))
    assert tree(tmp_path) == {}


def test_a_zip_that_holds_more_than_it_declares_is_refused(tmp_path: Path) -> None:
    content = bytearray(archive(("zeros", bytes(1 << 20))).getvalue())
    declared = struct.pack("<I", 1 << 20)
    assert content.count(declared) == 2  # in the local and the central header
    lie = bytes(content.replace(declared, struct.pack("<I", 100)))
    with pytest.raises(InvalidInput, match="damaged"):
        unpack(io.BytesIO(lie), "a.zip", tmp_path, limits=Limits(bytes=1 << 19))
    assert sum(len(file) for file in tree(tmp_path).values()) <= 100


def test_too_many_files_and_too_large_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="holds 3 files"):
        unpack(archive(*((str(n), b"") for n in range(3))), "a.zip", tmp_path, limits=Limits(entries=2))
    with pytest.raises(TooLarge, match="more than 4 bytes"):
        unpack(io.BytesIO(b"12345"), "a.csv", tmp_path, limits=Limits(bytes=4))


def test_a_zip_that_unpacks_to_implausibly_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.archives.EXPANSION_FLOOR", 1 << 20)
    assert unpack(archive(("zeros", bytes(1 << 20))), "a.zip", tmp_path)
    with pytest.raises(TooLarge, match="1,048,577 bytes"):
        unpack(archive(("more", bytes((1 << 20) + 1))), "b.zip", tmp_path)
    assert set(tree(tmp_path)) == {"zeros"}


def test_a_list_of_files_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = archive(*((f"{number:0200}", b"") for number in range(100)))
    monkeypatch.setattr("datastore.archives.LONGEST_LIST", 100 * 246 - 1)
    with pytest.raises(TooLarge, match="the list of files"):
        unpack(packed, "a.zip", tmp_path)
    monkeypatch.setattr("datastore.archives.LONGEST_LIST", 100 * 246)
    assert len(unpack(packed, "a.zip", tmp_path)) == 100


def test_a_zip_in_a_zip_and_entries_that_share_their_bytes_do_not_multiply(tmp_path: Path) -> None:
    inner = archive(("zeros", bytes(1 << 20))).getvalue()
    [file] = unpack(archive(("inner.zip", inner)), "a.zip", tmp_path)
    assert file.read_bytes() == inner
    shared = bytearray(archive(("one", bytes(1 << 20)), ("two", bytes(1 << 20))).getvalue())
    first, second = (match.start() for match in re.finditer(b"PK\x01\x02", bytes(shared)))
    shared[second + 42 : second + 46] = shared[first + 42 : first + 46]  # the second entry lies where the first does
    with pytest.raises(InvalidInput):
        unpack(io.BytesIO(bytes(shared)), "b.zip", tmp_path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content.replace(b"hello", b"jello", 1)


def encrypt(content: bytes) -> bytes:
    central = content.index(b"PK\x01\x02")
    return content[: central + 8] + b"\x01" + content[central + 9 :]


@pytest.mark.parametrize("damage", [cut, flip, encrypt, lambda _: b"", lambda _: b"no zip"])
def test_a_damaged_or_encrypted_zip_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = damage(archive(("a.txt", b"hello" * 100), compression=zipfile.ZIP_STORED).getvalue())
    with pytest.raises(InvalidInput):
        unpack(io.BytesIO(content), "a.zip", tmp_path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_damaged_at_any_byte_is_unpacked_or_refused(compression: int, tmp_path: Path) -> None:
    """Never another error: bz2, lzma and offsets out of the file each have one of their own."""
    sound = archive(("ö/a.txt", b"hello" * 9), compression=compression).getvalue()
    refused = 0
    for place in range(len(sound)):
        for value in {0, 127, 255} - {sound[place]}:
            damaged = sound[:place] + bytes([value]) + sound[place + 1 :]
            folder = tmp_path / f"{place}-{value}"
            folder.mkdir()
            try:
                unpack(io.BytesIO(damaged), "a.zip", folder)
            except (InvalidInput, TooLarge):
                refused += 1
    assert refused > len(sound)


def test_an_error_of_the_disk_is_not_the_archives_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(archive(("folder/a.txt", b"hello")), "a.zip", tmp_path)


def test_a_path_of_very_many_folders_is_refused() -> None:
    safe_name("a/" * 31 + "b")
    with pytest.raises(InvalidInput, match="32 folders deep"):
        safe_name("a/" * 32 + "b")


def test_an_empty_zip_and_other_archives_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no file"):
        unpack(archive(("folder/", b"")), "a.zip", tmp_path)
    for name in ("a.tar.gz", "a.TGZ", "a.7z"):
        with pytest.raises(InvalidInput, match="send a zip"):
            unpack(io.BytesIO(b""), name, tmp_path)
    assert unpack(io.BytesIO(b"1"), "rows.jsonl.gz", tmp_path)


def test_an_empty_name_is_refused() -> None:
    for name in ("", ".", "/", ".."):
        with pytest.raises(InvalidInput):
            safe_name(name)


def test_a_server_path_is_followed_and_must_end_inside_a_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "tasks", outside):
        folder.mkdir(parents=True)
    (root / "good").symlink_to(root / "tasks")
    (root / "bad").symlink_to(outside)
    (tmp_path / "alias").symlink_to(root)
    assert allowed_path(root / "tasks", [root]) == (root / "tasks").resolve()
    assert allowed_path(str(root / "good"), [root]) == (root / "tasks").resolve()
    assert allowed_path(root, [tmp_path / "alias"]) == root.resolve()
    for path in (root / "bad", outside, root / ".." / "outside", root / "missing", "/", "a\0b", tmp_path / "root2"):
        with pytest.raises(PathNotAllowed):
            allowed_path(path, [root])
    with pytest.raises(PathNotAllowed, match="serve --allow FOLDER"):
        allowed_path(root, [])


def test_a_path_outside_the_roots_is_refused_alike_whether_it_exists_or_not(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "here").mkdir()
    messages = []
    for name in ("here", "gone"):
        with pytest.raises(PathNotAllowed) as refused:
            allowed_path(tmp_path / name, [tmp_path / "root"])
        messages.append(str(refused.value).replace(name, "…"))
    assert messages[0] == messages[1]


def test_no_link_inside_an_allowed_folder_leads_out_of_the_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.jsonl"
    (root / "task").mkdir(parents=True)
    outside.write_text("secret")
    (root / "shared.jsonl").write_text("{}")
    (root / "task" / "validation.jsonl").symlink_to(root / "shared.jsonl")
    assert allowed_folder(root / "task", [root]) == (root / "task").resolve()
    (root / "task" / "test.jsonl").symlink_to(outside)
    with pytest.raises(PathNotAllowed):
        allowed_folder(root / "task", [root])
