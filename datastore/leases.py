"""Jobs and their shards: who computes what, under a lease, with a fencing token.

A shard is claimed, kept alive by a heartbeat and finished by an UPDATE that checks the attempt number, so a stalled
worker that wakes late changes nothing. A sweep puts back what a dead worker held. Leases are counted by the catalog's
clock, so that a host whose own is wrong takes none and loses none. Whoever calls these functions, a polling loop or a
Celery message, can lose or double its call without harm.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from gradstore.types import FINISHED, AnyJob, JobKind, Memory, Page, Precision, Problem, Progress, Worker
from sqlalchemy import ColumnElement, Select, delete, exists, func, literal, or_, select, tuple_, update
from sqlalchemy.orm import Session, aliased

from datastore import origin
from datastore.catalog import Catalog, take, use, utc_now
from datastore.errors import Conflict, InUse, NameTaken, NotFound
from datastore.isolation import DEATHS, Isolation, attempts
from datastore.schema import ChunkRow, JobRow, SegmentRow, ShardRow, UseRow, WorkerRow
from datastore.turns import Turns, Waiting, choose

WORKER_LIFETIME = timedelta(minutes=1)
"""A worker that has shown no sign of life for so long is not listed any more."""
CHOICE = 4
"""Of so many shards for each worker it prepares for one: two of eight then meet at one in five."""
ATTEMPT_BITS = 20
"""An attempt's number in the store: the shard's id above these bits, its attempt within them."""

OPEN = ("queued", "running")
"""States of a job that goes on."""


@dataclass(frozen=True)
class _Kind:
    """What is known of a kind of jobs wherever jobs are listed, counted and taken."""

    unit: str
    """What its work counts."""
    collection: str
    """Where it is listed, without the slash."""


_KINDS: dict[JobKind, _Kind] = {
    "gradients": _Kind("rows", "gradients"),
    "conversion": _Kind("rows", "conversions"),
    "finetune": _Kind("steps", "finetunes"),
    "evaluation": _Kind("examples", "evaluations"),
    "import": _Kind("rows", "imports"),
    "scoring": _Kind("rows", "jobs"),
    "validation": _Kind("trainings", "validations"),
    "attribution": _Kind("rows", "attributions"),
    "predictor": _Kind("fits", "predictors"),
    "cascade": _Kind("rows", "cascades"),
    "estimates": _Kind("subsets", "estimates"),
    "estimate-validation": _Kind("trainings", "estimates/validations"),
    "comparison": _Kind("parts", "comparisons"),
    "annotation": _Kind("rows", "annotations"),
    "stream": _Kind("rows", "streams"),
    "projector": _Kind("steps", "projectors"),
    "embedding": _Kind("rows", "embeddings"),
    "generation": _Kind("prompts", "generations"),
    "adapter-choice": _Kind("passes", "adapters/choices"),
}
ISOLATED: tuple[JobKind, ...] = ("gradients",)
"""Kinds of jobs whose rows go through a model, where one of them may take its worker down."""
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
    request_id: str | None = None
    """Id of the request that started the job."""
    isolation: Isolation | None = None
    """What is known of its rows, where earlier attempts have ended with their workers."""
    poisoned: tuple[int, ...] = ()
    """Rows that took their workers down, and are left out."""

    @property
    def token(self) -> int:
        """The attempt's number in the store, unlike that of any other shard or attempt."""
        return self.shard << ATTEMPT_BITS | self.attempt

    @property
    def labels(self) -> dict[str, Any]:
        """What the log's lines about it are marked with."""
        labels = {"job": self.job, "kind": self.kind, "shard": self.number, "attempt": self.attempt}
        return labels | ({"request": self.request_id} if self.request_id else {})


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
    return "/jobs" if kind is None else f"/{_KINDS[kind].collection}"


def queues() -> dict[str, JobKind]:
    """A queue for each kind of jobs, by its plural, under which workers are told what to take."""
    return {_plural(kind): kind for kind in _KINDS}


def _plural(kind: JobKind) -> str:
    if kind == "scoring":
        return "scores"
    return kind if kind.endswith("s") else f"{kind}s"


