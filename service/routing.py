"""What every route does beside its own work: the scope it needs, HEAD, its media types, idempotency, entity tags.

A route needs the scope and takes the media types that its entry in the OpenAPI document names, so that the two cannot
differ.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, cast, get_args, get_origin

from fastapi import APIRouter, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.routing import APIRoute
from gradstore.types import KeyScope, ProblemItem
from pydantic import BaseModel

from datastore.errors import InvalidInput
from service import forms, idempotency
from service.access import require
from service.dependencies import backend_of
from service.problems import UnsupportedMediaType

JSON = "application/json"
READING = frozenset({"GET", "HEAD"})
KEPT = ("Content-Security-Policy", "Content-Location")
"""Headers that a 304 repeats: a browser takes those it brings over into the answer that it has kept."""
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Route(APIRoute):
    """A route of this API."""

    def get_route_handler(self) -> Handler:
        """Wrap the handler that FastAPI makes."""
        answer = super().get_route_handler()
        accepted = self._media_types()
        single = self._single_parameters()
        scope = self._scope()

        async def handle(request: Request) -> Response:
            require(getattr(request.state, "key", None), scope)
            _refuse_repeated(request, single)
            if request.method in READING:
                return conditional(request, await answer(request))
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type == forms.MEDIA_TYPE and media_type in accepted:
                async with forms.received(request, inside=backend_of(request).settings.data / "incoming") as form:
                    request.state.form = form
                    return await _once(request, form.fingerprint, answer)
            body = await request.body()
            if body and accepted and media_type not in accepted:
                given = f", not {media_type}" if media_type else ""
                raise UnsupportedMediaType(f"the body is sent as {' or '.join(sorted(accepted))}{given}")
            return await _once(request, body, answer)

        return handle

    def _scope(self) -> KeyScope:
        """What the key of a request must permit."""
        [scope] = (self.openapi_extra or {})["security"][1]["key"]
        return cast("KeyScope", scope)

    def _single_parameters(self) -> frozenset[str]:
        """The parameters of the query that take one value."""
        names: set[str] = set()
        for name, kind in _query_fields(self.dependant):
            fields = {name: kind}
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                fields = {name: own.annotation for name, own in kind.model_fields.items()}
            names |= {name for name, own in fields.items() if not _is_list(own)}
        return frozenset(names)

    def _media_types(self) -> frozenset[str]:
        documented = (self.openapi_extra or {}).get("requestBody", {}).get("content", {})
        return frozenset(documented or ({JSON} if self.body_field else ()))


def _is_list(kind: Any) -> bool:
    """Whether values of a type, or of one of its alternatives, are lists."""
    return get_origin(kind) in {list, tuple} or any(map(_is_list, get_args(kind)))


def _query_fields(dependant: Dependant) -> Iterator[tuple[str, Any]]:
    """Name and type of what a route and its dependencies read of the query."""
    yield from ((field.alias, field.field_info.annotation) for field in dependant.query_params)
    for dependency in dependant.dependencies:
        yield from _query_fields(dependency)


def _refuse_repeated(request: Request, single: frozenset[str]) -> None:
    """Raise `InvalidInput` where a parameter of one value is given several times: all but one would be dropped."""
    given = Counter(name for name, _ in request.query_params.multi_items())
    errors = [
        ProblemItem(parameter=name, detail=f"takes one value, and is given {times} times")
        for name, times in given.items()
        if times > 1 and name in single
    ]
    if errors:
        raise InvalidInput(f"{errors[0].parameter}: {errors[0].detail}", errors=errors)


class Router(APIRouter):
    """A router whose GET routes answer HEAD, too: the headers alone, and nothing is read or made for the body."""

    def __init__(self, *, prefix: str = "", tag: str, admin: bool = False) -> None:
        """`admin`: its routes are for whoever runs the server."""
        super().__init__(prefix=prefix, tags=[tag], route_class=Route)
        self.admin = admin

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **settings: Any) -> None:
        """Add a route with the scope that it needs, and its HEAD beside a GET."""
        scope: KeyScope = "admin" if self.admin else "read" if settings.get("methods") == ["GET"] else "write"
        security = {"security": [{}, {"key": [scope]}]}
        settings["openapi_extra"] = {**(settings.get("openapi_extra") or {}), **security}
        super().add_api_route(path, endpoint, **settings)
        if settings.get("methods") == ["GET"]:
            head = {"methods": ["HEAD"], "include_in_schema": False}
            super().add_api_route(path, endpoint, **settings | head)


def noun(collection: str) -> Router:
    """A router of routes below `/collection`."""
    return Router(prefix=f"/{collection}", tag=collection)


def conditional(request: Request, response: Response) -> Response:
    """The response with its entity tag, or 304 where the client has it already; a stream is not begun for HEAD."""
    if request.method == "HEAD" and isinstance(response, StreamingResponse):
        response.body_iterator = _nothing()
    if response.status_code != 200:
        return response
    tag = response.headers.get("etag")
    if tag is None:
        if isinstance(response, FileResponse | StreamingResponse):
            return response
        tag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
        response.headers["ETag"] = tag
    wanted = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    if tag in wanted or "*" in wanted:
        kept = {name: response.headers[name] for name in KEPT if name in response.headers}
        return Response(status_code=304, headers={"ETag": tag, **kept})
    return response


async def _nothing() -> AsyncIterator[bytes]:
    """The body of an answer to HEAD."""
    return
    yield b""


async def _once(request: Request, content: bytes, answer: Handler) -> Response:
    if request.method != "POST":
        return await answer(request)
    return await idempotency.once(request, backend_of(request).catalog, content=content, answer=lambda: answer(request))
