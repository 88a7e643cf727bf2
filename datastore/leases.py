"""Jobs and their shards: who computes what, under a lease, with a fencing token.

A shard is claimed, kept alive by a heartbeat and finished by an UPDATE that checks the attempt number, so a stalled
worker that wakes late changes nothing. A sweep puts back what a dead worker held. Leases are counted by the catalog's
clock, so that a host whose own is wrong takes none and loses none. Whoever calls these functions, a polling loop or a
Celery message, can lose or double its call without harm.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from gradstore.types import FINISHED, AnyJob, JobKind, Page, Precision, Problem, Progress, Worker
from sqlalchemy import ColumnElement, delete, exists, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from datastore.catalog import Catalog, take, use, utc_now
from datastore.errors import Conflict, InUse, NameTaken, NotFound
from datastore.schema import ChunkRow, JobRow, SegmentRow, ShardRow, UseRow, WorkerRow

WORKER_LIFETIME = timedelta(minutes=1)
"""A worker that has shown no sign of life for so long is not listed any more."""
CHOICE = 4
"""Of so many shards for each worker it prepares for one: two of eight then meet at one in five."""
ATTEMPT_BITS = 20
"""An attempt's number in the store: the shard's id above these bits, its attempt within them."""

UNITS: dict[JobKind, str] = {
    "gradients": "rows",
    "conversion": "rows",
    "finetune": "steps",
    "evaluation": "examples",
    "import": "rows",
    "scoring": "rows",
    "validation": "trainings",
    "attribution": "rows",
}
MAKE_FEATURES: tuple[JobKind, ...] = ("gradients", "import", "conversion")
"""Kinds of jobs that leave feature sets in the store."""


@dataclass(frozen=True)
class NewShard:
    """A shard to be done; `finished` where its chunks exist already."""

    payload: dict[str, Any]
    units: int
    finished: bool = False


@dataclass(frozen=True)
class Claim:
    """A shard that its owner may work on until the lease ends."""

    shard: int
    job: str
    kind: JobKind
    number: int
    attempt: int
    payload: dict[str, Any]
    request: dict[str, Any]
    plan: dict[str, Any]
    owner: str
    worked: float = 0.0
    """Seconds that earlier attempts have worked."""

    @property
    def token(self) -> int:
        """The attempt's number in the store, unlike that of any other shard or attempt."""
        return self.shard << ATTEMPT_BITS | self.attempt

    @property
    def labels(self) -> dict[str, Any]:
        """What the log's lines about it are marked with."""
        return {"job": self.job, "kind": self.kind, "shard": self.number, "attempt": self.attempt}


@dataclass(frozen=True)
class NewChunk:
    """A range of a segment that an attempt has written."""

    segment: str
    start: int
    stop: int
    digest: str
    excluded: Sequence[tuple[int, str]] = ()
    tokens: int = 0


@dataclass(frozen=True)
class Publication:
    """A chunk whose committed bytes must get the chunk's key."""

    segment: str
    start: int
    stop: int
    attempt: int
    digest: str


def collection(kind: JobKind | None) -> str:
    """Where the jobs of a kind are listed; scoring jobs are listed among all jobs only."""
    own: dict[JobKind | None, str] = {
        "gradients": "gradients",
        "conversion": "conversions",
        "finetune": "finetunes",
        "evaluation": "evaluations",
        "import": "imports",
        "validation": "validations",
        "attribution": "attributions",
    }
    return f"/{own.get(kind, 'jobs')}"


Results = dict[JobKind, Callable[[Session, JobRow], dict[str, Any]]]


