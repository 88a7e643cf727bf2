"""Embeddings: where a projector places the rows of a dataset, or the validation rows of a task.

They are kept as one matrix (datastore/matrices.py): the unit vector u, then the probabilities of the capabilities, then
⟨v, b̂⟩ with each base vector. What chooses rows by a projector reads those of its pool and of its task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gradstore.types import (
    AnyJob,
    CapabilityCount,
    CapabilityHistogram,
    EmbeddedRow,
    EmbeddedRows,
    EmbeddingEstimate,
    EmbeddingRequest,
    EmbeddingResult,
)
from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore.catalog import Catalog
from datastore.durations import duration
from datastore.errors import Conflict, Damaged
from datastore.identity import content_id
from datastore.influence import Floats
from datastore.leases import Claim, Jobs, NewShard
from datastore.matrices import Matrices, Matrix
from datastore.projectors import Projectors
from datastore.schema import JobRow, ShardRow
from datastore.selection.abilities import Places, called_for
from datastore.stream_sets import Joined, StreamSet, StreamSets, refuse_unlike

EMBEDDINGS_VERSION = 1
"""Counted up when the same projector would place the same rows elsewhere."""
ABSENT = "a stream has no such row, so it has no place in the ability space"


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a catalog."""

    catalog: Catalog
    jobs: Jobs
    sets: StreamSets
    projectors: Projectors
    matrices: Matrices

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: EmbeddingRequest) -> tuple[AnyJob, bool]:
        """Start placing rows, or return the embedding of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput` where the streams are not made as the projector's are, and `Conflict` where
        the projector or a stream is not there yet.
        """
        plan, streams = self._plan(request)
        return self.jobs.create(
            id=content_id("emb", plan),
            kind="embedding",
            request=request.model_dump(mode="json"),
            plan={**plan, "owner": streams.owner.id, "rows": streams.owner.rows},
            shards=[NewShard(payload={}, units=streams.owner.rows)],
            name=request.name,
            uses=[streams.owner.id, plan["projector"], *streams.ids.values()],
        )

    def estimate(self, request: EmbeddingRequest) -> EmbeddingEstimate:
        """What a request would cost. Raises what `start` does."""
        plan, streams = self._plan(request)
        projector, rows = plan["projector"], streams.owner.rows
        time = duration(
            self.jobs,
            kind="embedding",
            units=rows,
            done=lambda job: job.plan["rows"] if job.plan["projector"] == projector else 0.0,
            operations=None,
            precision=None,
            alone=True,
        )
        dim: int = self.jobs.plan(projector)["config"]["dim"]
        return EmbeddingEstimate(
            done=self.jobs.is_done(content_id("emb", plan)),
            rows=rows,
            read_bytes=streams.bytes,
            bytes=4 * rows * (dim + 2 * len(self.projectors.capabilities(projector))),
            seconds=time.seconds,
            basis=time.basis,
        )

    def _plan(self, request: EmbeddingRequest) -> tuple[dict[str, Any], StreamSet]:
        """What an embedding depends on, and its streams. Raises what `start` does."""
        projector = self.projectors.trained(request.projector)
        streams = self.sets.find(request.streams)
        refuse_unlike(streams, self.projectors.streams(projector.id), projector=projector.id)
        return {"version": EMBEDDINGS_VERSION, "projector": projector.id, "streams": streams.ids}, streams

    def remove(self, reference: str) -> str:
        """Delete an embedding and return its id. Raises `NotFound`, `Conflict` while it is at work, and `InUse`."""
        return self.jobs.remove(reference, kind="embedding", before=lambda _, job: self.matrices.delete([_key(job.id)]))

    def places(self, reference: str) -> Places:
        """Where the rows of an embedding are. Raises `NotFound`, `Conflict` before it has succeeded, and `Damaged`."""
        job = self.jobs.get(reference, kind="embedding")
        if job.status != "succeeded" or job.result is None:
            raise Conflict(f"the embedding {job.id} is {job.status}: its rows have places once it has succeeded")
        result = EmbeddingResult.model_validate(job.result.model_dump())
        return _places(self.matrices.get(_key(job.id)), dim=result.dim, capabilities=len(result.capabilities))

    def rows(self, reference: str, *, start: int, stop: int) -> EmbeddedRows:
        """Some rows of an embedding. Raises as `places` does."""
        job = self.jobs.get(reference, kind="embedding")
        places = self.places(job.id)
        names = list(self.projectors.capabilities(self.jobs.plan(job.id)["projector"]))
        data = [
            EmbeddedRow(row=row, embedding=u, probabilities=p, similarities=s)
            if there
            else EmbeddedRow(row=row, embedding=None, probabilities=None, similarities=None)
            for row, (u, p, s, there) in enumerate(
                zip(*(part[start:stop].tolist() for part in vars(places).values()), strict=True), start=start
            )
        ]
        return EmbeddedRows(
            rows=len(places.present), capabilities=names, data=data, has_more=stop < len(places.present)
        )

    def of(self, projector: str, owner: str) -> Places:
        """Where a projector places the rows of a dataset or task (ids). Raises as `only` does, and `Damaged`."""
        return self.places(self.only(projector, owner))

    def only(self, projector: str, owner: str) -> str:
        """The embedding of a dataset or task by a projector (ids). Raises `Conflict` where its rows have not been
        placed, which says what to send, or in several ways.
        """
        ids = [id for id, plan in self._made(projector) if plan["owner"] == owner]
        if not ids:
            raise self._missing(projector, owner)
        if len(ids) > 1:
            raise Conflict(
                f"{projector} has placed the rows of {owner} by several uploaded streams ({', '.join(ids)}): delete "
                f"all but one, DELETE /embeddings/{ids[0]}"
            )
        return ids[0]

    def owners(self, projector: str) -> list[str]:
        """The datasets and tasks (ids) whose rows a projector has placed."""
        return list(dict.fromkeys(plan["owner"] for _, plan in self._made(projector)))

    def _made(self, projector: str) -> list[tuple[str, dict[str, Any]]]:
        """The finished embeddings by a projector, and their plans."""
        query = select(JobRow.id, JobRow.plan).where(JobRow.kind == "embedding", JobRow.status == "succeeded")
        with self.catalog.reading() as session:
            found = session.execute(query.order_by(JobRow.id)).all()
        return [(id, plan) for id, plan in found if plan["projector"] == projector]

    def histogram(
        self, projector: str, selection: str, datasets: Sequence[str], chosen: Iterable[tuple[str, int]]
    ) -> CapabilityHistogram:
        """The capabilities of datasets, and of the rows that a selection chose from them (dataset, row).

        Raises `Conflict` where a dataset's rows have not been placed.
        """
        pool = {dataset: self.of(projector, dataset) for dataset in datasets}
        everything = np.concatenate([places.probabilities[places.present] for places in pool.values()])
        rows = [pool[dataset].probabilities[row] for dataset, row in chosen if pool[dataset].present[row]]
        taken = np.array(rows, np.float32).reshape(-1, everything.shape[1])
        names = self.projectors.capabilities(projector)
        return CapabilityHistogram(
            projector=projector,
            selection=selection,
            pool=len(everything),
            selected=len(taken),
            capabilities=[_counted(name, everything[:, at], taken[:, at]) for at, name in enumerate(names)],
        )

    def _missing(self, projector: str, owner: str) -> Conflict:
        noun = "dataset" if owner.startswith("ds_") else "task"
        streams = dict.fromkeys(self.projectors.streams(projector).ids, "str_…")
        body = json.dumps({"projector": projector, "streams": streams}, ensure_ascii=False)
        return Conflict(
            f"{projector} has not placed the rows of {owner}: make its streams as those of the projector were made "
            f"(GET /projectors/{projector} names them), and POST /embeddings {body} with the {noun}'s"
        )

    # Workers' side ----------------------------------------------------------------------------------------------------

    def read(self, plan: dict[str, Any]) -> Joined:
        """The rows to place."""
        return self.sets.read(plan["streams"])

    def finish(self, claim: Claim, places: Places, *, seconds: float) -> bool:
        """Keep and commit where rows are; False where it is not wanted any more."""
        plan = claim.plan
        names = self.projectors.capabilities(plan["projector"])
        is_dataset = plan["owner"].startswith("ds_")
        result = EmbeddingResult(
            projector=plan["projector"],
            dataset=plan["owner"] if is_dataset else None,
            task=None if is_dataset else plan["owner"],
            rows=len(places.present),
            absent_rows=int((~places.present).sum()),
            dim=places.embedding.shape[1],
            capabilities=list(names),
            counts=called_for(places.probabilities[places.present]).tolist(),
            seconds=seconds,
        )
        key = _key(claim.job)
        self.matrices.put(key, _matrix(places), made_from={"embedding": claim.job})
        records = partial(self._record, claim, key)
        return self.jobs.succeed(claim, result=result.model_dump(mode="json"), records=records)

    def _record(self, claim: Claim, key: str, session: Session) -> None:
        if not self.matrices.exists(key):
            raise Damaged(f"{key} was deleted before it was recorded; the next attempt does it again")
        shard = session.get_one(ShardRow, claim.shard)
        shard.payload = {**shard.payload, "matrix": key}


def _key(embedding: str) -> str:
    return content_id("matrix", {"embedding": embedding})


def _matrix(places: Places) -> Matrix:
    rows = np.concatenate([places.embedding, places.probabilities, places.similarities], axis=1)
    return Matrix(np.where(places.present[:, None], rows, 0).astype(np.float32, copy=False), places.present)


def _places(matrix: Matrix, *, dim: int, capabilities: int) -> Places:
    parts = np.split(matrix.rows, [dim, dim + capabilities], axis=1)
    u, probabilities, similarities = map(np.ascontiguousarray, parts)
    return Places(u, probabilities, similarities, matrix.present)


def _counted(name: str, pool: Floats, taken: Floats) -> CapabilityCount:
    there, chosen = int((pool > 0.5).sum()), int((taken > 0.5).sum())
    share, selected = there / max(len(pool), 1), chosen / max(len(taken), 1)
    return CapabilityCount(
        name=name,
        pool=there,
        selected=chosen,
        pool_share=share,
        selected_share=selected,
        enrichment=selected / share if there else None,
        pool_mean=_mean(pool),
        selected_mean=_mean(taken),
    )


def _mean(values: Floats) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0
