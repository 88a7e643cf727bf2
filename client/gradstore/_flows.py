"""What takes more than one request, written once for both clients.

A flow is a generator: it yields the effects it needs (`Send`, `Read`, `Sleep`, …), is sent their outcomes, and returns
its result; a `Stream` also yields `Emit` for each item it finds. `client.py` carries effects out, blocking or awaiting.
A failed connection is raised inside the flow, at the effect that met it. Files are written from within the flow, so
that an awaiting client holds its loop for the length of one small write.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import tempfile
import time
import uuid
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, Unpack, cast, get_args

from pydantic import BaseModel, ValidationError

from gradstore import _endpoints, errors
from gradstore._endings import array_type, content_format, export_format, table_type
from gradstore._endpoints import Call, Chosen, ComparisonFields, Question
from gradstore._progress import BytesBar, JobBar
from gradstore.results import ComparisonJob, ComparisonResult, Selection, SucceededJob
from gradstore.types import (
    AdapterSet,
    AdapterSets,
    AdapterShot,
    AdapterShots,
    AnnotatedRow,
    AnnotatedRows,
    AnyJob,
    ComparisonRequest,
    EmbeddedRow,
    EmbeddedRows,
    EstimatedSubset,
    EstimatedSubsets,
    ExampleRow,
    ExampleRows,
    Explanation,
    Explanations,
    ExportFormat,
    FeatureRow,
    FeatureRows,
    Job,
    Overlaps,
    Page,
    Problem,
    RequestT,
    ResultT,
    ScoreDistribution,
    ScoredRow,
    Scores,
    ScoringJob,
    SelectedRow,
    SelectionRecipe,
    Split,
    TableFormat,
)

PAGE = 1000  # rows asked for at a time
EXPLAINED = 20  # explanations asked for at a time: each is computed
LISTED = 100  # resources asked for at a time
PATIENCE = 300.0  # seconds a wait outlives a server that does not answer
LONGEST_PAUSE = 30.0  # seconds between two attempts, whatever the server asks for
SCORES_WAIT = 20.0  # seconds a /select may take to answer before it becomes a job
RETRIED = frozenset({429, 502, 503, 504})

ItemT = TypeVar("ItemT", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")
EmitT_co = TypeVar("EmitT_co", covariant=True)


# Effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """How often a request is tried again, and how long to pause before that."""

    retries: int
    backoff: float
    """Seconds before the first retry; doubled before each further one."""

    def pause(self, attempt: int, answer: Answer | None = None) -> float:
        """Seconds to pause after an attempt, counted from 0: what the server asks for, else a growing random time."""
        asked = answer.retry_after() if answer is not None else None
        if asked is not None:
            return min(asked, LONGEST_PAUSE)
        longest = min(self.backoff * 2.0 ** min(attempt, 10), LONGEST_PAUSE / 2)
        return longest * random.uniform(0.5, 1)  # noqa: S311  # spreads clients, guards no secret


@dataclass(frozen=True)
class Settings:
    """Effect: learn the client's Policy."""


@dataclass(frozen=True)
class Sleep:
    """Effect: pause."""

    seconds: float


@dataclass(frozen=True)
class Send:
    """Effect: send a request; the outcome is an Answer, of which a streamed one leaves its body to `Read`."""

    call: Call[Any]
    headers: Mapping[str, str]
    streamed: bool = False


@dataclass(frozen=True)
class Read:
    """Effect: the next bytes of the streamed body; empty at its end."""


@dataclass(frozen=True)
class Emit(Generic[EmitT_co]):
    """Effect: hand an item to whoever iterates."""

    item: EmitT_co


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = b""

    @property
    def request_id(self) -> str | None:
        """The id under which the server's log knows the request."""
        return self.headers.get("x-request-id")

    def retry_after(self) -> float | None:
        """Seconds the server asks to pause, given as a number or a date."""
        value = self.headers.get("retry-after", "")
        if value.isdigit():
            return float(value)
        try:
            return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
        except (TypeError, ValueError):
            return None


Effect = Settings | Sleep | Send | Read
Flow = Generator[Effect, Any, T]
Stream = Generator[Effect | Emit[T], Any, None]


