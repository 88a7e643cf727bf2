"""Projectors: networks that place rows in an ability space (worker/ability_space.py), trained as jobs and kept.

A projector is one shard, since a training has one order. Its id names the streams, labels, config and seed that it is
made from; a worker that finds it kept does not train it again. The epochs are told as they end, while it is at work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import (
    AnnotationResult,
    AnyJob,
    ProjectorEpoch,
    ProjectorEstimate,
    ProjectorRequest,
    ProjectorResult,
)
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from datastore.annotations import Annotations
from datastore.durations import duration
from datastore.errors import Conflict, Damaged, refusal
from datastore.identity import content_id
from datastore.leases import Claim, Jobs, NewShard
from datastore.owners import Owner
from datastore.projector_files import ProjectorFiles
from datastore.schema import JobRow, ShardRow
from datastore.stream_sets import Joined, StreamSet, StreamSets

LEAST_ROWS = 10
"""Labelled rows that a projector is trained and judged on."""
PROJECTORS_VERSION = 1
"""Counted up when the same request would give another projector, so that old ones are not found again."""


@dataclass(frozen=True)
class Labelled:
    """What a projector is trained on."""

    joined: Joined
    """The streams of all rows of the dataset or task."""
    rows: NDArray[np.intp]
    """Those that have an annotation and all streams, in order (m,)."""
    labels: NDArray[np.bool_]
    """Of these (m, capabilities)."""
    unlabelled: int
    absent: int


@dataclass(frozen=True)
class Projectors:
    """The projectors of a catalog."""

    jobs: Jobs
    sets: StreamSets
    annotations: Annotations
    files: ProjectorFiles

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: ProjectorRequest) -> tuple[AnyJob, bool]:
        """Start training a projector, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, and `Conflict` where a stream or the annotation is not there yet.
        """
        plan, streams = self._plan(request)
        return self.jobs.create(
            id=content_id("proj", plan),
            kind="projector",
            request=request.model_dump(mode="json"),
            plan={**plan, "owner": asdict(streams.owner), "dims": streams.dims, "made": streams.made},
            shards=[NewShard(payload={}, units=_steps(plan["config"], streams.owner.rows))],
            name=request.name,
            uses=[streams.owner.id, plan["annotations"], *streams.ids.values()],
        )

    def estimate(self, request: ProjectorRequest) -> ProjectorEstimate:
        """What a request would cost. Raises what `start` does."""
        plan, streams = self._plan(request)
        rows = streams.owner.rows
        training, steps = _training_rows(plan["config"], rows), _steps(plan["config"], rows)
        time = duration(
            self.jobs,
            kind="projector",
            units=steps,
            done=lambda job: _steps_done(job, plan["config"], streams.dims),
            operations=None,
            precision=None,
            alone=True,
        )
        return ProjectorEstimate(
            done=self.jobs.is_done(content_id("proj", plan)),
            training_rows=training,
            validation_rows=rows - training,
            steps=steps,
            read_bytes=streams.bytes,
            seconds=time.seconds,
            basis=time.basis,
        )

    def _plan(self, request: ProjectorRequest) -> tuple[dict[str, Any], StreamSet]:
        """What a projector depends on, and its streams. Raises what `start` does."""
        streams = self.sets.find(request.streams)
        annotation = self.jobs.get(request.annotations, kind="annotation")
        if annotation.status != "succeeded":
            raise Conflict(
                f"the annotation {annotation.id} is {annotation.status}: it can be used once it has succeeded"
            )
        owner = self.jobs.plan(annotation.id)["owner"]
        if owner != streams.owner.id:
            detail = f"these are labels of {owner}, and the streams are of {streams.owner.id}"
            raise refusal(detail, "/annotations")
        labelled = AnnotationResult.model_validate(annotation.result and annotation.result.model_dump()).labelled_rows
        if (usable := min(labelled, self.sets.present_rows(streams))) < LEAST_ROWS:
            raise Conflict(
                f"at most {usable:,} rows have an annotation and all streams: a projector is trained on at least "
                f"{LEAST_ROWS}; GET /streams/{{id}} and GET /annotations/{{id}}/rows say which have none"
            )
        plan = {
            "version": PROJECTORS_VERSION,
            "streams": streams.ids,
            "annotations": annotation.id,
            "config": request.config.model_dump(mode="json"),
            "seed": request.seed,
        }
        return plan, streams

    def trained(self, reference: str) -> AnyJob:
        """A projector that is there. Raises `NotFound`, and `Conflict` where it is not trained yet."""
        job = self.jobs.get(reference, kind="projector")
        if job.status != "succeeded":
            raise Conflict(f"the projector {job.id} is {job.status}: it can be used once it has succeeded")
        return job

    def streams(self, id: str) -> StreamSet:
        """The streams that a projector was trained on."""
        plan = self.jobs.plan(id)
        return StreamSet(Owner(**plan["owner"]), plan["streams"], plan["dims"], plan["made"])

    def capabilities(self, id: str) -> tuple[str, ...]:
        """The capabilities that a trained projector tells apart, in order. Raises `Damaged`."""
        return tuple(self.files.manifest(id)["capabilities"])

    def epochs(self, reference: str) -> list[ProjectorEpoch]:
        """The epochs that have ended, also of a projector that is at work. Raises `NotFound`."""
        job = self.jobs.get(reference, kind="projector")
        found = [each for payload in self.jobs.payloads(job.id) for each in payload.get("epochs", [])]
        return [ProjectorEpoch.model_validate(each) for each in found]

    def remove(self, reference: str) -> str:
        """Delete a projector and return its id. Raises `NotFound`, `Conflict` while it is at work, and `InUse`."""
        return self.jobs.remove(reference, kind="projector", before=lambda _, job: self.files.delete([job.id]))

    # Workers' side ----------------------------------------------------------------------------------------------------

    def labelled(self, plan: dict[str, Any]) -> Labelled:
        """What a projector of this plan is trained on."""
        joined = self.sets.read(plan["streams"])
        labels, known = self.annotations.labels(plan["annotations"])
        rows = np.flatnonzero(known & joined.present)
        return Labelled(
            joined, rows, labels[rows], unlabelled=int((~known).sum()), absent=int((known & ~joined.present).sum())
        )

    def note(self, claim: Claim, epochs: list[ProjectorEpoch]) -> bool:
        """Tell the epochs so far of a projector at work; False where it is not wanted any more."""

        def write(session: Session) -> None:
            shard = session.get_one(ShardRow, claim.shard)
            shard.payload = {**shard.payload, "epochs": [each.model_dump(mode="json") for each in epochs]}

        return self.jobs.record(claim, write)

    def keep(
        self, claim: Claim, result: ProjectorResult, *, capabilities: tuple[str, ...], write: Callable[[Path], None]
    ) -> None:
        """Keep a trained projector, whose network `write` puts into a file."""
        manifest = {name: claim.plan[name] for name in ("version", "streams", "annotations", "config", "seed", "dims")}
        manifest |= {"capabilities": capabilities, "result": result.model_dump(mode="json")}
        self.files.keep(claim.job, manifest, write)

    def finish(self, claim: Claim) -> bool:
        """Commit a projector that is kept; False where it is not wanted any more."""
        result = self.files.manifest(claim.job)["result"]
        return self.jobs.succeed(claim, result=result, records=partial(self._record, claim, result))

    def _record(self, claim: Claim, result: dict[str, Any], session: Session) -> None:
        if not self.files.exists(claim.job):
            raise Damaged(f"{claim.job} was deleted before it was recorded; the next attempt trains it again")
        shard = session.get_one(ShardRow, claim.shard)
        shard.payload = {**shard.payload, "epochs": result["epochs"]}


def held_out(rows: int, fraction: float) -> int:
    """Of so many rows those that are not trained on."""
    return min(max(round(rows * fraction), 1), rows - 2)


def _training_rows(config: dict[str, Any], rows: int) -> int:
    """Of so many rows those that are trained on."""
    return rows - held_out(rows, config["validation_fraction"])


def _steps(config: dict[str, Any], rows: int) -> int:
    """The batches of all epochs."""
    epochs: int = config["epochs"] + config["adjustment_epochs"]
    batches: int = -(-_training_rows(config, rows) // config["batch_size"])
    return epochs * batches


def _steps_done(job: JobRow, config: dict[str, Any], dims: dict[str, int]) -> float:
    """The steps of a finished projector; 0 where its network, batches or streams were others."""
    alike = all(job.plan["config"][name] == config[name] for name in ("width", "blocks", "dim", "batch_size"))
    if job.result is None or not alike or job.plan["dims"] != dims:
        return 0.0
    epochs = job.plan["config"]["epochs"] + job.plan["config"]["adjustment_epochs"]
    return float(epochs * -(-job.result["training_rows"] // job.plan["config"]["batch_size"]))
