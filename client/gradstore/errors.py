"""What can go wrong between a program and the service.

    GradstoreError
    ├── ConnectionFailed             no answer, after all retries (also a ConnectionError)
    │   └── RequestTimeout           connected, and no answer in time (also a TimeoutError)
    ├── UnexpectedAnswer             something answered that is not gradstore, or speaks another version
    ├── APIError                     the service refused: `problem` is its RFC 9457 answer
    │   ├── BadRequest               400
    │   ├── NotAuthenticated         401
    │   ├── NotAllowed               403
    │   ├── NotFound                 404
    │   ├── Conflict                 409
    │   ├── TooLarge                 413
    │   ├── Invalid                  422
    │   ├── TooManyRequests          429
    │   └── ServerError              5xx
    │       ├── Unavailable          502, 503, 504
    │       └── NotEnoughSpace       507
    ├── JobFailed                    the job waited for failed or was cancelled
    ├── WaitTimeout                  the job is not finished yet (also a TimeoutError)
    └── MissingExtra                 an optional package is not installed (also an ImportError)

Every error has the `request_id` under which the service's log knows it, where there was an answer.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from gradstore.types import Job, Problem, ProblemItem

_SHOWN = 10  # places of a Problem that go into the message


class GradstoreError(Exception):
    """Base of all errors of this library."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class ConnectionFailed(GradstoreError, ConnectionError):
    """No answer came: the service is not running, not reachable, or went away."""


class RequestTimeout(ConnectionFailed, TimeoutError):
    """The service did not answer in time."""


class UnexpectedAnswer(GradstoreError):
    """The answer is not what gradstore sends: another program listens there, a proxy answered, or versions differ."""


class APIError(GradstoreError):
    """The service refused the request; the message is its reason and what to do next."""

    def __init__(self, problem: Problem, *, request_id: str | None = None) -> None:
        super().__init__(describe(problem), request_id=request_id or problem.instance)
        self.problem = problem
        self.status = problem.status


class BadRequest(APIError):
    """400: the request could not be read."""


class NotAuthenticated(APIError):
    """401: the server wants an API key (GRADSTORE_API_KEY), or refuses this one."""


class NotAllowed(APIError):
    """403: the key is known and does not permit this: another one is needed."""


class NotFound(APIError):
    """404: nothing has this id or name."""


class Conflict(APIError):
    """409: the request does not fit what is stored: a taken name, something still in use, missing gradients."""


class TooLarge(APIError):
    """413: the upload is beyond the server's limit."""


class Invalid(APIError):
    """422: the input cannot be used; `problem.errors` names the places."""


class TooManyRequests(APIError):
    """429: the key has sent more requests than it may, and was still refused after the retries."""


class ServerError(APIError):
    """5xx: the service's own fault; its log has the reason under `request_id`."""


class Unavailable(ServerError):
    """502, 503 or 504: the service cannot answer now, after all retries."""


class NotEnoughSpace(ServerError):
    """507: the store's disk cannot hold what the job would write."""


class JobFailed(GradstoreError):
    """A job that was waited for failed or was cancelled; `job` is its last state."""

    def __init__(self, job: Job[Any, Any], *, request_id: str | None = None) -> None:
        if job.error is not None:
            reason = describe(job.error)
        else:
            reason = "it was cancelled" if job.status == "cancelled" else "the service gave no reason"
        super().__init__(
            f"{job.kind} {job.id} {job.status}: {reason}",
            request_id=(job.error.instance if job.error else None) or request_id,
        )
        self.job = job
        self.problem = job.error


class WaitTimeout(GradstoreError, TimeoutError):
    """The time given to `wait` is over; the job goes on, and `wait` can be called again."""

    def __init__(self, message: str, *, job: Job[Any, Any] | None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.job = job


class MissingExtra(GradstoreError, ImportError):
    """An optional package is needed for this."""

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'gradstore[{extra}]'")
        self.extra = extra


_BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequest,
    401: NotAuthenticated,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Invalid,
    429: TooManyRequests,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
    507: NotEnoughSpace,
}


def refused(problem: Problem, *, request_id: str | None) -> APIError:
    """Name the error of a problem by its status."""
    kind = _BY_STATUS.get(problem.status, ServerError if problem.status >= 500 else APIError)
    return kind(problem, request_id=request_id)


def describe(problem: Problem) -> str:
    """Say a problem in plain text: its detail, then the first places that are wrong, one to a line.

    A place that the detail has told already is left out.
    """
    shown = [item for item in problem.errors[:_SHOWN] if item.line is not None or item.detail not in problem.detail]
    left = max(problem.total_errors, len(problem.errors)) - len(problem.errors[:_SHOWN])
    lines = [problem.detail or problem.title, *(f"  {_place(item)}{item.detail}" for item in shown)]
    if left > 0:
        lines.append(f"  … and {left} more")
    return "\n".join(lines)


def without_problem(status: int, body: str) -> Problem:
    """Make a problem of an error answer that has none, such as a proxy's HTML page."""
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = f"Status {status}"
    text = " ".join(body.split())[:200]
    return Problem(type="about:blank", title=title, status=status, detail=f"{status} {title}: {text}".rstrip(": "))


def _place(item: ProblemItem) -> str:
    if item.line is not None:
        return f"line {item.line}: "
    place = item.parameter or item.pointer
    return f"{place}: " if place else ""