# One request ------------------------------------------------------------------------------------------------------


def exchange(
    call: Call[Any], *, headers: Mapping[str, str] | None = None, streamed: bool = False, patience: float | None = None
) -> Flow[Answer]:
    """Send a request until it is answered: connection errors and 429, 502, 503, 504 are tried again.

    Every POST carries an Idempotency-Key which its retries repeat, so that they never start a job twice. Gives up after
    the policy's retries, or, where `patience` is given, after so many seconds. Raises the errors of `gradstore.errors`.
    """
    policy: Policy = yield Settings()
    keyed = {"Idempotency-Key": uuid.uuid4().hex} if call.method == "POST" else {}
    send = Send(call, {**keyed, **(headers or {})}, streamed)
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            answer: Answer = yield send
        except errors.ConnectionFailed as error:
            failure: errors.GradstoreError = error
            pause = policy.pause(attempt)
        else:
            gone = answer.status == 404 and call.method == "DELETE" and attempt > 0  # by an attempt that got no answer
            if answer.status < 300 or gone:
                return answer
            failure = refused(answer)
            if answer.status not in RETRIED:
                raise failure
            pause = policy.pause(attempt, answer)
        left = float("inf") if patience is None else patience - (time.monotonic() - started)
        if left <= 0 or (patience is None and attempt >= policy.retries):
            raise failure
        yield Sleep(min(pause, left))
    raise AssertionError("unreachable")


def send(call: Call[T]) -> Flow[T]:
    """Send a request and read its answer."""
    answer = yield from exchange(call)
    return cast("T", None if call.answer is None else parse(call.answer, answer))


