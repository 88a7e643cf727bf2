"""The last steps of what attempts have written: committed chunks get their keys, and what nobody has committed goes.

Whoever comes first takes them: the worker itself, another one that finds them left, or the doctor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal

from gradstore.types import Problem

from datastore.errors import Conflict, Damaged
from datastore.leases import Publication
from datastore.store import OpenStore

log = logging.getLogger(__name__)

Fate = Literal["published", "computed again", "another's"]
"""What became of a committed chunk; `another's`: somebody else has published it, or taken it back, or deleted it."""


def publish(store: OpenStore, publications: Sequence[Publication]) -> list[Fate]:
    """Put committed chunks where they are read, or have their rows computed again; what became of each."""
    fates = [_publish(store, one) for one in publications]
    done = [one for one, fate in zip(publications, fates, strict=True) if fate == "published"]
    if done:
        store.jobs.published(done)
    return fates


def discard(store: OpenStore, segment: str, *, start: int, attempt: int) -> None:
    """Remove what an attempt has written, unless it is being published."""
    try:
        store.store.discard(segment, start=start, attempt=attempt)
    except Conflict:  # somebody is publishing it at this moment
        log.info("attempt is being published", extra={"segment": segment, "start": start})


def _publish(store: OpenStore, one: Publication) -> Fate:
    try:
        store.store.publish(one.segment, start=one.start, attempt=one.attempt, digest=one.digest)
    except (Conflict, Damaged) as error:
        return _give_up(store, one, reason=str(error))
    return "published"


def _give_up(store: OpenStore, chunk: Publication, *, reason: str) -> Fate:
    """Have rows computed again whose bytes are lost; these may also be deleted, or another attempt's, and then stay so.

    A publication is refused only where it can never be finished: an attempt's bytes are either in its folder or, moved
    by another publisher, under their keys.
    """
    problem = Problem(
        type="bytes-lost", title="Bytes lost", status=500,
        detail=f"what was computed for rows from {chunk.start} of {chunk.segment} was lost before it was published: "
        f"{reason}",
    )  # fmt: skip
    give_up = partial(store.store.give_up, chunk.segment, start=chunk.start, attempt=chunk.attempt)
    again = store.jobs.lost(chunk, problem, discard=give_up)
    log.warning(
        "chunk not published",
        extra={"segment": chunk.segment, "start": chunk.start, "reason": reason, "computed_again": again},
    )
    return "computed again" if again else "another's"
