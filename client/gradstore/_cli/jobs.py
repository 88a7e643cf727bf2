"""Jobs of every kind: what is printed of them in a list and when they start, and the commands of `jobs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore import errors
from gradstore._cli.names import Names
from gradstore._cli.nouns import add_delete, add_show, bare_group, resource
from gradstore._cli.options import Json, Limit, Timeout, Wait
from gradstore._cli.output import Columns, ago, is_terminal, print_json, print_list, print_object, say, say_lost_rows
from gradstore._cli.session import session
from gradstore.types import Job, JobKind, JobStatus

if TYPE_CHECKING:
    from gradstore import GradientStore

JobReference = Annotated[str, typer.Argument(metavar="JOB", help="Id or name of the job.")]


def _progress(job: Job[Any, Any]) -> str:
    return f"{job.progress.done:,}/{job.progress.total:,} {job.progress.unit}"


OF = (
    "dataset",
    "datasets",
    "task",
    "tasks",
    "selection",
    "finetune",
    "checkpoint",
    "adapter",
    "adapters",
    "gradients",
    "model",
    "projector",
    "streams",
    "annotations",
    "estimates",
)
"""Fields of a request that say what a job is about."""


def listed(names: Names) -> Columns:
    """What is printed of a job."""
    return {
        "id": lambda job: job.id,
        "name": lambda job: job.name,
        "of": lambda job: _about(job, names),
        "status": lambda job: job.status,
        "progress": _progress,
        "age": lambda job: ago(job.created_at),
    }


def _about(job: Job[Any, Any], names: Names) -> str | None:
    """The datasets, tasks and models that a job's request names; of scores, those of their recipe."""
    request = job.request.model_dump()
    fields = request | (request.get("recipe") or {})
    said = [one for name in OF if (value := fields.get(name)) for one in _references(value)]
    return ", ".join(names.called(one) for one in said) or None


def _references(value: str | list[str] | dict[str, str | None]) -> list[str]:
    """What a field of a request names: one, several, or one by each name."""
    if isinstance(value, str):
        return [value]
    return [one for one in (value.values() if isinstance(value, dict) else value) if one is not None]


jobs = bare_group("jobs", help="Work of all kinds: look, wait, cancel, go on.")
add_show(jobs, "jobs")
add_delete(
    jobs,
    "jobs",
    help="Delete finished scoring jobs; their scores stay. Other jobs are deleted as what they are.",
)


def start(
    store: GradientStore,
    noun: str,
    fields: Mapping[str, Any],
    *,
    wait: bool,
    dry_run: bool,
    as_json: bool,
    show: Callable[[Any], None] | None = None,
    cost: Callable[..., None] = print_object,
) -> None:
    """Start a job of these fields, and print it as `started` does; with `dry_run` print what it would take instead."""
    found = resource(store, noun)
    if dry_run:
        cost(found.estimate(**fields), as_json=as_json)
    else:
        started(store, noun, found.create(**fields), wait=wait, as_json=as_json, show=show)


def started(
    store: GradientStore,
    noun: str,
    job: Job[Any, Any],
    *,
    wait: bool,
    as_json: bool,
    show: Callable[[Any], None] | None = None,
) -> None:
    """Print a job that was started, or, with `wait`, as it ended: its result by `show`, else its id."""
    if wait:
        try:
            job = resource(store, noun).wait(job, progress=is_terminal())
        except KeyboardInterrupt:
            say(f"the job goes on: gradstore jobs wait {job.id}")
            raise
    elif not job.finished:
        say(f"{job.kind} {job.id} is {job.status}: gradstore jobs wait {job.id}")
    say_lost_rows(job.result)
    if as_json:
        print_json(job)
    elif show is not None and job.result is not None:
        show(job.result)
    else:
        typer.echo(job.id)


def print_outcome(job: Job[Any, Any], show: Callable[[Any], None], *, as_json: bool) -> None:
    """Print a job's result by `show`; as JSON, or before there is a result, all that is known of the job."""
    if as_json or job.result is None:
        print_object(job, as_json=as_json)
    else:
        show(job.result)


@jobs.command("list")
def list_jobs(
    ctx: typer.Context,
    *,
    kind: Annotated[JobKind | None, typer.Option(help="Only jobs of this kind.")] = None,
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """List the jobs, the newest first."""
    with session(ctx) as store:
        print_list(
            islice(store.jobs.list(kind=kind, status=status), limit),
            {"kind": lambda job: job.kind, **listed(Names(store))},
            as_json=as_json,
        )


@jobs.command("wait")
def wait_for_job(ctx: typer.Context, job: JobReference, *, timeout: Timeout = None, as_json: Json = False) -> None:
    """Wait until a job has succeeded. Prints its id; exit code 3 where it fails."""
    with session(ctx) as store:
        done = store.jobs.wait(job, progress=is_terminal(), timeout=timeout)
        if as_json:
            print_json(done)
        else:
            typer.echo(done.id)


@jobs.command("watch")
def watch_job(ctx: typer.Context, job: JobReference, *, as_json: Json = False) -> None:
    """Print a line whenever a job changes. Ends when it is finished; exit code 3 where it fails."""
    with session(ctx) as store:
        for state in store.jobs.events(job):
            if as_json:
                print_json(state)
            else:
                typer.echo(f"{state.status:<9}  {_progress(state)}")
            if state.finished and state.status != "succeeded":
                raise errors.JobFailed(state)


@jobs.command("prioritise")
def prioritise_job(
    ctx: typer.Context,
    job: JobReference,
    priority: Annotated[int, typer.Argument(metavar="PRIORITY", min=-10, max=10, help="-10 to 10; jobs start with 0.")],
    *,
    as_json: Json = False,
) -> None:
    """Have a job done before those of a lower priority, from its next shard on; `-- -5` for one below 0."""
    with session(ctx) as store:
        changed = store.jobs.prioritise(job, priority)
        print_object(changed, as_json=True) if as_json else typer.echo(changed.id)


@jobs.command("cancel")
def cancel_job(ctx: typer.Context, job: JobReference, *, as_json: Json = False) -> None:
    """Stop a job; what it finished stays."""
    with session(ctx) as store:
        print_object(store.jobs.cancel(job), as_json=True) if as_json else typer.echo(store.jobs.cancel(job).id)


@jobs.command("retry")
def retry_job(ctx: typer.Context, job: JobReference, *, wait: Wait = False, as_json: Json = False) -> None:
    """Go on with a failed or cancelled job from where it stopped."""
    with session(ctx) as store:
        started(store, "jobs", store.jobs.retry(job), wait=wait, as_json=as_json)