@dataclass(frozen=True)
class Jobs:
    """The jobs of a catalog."""

    catalog: Catalog
    lease: float = 30.0  # seconds
    max_attempts: int = 3
    results: Results = field(default_factory=dict)
    """How the result of a job of many shards is put together when its last shard is done."""

    # Users' side ----------------------------------------------------------------------------------------------------

    def create(
        self,
        *,
        id: str,
        kind: JobKind,
        request: dict[str, Any],
        plan: dict[str, Any],
        shards: Sequence[NewShard] = (),
        name: str | None = None,
        uses: Iterable[str] = (),
        before: Callable[[Session, JobRow], Sequence[NewShard]] | None = None,
    ) -> tuple[AnyJob, bool]:
        """Start a job, or return the one that has this id; one that failed or was cancelled goes on, as is asked now.

        `before` is called in the same transaction, with the new job: it writes further records, completes the job's
        plan, and returns further shards. Returns the job and whether it has work to do now. Raises `NotFound` where one
        of `uses` (ids) is not there any more.
        """
        with self.catalog.transaction() as session:
            job = session.get(JobRow, id)
            if job is not None:
                return self._again(session, job, name, request=request, plan=plan)
            job = JobRow(
                id=id, kind=kind, name=None, status="queued", request=request, plan=plan, done=0, total=0,
                unit=UNITS[kind], created_at=utc_now(), resumed_done=0,
            )  # fmt: skip
            session.add(job)
            session.flush()
            if name is not None:
                _take_job_name(session, job, name)
            use(session, user=id, used=uses)
            if before is not None:
                shards = [*shards, *before(session, job)]
            session.add_all(_shard_row(job, number, shard) for number, shard in enumerate(shards))
            job.total = sum(shard.units for shard in shards)
            job.done = job.resumed_done = sum(shard.units for shard in shards if shard.finished)
            session.flush()
            self._settle(session, job)
            return _describe(job), job.status == "queued"

    def get(self, reference: str, *, kind: JobKind | None = None) -> AnyJob:
        """A job by id, or by name among its kind. Raises `NotFound`."""
        with self.catalog.reading() as session:
            return _describe(_find_job(session, reference, kind))

    def of_features(self, reference: str) -> AnyJob:
        """A job that makes feature sets, of any kind that does (`MAKE_FEATURES`), by id or name.

        A name is the gradients job's where one has it. Raises `NotFound`, and `Conflict` where an import and a
        conversion share it.
        """
        with self.catalog.reading() as session:
            found = _jobs_called(session, reference, MAKE_FEATURES)
            gradients = [job for job in found if job.kind == "gradients"]
            return _describe(_only(gradients or found, reference, noun="job with features", collection="/jobs"))

    def plan(self, id: str) -> dict[str, Any]:
        """What a job's request was resolved to."""
        with self.catalog.reading() as session:
            return _find_job(session, id, None).plan

    def page(
        self, *, kind: JobKind | None = None, status: str | None = None, limit: int, after: str | None = None
    ) -> Page[AnyJob]:
        """A page of jobs, newest first."""
        query = select(JobRow)
        if kind is not None:
            query = query.where(JobRow.kind == kind)
        if status is not None:
            query = query.where(JobRow.status == status)
        with self.catalog.reading() as session:
            if after is not None:
                last = _find_job(session, after, kind)
                query = query.where(tuple_(JobRow.created_at, JobRow.id) < (last.created_at, last.id))
            rows, has_more = take(session, query.order_by(JobRow.created_at.desc(), JobRow.id.desc()), limit)
            return Page[AnyJob](data=[_describe(row) for row in rows], has_more=has_more)

    def rename(self, reference: str, name: str | None, *, kind: JobKind) -> AnyJob:
        """Give a job another name, or none. Raises `NotFound`, `NameTaken`."""
        with self.catalog.transaction() as session:
            job = _find_job(session, reference, kind)
            if name is None:
                job.name = None
            else:
                _take_job_name(session, job, name)
            return _describe(job)

    def cancel(self, reference: str) -> AnyJob:
        """Stop a job: its running shards learn of it at their next heartbeat. Raises `Conflict` if it has finished."""
        with self.catalog.transaction() as session:
            job = _find_job(session, reference, None)
            if job.status == "cancelled":
                return _describe(job)
            if job.status in FINISHED:
                raise Conflict(f"{job.id} has {job.status} already; there is nothing to cancel")
            job.status = "cancelled"
            job.finished_at = utc_now()
            return _describe(job)

    def retry(self, reference: str) -> AnyJob:
        """Go on with a failed or cancelled job from its last finished shard. Raises `Conflict` otherwise."""
        with self.catalog.transaction() as session:
            job = _find_job(session, reference, None)
            if job.status not in {"failed", "cancelled"}:
                raise Conflict(f"{job.id} is {job.status}; only failed and cancelled jobs are tried again")
            self._resume(session, job)
            return _describe(job)

    def remove(self, reference: str, *, kind: JobKind, before: Callable[[Session, JobRow], None] | None = None) -> str:
        """Delete a finished job's record and return its id; `before` deletes what hangs on it.

        Raises `NotFound`, `Conflict` while the job is at work, and `InUse` naming who needs it.
        """
        with self.catalog.transaction() as session:
            job = _find_job(session, reference, kind)
            if job.status not in FINISHED:
                raise Conflict(f"{job.id} is {job.status}: POST /jobs/{job.id}/cancel first")
            users = sorted(session.scalars(select(UseRow.user).where(UseRow.used == job.id)))
            if users:
                raise InUse(kind, job.id, users)
            if before is not None:
                before(session, job)
            session.execute(delete(UseRow).where(UseRow.user == job.id))
            session.delete(job)
            return job.id

    # Workers' side --------------------------------------------------------------------------------------------------

    def claim(
        self,
        owner: str,
        *,
        kinds: Collection[JobKind],
        job: str | None = None,
        prefer: int | None = None,
        most_units: int | None = None,
    ) -> Claim | None:
        """Take the shard `prefer`, or else the oldest, of those that wait; None where none does.

        With `most_units` shards that are larger are left to others.
        """
        query = (
            select(ShardRow, JobRow)
            .join(JobRow, JobRow.id == ShardRow.job_id)
            .where(ShardRow.status == "queued", ShardRow.kind.in_(kinds), JobRow.status.in_(("queued", "running")))
            .order_by(ShardRow.id)
            .limit(1)
        )
        if job is not None:
            query = query.where(ShardRow.job_id == job)
        if most_units is not None:
            query = query.where(ShardRow.units <= most_units)
        with self.catalog.transaction() as session:
            found = None
            if prefer is not None:
                found = session.execute(query.where(ShardRow.id == prefer)).first()
            found = found or session.execute(query).first()
            if found is None:
                return None
            shard, row = found
            shard.status, shard.owner, shard.error = "running", owner, None
            shard.attempt += 1
            shard.claimed_at = self.catalog.now(session)
            shard.leased_until = shard.claimed_at + self.lease
            row.status = "running"
            row.started_at = row.started_at or utc_now()
            if row.resumed_at is None:
                row.resumed_at, row.resumed_done = utc_now(), row.done
            return Claim(
                shard=shard.id, job=row.id, kind=cast("JobKind", row.kind), number=shard.number, attempt=shard.attempt,
                payload=shard.payload, request=row.request, plan=row.plan, owner=owner,
                worked=shard.worked,
            )  # fmt: skip

    def upcoming(self, claim: Claim) -> tuple[int, dict[str, Any]] | None:
        """A shard of the claim's job (its id and payload) that its worker is likely to get next, or None.

        Alone it is the oldest that waits; beside other workers, at random one of the next few, so that not all of them
        prepare for the same.
        """
        of_job = ShardRow.job_id == claim.job
        with self.catalog.reading() as session:
            owners = select(func.count(ShardRow.owner.distinct())).where(of_job, ShardRow.status == "running")
            at_work = session.scalar(owners) or 0
            query = select(ShardRow.id, ShardRow.payload).where(of_job, ShardRow.status == "queued")
            few = 1 if at_work <= 1 else CHOICE * at_work
            found = session.execute(query.order_by(ShardRow.id).limit(few)).all()
        if not found:
            return None
        shard, payload = random.choice(found)  # noqa: S311 - nothing secret
        return shard, payload

    def waiting(self, *, kinds: Collection[JobKind]) -> bool:
        """Whether a shard waits: a look that takes no lock."""
        query = select(exists().where(
            ShardRow.status == "queued", ShardRow.kind.in_(kinds), JobRow.id == ShardRow.job_id,
            JobRow.status.in_(("queued", "running")),
        ))  # fmt: skip
        with self.catalog.reading() as session:
            return bool(session.scalar(query))

    def renew(self, claim: Claim, *, done: int, total: int | None = None) -> bool:
        """Prolong the lease and record progress; False when the shard must be dropped (lost, or its job cancelled).

        `total` replaces the shard's number of units where it is known only now.
        """
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is None:
                return False
            shard, job = found
            job.done += done - shard.done
            shard.done = done
            if total is not None:
                job.total += total - shard.units
                shard.units = total
            shard.leased_until = self.catalog.now(session) + self.lease
            return job.status == "running"

    def settle(self, claim: Claim, name: str, value: Any) -> Any:
        """Record in the job's plan what its request left open, and return what stands there: the first worker's word.

        A claim that is lost records nothing.
        """
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is None:
                return value
            job = found[1]
            if job.plan[name] is None:
                job.plan = {**job.plan, name: value}
            return job.plan[name]

    def succeed(
        self,
        claim: Claim,
        *,
        result: dict[str, Any] | None = None,
        chunks: Sequence[NewChunk] = (),
        records: Callable[[Session], None] | None = None,
    ) -> bool:
        """Commit a shard; False, changing nothing, when it belongs to another attempt by now.

        `chunks` enter the manifest unless another attempt's are there; `records` writes in the same transaction.
        """
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is None or found[1].status == "cancelled":
                return False
            shard, job = found
            job.done += shard.units - shard.done
            _let_go(shard, self.catalog.now(session))
            shard.status, shard.done = "succeeded", shard.units
            for chunk in chunks:
                if session.get(ChunkRow, (chunk.segment, chunk.start)) is None:
                    session.add(_chunk_row(chunk, claim.token))
            if records is not None:
                records(session)
            if result is not None:
                job.result = result
            session.flush()
            self._settle(session, job)
            return True

    def fail(self, claim: Claim, problem: Problem, *, permanent: bool) -> bool:
        """Record a failed attempt: the shard waits for another one, or fails its job when tried too often.

        Returns whether the job has failed.
        """
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is None:
                return False
            shard, job = found
            _let_go(shard, self.catalog.now(session))
            self._put_back(job, shard, problem.model_dump(mode="json"), permanent=permanent)
            return job.status == "failed"

    def release(self, claim: Claim) -> None:
        """Give a shard back unfinished, when its worker is asked to stop."""
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is not None:
                shard, job = found
                job.done -= shard.done
                _let_go(shard, self.catalog.now(session))
                shard.status, shard.done = "queued", 0

    def unpublished(self, *, attempt: int | None = None) -> list[Publication]:
        """Committed chunks whose bytes do not have their key yet, of one attempt or of all."""
        query = select(ChunkRow).where(ChunkRow.published.is_(False))
        if attempt is not None:
            query = query.where(ChunkRow.attempt == attempt)
        with self.catalog.reading() as session:
            return [
                Publication(row.segment_id, row.start, row.stop, row.attempt, row.digest)
                for row in session.scalars(query)
            ]

    def published(self, publications: Sequence[Publication]) -> None:
        """Record that these chunks have their key, and finish the jobs that waited for them."""
        with self.catalog.transaction() as session:
            for chunk in publications:
                row = _committed(session, chunk)
                if row is not None:
                    row.published = True
            session.flush()
            for segment in {chunk.segment for chunk in publications}:
                _complete(session, segment)
            for job in session.scalars(select(JobRow).where(JobRow.status.in_(("queued", "running")))):
                self._settle(session, job)

    def lost(self, chunk: Publication, problem: Problem, *, discard: Callable[[], None]) -> bool:
        """Take back a commit whose bytes are lost: the shards that it finished wait again, or fail, tried too often.

        `discard` removes what is left of the bytes, before others can commit new ones. Returns False, changing nothing,
        where the rows have been published, have another attempt's bytes by now, or are gone with their segment.
        """
        with self.catalog.transaction() as session:
            row = _committed(session, chunk)
            if row is None or row.published:
                return False
            discard()
            session.delete(row)
            for shard, job in _finished_by(session, chunk):
                self._put_back(job, shard, problem.model_dump(mode="json"), permanent=False)
            return True

    def sweep(self) -> int:
        """Put back the shards whose lease has ended; returns how many there were."""
        query = select(ShardRow, JobRow).join(JobRow, JobRow.id == ShardRow.job_id).where(ShardRow.status == "running")
        with self.catalog.transaction() as session:
            lost = session.execute(query.where(ShardRow.leased_until < self.catalog.now(session))).all()
            for shard, job in lost:
                problem = Problem(
                    type="worker-lost", title="Worker lost", status=500,
                    detail=f"the worker {shard.owner} stopped while it worked on shard {shard.number}",
                )  # fmt: skip
                _let_go(shard, self._last_sign_of_life(shard))
                self._put_back(job, shard, problem.model_dump(mode="json"), permanent=False)
            return len(lost)

    def announce(self, worker: str, *, device: str, job: str | None, flops: Mapping[Precision, float]) -> None:
        """Record a worker's sign of life; a new worker's replaces those of workers that are gone."""
        with self.catalog.transaction() as session:
            if session.get(WorkerRow, worker) is None:
                session.execute(delete(WorkerRow).where(~self._at_work(session)))
            seen_at = self._time(session)
            session.merge(WorkerRow(id=worker, device=device, job=job, flops=dict(flops), gone=False, seen_at=seen_at))

    def leave(self, worker: str) -> None:
        """Record that a worker has stopped."""
        with self.catalog.transaction() as session:
            session.execute(update(WorkerRow).where(WorkerRow.id == worker).values(gone=True, job=None))

    def workers(self) -> list[Worker]:
        """The workers seen lately."""
        with self.catalog.reading() as session:
            query = select(WorkerRow).where(self._at_work(session)).order_by(WorkerRow.id)
            return [Worker.model_validate(row, from_attributes=True) for row in session.scalars(query)]

    def known_workers(self) -> list[Worker]:
        """The workers seen lately; where there are none, the one that was seen last."""
        found = self.workers()
        if found:
            return found
        with self.catalog.reading() as session:
            last = session.scalar(select(WorkerRow).order_by(WorkerRow.seen_at.desc()).limit(1))
            return [Worker.model_validate(last, from_attributes=True)] if last is not None else []

    # Inside a transaction -------------------------------------------------------------------------------------------

    def _time(self, session: Session) -> datetime:
        return datetime.fromtimestamp(self.catalog.now(session), UTC)

    def _at_work(self, session: Session) -> ColumnElement[bool]:
        return WorkerRow.gone.is_(False) & (WorkerRow.seen_at > self._time(session) - WORKER_LIFETIME)

    def _again(
        self, session: Session, job: JobRow, name: str | None, *, request: dict[str, Any], plan: dict[str, Any]
    ) -> tuple[AnyJob, bool]:
        if name is not None:
            if job.name not in (None, name):
                raise Conflict(f"the same request is called {job.name!r} already ({job.id}): leave the name out")
            _take_job_name(session, job, name)
        if job.status in {"failed", "cancelled"}:
            if request != job.request:  # what changes no result, smaller batches say, may be what it failed for
                job.request, job.plan = request, {**job.plan, **plan}
            self._resume(session, job)
            return _describe(job), True
        return _describe(job), False

    def _resume(self, session: Session, job: JobRow) -> None:
        unfinished = (ShardRow.job_id == job.id, ShardRow.status != "succeeded")
        finished = (ShardRow.job_id == job.id, ShardRow.status == "succeeded")
        job.done = session.scalar(select(func.sum(ShardRow.units)).where(*finished)) or 0
        for shard in session.scalars(select(ShardRow).where(*unfinished)):
            _let_go(shard, self._last_sign_of_life(shard))
            shard.status, shard.done, shard.failures, shard.error = "queued", 0, 0, None
        session.flush()
        job.status, job.error, job.result, job.finished_at, job.resumed_at = "queued", None, None, None, None
        self._settle(session, job)

    def _put_back(self, job: JobRow, shard: ShardRow, error: dict[str, Any], *, permanent: bool) -> None:
        job.done -= shard.done
        shard.failures += 1
        shard.done, shard.error = 0, error
        if job.status in FINISHED:
            shard.status = "queued"  # for a later retry
        elif permanent or shard.failures >= self.max_attempts:
            shard.status = "failed"
            job.status, job.error, job.finished_at = "failed", error, utc_now()
        else:
            shard.status = "queued"

    def _last_sign_of_life(self, shard: ShardRow) -> float:
        return (shard.leased_until or self.lease) - self.lease

    def _settle(self, session: Session, job: JobRow) -> None:
        """Finish a job whose shards are all done and whose chunks are all published."""
        if job.status in FINISHED:
            return
        open_shards = exists().where(ShardRow.job_id == job.id, ShardRow.status != "succeeded")
        if session.scalar(select(open_shards)) or _awaits_publication(session, job):
            return
        job.status, job.finished_at, job.done = "succeeded", utc_now(), job.total
        job.started_at = job.started_at or job.finished_at
        if job.kind in self.results:
            job.result = self.results[job.kind](session, job)


