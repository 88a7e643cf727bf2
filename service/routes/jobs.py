"""Jobs of all kinds: look, follow, cancel, try again."""

from __future__ import annotations

from typing import Annotated, TypeVar

from anyio.to_thread import run_sync
from fastapi import Query, Response
from fastapi.responses import StreamingResponse
from gradstore.types import AnyJob, Job, JobKind, JobStatus, Page, Prioritise, Rename

from datastore.errors import Conflict
from datastore.leases import collection
from service import events
from service.dependencies import Backend, BackendDep, Paging, Reference
from service.openapi import starting
from service.routing import Router, noun

router = noun("jobs")
JobT = TypeVar("JobT", bound=Job)  # type: ignore[type-arg]  # of any kind
RETRY_AFTER = 1  # seconds


class JobFilter(Paging):
    """Which jobs are listed."""

    kind: JobKind | None = None
    status: JobStatus | None = None


def started(backend: Backend, job: AnyJob, response: Response, *, model: type[JobT]) -> JobT:
    """The answer to what started a job: 202 and where to look, or 200 where it has finished before."""
    if job.finished:
        response.status_code = 200
    else:
        response.headers["Location"] = f"/jobs/{job.id}"
        response.headers["Retry-After"] = str(RETRY_AFTER)
        if job.kind == "scoring":
            backend.scorer.ring()
        else:
            backend.queue.ring(job.id, job.kind)
    return typed(job, model)


def typed(job: AnyJob, model: type[JobT]) -> JobT:
    """The job with the request and result of its kind."""
    return model.model_validate(job.model_dump())


def typed_page(page: Page[AnyJob], model: type[JobT]) -> Page[JobT]:
    """A page of jobs of one kind."""
    return Page[model](data=[typed(job, model) for job in page.data], has_more=page.has_more)  # type: ignore[valid-type]


def look_and_name(router: Router, *, kind: JobKind, model: type[JobT], one: str) -> None:
    """Add the routes that every noun of jobs has alike: list, get and rename; `one` describes what get answers."""
    plural = router.prefix.removeprefix("/").replace("/", "_")

    @router.get(
        "",
        name=f"list_{plural}",
        response_model=Page[model],  # type: ignore[valid-type]
        description=f"A page of {plural.replace('_', ' ')}, newest first.",
    )
    def list_all(backend: BackendDep, paging: Annotated[Paging, Query()]) -> Page[JobT]:
        return typed_page(backend.jobs.page(kind=kind, limit=paging.limit, after=paging.after), model)

    @router.get("/{reference}", name=f"get_{kind.replace('-', '_')}", response_model=model, description=one)
    def get(backend: BackendDep, reference: Reference) -> JobT:
        return typed(backend.jobs.get(reference, kind=kind), model)

    @router.patch(
        "/{reference}",
        name=f"rename_{kind.replace('-', '_')}",
        response_model=model,
        description="Give it another name, or none.",
    )
    def rename(backend: BackendDep, reference: Reference, body: Rename) -> JobT:
        return typed(backend.jobs.rename(reference, body.name, kind=kind), model)


@router.get("")
def list_jobs(backend: BackendDep, wanted: Annotated[JobFilter, Query()]) -> Page[AnyJob]:
    """A page of jobs, newest first."""
    return backend.jobs.page(kind=wanted.kind, status=wanted.status, limit=wanted.limit, after=wanted.after)


@router.get("/{reference}")
def get_job(backend: BackendDep, reference: Reference) -> AnyJob:
    """A job by id; by name, where only one job has it."""
    return backend.jobs.get(reference)


@router.patch("/{reference}")
def prioritise_job(backend: BackendDep, reference: Reference, body: Prioritise) -> AnyJob:
    """Have a job's shards done before those of jobs with a lower priority, from the next one on."""
    return backend.jobs.prioritise(reference, body.priority)


@router.post("/{reference}/cancel")
def cancel_job(backend: BackendDep, reference: Reference) -> AnyJob:
    """Stop a job. Its finished shards stay, and `retry` goes on from there. 409 where it has finished."""
    return backend.jobs.cancel(reference)


@router.post("/{reference}/retry", status_code=202, responses=starting(AnyJob))
def retry_job(backend: BackendDep, reference: Reference, response: Response) -> AnyJob:
    """Go on with a failed or cancelled job from its last finished shard; 409 for any other."""
    return started(backend, backend.jobs.retry(reference), response, model=AnyJob)


@router.delete("/{reference}", status_code=204)
def delete_job(backend: BackendDep, reference: Reference) -> None:
    """Delete a finished scoring job; what it computed stays. Other jobs are deleted with what they made, where it is.

    409 for those, which says where, and for a job at work.
    """
    job = backend.jobs.get(reference)
    if job.kind != "scoring":
        raise Conflict(f"{job.id} is deleted with what it made: DELETE {collection(job.kind)}/{job.id}")
    backend.jobs.remove(job.id, kind=job.kind)


@router.get(
    "/{reference}/events",
    response_class=StreamingResponse,
    responses={200: {"description": "The events.", "content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}}}},
)
async def follow_job(backend: BackendDep, reference: Reference) -> StreamingResponse:
    """The states of a job as server-sent events: `progress` at every change, and `finished`; data is the job."""
    job = await run_sync(backend.jobs.get, reference)
    states = events.job_events(lambda: backend.jobs.get(job.id), stopping=backend.stopping)
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}  # nginx would hold events back
    return StreamingResponse(states, media_type=events.MEDIA_TYPE, headers=headers)
