"""Where the things of the store are for good: in the data folder itself, or in a bucket of which the folder is a cache.

A thing is a file or a folder with a place in the data folder, whole or absent, and never changed. With a bucket, the
objects of one thing are those of one publication, named by its index, which is put last and only where there is none:

    <kind>/<name>.index.json         bytes and SHA-256 of each file, and the publication that they are of
    <kind>/<name>/<publication>/…    the files
    <kind>/of/<part>/<name>          an empty object for each part that the thing is to be deleted with

So a thing that is published by two at once is the first one's, and what killed or beaten publishers left is never
read. A room publishes before the thing gets its place in the folder, and before the catalog records it: what has a
place on any machine may be evicted there. Fetched files are compared with their SHA-256.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from datastore.bucket import Bucket, Found, at_once
from datastore.durable import place, sweep, sync_folder, unfinished, untouched_for
from datastore.errors import Damaged
from datastore.identity import sha256_of
from datastore.sizes import bytes_of

IN_USE = 900.0  # seconds after its last use in which a thing is not evicted
_LOOK = 32  # the cache is measured whenever it has grown by this part of its bound
_INDEX = ".index.json"
_OF = "of"
_PUBLICATION_BYTES = 8
_IS_PUBLICATION = re.compile(rf"[0-9a-f]{{{2 * _PUBLICATION_BYTES}}}")


class Depot:
    """The things of one kind. This one is for a store in a folder: a place in it is all that there is to a thing."""

    def publish(self, source: Path, final: Path, *, of: Iterable[str] = ()) -> bool:  # noqa: ARG002 - the interface
        """Have a file or folder kept for good as the thing whose place is `final`; False where there is one already.

        The thing is found among the `users` of each part that it is made `of`. Raises `BucketUnreachable`.
        """
        return not final.exists()

    def keep(self, partial: Path, final: Path, *, of: Iterable[str] = ()) -> bool:  # noqa: ARG002 - the interface
        """Publish a finished folder and give it its place; where the thing is there already, nothing happens and the
        answer is False. Raises `BucketUnreachable`.
        """
        return place(partial, final)

    def ensure(self, final: Path) -> bool:
        """Have a thing in its place; False where there is none. Raises `BucketUnreachable` and `Damaged`."""
        return final.exists()

    def exists(self, final: Path) -> bool:
        """Whether a thing is kept, whatever lies in its place here. Raises `BucketUnreachable`."""
        return final.exists()

    def files(self, final: Path) -> list[str]:
        """The files of a folder, by their names in it, without fetching them; none where there is no such thing."""
        return [str(path.relative_to(final)) for path in final.rglob("*") if path.is_file()]

    def read(self, final: Path, file: str) -> bytes | None:
        """A small file of a folder, without fetching the others; None where there is none."""
        with suppress(FileNotFoundError):
            return (final / file).read_bytes()
        return None

    def delete(self, final: Path) -> None:
        """Let a thing be kept no longer; the caller removes it from its place. Nothing happens where there is none."""

    def names(self, folder: Path, pattern: str, *, older_than: float | None = None) -> list[str]:
        """The names of the things whose places are in a folder and match; of those of an `age`, where one is given."""
        found = folder.glob(pattern)
        return [path.name for path in found if older_than is None or self.age(path) > older_than]

    def age(self, final: Path) -> float:
        """Seconds since a thing was published or changed; 0 where there is none."""
        return untouched_for(final)

    def touch(self, final: Path) -> bool:
        """Take the age of a thing away that is about to be recorded; False where it was deleted at this moment.

        In a bucket things do not lose their age: who records one looks, inside the transaction, whether it `exists`.
        """
        with suppress(FileNotFoundError):
            os.utime(final)
            return True
        return False

    def users(self, folder: Path, pattern: str, part: str) -> list[str] | None:
        """The names of the things in a folder that are made of a part; None where only the things themselves know."""

    def size(self, final: Path) -> int:
        """Bytes of a thing; 0 where there is none."""
        return bytes_of(final)

    def faults(self, *, deep: bool) -> Iterator[tuple[Path, str]]:  # noqa: ARG002 - the interface
        """The places of the things of which files are missing, cut or, where it is `deep`, changed; and what is wrong.

        Of a bucket only: of a folder, rooms know more of their own files.
        """
        return iter(())

    def heal(self, final: Path) -> bool:  # noqa: ARG002 - the interface
        """Put a thing's files again from its place on this machine, where these are sound; says whether they are."""
        return False

    def set_aside(self, final: Path, aside: Path) -> None:
        """Move what is left of a thing into a folder, so that it can come anew; nothing happens where nothing is."""
        aside.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            final.rename(aside / f"{final.name}.{token_hex(4)}")

    def tidy(self, *, older_than: float) -> None:
        """Remove what killed processes of this machine left half fetched so many seconds ago."""

    def leftovers(self, *, older_than: float) -> Iterator[Rest]:  # noqa: ARG002 - the interface
        """What killed publishers left in the bucket so many seconds ago."""
        return iter(())

    def sweep(self, *, older_than: float) -> None:
        """Remove the `leftovers`."""
        for rest in list(self.leftovers(older_than=older_than)):
            rest.remove()


