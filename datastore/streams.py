"""Streams: named rows of numbers for the rows of a dataset, or for the validation rows of a task.

    gradients   a feature set of this store, as it is decoded; nothing is copied
    upload      an .npy or .safetensors file with an id for each of its rows
    hidden      the attention's output at some layers, pooled over the prompt's and over the completion's tokens
    routing     the routers' probabilities of a mixture-of-experts model, averaged over a row's tokens

A stream is a job: the first two have nothing left to do, the others are computed in shards (worker/kinds/streams.py),
each of which is one matrix, found again by its content (datastore/matrices.py).

Memory of `matrix`: 4·n·d bytes, and once more while the shards are put together. `numbers` holds 8 MiB, of gradients
256 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gradstore.types import AbsentRow, AnyJob, StreamRequest, StreamResult
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore import shards
from datastore.catalog import Catalog
from datastore.errors import Conflict, Damaged, InvalidInput, refusal
from datastore.feature_files import Numbers, of_features
from datastore.features import DEFAULT_MAX_LENGTH, Features
from datastore.identity import content_id
from datastore.leases import Claim, Jobs, NewShard, payloads_of
from datastore.matrices import Matrices, Matrix
from datastore.owners import REPORTED, Owner, Owners, Problems, joined_once, row_problems, unknown_id
from datastore.schema import JobRow, ShardRow
from datastore.settings import Settings
from datastore.stream_files import fingerprint, read_upload

STREAMS_VERSION = 1
"""Counted up when the same request would give other rows, so that old ones are not found again."""
MAX_BYTES = 32 << 30
"""Of an upload's rows as float32, once they stand for all rows of their dataset."""
BLOCK_BYTES = 8 << 20  # of rows that are sent at a time
NOT_SENT, NOT_FINITE = "no row with this id was sent", "not finite"
_IDENTITY = ("version", "kind", "owner", "checkpoint", "layers", "template", "max_length", "precision", "quantisation")
"""What a computed row depends on, beside the row."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Streams:
    """The streams of a catalog."""

    catalog: Catalog
    jobs: Jobs
    owners: Owners
    features: Features
    matrices: Matrices
    settings: Settings

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: StreamRequest) -> tuple[AnyJob, bool]:
        """Start a stream of gradients, hidden states or routing weights, or return the one of the same content; says
        whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `Ambiguous`, and `Conflict` for gradients that are not all there.
        """
        if request.kind == "upload":
            detail = "send the rows as a file of a form, or say kind=gradients, hidden or routing"
            raise refusal(detail, "/kind")
        return self._of_gradients(request) if request.kind == "gradients" else self._of_states(request)

    def upload(self, request: StreamRequest, folder: Path) -> tuple[AnyJob, bool]:
        """Take the rows of an .npy or .safetensors file with their ids (datastore/stream_files.py).

        Raises `NotFound`, and `InvalidInput` naming rows that are not finite, and ids that are unknown or come twice,
        unless these are to be left out.
        """
        owner = self.owners.find(dataset=request.dataset, task=request.task)
        plan = self._plan("upload", owner) | {"files": fingerprint(folder), "on_error": request.on_error}
        key = content_id("matrix", plan)
        matrix, problems = self._joined(folder, owner)
        if request.on_error == "fail":
            problems.refuse()
        payload = {"matrix": key, **found(matrix), "problems": [each.model_dump() for each in problems.first]}
        payload["total_problems"] = problems.total
        self.matrices.put(key, matrix, made_from=plan)
        created = self._create(request, plan, [NewShard(payload=payload, units=owner.rows, finished=True)])
        self.matrices.put(key, matrix, made_from=plan)  # where the same was being deleted; now it is recorded
        return created

    def matrix(self, reference: str) -> tuple[Floats, NDArray[np.bool_]]:
        """The numbers of a stream (id or name): rows (n, d) float32, zeros where there are none, and which rows are
        there (n,).

        Rows are those of its dataset, or of its task's validation rows. Raises `NotFound`, `Conflict` before it has
        succeeded, and `Damaged`.
        """
        job = self.made(reference)
        plan = self.jobs.plan(job.id)
        if plan["kind"] == "gradients":
            view = self.features.view(self.features.get(plan["feature_set"]))
            present = view.valid
            rows = np.where(present[:, None], view.features(0, view.rows), np.float32(0))
            return rows, present
        parts = [self.matrices.get(payload["matrix"]) for payload in self.jobs.payloads(job.id)]
        dim = max(part.rows.shape[1] for part in parts)
        rows = np.concatenate([part.rows if part.rows.shape[1] else _no(len(part.rows), dim) for part in parts])
        present = np.concatenate([part.present for part in parts])
        if len(rows) != plan["rows"]:
            raise Damaged(f"{job.id} has {len(rows):,} rows instead of {plan['rows']:,}: delete it and make it again")
        return rows, present

    def made(self, reference: str) -> AnyJob:
        """A stream (id or name) whose rows are there. Raises `NotFound`, and `Conflict` before it has succeeded."""
        job = self.jobs.get(reference, kind="stream")
        if job.status != "succeeded":
            raise Conflict(f"{job.id} is {job.status}: its rows are known once it has succeeded")
        return job

    def numbers(self, stream: str) -> Numbers:
        """The rows of a stream (id) whose rows are there, as `matrix` has them, a few at a time; NaN where one is
        absent. Reading them raises `Damaged`.
        """
        plan, payloads = self.jobs.plan(stream), self.jobs.payloads(stream)
        if plan["kind"] == "gradients":
            return of_features(self.features.view(self.features.get(plan["feature_set"])))
        dim = max(payload["dim"] for payload in payloads)
        pieces = [
            (payload.get("start", 0), payload.get("stop", plan["rows"]), payload["matrix"]) for payload in payloads
        ]

        def blocks(start: int, stop: int) -> Iterator[Floats]:
            for begin, end, key in pieces:
                if begin < stop and start < end:
                    yield from _blocks(self.matrices.map(key), dim, max(start - begin, 0), min(stop, end) - begin)

        return Numbers(dim, blocks)

    def ids(self, stream: str) -> list[str | None]:
        """The id of every row of a stream (id)."""
        return self.owners.ids(self.jobs.plan(stream)["owner"])

    def remove(self, reference: str) -> str:
        """Delete a stream, and its rows where no other one has them; returns its id. Raises `NotFound`, `Conflict` and
        `InUse`.
        """

        def forget(session: Session, job: JobRow) -> None:
            mine = {payload["matrix"] for payload in payloads_of(session, job.id) if "matrix" in payload}
            self.matrices.delete(mine - matrices_of(session, besides=job.id))

        return self.jobs.remove(reference, kind="stream", before=forget)

    def sweep(self, *, older_than: float) -> None:
        """Remove the rows of `older_than` seconds ago that nothing has: of refused uploads, and of workers that were
        killed before they recorded them.
        """
        self.matrices.sweep(older_than=older_than)
        if old := self.matrices.keys(older_than=older_than):
            with self.catalog.transaction() as session:
                self.matrices.delete(old - matrices_of(session))

    def result(self, session: Session, job: JobRow) -> dict[str, Any]:
        """The result of a stream whose rows are all done."""
        plan, payloads = job.plan, payloads_of(session, job.id)
        owner = Owner(plan["owner"], plan["rows"])
        absent = [(payload.get("start", 0) + row, reason) for payload in payloads for row, reason in payload["absent"]][
            :REPORTED
        ]
        ids = self.owners.ids(owner.id) if absent else []
        return StreamResult(
            kind=plan["kind"],
            dataset=owner.dataset,
            task=owner.task,
            rows=owner.rows,
            dim=max(payload["dim"] for payload in payloads),
            present_rows=sum(payload["present"] for payload in payloads),
            zero_rows=sum(payload["zeros"] for payload in payloads),
            absent=[AbsentRow(row=row, id=ids[row], reason=reason) for row, reason in absent],
            total_absent=sum(payload["total_absent"] for payload in payloads),
            problems=row_problems(payloads[0].get("problems", [])),
            total_problems=payloads[0].get("total_problems", 0),
            layers=next((payload["layers"] for payload in payloads if "layers" in payload), None),
            feature_set=plan.get("feature_set"),
        ).model_dump(mode="json")

    # Workers' side ----------------------------------------------------------------------------------------------------

    def key(self, claim: Claim) -> str:
        """The name of the matrix that a shard comes to."""
        plan, payload = claim.plan, claim.payload
        rows = {"start": payload["start"], "stop": payload["stop"]}
        return content_id("matrix", {name: plan[name] for name in _IDENTITY} | rows)

    def kept(self, claim: Claim) -> Matrix | None:
        """The rows of a shard where an earlier attempt, or another stream, has computed them; None where there are
        none, or they are damaged, and are removed.
        """
        key = self.key(claim)
        try:
            return self.matrices.get(key) if self.matrices.exists(key) else None
        except Damaged:
            self.matrices.delete([key])
            return None

    def finish(self, claim: Claim, matrix: Matrix) -> bool:
        """Commit a shard's rows; False where it is not wanted any more."""
        key = self.key(claim)
        self.matrices.put(key, matrix, made_from={name: claim.plan[name] for name in _IDENTITY})
        done = {"matrix": key, **found(matrix)}
        return self.jobs.succeed(claim, records=partial(self._record, claim, key, done))

    def _record(self, claim: Claim, key: str, done: Mapping[str, Any], session: Session) -> None:
        """Write what a shard has come to."""
        if not self.matrices.exists(key):
            raise Damaged(f"{key} was deleted before it was recorded; the next attempt does it again")
        shard = session.get_one(ShardRow, claim.shard)
        shard.payload = {**shard.payload, **done}
        dims = {payload["dim"] for payload in payloads_of(session, claim.job) if payload.get("dim")}
        if len(dims) > 1:
            raise Conflict(
                f"shards of {claim.job} have rows of {sorted(dims)} numbers: the model has changed meanwhile"
            )

    # ------------------------------------------------------------------------------------------------------------------

    def _of_gradients(self, request: StreamRequest) -> tuple[AnyJob, bool]:
        job = self.jobs.of_features(request.gradients or "")
        feature_set = self.features.of_job(job, request.feature_set, path="/streams")
        owner = Owner(feature_set.dataset or feature_set.task or "", feature_set.rows)
        view = self.features.view(feature_set)
        reasons = view.reasons
        present = view.valid
        payload = {
            "dim": view.dim,
            "present": int(present.sum()),
            "zeros": int((present & (view.lengths == 0)).sum()),
            "absent": [[row, reasons.get(row, "")] for row in np.flatnonzero(~present)[:REPORTED].tolist()],
            "total_absent": int((~present).sum()),
        }
        plan = self._plan("gradients", owner) | {"feature_set": feature_set.id}
        shard = NewShard(payload=payload, units=owner.rows, finished=True)
        return self._create(request, plan, [shard], uses=[job.id])

    def _of_states(self, request: StreamRequest) -> tuple[AnyJob, bool]:
        owner = self.owners.find(dataset=request.dataset, task=request.task)
        checkpoint = self.catalog.checkpoint(request.checkpoint or "")
        plan = self._plan(request.kind, owner) | {
            "checkpoint": checkpoint.id,
            "layers": request.layers,
            "template": request.template or checkpoint.template or "tulu",
            "max_length": request.max_length or checkpoint.max_length or DEFAULT_MAX_LENGTH,
            "precision": request.precision or checkpoint.precision,
            "quantisation": request.quantisation,
        }
        pieces = [
            NewShard(payload={"start": each.start, "stop": each.stop}, units=each.rows)
            for each in shards.plan(owner.rows, size=self.settings.shard_rows)
        ]
        return self._create(request, plan, pieces, uses=[checkpoint.id], token_budget=request.token_budget)

    def _plan(self, kind: str, owner: Owner) -> dict[str, Any]:
        return {"version": STREAMS_VERSION, "kind": kind, "owner": owner.id, "rows": owner.rows}

    def _create(
        self,
        request: StreamRequest,
        plan: dict[str, Any],
        pieces: Sequence[NewShard],
        *,
        uses: Sequence[str] = (),
        token_budget: int | None = None,
    ) -> tuple[AnyJob, bool]:
        return self.jobs.create(
            id=content_id("str", plan),
            kind="stream",
            request=request.model_dump(mode="json"),
            plan={**plan, "token_budget": token_budget},
            shards=pieces,
            name=request.name,
            uses=[plan["owner"], *uses],
        )

    def _joined(self, folder: Path, owner: Owner) -> tuple[Matrix, Problems]:
        """The rows of an upload in the order of its owner's, and what is wrong with them."""
        sent = read_upload(folder)
        size = 4 * owner.rows * sent.rows.shape[1]
        if size > MAX_BYTES:
            raise InvalidInput(
                f"{owner.rows:,} rows of {sent.rows.shape[1]:,} numbers take {size:,} bytes, and {MAX_BYTES:,} are "
                "taken: send fewer numbers, projected to some thousand dims"
            )
        places = self.owners.places(owner)
        problems = Problems("row")
        rows = np.zeros((owner.rows, sent.rows.shape[1]), np.float32)
        present = np.zeros(owner.rows, np.bool_)
        reasons: dict[int, str] = {}
        seen: dict[str, int] = {}
        for number, id in enumerate(sent.ids):
            numbers = np.asarray(sent.rows[number], np.float32)
            wrong = joined_once(seen, id, number + 1) or (None if id in places else unknown_id(id, owner))
            if wrong is None and not np.isfinite(numbers).all():
                wrong = f"the row of {id!r} is {NOT_FINITE}, or too large for a float32"
                reasons |= dict.fromkeys(places[id], NOT_FINITE)
            if wrong is not None:
                problems.add(number + 1, wrong)
                continue
            rows[places[id]], present[places[id]] = numbers, True
        reasons = {row: reasons.get(row, NOT_SENT) for row in np.flatnonzero(~present).tolist()}
        return Matrix(rows, present, reasons), problems


