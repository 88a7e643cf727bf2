"""What every route does beside its own work: HEAD, the media types it takes, idempotency, entity tags.

A route takes the media types that its entry in the OpenAPI document names, so the two cannot differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.routing import APIRoute

from service import forms, idempotency
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

        async def handle(request: Request) -> Response:
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

    def _media_types(self) -> frozenset[str]:
        documented = (self.openapi_extra or {}).get("requestBody", {}).get("content", {})
        return frozenset(documented or ({JSON} if self.body_field else ()))


class Router(APIRouter):
    """A router whose GET routes answer HEAD, too: the headers alone, and nothing is read or made for the body."""

    def __init__(self, *, prefix: str = "", tag: str) -> None:
        super().__init__(prefix=prefix, tags=[tag], route_class=Route)

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **settings: Any) -> None:
        """Add a route, and its HEAD beside a GET."""
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
