"""Every error of the API as RFC 9457 `application/problem+json`. The only module that knows which status an error has.

Errors that only the web has stand beside those of `datastore/errors.py`:

    Refused
    ├── Unreadable              400
    ├── NotAuthenticated        401
    ├── NotAllowed              403
    ├── UnsupportedMediaType    415
    ├── TooManyRequests         429
    └── NotReady                503
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from gradstore.types import Check, Problem, ProblemItem
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from datastore.durable import FULL
from datastore.errors import (
    Ambiguous,
    BucketUnreachable,
    Busy,
    Conflict,
    Damaged,
    GradientsMissing,
    GradstoreError,
    HubUnreachable,
    InvalidInput,
    LabellerFails,
    NamedOtherwise,
    NotEnoughSpace,
    NotFound,
    TooLarge,
    UnexpectedError,
    problem_of,
)

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
SHOWN = 100  # places of the input that one answer names
NO_ROOM = "the disk of the store is full: free some space, then send this again"


class Refused(Exception):
    """A request that does not get as far as the store."""


class Unreadable(Refused):
    """The body is not what its media type says, or it ends too early."""


class NotAuthenticated(Refused):
    """No API key, or the wrong one."""


class NotAllowed(Refused):
    """The key does not permit this; or a web page of another origin sent it, or it names another server."""


class UnsupportedMediaType(Refused):
    """The body is of a kind that the route does not take."""


class TooManyRequests(Refused):
    """The key has sent more requests than it may; `wait` is the time until it may send one more, in seconds."""

    def __init__(self, detail: str, *, wait: float) -> None:
        super().__init__(detail)
        self.wait = wait


class NotReady(Refused):
    """Something that requests cannot do without is missing."""

    def __init__(self, missing: Sequence[Check]) -> None:
        super().__init__("; ".join(f"{check.name}: {check.detail}" for check in missing))
        self.missing = missing


STATUS: dict[type[Exception], int] = {
    NotFound: 404,
    InvalidInput: 422,
    TooLarge: 413,
    NotEnoughSpace: 507,
    Damaged: 500,
    HubUnreachable: 503,
    LabellerFails: 503,
    BucketUnreachable: 503,
    Busy: 503,
    Conflict: 409,
    Unreadable: 400,
    NotAuthenticated: 401,
    NotAllowed: 403,
    UnsupportedMediaType: 415,
    TooManyRequests: 429,
    NotReady: 503,
    UnexpectedError: 500,
}
"""The status of each error and of those below it in the tree."""
OF_KEYS = frozenset(STATUS[kind] for kind in (NotAuthenticated, NotAllowed, TooManyRequests))
"""The statuses of what is refused for its key."""


def install(app: FastAPI) -> None:
    """Let the app answer every error that is foreseen with a problem; the others are the middleware's."""
    app.exception_handler(GradstoreError)(_foreseen)
    app.exception_handler(Refused)(_foreseen)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_of_the_framework)
    app.exception_handler(OperationalError)(_no_catalog)
    app.exception_handler(OSError)(_disk)


def respond(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that a problem is."""
    return Response(problem.model_dump_json(), status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


def describe(
    error: GradstoreError | Refused | UnexpectedError, *, request_id: str | None, base_url: str = ""
) -> Problem:
    """A foreseen error as a problem."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    items, total = _places(error, base_url)
    return problem_of(error, status=status, instance=request_id, errors=items[:SHOWN], total_errors=total)


def of_status(status: int, detail: str, *, request_id: str | None, errors: Sequence[ProblemItem] = ()) -> Problem:
    """A problem whose type and title are HTTP's own for this status."""
    phrase = HTTPStatus(status).phrase
    return Problem(
        type=phrase.lower().replace(" ", "-").replace("'", ""),
        title=phrase.capitalize(),
        status=status,
        detail=detail,
        instance=request_id,
        errors=list(errors[:SHOWN]),
        total_errors=len(errors),
    )


def unreadable(detail: str, *, request_id: str) -> Problem:
    """Bytes that are no request."""
    return of_status(400, detail, request_id=request_id)


def unexpected(request_id: str) -> Problem:
    """What the user is told of an error that nobody foresaw: where the log has it, and nothing of its insides."""
    detail = f"the server failed in a way that nobody foresaw; its log has the reason under {request_id}"
    return of_status(500, detail, request_id=request_id)


def request_id(request: Request) -> str | None:
    """The id that the middleware gave the request."""
    return getattr(request.state, "request_id", None)


def _places(error: Exception, base_url: str) -> tuple[list[ProblemItem], int]:
    if isinstance(error, InvalidInput):
        return error.errors, error.total_errors
    if isinstance(error, NotReady):
        items = [ProblemItem(detail=f"{check.name}: {check.detail}") for check in error.missing]
        return items, len(items)
    if isinstance(error, Ambiguous):
        return [ProblemItem(detail=_said(choice, base_url)) for choice in error.choices], len(error.choices)
    if isinstance(error, NamedOtherwise):
        return [ProblemItem(detail=error.id, pointer="/name")], 1
    if isinstance(error, GradientsMissing):
        return [ProblemItem(detail=f"POST /gradients {json.dumps(error.body)}")], 1
    return [], 0


def _said(choice: str, base_url: str) -> str:
    """A choice that is a path as a URL; what a request's body would say as it is."""
    return base_url + choice if choice.startswith("/") else choice


async def _foreseen(request: Request, error: GradstoreError | Refused) -> Response:
    base_url = str(request.base_url).rstrip("/")
    problem = describe(error, request_id=request_id(request), base_url=base_url)
    if problem.status >= 500:
        log.error("refused", exc_info=error, extra={"request": problem.instance})
    return respond(problem, headers_of(error))


def headers_of(error: Exception) -> dict[str, str]:
    """The headers that an error's answer has."""
    if isinstance(error, NotAuthenticated):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooManyRequests):
        return {"Retry-After": str(math.ceil(error.wait))}
    return {}


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    found = error.errors()
    broken = next((item for item in found if item["type"] == "json_invalid"), None)
    if broken is not None:
        reason = broken.get("ctx", {}).get("error", broken["msg"])
        detail = f"the body is not JSON: {reason}"
        return respond(of_status(400, detail, request_id=request_id(request)))
    items = list({item.model_dump_json(): item for item in (_item(one, error.body) for one in found)}.values())
    first = items[0]
    place = first.parameter or first.pointer
    more = f" (and {len(items) - 1} more)" if len(items) > 1 else ""
    problem = of_status(
        422, f"{place}: {first.detail}{more}" if place else f"{first.detail}{more}", request_id=request_id(request),
        errors=items,
    ).model_copy(update={"type": "invalid-input", "title": "Invalid input"})  # fmt: skip
    return respond(problem)