@dataclass(frozen=True)
class Rest:
    """Objects of a publication that nothing names."""

    place: str
    """What their keys begin with."""
    bytes: int
    remove: Callable[[], None]


LOCAL = Depot()


@dataclass(frozen=True)
class _Index:
    """What a thing in a bucket consists of."""

    publication: str
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 by name; a thing that is a file itself has one, without a name."""
    of: tuple[str, ...]


class Cache:
    """The things that a machine keeps of a bucket: at most so many bytes, what was used longest ago goes first.

    What was used within `IN_USE` seconds stays, since it may be at work. Things are measured again whenever a 32nd of
    the bound has come in since.
    """

    def __init__(self, *, bytes: int) -> None:
        self._bytes, self._grown, self._folders = bytes, bytes, list[tuple[Path, str]]()

    def watch(self, folder: Path, pattern: str) -> None:
        """Count the things in this folder that match."""
        self._folders.append((folder, pattern))

    def used(self, final: Path) -> None:
        """Note that a thing is used."""
        with suppress(FileNotFoundError):
            os.utime(final)

    def grew(self, bytes: int) -> None:
        """Note that a thing comes in, and make room where it is needed."""
        self._grown += bytes
        if self._grown * _LOOK >= self._bytes:
            self._grown = 0
            self._make_room()

    def _make_room(self) -> None:
        kept = []
        for folder, pattern in self._folders:
            for path in folder.glob(pattern):
                with suppress(FileNotFoundError):
                    kept.append((path.stat().st_mtime, bytes_of(path), path))
        total = sum(size for _, size, _ in kept)
        for used_at, size, path in sorted(kept):
            if total <= self._bytes or time.time() - used_at < IN_USE:
                return
            evict(path)
            total -= size


def evict(path: Path) -> None:
    """Remove a thing from its place at once: what has it open goes on reading."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with unfinished(path.parent / "unfinished", path.name) as partial, suppress(FileNotFoundError):
        path.rename(partial / path.name)


