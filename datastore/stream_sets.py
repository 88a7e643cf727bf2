"""The streams that a projector reads, of one dataset or task: found, compared with others, and read side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gradstore.types import ProjectorStreams
from numpy.typing import NDArray

from datastore.errors import Conflict, refusal
from datastore.features import Features
from datastore.leases import Jobs
from datastore.owners import Owner
from datastore.parameters import OWN, SHARED
from datastore.streams import Streams

Floats = NDArray[np.float32]
NAMES = ("gradients", "routing", "hidden")
_OF_STATES = ("checkpoint", "layers", "template", "max_length", "precision", "quantisation")


@dataclass(frozen=True)
class StreamSet:
    """Streams of the same rows."""

    owner: Owner
    ids: dict[str, str]
    """By the name under which a projector reads them."""
    dims: dict[str, int]
    """Numbers of a row in each."""
    made: dict[str, dict[str, Any]]
    """How each was made; what is known of an upload is its dim."""

    @property
    def bytes(self) -> int:
        """Bytes of all rows, as they are read."""
        return 4 * self.owner.rows * sum(self.dims.values())


@dataclass(frozen=True)
class Joined:
    """The rows of a stream set."""

    gradients: Floats
    """Of gradients, with the hidden states behind them (n, columns)."""
    routing: Floats | None
    """(n, experts)"""
    present: NDArray[np.bool_]
    """Rows that every stream has (n,)."""


@dataclass(frozen=True)
class StreamSets:
    """Streams by the names under which projectors read them."""

    jobs: Jobs
    streams: Streams
    features: Features

    def find(self, wanted: ProjectorStreams) -> StreamSet:
        """The streams that a request names. Raises `NotFound`, `Conflict` where one is not there yet, and
        `InvalidInput` where they are of different rows.
        """
        named = {name: reference for name in NAMES if (reference := getattr(wanted, name)) is not None}
        found = {name: self._stream(reference) for name, reference in named.items()}
        plans = {name: plan for name, (_, plan, _) in found.items()}
        owner = Owner(plans["gradients"]["owner"], plans["gradients"]["rows"])
        for name, plan in plans.items():
            if plan["owner"] != owner.id:
                detail = f"this is a stream of {plan['owner']}, and the gradients are of {owner.id}"
                raise refusal(detail, f"/streams/{name}")
        return StreamSet(
            owner,
            {name: id for name, (id, _, _) in found.items()},
            {name: dim for name, (_, _, dim) in found.items()},
            {name: self._made(plan) for name, plan in plans.items()},
        )

    def read(self, ids: dict[str, str]) -> Joined:
        """The rows of streams. Raises `NotFound` where one has been deleted, and `Damaged`."""
        rows, present = zip(*(self.streams.matrix(ids[name]) for name in NAMES if name in ids), strict=True)
        by_name = dict(zip((name for name in NAMES if name in ids), rows, strict=True))
        gradients = by_name["gradients"]
        if "hidden" in by_name:
            gradients = np.concatenate([gradients, by_name["hidden"]], axis=1)
        return Joined(gradients, by_name.get("routing"), np.logical_and.reduce(present))

    def present_rows(self, streams: StreamSet) -> int:
        """Rows of the stream that has the fewest."""
        results = (self.jobs.get(id).result for id in streams.ids.values())
        return min(int(result.model_dump()["present_rows"]) for result in results if result is not None)

    def _stream(self, reference: str) -> tuple[str, dict[str, Any], int]:
        job = self.jobs.get(reference, kind="stream")
        if job.status != "succeeded" or job.result is None:
            raise Conflict(f"the stream {job.id} is {job.status}: its rows are there once it has succeeded")
        return job.id, self.jobs.plan(job.id), job.result.model_dump()["dim"]

    def _made(self, plan: dict[str, Any]) -> dict[str, Any]:
        """How a stream was made, whatever its rows are."""
        made: dict[str, Any] = {"kind": plan["kind"]}
        if plan["kind"] == "gradients":
            features = self.features.get(plan["feature_set"]).model_dump(mode="json")
            return made | {name: features[name] for name in ("checkpoint", *OWN, *SHARED)}
        return made | {name: plan[name] for name in _OF_STATES if name in plan}


def refuse_unlike(given: StreamSet, trained: StreamSet, *, projector: str) -> None:
    """Raise `InvalidInput` where streams are made otherwise than those that a projector was trained on."""
    for name in NAMES:
        if (name in given.ids) != (name in trained.ids):
            said = "has none of these" if name in given.ids else "reads these, too"
            raise refusal(f"{projector} {said}: give it the streams that it was trained on", f"/streams/{name}")
    for name in given.ids:
        if given.dims[name] != trained.dims[name]:
            detail = f"a row has {given.dims[name]:,} numbers, and {projector} was trained on {trained.dims[name]:,}"
            raise refusal(detail, f"/streams/{name}")
        other = trained.made[name]
        unlike = [key for key, value in given.made[name].items() if other.get(key) != value]
        if unlike:
            key = unlike[0]
            detail = (
                f"{key} is {given.made[name][key]!r}, and {other.get(key)!r} in the stream that {projector} was "
                "trained on: make it alike"
            )
            raise refusal(detail, f"/streams/{name}")