def _shard_row(job: JobRow, number: int, shard: NewShard) -> ShardRow:
    return ShardRow(
        job_id=job.id, number=number, kind=job.kind, status="succeeded" if shard.finished else "queued",
        payload=shard.payload, units=shard.units, done=shard.units if shard.finished else 0, attempt=0, failures=0,
        worked=0.0,
    )  # fmt: skip


def _let_go(shard: ShardRow, at: float) -> None:
    """Have nobody work on a shard from `at` (Unix seconds) on, and count the time that somebody has."""
    if shard.claimed_at is not None:
        shard.worked += max(0.0, at - shard.claimed_at)
    shard.owner, shard.leased_until, shard.claimed_at = None, None, None


def _chunk_row(chunk: NewChunk, attempt: int) -> ChunkRow:
    return ChunkRow(
        segment_id=chunk.segment, start=chunk.start, stop=chunk.stop, attempt=attempt, digest=chunk.digest,
        excluded=[list(item) for item in chunk.excluded], tokens=chunk.tokens, published=False,
    )  # fmt: skip


def _committed(session: Session, chunk: Publication) -> ChunkRow | None:
    """The chunk's record, if it is still that of the same bytes."""
    row = session.get(ChunkRow, (chunk.segment, chunk.start))
    return row if row is not None and (row.attempt, row.digest) == (chunk.attempt, chunk.digest) else None