class BucketDepot(Depot):
    """The things of a kind, kept in a bucket under their places' names below `root`."""

    def __init__(self, bucket: Bucket, root: Path, *, cache: Cache) -> None:
        self._bucket, self._root, self._cache = bucket, root, cache

    def publish(self, source: Path, final: Path, *, of: Iterable[str] = ()) -> bool:
        """See `Depot.publish`."""
        key = self._key(final)
        if self._bucket.head(key + _INDEX) is not None:
            return False
        publication = token_hex(_PUBLICATION_BYTES)
        paths = _files(source)
        index = {
            "publication": publication,
            "files": {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in paths.items()},
            "of": sorted(set(of)),
        }
        at_once(lambda name: self._bucket.put(_object(key, publication, name), paths[name]), paths)
        for part in index["of"]:
            self._bucket.put(self._mark(final, part), b"")
        won = self._bucket.put(key + _INDEX, json.dumps(index, indent=1).encode(), create=True)
        if not won:
            self._bucket.delete(*(_object(key, publication, name) for name in paths))
        self._cache.grew(bytes_of(source))
        return won

    def keep(self, partial: Path, final: Path, *, of: Iterable[str] = ()) -> bool:
        """See `Depot.keep`."""
        won = self.publish(partial, final, of=of)
        if won and not place(partial, final):  # what lies there is of a thing of this name that was deleted elsewhere
            evict(final)
            place(partial, final)
        return won

    def ensure(self, final: Path) -> bool:
        """See `Depot.ensure`."""
        if final.exists():
            self._cache.used(final)
            return True
        index = self._index(final)
        if index is None:
            return False
        with unfinished(self._root / "unfinished", final.name) as partial:
            fetched = partial / final.name
            names = [(name, fetched / name if name else fetched) for name in index.files]
            for path in {path.parent for _, path in names}:
                path.mkdir(parents=True, exist_ok=True)
            at_once(lambda each: self._fetch(final, index, *each), names)
            final.parent.mkdir(parents=True, exist_ok=True)
            if fetched.is_dir():
                place(fetched, final)
            else:
                fetched.replace(final)
                sync_folder(final.parent)
        self._cache.grew(bytes_of(final))
        return True

    def exists(self, final: Path) -> bool:
        """See `Depot.exists`."""
        return self._bucket.head(self._key(final) + _INDEX) is not None

    def files(self, final: Path) -> list[str]:
        """See `Depot.files`."""
        index = self._index(final)
        return [] if index is None else list(index.files)

    def read(self, final: Path, file: str) -> bytes | None:
        """See `Depot.read`."""
        index = self._index(final)
        if index is None or file not in index.files:
            return None
        return self._bucket.read(_object(self._key(final), index.publication, file))

    def delete(self, final: Path) -> None:
        """See `Depot.delete`; the index goes first: from then on there is no such thing."""
        key = self._key(final)
        try:
            index = self._index(final)
        except Damaged:  # what it has named is swept
            index = None
            self._bucket.delete(key + _INDEX)
        if index is None:
            return
        self._bucket.delete(key + _INDEX)
        self._bucket.delete(
            *(_object(key, index.publication, name) for name in index.files),
            *(self._mark(final, part) for part in index.of),
        )

    def names(self, folder: Path, pattern: str, *, older_than: float | None = None) -> list[str]:
        """See `Depot.names`."""
        objects, _ = self._bucket.inside(f"{self._key(folder)}/")
        old = [each for each in objects if older_than is None or each.age > older_than]
        names = [Path(each.key).name.removesuffix(_INDEX) for each in old if each.key.endswith(_INDEX)]
        return [name for name in names if Path(name).match(pattern)]

    def age(self, final: Path) -> float:
        """See `Depot.age`."""
        found = self._bucket.head(self._key(final) + _INDEX)
        return 0.0 if found is None else found.age

    def touch(self, final: Path) -> bool:
        """See `Depot.touch`."""
        return self.exists(final)

    def users(self, folder: Path, pattern: str, part: str) -> list[str] | None:
        """See `Depot.users`."""
        objects, _ = self._bucket.inside(f"{self._key(folder)}/{_OF}/{part}/")
        return [name for each in objects if Path(name := Path(each.key).name).match(pattern)]

    def holds(self, final: Path) -> bool:
        """Whether a place is one of this kind's."""
        return final.is_relative_to(self._root)

    def size(self, final: Path) -> int:
        """See `Depot.size`."""
        try:
            index = self._index(final)
        except Damaged:
            return 0
        return 0 if index is None else sum(facts["bytes"] for facts in index.files.values())

    def faults(self, *, deep: bool) -> Iterator[tuple[Path, str]]:
        """See `Depot.faults`. A request for each 1,000 objects, and one for each thing."""
        objects = {found.key: found for found in self._bucket.below(f"{self._key(self._root)}/")}
        for key in filter(_is_index, objects):
            final = self._root.parent / key.removesuffix(_INDEX)
            fault = self._fault(final, objects, deep=deep)
            if fault is not None:
                yield final, fault

    def heal(self, final: Path) -> bool:
        """See `Depot.heal`."""
        try:
            index = self._index(final)
        except Damaged:
            return False
        if index is None:
            return False
        paths = {name: final / name if name else final for name in index.files}
        try:
            if any(sha256_of(path) != index.files[name]["sha256"] for name, path in paths.items()):
                return False
        except OSError:
            return False
        at_once(lambda name: self._bucket.put(_object(self._key(final), index.publication, name), paths[name]), paths)
        return True

    def set_aside(self, final: Path, aside: Path) -> None:
        """See `Depot.set_aside`: it stays in the bucket, under the name of that folder."""
        key = self._key(final)
        left = [found.key for found in self._bucket.below(f"{key}/")]
        left += [] if self._bucket.head(key + _INDEX) is None else [key + _INDEX]
        target = f"{aside.name}/{final.name}.{token_hex(4)}"
        at_once(lambda each: self._bucket.copy(each, f"{target}{each.removeprefix(key)}"), left)
        self._bucket.delete(key + _INDEX)
        self._bucket.delete(*left)
        evict(final)

    def tidy(self, *, older_than: float) -> None:
        """See `Depot.tidy`."""
        sweep(self._root / "unfinished", older_than=older_than)

    def leftovers(self, *, older_than: float) -> Iterator[Rest]:
        """See `Depot.leftovers`. Lists all that is kept of this kind: a request for each 1,000 objects."""
        indexes: set[str] = set()
        things: dict[str, dict[str, list[Found]]] = {}
        for found in self._bucket.below(f"{self._key(self._root)}/"):
            if _is_index(found.key):
                indexes.add(found.key.removesuffix(_INDEX))
            elif (of := _publication(found.key)) is not None:
                things.setdefault(of[0], {}).setdefault(of[1], []).append(found)
        for key, publications in things.items():
            if key not in indexes or len(publications) > 1:
                yield from self._unnamed(key, publications, older_than=older_than)

    def _unnamed(self, key: str, publications: dict[str, list[Found]], *, older_than: float) -> Iterator[Rest]:
        try:
            index = self._index(self._root.parent / key)  # now: it may have been put after its objects were listed
        except Damaged:  # nobody knows which objects it names
            return
        for publication, objects in publications.items():
            if (index is None or publication != index.publication) and min(each.age for each in objects) > older_than:
                remove = partial(self._bucket.delete, *(each.key for each in objects))
                yield Rest(f"{key}/{publication}", sum(each.bytes for each in objects), remove)

    def _fault(self, final: Path, listed: Mapping[str, Found], *, deep: bool) -> str | None:
        try:
            index = self._index(final)
        except Damaged as error:
            return str(error)
        if index is None:  # deleted at this moment
            return None
        for name, facts in index.files.items():
            key = _object(self._key(final), index.publication, name)
            fault = self._object_fault(key, listed.get(key), facts, deep=deep)
            if fault is not None:
                return f"{self._bucket.url}/{key} {fault}" if self._index(final) == index else None
        return None

    def _object_fault(self, key: str, found: Found | None, facts: Mapping[str, Any], *, deep: bool) -> str | None:
        found = found or self._bucket.head(key)  # put after the others were listed
        if found is None:
            return "is missing"
        if found.bytes != facts["bytes"]:
            return f"has {found.bytes:,} bytes instead of {facts['bytes']:,}"
        if deep and self._bucket.sha256(key, found.bytes) != facts["sha256"]:
            return "does not match its checksum"
        return None

    def _index(self, final: Path) -> _Index | None:
        raw = self._bucket.read(self._key(final) + _INDEX)
        if raw is None:
            return None
        try:
            found = json.loads(raw)
            return _Index(found["publication"], found["files"], tuple(found["of"]))
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{self._bucket.url}/{self._key(final)}{_INDEX} cannot be read ({error})") from error

    def _fetch(self, final: Path, index: _Index, name: str, path: Path) -> None:
        key, facts = _object(self._key(final), index.publication, name), index.files[name]
        if not self._bucket.download(key, path, facts["bytes"]):
            raise Damaged(f"{self._bucket.url}/{key} is missing: lost, or deleted at this moment")
        if sha256_of(path) != facts["sha256"]:
            raise Damaged(f"{self._bucket.url}/{key} does not match its checksum")

    def _key(self, final: Path) -> str:
        return str(final.relative_to(self._root.parent))

    def _mark(self, final: Path, part: str) -> str:
        return f"{self._key(final.parent)}/{_OF}/{part}/{final.name}"


def _is_index(key: str) -> bool:
    """Whether an object is a thing's index, and no file of a thing that is called like one."""
    return key.endswith(_INDEX) and _publication(key) is None


def _publication(key: str) -> tuple[str, str] | None:
    """The thing and the publication that an object is of; None for a mark."""
    parts = key.split("/")
    for number, part in enumerate(parts):
        if _IS_PUBLICATION.fullmatch(part):
            return "/".join(parts[:number]), part
    return None


def _object(key: str, publication: str, name: str) -> str:
    return f"{key}/{publication}/{name}" if name else f"{key}/{publication}"


def _files(source: Path) -> dict[str, Path]:
    """Files by their names in a folder, or a file without a name."""
    if source.is_file():
        return {"": source}
    return {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
