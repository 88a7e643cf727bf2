"""What happens to every request around its route: its id, its log line, and its limits; service/door.py has the rest.

Plain ASGI, so that streams pass untouched.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from datastore import tracing
from datastore.errors import TooLarge
from datastore.keys import Key
from datastore.origin import request_id
from service import problems
from service.forms import MEDIA_TYPE as FORM

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 16 << 20  # of any body that is not a form
MAX_DRAINED_BYTES = 64 << 20  # read of a refused body, so that its sender gets to see the answer
MAX_DRAIN = 2.0  # seconds

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # keep it, and ask each time whether it is still so
}

WATCHED = frozenset({"/health", "/ready", "/metrics"})
"""Asked for every few seconds by whatever watches over the service: logged only when something is wrong."""

Observer = Callable[[str, str, int, float], None]
"""Told of every answer: method, route, status, seconds."""


class Conversation:
    """Gives every request an id, every answer its headers, and the log one line; the border where no error passes."""

    def __init__(self, app: ASGIApp, *, observe: Observer) -> None:
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = id
        request_id.set(id)
        watched = scope["path"] in WATCHED
        end_span = tracing.begin(scope["method"], request=id) if not watched else None
        answer = _Answer(send, id)
        began = time.perf_counter()
        try:
            await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            log.info("the client went away", extra={"request": id})
        except Exception:
            log.exception("unexpected error", extra={"request": id, "path": scope["path"]})
            if answer.status is not None:
                raise  # the body has begun: all that is left is to break the connection off
            await problems.respond(problems.unexpected(id))(scope, receive, answer.send)
        finally:
            seconds = time.perf_counter() - began
            status = answer.status or 499
            self.observe(scope["method"], _route(scope), status, seconds)
            if end_span is not None:
                _end(end_span, scope, status)
            quiet = watched and status < 400
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                "request",
                extra={
                    "request": id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(seconds, 4),
                },
            )


class _Answer:
    """Passes an answer on with the headers that all have, and a plain-text error of the framework as a problem."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._held: Message | None = None
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["X-Request-ID"] = self._request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if message["status"] >= 400 and headers.get("content-type", "").startswith("text/plain"):
                self._held = message
                return
        elif self._held is not None:
            message = await self._problem(self._held, message)
            self._held = None
        await self._send(message)

    async def _problem(self, start: Message, body: Message) -> Message:
        text = bytes(body.get("body", b"")).decode(errors="replace")
        detail = text or {416: "the range lies outside the content; Content-Range says how long it is"}.get(
            start["status"], "the request was refused"
        )
        problem = problems.of_status(start["status"], detail, request_id=self._request_id)
        content = problems.respond(problem).body
        headers = MutableHeaders(raw=start["headers"])
        headers["content-type"], headers["content-length"] = problems.MEDIA_TYPE, str(len(content))
        await self._send(start)
        return {"type": "http.response.body", "body": bytes(content)}


class Bodies:
    """Limits what a request may send, and reads what is left of a refused body before the refusal is sent.

    A server that answers and closes while its client still sends resets the connection, and the client sees no answer.
    The limit of an upload is its key's, where the key has one; the key is known by the time the body is asked for.
    """

    def __init__(self, app: ASGIApp, *, max_upload_bytes: int) -> None:
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = headers.get("content-type", "").startswith(FORM)
        body = _Body(receive, limits=lambda: self._limits(scope, upload=upload), headers=headers)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await body.drain()
            await send(message)

        await self.app(scope, body.receive, answer)

    def _limits(self, scope: Scope, *, upload: bool) -> tuple[int, str]:
        """The most bytes of a body, and what to do with more."""
        if not upload:
            return MAX_JSON_BYTES, f"what is larger is sent as a file, in a form ({FORM})"
        key: Key | None = scope["state"].get("key")
        own = key.max_upload_bytes if key is not None else None
        if key is None or own is None or own > self.max_upload_bytes:
            return self.max_upload_bytes, "send less at once, or raise the server's GRADSTORE_MAX_UPLOAD_BYTES"
        return own, (
            f"send less at once, or ask whoever runs the server for a key that may send more than {key.name!r} "
            "(gradstore keys create NAME --max-upload-bytes N)"
        )


class _Body:
    def __init__(self, receive: Receive, *, limits: Callable[[], tuple[int, str]], headers: Headers) -> None:
        self._receive = receive
        self._limits = limits
        self._length = headers.get("content-length", "")
        self._empty = not self._length and "transfer-encoding" not in headers
        self._waits = headers.get("expect", "").lower() == "100-continue"
        self._read = 0
        self._finished = self._empty

    async def receive(self) -> Message:
        limit, advice = self._limits()
        refusal = TooLarge(f"the body is larger than {limit:,} bytes: {advice}")
        if self._length.isdecimal() and int(self._length) > limit:
            raise refusal
        message = await self._next()
        if self._read > limit:
            raise refusal
        return message

    async def drain(self) -> None:
        """Read what the client still sends, within bounds; one that waits for leave to send is sending nothing."""
        if self._finished or (self._waits and not self._read):
            return
        before = self._read
        try:
            async with asyncio.timeout(MAX_DRAIN):
                while not self._finished and self._read - before < MAX_DRAINED_BYTES:
                    await self._next()
        except TimeoutError:
            return

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._finished = not message.get("more_body", False)
        else:
            self._finished = True
        return message


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else secrets.token_hex(8)


def _end(span: tracing.End, scope: Scope, status: int) -> None:
    """End a request's span, named by what is known of it only now."""
    method, route = scope["method"], _route(scope)
    attributes = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    span(name=f"{method} {route}", attributes=attributes, error=status >= 500)


def _route(scope: Scope) -> str:
    """The path's pattern: a metric for every id would never end."""
    return str(getattr(scope.get("route"), "path", "unknown"))