def _noun(kind: str | None) -> str:
    """What one job of a kind is called in a message."""
    return {None: "job", "gradients": "gradients job", "scoring": "scoring job"}.get(kind, str(kind))


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
                unit=_KINDS[kind].unit, created_at=utc_now(), resumed_done=0, api_key=origin.api_key.get(),
                request_id=origin.request_id.get(),
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

    def is_done(self, id: str) -> bool:
        """Whether there is a job of this id, and it has succeeded."""
        with self.catalog.reading() as session:
            job = session.get(JobRow, id)
            return job is not None and job.status == "succeeded"

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

    def prioritise(self, reference: str, priority: int) -> AnyJob:
        """Have a job's shards claimed before those of jobs with a lower priority from now on. Raises `NotFound`."""
        with self.catalog.transaction() as session:
            job = _find_job(session, reference, None)
            job.priority = priority
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

    def redo(self, id: str) -> AnyJob:
        """Have a job that has succeeded done all over, as what came of it is lost: what uses the job keeps it."""
        with self.catalog.transaction() as session:
            job = session.get_one(JobRow, id)
            if job.status == "succeeded":
                for shard in session.scalars(select(ShardRow).where(ShardRow.job_id == id)):
                    shard.status = "queued"
                session.flush()
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
                raise InUse(_noun(kind), job.id, users)
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
        turns: Turns | None = None,
    ) -> Claim | None:
        """Take a shard of the job whose turn it is (datastore/turns.py); None where no shard waits.

        Of that job it is the shard `prefer`, where that still waits, or else the oldest. `turns` is the worker's
        memory. With `most_units` shards that are larger are left to others.
        """
        with self.catalog.transaction() as session:
            waiting = _waiting(session, kinds, job=job, most_units=most_units)
            if not waiting:
                return None
            turns = turns if turns is not None else Turns()
            chosen = choose(waiting, at_work=_shards_at_work(session, besides=owner), turns=turns)
            shard = _queued(session, prefer, of_job=chosen.job) or session.get_one(ShardRow, chosen.shard)
            turns.took(chosen.job, chosen.api_key)
            return self._take(session, shard, owner)

    def _take(self, session: Session, shard: ShardRow, owner: str) -> Claim:
        """Make a waiting shard its owner's."""
        job = session.get_one(JobRow, shard.job_id)
        session.execute(update(WorkerRow).where(WorkerRow.id == owner).values(job=job.id, shard=shard.number))
        shard.status, shard.owner, shard.error = "running", owner, None
        shard.attempt += 1
        isolation = Isolation.read(shard.trying)
        if isolation is not None:
            shard.trying = replace(isolation, at=()).stored()
        shard.claimed_at = self.catalog.now(session)
        shard.leased_until = shard.claimed_at + self.lease
        job.status = "running"
        job.started_at = job.started_at or utc_now()
        if job.resumed_at is None:
            job.resumed_at, job.resumed_done = utc_now(), job.done
        return Claim(
            shard=shard.id, job=job.id, kind=cast("JobKind", job.kind), number=shard.number, attempt=shard.attempt,
            payload=shard.payload, request=job.request, plan=job.plan, owner=owner,
            worked=shard.worked, request_id=job.request_id, isolation=isolation,
            poisoned=tuple(shard.poisoned or ()),
        )  # fmt: skip

    def upcoming(self, claim: Claim) -> tuple[int, dict[str, Any]] | None:
        """A shard of the claim's job (its id and payload) that its worker is likely to get next, or None.

        Alone it is the oldest that waits; beside other workers, at random one of the next few, so that not all of them
        prepare for the same.
        """
        of_job = (ShardRow.job_id == claim.job, ShardRow.kind == claim.kind)
        with self.catalog.reading() as session:
            owners = select(func.count(ShardRow.owner.distinct())).where(*of_job, ShardRow.status == "running")
            at_work = session.scalar(owners) or 0
            few = 1 if at_work <= 1 else CHOICE * at_work
            ids = _in_state(session, "queued", job=literal(claim.job), kind=literal(claim.kind)).limit(few)
            found = session.execute(select(ShardRow.id, ShardRow.payload).where(ShardRow.id.in_(ids))).all()
        if not found:
            return None
        shard, payload = random.choice(found)  # noqa: S311 - nothing secret
        return shard, payload

    def waiting(self, *, kinds: Collection[JobKind]) -> bool:
        """Whether a shard waits: a look that takes no lock."""
        with self.catalog.reading() as session:
            return bool(session.scalar(select(exists(_open(kinds).where(_first_waiting(session).is_not(None))))))

    def wanted(self, claim: Claim) -> bool:
        """Whether a claim is still its owner's and its job goes on: a look that takes no lock."""
        with self.catalog.reading() as session:
            found = _held(session, claim)
            return found is not None and found[1].status == "running"

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

    def trying(self, claim: Claim, isolation: Isolation) -> bool:
        """Record which rows an attempt is about to compute; False when the shard must be dropped."""
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is None:
                return False
            shard, job = found
            shard.trying = isolation.stored()
            return job.status == "running"

    def record(self, claim: Claim, records: Callable[[Session], None]) -> bool:
        """Write what a shard has come to so far; False, changing nothing, when the shard must be dropped."""
        with self.catalog.transaction() as session:
            found = _held(session, claim)
            if found is None or found[1].status != "running":
                return False
            records(session)
            return True

    def payloads(self, id: str) -> list[dict[str, Any]]:
        """What is recorded of a job's shards, in their order."""
        with self.catalog.reading() as session:
            return payloads_of(session, id)

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
                _give_back(*found, at=self.catalog.now(session))

    def release_all(self) -> None:
        """Give back every shard that is at work, and know no worker: in a restored catalog they are another's."""
        with self.catalog.transaction() as session:
            for shard, job in session.execute(_running()):
                _give_back(shard, job, at=self._last_sign_of_life(shard))
            session.execute(delete(WorkerRow))

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
            completed = [_complete(session, segment) for segment in {chunk.segment for chunk in publications}]
            if any(completed):  # else no job waits for nothing more but these
                for job in session.scalars(select(JobRow).where(JobRow.status.in_(OPEN))):
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
        """Put back the shards whose lease has ended; returns how many there were. Takes no lock where there is none."""

        def ended(session: Session) -> Select[ShardRow, JobRow]:
            return _running().where(ShardRow.leased_until < self.catalog.now(session))

        with self.catalog.reading() as session:
            if session.execute(ended(session).limit(1)).first() is None:
                return 0
        with self.catalog.transaction() as session:
            lost = session.execute(ended(session)).all()
            for shard, job in lost:
                problem = _ended_with_its_worker(shard)
                _let_go(shard, self._last_sign_of_life(shard))
                self._put_back(job, shard, problem.model_dump(mode="json"), permanent=False)
            return len(lost)

    def announce(
        self,
        worker: str,
        *,
        device: str,
        job: str | None,
        flops: Mapping[Precision, float],
        shard: int | None = None,
        host: str | None = None,
        kinds: Collection[JobKind] | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Record a worker's sign of life; a new worker's replaces those of workers that are gone.

        `shard` is the number within the job.
        """
        with self.catalog.noting() as session:
            now = self._time(session)
            row = session.get(WorkerRow, worker)
            if row is None:
                session.execute(delete(WorkerRow).where(~self._at_work(session)))
                row = WorkerRow(id=worker, started_at=now)
            row.device, row.host, row.flops = device, host, cast("dict[str, Any]", flops)
            row.kinds = sorted(kinds) if kinds is not None else None
            row.job, row.shard = job, shard
            row.memory = memory.model_dump() if memory is not None else None
            row.gone, row.seen_at = False, now
            session.add(row)

    def leave(self, worker: str) -> None:
        """Record that a worker has stopped."""
        with self.catalog.transaction() as session:
            session.execute(update(WorkerRow).where(WorkerRow.id == worker).values(gone=True, job=None, shard=None))

    def workers(self) -> list[Worker]:
        """The workers seen lately."""
        with self.catalog.reading() as session:
            query = select(WorkerRow).where(self._at_work(session)).order_by(WorkerRow.id)
            return [Worker.model_validate(row, from_attributes=True) for row in session.scalars(query)]

    def page_of_workers(self, *, limit: int, after: str | None) -> Page[Worker]:
        """A page of the workers seen lately, by id."""
        with self.catalog.reading() as session:
            query = select(WorkerRow).where(self._at_work(session), WorkerRow.id > (after or ""))
            rows, has_more = take(session, query.order_by(WorkerRow.id), limit)
            workers = [Worker.model_validate(row, from_attributes=True) for row in rows]
            return Page[Worker](data=workers, has_more=has_more)

    def worker(self, id: str) -> Worker:
        """A worker seen lately. Raises `NotFound`."""
        with self.catalog.reading() as session:
            row = session.scalar(select(WorkerRow).where(self._at_work(session), WorkerRow.id == id))
            if row is None:
                raise NotFound("worker", id, collection="/workers")
            return Worker.model_validate(row, from_attributes=True)

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
            shard.trying = shard.poisoned = None  # what took workers down may have been mended since
        session.flush()
        job.status, job.error, job.result, job.finished_at, job.resumed_at = "queued", None, None, None, None
        self._settle(session, job)

    def _put_back(self, job: JobRow, shard: ShardRow, error: dict[str, Any], *, permanent: bool) -> None:
        job.done -= shard.done
        shard.failures += 1
        shard.done, shard.error = 0, error
        if job.status in FINISHED:
            shard.status = "queued"  # for a later retry
        elif permanent or shard.failures >= self._attempts(shard):
            shard.status = "failed"
            job.status, job.error, job.finished_at = "failed", error, utc_now()
        else:
            shard.status = "queued"

    def _attempts(self, shard: ShardRow) -> int:
        """How many attempts at a shard may fail."""
        return attempts(Isolation.read(shard.trying), poisoned=shard.poisoned or (), at_most=self.max_attempts)

    def _last_sign_of_life(self, shard: ShardRow) -> float:
        return (shard.leased_until or self.lease) - self.lease

    def _settle(self, session: Session, job: JobRow) -> None:
        """Finish a job whose shards are all done and whose chunks are all published."""
        if job.status in FINISHED:
            return
        if _has_open_shards(session, job) or _awaits_publication(session, job):
            return
        job.status, job.finished_at, job.done = "succeeded", utc_now(), job.total
        job.started_at = job.started_at or job.finished_at
        if job.kind in self.results:
            job.result = self.results[job.kind](session, job)


def payloads_of(session: Session, job: str) -> list[dict[str, Any]]:
    """What is recorded of a job's shards (id), in their order."""
    query = select(ShardRow.payload).where(ShardRow.job_id == job)
    return list(session.scalars(query.order_by(ShardRow.number)))


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


def _give_back(shard: ShardRow, job: JobRow, *, at: float) -> None:
    """Have a shard that somebody worked on until `at` (Unix seconds) wait again, unfinished and without a failure."""
    job.done -= shard.done
    _let_go(shard, at)
    shard.status, shard.done = "queued", 0


def _running() -> Select[ShardRow, JobRow]:
    """The shards that are at work, each with its job."""
    return select(ShardRow, JobRow).join(JobRow, JobRow.id == ShardRow.job_id).where(ShardRow.status == "running")


def _ended_with_its_worker(shard: ShardRow) -> Problem:
    """Record which rows a shard's worker was at when it died, where the kind of its job tells them."""
    where = ""
    if shard.kind in ISOLATED:
        isolation, poisoned = (Isolation.read(shard.trying) or Isolation()).ended()
        shard.trying = isolation.stored()
        if poisoned is not None:
            shard.poisoned = [*(shard.poisoned or ()), poisoned]
        if shard.poisoned:
            rows = ", ".join(map(str, shard.poisoned))
            where = f"; computed alone, these rows took their worker down {DEATHS} times each: {rows}"
    return Problem(
        type="worker-lost", title="Worker lost", status=500,
        detail=f"the worker {shard.owner} stopped while it worked on shard {shard.number}{where}",
    )  # fmt: skip


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


def _complete(session: Session, segment: str) -> bool:
    """Mark a segment complete when published chunks cover its rows; whether it has become so now."""
    row = session.get(SegmentRow, segment)
    chunks = select(ChunkRow.stop).where(ChunkRow.segment_id == segment)
    last = session.scalar(chunks.order_by(ChunkRow.start.desc()).limit(1))  # a look at one chunk, not at thousands
    if row is None or row.complete or last is None or last < row.rows:
        return False
    covered = session.scalar(
        select(func.coalesce(func.sum(ChunkRow.stop - ChunkRow.start), 0)).where(
            ChunkRow.segment_id == segment, ChunkRow.published.is_(True)
        )
    )
    row.complete = covered == row.rows
    session.flush()
    return row.complete


# Shards by state ------------------------------------------------------------------------------------------------------
#
# A job of ten million rows has ten thousand shards of each checkpoint, most of them done or waiting. The shards of a
# job have their ids in one piece, in the order of their numbers (`create` adds them in one transaction, and the catalog
# has one writer), so those in a state are a range of the index (status, kind, id), however many are beside them.


_SHARD, _OTHER = aliased(ShardRow), aliased(ShardRow)  # made once: each takes a millisecond until it was first used


def _in_state(
    session: Session,
    status: str,
    *,
    job: ColumnElement[str],
    kind: ColumnElement[str],
    most_units: int | None = None,
) -> Select[int]:
    """The ids of a job's shards in a state, the oldest first; with `most_units` those that are no larger."""
    shard, other = _SHARD, _OTHER
    ids = select(other.id).where(other.job_id == job).limit(1)
    first, last = (
        ids.order_by(number).correlate(JobRow).scalar_subquery() for number in (other.number, other.number.desc())
    )
    query = select(shard.id)
    if session.get_bind().dialect.name == "postgresql":
        # asked for a range of ids, its planner may take the primary key, and read all shards that are done
        key = tuple_(shard.status, shard.kind, shard.id)
        query = query.where(key.between(tuple_(literal(status), kind, first), tuple_(literal(status), kind, last)))
        query = query.order_by(shard.status, shard.kind, shard.id)
    else:  # of a range of several columns SQLite uses the first
        query = query.where(shard.status == status, shard.kind == kind, shard.id.between(first, last))
        query = query.order_by(shard.id)
    return query if most_units is None else query.where(shard.units <= most_units)


def _first_waiting(session: Session, *, most_units: int | None = None) -> ColumnElement[int | None]:
    """The id of a job's first shard that waits, within a query of jobs."""
    columns = JobRow.__table__.c
    ids = _in_state(session, "queued", job=columns.id, kind=columns.kind, most_units=most_units)
    return ids.limit(1).correlate(JobRow).scalar_subquery()


def _open(kinds: Collection[JobKind]) -> Select[str]:
    kind = JobRow.kind + ""  # by the index of states: there are many jobs of a kind, and few that go on
    return select(JobRow.id).where(JobRow.status.in_(OPEN), kind.in_(kinds))


def _waiting(session: Session, kinds: Collection[JobKind], *, job: str | None, most_units: int | None) -> list[Waiting]:
    """The jobs with a shard that waits."""
    first = _first_waiting(session, most_units=most_units)
    query = _open(kinds).add_columns(JobRow.priority, JobRow.api_key, first)
    if job is not None:
        query = query.where(JobRow.id == job)
    return [Waiting(*found) for found in session.execute(query) if found[-1] is not None]


def _shards_at_work(session: Session, *, besides: str) -> dict[tuple[str | None, str], int]:
    """How many shards of each API key and job others than `besides` are at."""
    query = (
        select(JobRow.api_key, JobRow.id, func.count())
        .join(ShardRow, ShardRow.job_id == JobRow.id)
        .where(ShardRow.status == "running", ShardRow.owner != besides)
        .group_by(JobRow.api_key, JobRow.id)
    )
    return {(key, job): shards for key, job, shards in session.execute(query)}


def _queued(session: Session, shard: int | None, *, of_job: str) -> ShardRow | None:
    """The shard with this id, where it waits and is the job's."""
    row = session.get(ShardRow, shard) if shard is not None else None
    return row if row is not None and (row.job_id, row.status) == (of_job, "queued") else None


def _has_open_shards(session: Session, job: JobRow) -> bool:
    """Whether shards of a job are not done."""
    states = ("running", "queued", "failed")
    return any(
        session.scalar(_in_state(session, state, job=literal(job.id), kind=literal(job.kind)).limit(1)) is not None
        for state in states
    )


def _find_job(session: Session, reference: str, kind: JobKind | None) -> JobRow:
    found = _jobs_called(session, reference, None if kind is None else (kind,))
    return _only(found, reference, noun=_noun(kind), collection=collection(kind))


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
        raise NameTaken(_noun(job.kind), name, holder.id, movable=False)
    job.name = name


def _describe(job: JobRow) -> AnyJob:
    columns = (
        *("id", "kind", "name", "status", "priority", "created_at", "started_at", "finished_at"),
        *("error", "request", "result"),
    )
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