def parse(model: type[T], answer: Answer) -> T:
    """Read a JSON answer; UnexpectedAnswer where it is something else."""
    body = cast("type[BaseModel]", model)
    try:
        return cast("T", _validated(body, answer.body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise errors.UnexpectedAnswer(
            f"the answer is not the {body.__name__} expected ({place or 'body'}: {first['msg']}): "
            "is this the address of a gradstore server, and of this client's version?",
            request_id=answer.request_id,
        ) from error


def _validated(model: type[BaseModel], body: bytes) -> BaseModel:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if any(part["type"] != "extra_forbidden" for part in error.errors(include_url=False)):
            raise
        # A job echoes its request, whose model refuses unknown fields: those of a newer server are left out.
        return model.model_validate_json(body, extra="ignore")


def refused(answer: Answer) -> errors.GradstoreError:
    """Name the error that an answer stands for; a redirect is one: a POST would lose its body, a key its secrecy."""
    if answer.status < 400:
        return errors.UnexpectedAnswer(
            f"the server is at another address, {answer.headers.get('location', 'which it does not name')}: "
            "use that one (GRADSTORE_URL)",
            request_id=answer.request_id,
        )
    try:
        problem = Problem.model_validate_json(answer.body)
    except ValidationError:
        problem = errors.without_problem(answer.status, answer.body.decode(errors="replace"))
    return errors.refused(problem, request_id=answer.request_id)


# Pages ------------------------------------------------------------------------------------------------------------


def pages(call: Call[Page[ItemT]]) -> Stream[ItemT]:
    """Iterate over the items of all pages; each page is asked for when it is needed.

    The next one is asked for before the last item of a page is handed on: it begins after that item, which whoever
    iterates may delete.
    """
    params = (*call.params, ("limit", str(LISTED)))
    page = yield from send(replace(call, params=params))
    while page.has_more and page.data:
        last = page.data[-1]
        for item in page.data[:-1]:
            yield Emit(item)
        page = yield from send(replace(call, params=(*params, ("after", cast("Any", last).id))))
        yield Emit(last)
    for item in page.data:
        yield Emit(item)


def paged(function: Callable[P, Call[Page[ItemT]]]) -> Callable[P, Stream[ItemT]]:
    """Make a stream of all items of a call that gets a page."""

    @functools.wraps(function)
    def stream(*args: P.args, **kwargs: P.kwargs) -> Stream[ItemT]:
        return pages(function(*args, **kwargs))

    return stream


def gradients_rows(job: str, /, *, feature_set: str | None = None) -> Stream[FeatureRow]:
    """Iterate over what is known of a feature set's rows beside their features: norms, loss, tokens, why one has none.

    `job` is the id or name of gradients, an import or a conversion; a name is a gradients job's first. `feature_set` is
    the id of one of the job's feature sets; Conflict lists them where it is left out and there are several.
    """

    def page(after: str | None) -> Flow[FeatureRows]:
        return send(_endpoints.gradients_rows(job, feature_set=feature_set, limit=PAGE, after=after))

    yield from _paged(page)


def estimates_subsets(estimates: str, /) -> Stream[EstimatedSubset]:
    """Iterate over the subsets of estimates: their groups, and what training on each is estimated to give."""

    def page(after: str | None) -> Flow[EstimatedSubsets]:
        return send(_endpoints.estimates_subsets(estimates, limit=PAGE, after=after))

    yield from _paged(page)


def adapter_choices_sets(choice: str, /) -> Stream[AdapterSet]:
    """Iterate over every set of candidates of a choice, the best first."""

    def page(after: str | None) -> Flow[AdapterSets]:
        return send(_endpoints.adapter_choices_sets(choice, limit=PAGE, after=after))

    yield from _paged(page)


def adapter_choices_shots(choice: str, /) -> Stream[AdapterShot]:
    """Iterate over the shots of a choice: what every adapter makes of each."""

    def page(after: str | None) -> Flow[AdapterShots]:
        return send(_endpoints.adapter_choices_shots(choice, limit=PAGE, after=after))

    yield from _paged(page)


def gradients_save_rows(
    job: str, path: str | os.PathLike[str], /, *, feature_set: str | None = None, progress: bool = False
) -> Flow[Path]:
    """Save what is known of a feature set's rows: as `.npy` (a structured array), `.safetensors` or `.parquet`.

    `job` and `feature_set` are those of `rows`.
    """
    call = _endpoints.gradients_rows(job, feature_set=feature_set)
    return download(replace(call, accept=table_type(path, what="rows")), path, progress=progress)


def gradients_save_features(
    job: str,
    path: str | os.PathLike[str],
    /,
    *,
    feature_set: str | None = None,
    start: int | None = None,
    stop: int | None = None,
    progress: bool = False,
) -> Flow[Path]:
    """Save the features of a feature set, float32 (rows, dim): as `.npy` or `.safetensors`, by the path's ending.

    `job` is the id or name of gradients, an import or a conversion; a name is a gradients job's first. `start` and
    `stop` choose rows, as a slice does. A row without a feature is NaN. `feature_set` is the id of one of the job's
    feature sets; Conflict lists them where it is left out and there are several.
    """
    accept = array_type(path, what="features")
    call = _endpoints.gradients_features(job, accept=accept, feature_set=feature_set, start=start, stop=stop)
    return (yield from download(call, path, progress=progress))


def streams_save(
    stream: str,
    path: str | os.PathLike[str],
    /,
    *,
    start: int | None = None,
    stop: int | None = None,
    progress: bool = False,
) -> Flow[Path]:
    """Save the rows of a stream, float32 (rows, dim): as `.npy` or `.safetensors`, by the path's ending.

    They are in the order of the dataset's or the task's rows, and NaN where one is absent; `start` and `stop` choose
    rows, as a slice does. A `.safetensors` has their ids with them, as `upload` takes them.
    """
    call = _endpoints.streams_content(stream, accept=array_type(path, what="streams"), start=start, stop=stop)
    return (yield from download(call, path, progress=progress))


def selection_rows(selection: str, /) -> Stream[SelectedRow]:
    """Iterate over the chosen rows, best first, with their scores."""

    def page(after: str | None) -> Flow[Selection]:
        return send(_endpoints.selections_get(selection, limit=PAGE, after=after))

    yield from _paged(page)


def selection(name: str, /, *, limit: int | None = None) -> Flow[Selection]:
    """Get a selection with all its rows, or with the first `limit` of them."""
    first = yield from send(_endpoints.selections_get(name, limit=_page(limit)))
    return (yield from _whole(first, limit))


def _whole(first: Selection, limit: int | None) -> Flow[Selection]:
    rows = list(first.data[:limit])
    more = first.has_more or len(rows) < len(first.data)
    while more and (limit is None or len(rows) < limit):
        left = None if limit is None else limit - len(rows)
        page = yield from send(_endpoints.selections_get(first.id, limit=_page(left), after=_rows_seen(len(rows))))
        rows += page.data
        more = page.has_more and bool(page.data)
    return first.model_copy(update={"data": rows, "has_more": more})


def _page(limit: int | None) -> int:
    return PAGE if limit is None else min(limit, PAGE)


def _rows_seen(count: int) -> str | None:
    return str(count) if count else None


class _Rows(Protocol[EmitT_co]):
    """A page of rows."""

    @property
    def data(self) -> Sequence[EmitT_co]: ...

    @property
    def has_more(self) -> bool: ...


def _paged(page: Callable[[str | None], Flow[_Rows[T]]]) -> Stream[T]:
    """Iterate over the rows of page after page; `page` asks for the one after so many rows."""
    seen = 0
    while True:
        found = yield from page(_rows_seen(seen))
        for row in found.data:
            yield Emit(row)
        seen += len(found.data)
        if not found.has_more or not found.data:
            return


class _Places(_Rows[EmitT_co], Protocol[EmitT_co]):
    """A page of rows that says where the next one begins: a search may find nothing on a page and go on."""

    @property
    def next(self) -> int | None: ...


def _followed(page: Callable[[str | None], Flow[_Places[T]]]) -> Stream[T]:
    """Iterate over the rows of page after page; each says where the next one begins."""
    after: str | None = None
    while True:
        found = yield from page(after)
        for row in found.data:
            yield Emit(row)
        if found.next is None:
            return
        after = str(found.next)


# Waiting ----------------------------------------------------------------------------------------------------------


class Wait(Protocol[RequestT, ResultT]):
    """The signature of `wait` for one kind of job."""

    def __call__(
        self,
        job: Job[RequestT, ResultT] | str,
        /,
        *,
        progress: bool = False,
        timeout: float | None = None,
        poll: float = 2.0,
    ) -> Flow[SucceededJob[RequestT, ResultT]]: ...


def waiter(
    get: Callable[[str], Call[Job[RequestT, ResultT]]], succeeded: type[SucceededJob[RequestT, ResultT]]
) -> Wait[RequestT, ResultT]:
    """Make the flow that waits for one kind of job."""

    def wait(
        job: Job[RequestT, ResultT] | str,
        /,
        *,
        progress: bool = False,
        timeout: float | None = None,
        poll: float = 2.0,
    ) -> Flow[SucceededJob[RequestT, ResultT]]:
        """Wait until the job has succeeded and return it, with its result; `progress` shows a bar on stderr.

        Asks every `poll` seconds at most, sooner in the beginning. A server that restarts in the meantime is waited for
        (up to five minutes without any answer). Raises `JobFailed` where the job failed or was cancelled, and
        `WaitTimeout` after `timeout` seconds; the job goes on then.
        """
        call = get(job if isinstance(job, str) else job.id)
        answer = yield from _finished(call, progress=progress, timeout=timeout, poll=poll)
        return parse(succeeded, answer)

    return wait


def _finished(
    call: Call[Job[RequestT, ResultT]], *, progress: bool, timeout: float | None, poll: float
) -> Flow[Answer]:
    """Ask for a job until it has succeeded."""
    deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
    job: Job[RequestT, ResultT] | None = None
    with JobBar(shown=progress) as bar:
        for interval in _intervals(poll):
            left = deadline - time.monotonic()
            try:
                answer = yield from exchange(_within(call, left), patience=min(left, PATIENCE))
            except errors.ConnectionFailed as error:
                if time.monotonic() < deadline:
                    raise
                raise _out_of_time(call, job, timeout) from error
            job = parse(cast("type[Job[RequestT, ResultT]]", call.answer), answer)
            bar.update(job)
            if job.status == "succeeded":
                return answer
            if job.finished:
                raise errors.JobFailed(job, request_id=answer.request_id)
            left = deadline - time.monotonic()
            if left <= 0:
                raise _out_of_time(call, job, timeout)
            asked = answer.retry_after()
            yield Sleep(min(interval if asked is None else asked, LONGEST_PAUSE, left))
    raise AssertionError("unreachable")


def _within(call: Call[T], left: float) -> Call[T]:
    """Let a request last no longer than what is left of the waiting time, and a second at least."""
    return call if left == float("inf") else replace(call, timeout=min(60.0, max(left, 1.0)))


def _out_of_time(call: Call[Any], job: Job[Any, Any] | None, timeout: float | None) -> errors.WaitTimeout:
    state = "the server has not answered" if job is None else f"{job.kind} {job.id} is {job.status}"
    return errors.WaitTimeout(f"{state} after {timeout or 0:g} s of waiting for {call.path}; the job goes on", job=job)


def _intervals(longest: float) -> Iterator[float]:
    interval = min(0.1, longest)
    while True:
        yield interval
        interval = min(interval * 1.5, longest)


def events(job: str, /) -> Stream[AnyJob]:
    """Iterate over the states of a job as they change, until it is finished; a broken connection is made again."""
    policy: Policy = yield Settings()
    patience: float | None = None
    while True:
        body = Body(_endpoints.jobs_events(job), resumed=False)
        yield from body.open(patience=patience)
        patience = PATIENCE
        try:
            while (data := (yield from _event(body))) is not None:
                state = parse(AnyJob, Answer(200, body.headers, data))
                yield Emit(state)
                if state.finished:
                    return
        except errors.ConnectionFailed:
            pass  # begin again: each event holds the whole state
        yield Sleep(policy.pause(0))


def _event(body: Body) -> Flow[bytes | None]:
    """Get the data of the next server-sent event; None at the end of the body."""
    data: list[bytes] = []
    while (line := (yield from body.line())) is not None:
        if line.startswith(b"data:"):
            data.append(line[5:].strip())
        elif not line.strip() and data:
            return b"\n".join(data)
    return None


# Selection --------------------------------------------------------------------------------------------------------


def select(
    *,
    recipe: SelectionRecipe | Mapping[str, Any] | str | None = None,
    limit: int | None = None,
    progress: bool = False,
    timeout: float | None = None,
    **fields: Unpack[Chosen],
) -> Flow[Selection]:
    """Choose the examples that help a task most, best first: `select(task="mmlu", pct=0.05)`.

    `pct` is a fraction of the pool, `k` a number of rows; docs/selection.md tells every way of choosing. With `recipe`,
    a selection's `recipe` or id, and nothing else, the same rows are chosen again. The answer's `data` holds all chosen
    rows, or the first `limit`; it is recorded under its id, which `finetunes.create(selection=…)` takes. Where scores
    have to be computed first, that job is waited for (`progress`, `timeout` as in `wait`). Raises `Conflict` where
    gradients are missing, with the request that computes them, or where several stored things fit, with their list.
    """
    if recipe is None:
        call = _endpoints.select(**fields, limit=_page(limit), wait=_patience(timeout))
    elif fields:
        raise ValueError(f"a recipe says everything: leave out {', '.join(fields)}")
    else:
        if isinstance(recipe, str):
            recipe = (yield from send(_endpoints.selections_get(recipe, limit=0))).recipe
        call = _endpoints.selections_create(recipe)
    answer = yield from _scored(call, progress=progress, timeout=timeout)
    return (yield from _whole(parse(Selection, answer), limit))


def scores(*, progress: bool = False, timeout: float | None = None, **question: Unpack[Question]) -> Stream[ScoredRow]:
    """Iterate over the score of every row of the pool, in its order; a row without a feature has None."""

    def page(after: str | None) -> Flow[Scores]:
        call = _endpoints.scores(**question, limit=PAGE, after=after, wait=_patience(timeout))
        return parse(Scores, (yield from _scored(call, progress=progress, timeout=timeout)))

    yield from _paged(page)


def save_scores(
    path: str | os.PathLike[str],
    /,
    *,
    progress: bool = False,
    timeout: float | None = None,
    **question: Unpack[Question],
) -> Flow[Path]:
    """Save the whole score vector: as `.npy` or `.safetensors` (one number per row) or `.parquet` (a table), by the
    path's ending."""
    accept = table_type(path, what="scores")
    call = _endpoints.scores(**question, wait=_patience(timeout))
    yield from _scored(replace(call, params=(*call.params, ("limit", "1"))), progress=progress, timeout=timeout)
    return (yield from download(replace(call, accept=accept), path, progress=progress))


def score_distribution(
    *,
    bins: int | None = None,
    steps: int | None = None,
    progress: bool = False,
    timeout: float | None = None,
    **question: Unpack[Question],
) -> Flow[ScoreDistribution]:
    """Get the histogram of a pool's scores by origin, and what the fractions 1/steps, 2/steps, … of the pool take.

    Scores that are not ready are waited for (`progress`, `timeout` as in `wait`).
    """
    call = _endpoints.score_distribution(**question, bins=bins, steps=steps, wait=_patience(timeout))
    return parse(ScoreDistribution, (yield from _scored(call, progress=progress, timeout=timeout)))


def overlaps(
    *,
    pct: float | None = None,
    k: int | None = None,
    progress: bool = False,
    timeout: float | None = None,
    **question: Unpack[Question],
) -> Flow[Overlaps]:
    """Get what the selections of several tasks share, and how far the tasks agree on the pool, for each pair of tasks.

    Scores that are not ready are waited for (`progress`, `timeout` as in `wait`).
    """
    call = _endpoints.overlaps(**question, pct=pct, k=k, wait=_patience(timeout))
    return parse(Overlaps, (yield from _scored(call, progress=progress, timeout=timeout)))


def compare(
    *, progress: bool = False, timeout: float | None = None, **fields: Unpack[ComparisonFields]
) -> Flow[SucceededJob[ComparisonRequest, ComparisonResult]]:
    """Compare ways to select, and wait for the table: `compare(dataset="pool", tasks=["mmlu"], pct=0.05)`.

    Begins the comparison, or finds the one of the same content, and waits for it as `comparisons.wait` does.
    """
    job = yield from send(_endpoints.comparisons_create(**fields))
    get = _endpoints.getter("comparisons", ComparisonJob)
    wait = waiter(get, SucceededJob[ComparisonRequest, ComparisonResult])
    return (yield from wait(job, progress=progress, timeout=timeout))


def selections_explanations(
    selection: str, /, *, origin: str | None = None, q: str | None = None
) -> Stream[Explanation]:
    """Iterate over the chosen rows with their text, their score for every subtask and the nearest validation example.

    Only those of one `origin`, and those that hold the text `q`.
    """

    def page(after: str | None) -> Flow[Explanations]:
        return send(_endpoints.selections_explanations(selection, origin=origin, q=q, limit=EXPLAINED, after=after))

    yield from _followed(page)


def _patience(timeout: float | None) -> float:
    """Seconds that the server may take over an answer before it becomes a job."""
    return SCORES_WAIT if timeout is None else min(timeout, SCORES_WAIT)


def _scored(call: Call[Any], *, progress: bool, timeout: float | None) -> Flow[Answer]:
    """Ask, and where the answer is a scoring job, wait for it and ask again."""
    while True:
        answer = yield from exchange(call)
        if answer.status != 202:
            return answer
        job = parse(ScoringJob, answer)
        get = Call(method="GET", path=f"/jobs/{job.id}", answer=ScoringJob)
        yield from _finished(get, progress=progress, timeout=timeout, poll=2.0)


# Bodies that are no JSON --------------------------------------------------------------------------------------------


class Body:
    """A streamed body that survives its connection: what is missing is asked for again and continued."""

    def __init__(self, call: Call[Any], *, resumed: bool = True) -> None:
        self.headers: Mapping[str, str] = {}
        self._call = call
        self._resumed = resumed
        self._open = False
        self._received = 0  # bytes
        self._skip = 0  # bytes of a body sent from its beginning that have been received before
        self._lines: deque[bytes] = deque()
        self._begun: list[bytes] = []  # pieces of the line that has not ended yet

    def open(self, *, patience: float | None = None) -> Flow[None]:
        """Ask for the body, or for the part of it that has not been received."""
        headers = {"Accept-Encoding": "identity"}
        etag = self.headers.get("etag")
        if self._received:
            headers["Range"] = f"bytes={self._received}-"
            if etag:
                headers["If-Range"] = etag
        answer = yield from exchange(self._call, headers=headers, streamed=True, patience=patience)
        if self._received and answer.headers.get("etag") != etag:
            raise errors.UnexpectedAnswer(
                f"{self._call.path} changed while it was being read: start again", request_id=answer.request_id
            )
        self.headers = answer.headers
        self._open = True
        self._skip = 0 if answer.status == 206 else self._received

    def read(self) -> Flow[bytes]:
        """Get the next bytes; empty at the end."""
        policy: Policy = yield Settings()
        for attempt in itertools.count():
            if not self._open:
                yield from self.open()
            try:
                data = yield from self._unread()
            except errors.ConnectionFailed:
                self._open = False
                if not self._resumed or attempt >= policy.retries:
                    raise
                yield Sleep(policy.pause(attempt))
            else:
                self._received += len(data)
                return data
        raise AssertionError("unreachable")

    def _unread(self) -> Flow[bytes]:
        data: bytes = yield Read()
        while data and self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = data[dropped:] or (yield Read())
        return data

    def line(self) -> Flow[bytes | None]:
        """Get the next line, without its newline; None at the end. Only a newline ends a line."""
        while not self._lines:
            data = yield from self.read()
            if not data:
                last = b"".join(self._begun)
                self._begun.clear()
                return last or None
            first, *others = data.split(b"\n")
            self._begun.append(first)
            if others:
                self._lines.append(b"".join(self._begun))
                self._lines.extend(others[:-1])
                self._begun = [others[-1]]
        return self._lines.popleft()


def lines(call: Call[None]) -> Stream[bytes]:
    """Iterate over the lines of a body, byte for byte, without their newlines."""
    body = Body(call)
    while (line := (yield from body.line())) is not None:
        yield Emit(line)


def download(call: Call[Any], path: str | os.PathLike[str], *, progress: bool) -> Flow[Path]:
    """Save a body as a file, which appears under its name when it is complete."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.part")
    body = Body(call)
    try:
        with partial.open("wb") as file:
            yield from body.open()
            length = body.headers.get("content-length")
            with BytesBar(target.name, total=int(length) if length else None, shown=progress) as bar:
                while data := (yield from body.read()):
                    file.write(data)
                    bar.add(len(data))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def download_folder(call: Call[Any], path: str | os.PathLike[str], *, progress: bool) -> Flow[Path]:
    """Save a zip as the folder it holds, or as it is where the path ends in .zip."""
    target = Path(path)
    if target.suffix == ".zip":
        return (yield from download(call, target, progress=progress))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists: name a folder that does not, or an empty one")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        archive = yield from download(call, scratch / f"{target.name}.zip", progress=progress)
        content = scratch / "content"
        content.mkdir()
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(content)
        content.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def datasets_rows(dataset: str, /, *, origin: str | None = None, q: str | None = None) -> Stream[ExampleRow]:
    """Iterate over a dataset's rows with their text, in order; those of one `origin`, those that hold the text `q`."""

    def page(after: str | None) -> Flow[ExampleRows]:
        return send(_endpoints.datasets_rows(dataset, origin=origin, q=q, limit=PAGE, after=after))

    yield from _followed(page)


def annotations_rows(annotation: str, /, *, unparsed: bool = False) -> Stream[AnnotatedRow]:
    """Iterate over an annotation's rows with their labels, in order; `unparsed`: those whose reply is no list."""

    def page(after: str | None) -> Flow[AnnotatedRows]:
        return send(_endpoints.annotations_rows(annotation, unparsed=unparsed or None, limit=PAGE, after=after))

    yield from _followed(page)


def datasets_lines(dataset: str, /) -> Stream[bytes]:
    """Iterate over the original rows, one line each, byte for byte."""
    return lines(_endpoints.datasets_content(dataset))


def datasets_download(
    dataset: str, path: str | os.PathLike[str], /, *, source: str | None = None, progress: bool = False
) -> Flow[Path]:
    """Save the original rows, one per line; with `source` one uploaded file, byte for byte, by its SHA-256."""
    return download(_endpoints.datasets_content(dataset, source=source), path, progress=progress)


def tasks_download(
    task: str,
    path: str | os.PathLike[str],
    /,
    *,
    split: Split | None = None,
    rows: int | None = None,
    progress: bool = False,
) -> Flow[Path]:
    """Save a task's rows as a dataset takes them (JSONL): by default each of its validation rows once.

    With `rows` they are repeated until there are so many: what training on the few alone comes to is a baseline.
    """
    return download(_endpoints.tasks_content(task, split=split, rows=rows), path, progress=progress)


def checkpoints_download(checkpoint: str, path: str | os.PathLike[str], /, *, progress: bool = False) -> Flow[Path]:
    """Save the adapter as a PEFT folder; as a zip where the path ends in .zip."""
    return download_folder(_endpoints.checkpoints_content(checkpoint), path, progress=progress)


def adapters_download(adapter: str, path: str | os.PathLike[str], /, *, progress: bool = False) -> Flow[Path]:
    """Save an adapter of the bank as a PEFT folder; as a zip where the path ends in .zip."""
    return download_folder(_endpoints.adapters_content(adapter), path, progress=progress)


def finetunes_download(finetune: str, path: str | os.PathLike[str], /, *, progress: bool = False) -> Flow[Path]:
    """Save the last checkpoint as a PEFT folder (a full fine-tune: the model's); as a zip where the path ends so."""
    return download_folder(_endpoints.finetunes_content(finetune), path, progress=progress)


def projectors_download(projector: str, path: str | os.PathLike[str], /, *, progress: bool = False) -> Flow[Path]:
    """Save a projector's network as safetensors, with what its rows are standardised with."""
    return download(_endpoints.projectors_content(projector), path, progress=progress)


def embeddings_rows(embedding: str, /) -> Stream[EmbeddedRow]:
    """Iterate over the rows of an embedding: unit vectors, probabilities, and products with the base vectors."""

    def page(after: str | None) -> Flow[EmbeddedRows]:
        return send(_endpoints.embeddings_rows(embedding, limit=PAGE, after=after))

    yield from _paged(page)


def embeddings_save(embedding: str, path: str | os.PathLike[str], /, *, progress: bool = False) -> Flow[Path]:
    """Save an embedding: as `.npy` the unit vectors (rows, dim), as `.safetensors` probabilities and products, too.

    A row without a place is NaN.
    """
    accept = array_type(path, what="features")
    return download(_endpoints.embeddings_rows(embedding, accept=accept), path, progress=progress)


def selections_lines(selection: str, /, *, format: Literal["ndjson", "csv"] = "ndjson") -> Stream[bytes]:
    """Iterate over the chosen original rows, best first, one line each, byte for byte.

    With `format="csv"` over the lines of the sorted table (file, row, score).
    """
    return lines(_endpoints.selections_content(selection, format=format))


def selections_save(selection: str, path: str | os.PathLike[str], /, *, progress: bool = False) -> Flow[Path]:
    """Save the chosen original rows, best first; where the path ends in .csv, the sorted table (file, row, score).

    Raises `ValueError` where the path ends as a file of another kind does.
    """
    call = _endpoints.selections_content(selection, format=content_format(path))
    return download(call, path, progress=progress)


def selections_export(
    selection: str,
    path: str | os.PathLike[str],
    /,
    *,
    format: ExportFormat | None = None,
    scores: bool | None = None,
    progress: bool = False,
) -> Flow[Path]:
    """Save the chosen rows for other programs: a table (`.jsonl`, `.csv` or `.parquet`, by the path's ending), or with
    `format="trl"`, `"axolotl"` or `"llama-factory"` a folder that this trainer works with (a zip, where the path ends
    in .zip).

    The columns `selection_rank`, `selection_score` and so on say why a row was chosen; `scores=False` leaves them out.
    """
    wanted = format or export_format(path)
    call = _endpoints.selections_export(selection, format=wanted, scores=scores)
    if wanted in get_args(TableFormat):
        return (yield from download(call, path, progress=progress))
    return (yield from download_folder(call, path, progress=progress))


def selections_card(selection: str, /) -> Flow[str]:
    """Get the provenance as a page in Markdown: what selected these rows, from what, for what, when and how."""
    answer = yield from exchange(_endpoints.selections_card(selection))
    return answer.body.decode()