def matrices_of(session: Session, *, besides: str = "") -> set[str]:
    """The matrices that streams, annotations and embeddings have, but for those of one job (id)."""
    kinds = ("stream", "annotation", "embedding")
    query = select(ShardRow.payload).where(ShardRow.kind.in_(kinds), ShardRow.job_id != besides)
    return {payload["matrix"] for payload in session.scalars(query) if "matrix" in payload}


def _no(rows: int, dim: int) -> Floats:
    """The numbers of a shard none of whose rows could be read, so that nobody knew how many a row has."""
    return np.zeros((rows, dim), np.float32)


def _blocks(matrix: Matrix, dim: int, start: int, stop: int) -> Iterator[Floats]:
    """Rows `start:stop` of a shard, a few at a time; NaN where one is absent, as all are of a shard without dims."""
    step = max(1, BLOCK_BYTES // (4 * max(dim, 1)))
    for first in range(start, stop, step):
        there = matrix.present[first : min(first + step, stop)]
        block = np.full((len(there), dim), np.nan, np.float32)
        if matrix.rows.shape[1]:
            block[there] = matrix.rows[first : first + len(there)][there]
        yield block


def found(matrix: Matrix) -> dict[str, Any]:
    """What a result says of a matrix."""
    absent = np.flatnonzero(~matrix.present).tolist()
    return {
        "dim": matrix.rows.shape[1],
        "present": int(matrix.present.sum()),
        "zeros": int((matrix.present & ~matrix.rows.any(1)).sum()),
        "absent": [[row, matrix.reasons.get(row, "")] for row in absent[:REPORTED]],
        "total_absent": len(absent),
        **matrix.notes,
    }
