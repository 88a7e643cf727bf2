"""The feature store in a bucket: the files of datastore/gradients.py as objects, and renames as copies inside it.

    features/<segment>/born                  a random word, put last: there is a segment from now on; deleted first
    features/<segment>/data.zarr/…           the group, as on a disk
    features/<segment>/receipts/<start>.json which bytes the rows from `start` have, for good: put where there is none
    attempts/<segment>/<start>-<attempt>/…   what an attempt has written; whole when its manifest is there

A publication claims the receipt, which only one attempt can get, and copies the attempt's objects to the chunks' keys
inside the bucket. A copy of what is not there any more fails, so that a publisher which stalls changes nothing later.
What is read is kept by `ChunkCache`; the word in `born` tells a segment from one of its name that was deleted, so that
their chunks are never mixed. It is read again whenever a segment is opened: one small request.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

from datastore.bucket import Bucket, Found, at_once
from datastore.chunk_files import ADVICE, BucketFiles, ChunkCache, Files, Objects
from datastore.errors import Conflict, Damaged, NotFound
from datastore.gradients import (
    GROUP,
    MANIFEST,
    Attempt,
    FeatureStore,
    chunk_sizes,
    digest_of,
    flat_name,
    start_and_attempt,
)
from datastore.segments import Segment

_BORN = "born"


class BucketFeatureStore(FeatureStore):
    """The segments of all feature sets in a bucket; `root` is where they are written before they are put.

    Every method may raise `BucketUnreachable`.
    """

    def __init__(self, root: Path, *, bucket: Bucket, cache: ChunkCache) -> None:
        super().__init__(root)
        self._bucket, self._cache = bucket, cache

    def publish(self, segment: str, *, start: int, attempt: int, digest: str) -> None:
        """See `FeatureStore.publish`."""
        source, receipt = _attempt(segment, start, attempt), _receipt(segment, start)
        manifest = self._bucket.read(receipt) or _claim(self._bucket, source, receipt, digest)
        if digest_of(manifest) != digest:
            raise Conflict(f"rows from {start} of {segment} belong to another attempt; nothing was changed")
        files: dict[str, dict[str, Any]] = json.loads(manifest)["files"]

        def move(name: str) -> None:
            key, facts = _chunk(segment, name), files[name]
            if self._bucket.copy_checked(f"{source}/{flat_name(name)}", key, sha256=facts["sha256"]):
                return
            found = self._bucket.head(key)
            if found is None or found.bytes != facts["bytes"]:
                raise Damaged(f"{key} is lost, and so is {source}; {ADVICE}")

        at_once(move, files)
        self._bucket.delete_below(f"{source}/")

    def discard(self, segment: str, *, start: int, attempt: int) -> None:
        """See `FeatureStore.discard`."""
        source = _attempt(segment, start, attempt)
        manifest = self._bucket.read(f"{source}/{MANIFEST}")
        if manifest is not None and self._bucket.read(_receipt(segment, start)) == manifest:
            names = json.loads(manifest)["files"]
            if not all(at_once(lambda name: self._bucket.head(_chunk(segment, name)), names)):
                raise Conflict(
                    f"attempt {attempt} is being published for rows from {start} of {segment}: publish it again"
                )
        self._bucket.delete_below(f"{source}/")

    def give_up(self, segment: str, *, start: int, attempt: int) -> None:
        """See `FeatureStore.give_up`."""
        self._bucket.delete_below(f"{_attempt(segment, start, attempt)}/")  # first: no more objects get keys
        receipt = self._bucket.read(_receipt(segment, start))
        if receipt is not None:
            self._bucket.delete(*(_chunk(segment, name) for name in json.loads(receipt)["files"]))
            self._bucket.delete(_receipt(segment, start))  # last: killed before this, all of it is done again

    def forget(self, segment: str, *, start: int, stop: int) -> None:
        """See `FeatureStore.forget`."""
        names = chunk_sizes(self.afresh(segment), start, stop)
        self._bucket.delete(*(_chunk(segment, name) for name in names))
        self._bucket.delete(_receipt(segment, start))
        self.renew(segment)

    def renew(self, segment: str) -> None:
        """See `FeatureStore.renew`: with another word in `born` no cache has anything of it."""
        if self._bucket.head(f"{_home(segment)}/{_BORN}") is not None:
            self._bucket.put(f"{_home(segment)}/{_BORN}", token_hex(8).encode())

    def receipts(self, segment: str) -> dict[int, str]:
        """See `FeatureStore.receipts`."""
        keys = [found.key for found in self._bucket.below(f"{_home(segment)}/receipts/")]
        contents = at_once(self._bucket.read, keys)
        found = {int(Path(key).stem): content for key, content in zip(keys, contents, strict=True)}
        return {start: digest_of(content) for start, content in sorted(found.items()) if content is not None}

    def faults(self, segment: str, ranges: Iterable[tuple[int, int]], *, deep: bool) -> Iterator[tuple[int, int, str]]:
        """See `FeatureStore.faults`; where it is not `deep`, the sizes that a list tells are compared, no bytes."""
        if deep:
            yield from super().faults(segment, ranges, deep=True)
            return
        opened = self.afresh(segment)
        there = {found.key: found.bytes for found in self._bucket.below(f"{_home(segment)}/{GROUP}/")}
        for start, stop in ranges:
            for name, size in chunk_sizes(opened, start, stop).items():
                key = _chunk(segment, name)
                if there.get(key) != size:
                    has = f"has {there[key]:,} bytes instead of {size:,}" if key in there else "is missing"
                    yield start, stop, f"{self._bucket.url}/{key} {has}; {ADVICE}"
                    break

    def afresh(self, segment: str) -> Segment:
        """See `FeatureStore.afresh`."""
        birth = self._bucket.read(f"{_home(segment)}/{_BORN}")
        if birth is None:
            raise NotFound("segment", segment, collection="/gradients")
        return Segment(segment, BucketFiles(Objects(self._bucket), _home(segment), birth=birth.decode()))

    def bytes(self, segment: str) -> int:
        """Bytes that a segment takes in the bucket by now, attempts apart; 0 where it does not exist."""
        return sum(found.bytes for found in self._bucket.below(f"{_home(segment)}/{GROUP}/"))

    def delete(self, segment: str) -> None:
        """See `FeatureStore.delete`."""
        self._bucket.delete(f"{_home(segment)}/{_BORN}")
        self._bucket.delete_below(f"attempts/{segment}/")
        self._bucket.delete_below(f"{_home(segment)}/")
        self._cache.forget(f"{_home(segment)}/")

    def attempts(self) -> list[Attempt]:
        """See `FeatureStore.attempts`."""
        objects: dict[str, list[Found]] = defaultdict(list)
        for found in self._bucket.below("attempts/"):
            objects[found.key.rpartition("/")[0]].append(found)
        return [
            Attempt(
                place.split("/")[1], *start_and_attempt(place.split("/")[2]), min(each.age for each in parts),
                bytes=sum(each.bytes for each in parts), place=place,
            )
            for place, parts in sorted(objects.items())
        ]  # fmt: skip

    def names(self) -> list[str]:
        """See `FeatureStore.names`."""
        return self._bucket.inside("features/")[1]

    def age(self, segment: str) -> float:
        """See `FeatureStore.age`: since it was born, or of a rest without, since its youngest object was put."""
        born = self._bucket.head(f"{_home(segment)}/{_BORN}")
        if born is not None:
            return born.age
        return min((found.age for found in self._bucket.below(f"{_home(segment)}/")), default=0.0)

    def _is_there(self, segment: str) -> bool:
        """Whether there is a segment with all its metadata: of what was deleted while it was made, some may lack."""
        try:
            return self.open(segment) is not None
        except (NotFound, Damaged):
            return False

    def _files(self, segment: str) -> Files | None:
        birth = self._bucket.read(f"{_home(segment)}/{_BORN}")
        return None if birth is None else BucketFiles(self._cache, _home(segment), birth=birth.decode())

    def _keep_group(self, segment: str, partial: Path) -> None:
        documents = {str(path.relative_to(partial)): path.read_bytes() for path in partial.rglob("zarr.json")}
        at_once(lambda name: self._bucket.put_checked(f"{_home(segment)}/{name}", documents[name]), documents)
        self._bucket.put(f"{_home(segment)}/{_BORN}", token_hex(8).encode(), create=True)

    def _keep_attempt(self, segment: str, start: int, attempt: int, partial: Path) -> str | None:
        home = _attempt(segment, start, attempt)
        before = self._bucket.read(f"{home}/{MANIFEST}")
        if before is not None:
            return digest_of(before)
        paths = [path for path in partial.iterdir() if path.name != MANIFEST]
        at_once(lambda path: self._bucket.put_checked(f"{home}/{path.name}", path.read_bytes()), paths)
        self._bucket.put(f"{home}/{MANIFEST}", (partial / MANIFEST).read_bytes(), create=True)
        if self._files(segment) is None:  # deleted meanwhile
            self._bucket.delete_below(f"{home}/")
            raise NotFound("segment", segment, collection="/gradients")
        return None


def _claim(bucket: Bucket, source: str, receipt: str, digest: str) -> bytes:
    """Make the attempt's manifest the receipt of its rows, unless another publisher was faster; returns the receipt.

    Raises `Conflict` where there is none after that.
    """
    manifest = bucket.read(f"{source}/{MANIFEST}")
    problem = _unpublishable(bucket, source, manifest, digest)
    if problem is None and manifest is not None and bucket.put(receipt, manifest, create=True):
        return manifest
    found = bucket.read(receipt)
    if found is None:
        raise Conflict(problem or f"{source} was given up while it was published")
    return found


def _unpublishable(bucket: Bucket, source: str, manifest: bytes | None, digest: str) -> str | None:
    """Why an attempt cannot become the winner, if so."""
    if manifest is None:
        return f"{source} has written nothing, or was discarded: compute the shard again"
    if digest_of(manifest) != digest:
        return f"{source} has written other bytes than these; nothing was changed"
    segment = source.split("/")[1]
    found = at_once(lambda name: bucket.head(_chunk(segment, name)), json.loads(manifest)["files"])
    taken = [each.key for each in found if each is not None]
    return f"{taken[0]} is published already by a shard of another size; nothing was changed" if taken else None


def _home(segment: str) -> str:
    return f"features/{segment}"


def _chunk(segment: str, name: str) -> str:
    return f"{_home(segment)}/{GROUP}/{name}"


def _receipt(segment: str, start: int) -> str:
    return f"{_home(segment)}/receipts/{start}.json"


def _attempt(segment: str, start: int, attempt: int) -> str:
    return f"attempts/{segment}/{start}-{attempt}"