def _finished_by(session: Session, chunk: Publication) -> list[tuple[ShardRow, JobRow]]:
    """The finished shards that have these rows, of jobs that have not succeeded, each with its job."""
    query = (
        select(ShardRow, JobRow)
        .join(JobRow, JobRow.id == ShardRow.job_id)
        .where(
            JobRow.kind.in_(MAKE_FEATURES),
            JobRow.status != "succeeded",
            ShardRow.status == "succeeded",
        )
    )
    return [
        (shard, job)
        for shard, job in session.execute(query)
        for output in shard.payload["outputs"]
        if output["segment"] == chunk.segment
        and shard.payload["start"] <= output["base"] + chunk.start < shard.payload["stop"]
    ]


def _held(session: Session, claim: Claim) -> tuple[ShardRow, JobRow] | None:
    """The claim's shard and job, if the lease is still its own."""
    query = (
        select(ShardRow, JobRow)
        .join(JobRow, JobRow.id == ShardRow.job_id)
        .where(ShardRow.id == claim.shard, ShardRow.attempt == claim.attempt, ShardRow.status == "running")
        .where(ShardRow.job_id == claim.job, ShardRow.owner == claim.owner)
    )
    found = session.execute(query).first()
    return (found[0], found[1]) if found else None


def _awaits_publication(session: Session, job: JobRow) -> bool:
    segments = job.plan.get("segments", [])
    return bool(session.scalar(select(exists().where(SegmentRow.id.in_(segments), SegmentRow.complete.is_(False)))))