def _item(error: dict[str, Any], body: Any) -> ProblemItem:
    where, *path = error["loc"]
    detail = _SAYINGS.get(error["type"], error["msg"].removeprefix("Value error, "))
    if error["type"] == "too_short":
        detail = f"at least {error['ctx']['min_length']} needed, and {error['ctx']['actual_length']} given"
    if where == "body":
        if not path and error["type"] == "missing":
            return ProblemItem(detail="the body is missing: send JSON, as application/json", pointer="")
        return ProblemItem(detail=detail, pointer=_pointer(path, body))
    return ProblemItem(detail=detail, parameter=".".join(part for part in path if isinstance(part, str)) or None)


_SAYINGS = {
    "extra_forbidden": "there is no such field",
    "missing": "this is required",
    "model_attributes_type": "a JSON object is needed",
    "string_pattern_mismatch": "no id and no name has a line break or another control character",
}


def _pointer(path: Sequence[str | int], body: Any) -> str:
    """A JSON pointer (RFC 6901) to the place, without the names pydantic gives to the branches of a union."""
    parts = []
    for number, part in enumerate(path):
        here = range(len(body)) if isinstance(body, list) else body if isinstance(body, dict) else ()
        if part in here:
            body = body[part]
        elif not isinstance(body, dict) or number < len(path) - 1:
            continue
        parts.append(str(part).replace("~", "~0").replace("/", "~1"))
    return "".join(f"/{part}" for part in parts)


async def _of_the_framework(request: Request, error: HTTPException) -> Response:
    """What FastAPI and Starlette refuse: unknown paths and methods, bodies that cannot be decoded."""
    headers = dict(error.headers or {})
    allowed = ", ".join(_methods(request))
    if error.status_code == 405:
        headers["Allow"] = allowed
    details = {
        400: "the body cannot be read: send UTF-8 of the kind that Content-Type names",
        404: f"there is no {request.url.path}; GET /openapi.json lists what there is",
        405: f"{request.url.path} has no {request.method}; it has {allowed}",
    }
    detail = details.get(error.status_code, str(error.detail))
    return respond(of_status(error.status_code, detail, request_id=request_id(request)), headers)


def _methods(request: Request) -> list[str]:
    """The methods that the request's path has: one method is one route, and Starlette names those of one route."""
    path = getattr(request.scope.get("route"), "path", None)
    found = {method.upper() for method in request.app.openapi()["paths"].get(path, ("get",))}  # else a page or a file
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


async def _no_catalog(request: Request, error: OperationalError) -> Response:
    if getattr(error.orig, "sqlite_errorname", None) == "SQLITE_FULL":
        return _no_room(request, error)
    return no_catalog(error, request_id=request_id(request))


def no_catalog(error: OperationalError, *, request_id: str | None) -> Response:
    """The answer while the catalog does not answer."""
    log.error("the catalog does not answer", exc_info=error, extra={"request": request_id})
    problem = of_status(503, "the catalog does not answer; try again in a moment", request_id=request_id)
    return respond(problem, {"Retry-After": "5"})


async def _disk(request: Request, error: OSError) -> Response:
    if error.errno not in FULL:
        raise error
    return _no_room(request, error)


def _no_room(request: Request, error: Exception) -> Response:
    log.error("the disk is full", exc_info=error, extra={"request": request_id(request)})
    return respond(of_status(507, NO_ROOM, request_id=request_id(request)))
