"""Whether the service can work: each thing that it needs, or does less without, with what was found there.

Every check answers within seconds whatever is broken, so that whoever asks can rely on hearing which one it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from tempfile import TemporaryFile

from gradstore.types import Check, Worker
from sqlalchemy.exc import SQLAlchemyError

from datastore.bucket import Bucket
from datastore.errors import BucketUnreachable, first_line
from service.dependencies import Backend

LEAST_FREE_BYTES = 1 << 30
"""Below so much free space uploads and shards are about to fail."""


def workers(backend: Backend) -> list[Worker]:
    """The workers of the last minute; none where the catalog does not answer."""
    with suppress(SQLAlchemyError):
        return backend.jobs.workers()
    return []


def checks(backend: Backend, seen: list[Worker]) -> Iterator[Check]:
    """Look at everything, one after the other."""
    yield _catalog(backend)
    yield _store(backend)
    if backend.bucket is not None:
        yield _bucket(backend.bucket)
    yield _disk(backend)
    yield _dispatch(backend)
    yield _workers(seen)


def _catalog(backend: Backend) -> Check:
    try:
        found, expected = backend.catalog.revisions()
    except SQLAlchemyError as error:
        return _missing("catalog", f"it does not answer ({first_line(error)}): start it, or check GRADSTORE_CATALOG")
    dialect = backend.catalog.engine.dialect.name
    if found == expected:
        return _there("catalog", f"{dialect}, schema {found}")
    return _missing(
        "catalog",
        f"{dialect} has schema {found} and this version works with {expected}: "
        "restart the service, which brings an older one up to date; for a newer one install the version that made it",
    )


def _store(backend: Backend) -> Check:
    folder = backend.settings.data.absolute()
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return _missing(
            "store", f"nothing can be written to {folder} ({error.strerror or error}): check GRADSTORE_DATA"
        )
    return _there("store", str(folder))


def _bucket(bucket: Bucket) -> Check:
    try:
        bucket.reach()
    except BucketUnreachable as error:
        return _missing("bucket", str(error))
    return _there("bucket", bucket.url)


def _disk(backend: Backend) -> Check:
    try:
        free = shutil.disk_usage(backend.settings.data).free
    except OSError as error:
        return _missing("disk", f"it cannot be asked for its free space ({error.strerror or error})")
    if free < LEAST_FREE_BYTES:
        return _missing("disk", f"{free:,} bytes are free of the {LEAST_FREE_BYTES:,} it takes: free some space")
    return _there("disk", f"{free:,} bytes free")


def _dispatch(backend: Backend) -> Check:
    if not backend.settings.broker:
        return _there("dispatch", "workers look for work themselves", required=False)
    if backend.queue.alive():
        return _there("dispatch", "the broker answers", required=False)
    reason = (
        "the broker does not answer, and workers find their work seconds later: start it, or check GRADSTORE_BROKER"
    )
    return _missing("dispatch", reason, required=False)


def _workers(seen: list[Worker]) -> Check:
    if seen:
        return _there("workers", f"{len(seen)} seen in the last minute", required=False)
    return _missing(
        "workers", "none was seen in the last minute, and jobs wait: start `gradstore worker`", required=False
    )


def _there(name: str, detail: str, *, required: bool = True) -> Check:
    return Check.model_validate({"name": name, "ok": True, "required": required, "detail": detail})


def _missing(name: str, detail: str, *, required: bool = True) -> Check:
    return Check.model_validate({"name": name, "ok": False, "required": required, "detail": detail})