def _complete(session: Session, segment: str) -> None:
    """Mark a segment complete when published chunks cover its rows."""
    covered = session.scalar(
        select(func.coalesce(func.sum(ChunkRow.stop - ChunkRow.start), 0)).where(
            ChunkRow.segment_id == segment, ChunkRow.published.is_(True)
        )
    )
    session.execute(
        update(SegmentRow).where(SegmentRow.id == segment, SegmentRow.rows == covered).values(complete=True)
    )


def _find_job(session: Session, reference: str, kind: JobKind | None) -> JobRow:
    found = _jobs_called(session, reference, None if kind is None else (kind,))
    return _only(found, reference, noun=kind or "job", collection=collection(kind))


def _jobs_called(session: Session, reference: str, kinds: Sequence[JobKind] | None) -> list[JobRow]:
    """The jobs of these kinds, or of all, that have this id or name: one of each kind at most has the name."""
    if "\0" in reference:  # PostgreSQL takes no text with one
        return []
    query = select(JobRow).where(or_(JobRow.id == reference, JobRow.name == reference))
    return list(session.scalars(query if kinds is None else query.where(JobRow.kind.in_(kinds))))


def _only(found: Sequence[JobRow], reference: str, *, noun: str, collection: str) -> JobRow:
    """The one job that was found. Raises `NotFound` and `Conflict`."""
    if not found:
        raise NotFound(noun, reference, collection=collection)
    if len(found) > 1:
        raise Conflict(f"{len(found)} jobs of different kinds are called {reference!r}: name the job by its id")
    return found[0]


def _take_job_name(session: Session, job: JobRow, name: str) -> None:
    holder = session.scalar(select(JobRow).where(JobRow.kind == job.kind, JobRow.name == name))
    if holder is not None and holder.id != job.id:
        raise NameTaken(job.kind, name, holder.id, movable=False)
    job.name = name


def _describe(job: JobRow) -> AnyJob:
    columns = ("id", "kind", "name", "status", "created_at", "started_at", "finished_at", "error", "request", "result")
    values = {column: getattr(job, column) for column in columns}
    return AnyJob.model_validate({**values, "progress": _progress(job)})


def _progress(job: JobRow) -> Progress:
    rate = eta = None
    if job.resumed_at is not None:
        seconds = ((job.finished_at or utc_now()) - job.resumed_at).total_seconds()
        advanced = job.done - job.resumed_done
        if seconds > 0 and advanced > 0:
            rate = advanced / seconds
            eta = None if job.status in FINISHED else (job.total - job.done) / rate
    return Progress(done=job.done, total=job.total, unit=job.unit, rate=rate, eta_seconds=eta)
