"""Idempotency-Key: a POST that is sent again with its key gets the first one's answer, and nothing is done twice.

The key lives a day in the catalog, with a hash of the request. While the first request is at work, the second waits
for it. A request that is refused, or cancelled while the server stops, gives its key back. What makes a repeated POST
harmless even without a key is that ids are made from content; the key makes its answer the same too.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Request, Response
from gradstore.types import ProblemItem

from datastore.catalog import Catalog
from datastore.errors import Conflict, InvalidInput
from datastore.schema import IdempotencyRow

HEADER = "Idempotency-Key"
MAX_KEY = 255  # characters
WAIT = 30.0  # seconds for the answer of the first request
KEPT_HEADERS = ("location", "retry-after", "content-type")

T = TypeVar("T")


async def once(
    request: Request, catalog: Catalog, *, content: bytes, answer: Callable[[], Awaitable[Response]]
) -> Response:
    """The answer to a request, made once for all requests with its key; `content` is what was sent."""
    key = request.headers.get(HEADER)
    if key is None:
        return await answer()
    if not 0 < len(key) <= MAX_KEY:
        detail = f"a key has 1 to {MAX_KEY} characters"
        raise InvalidInput(f"{HEADER}: {detail}", errors=[ProblemItem(parameter=HEADER, detail=detail)])
    fingerprint = _fingerprint(request, content)
    mine = False

    def take() -> IdempotencyRow | None:
        nonlocal mine
        row = catalog.reserve_key(key, fingerprint)
        mine = row is None
        return row

    try:
        first = await _reserve(take)
        if first is not None:
            return _again(first)
        response = await answer()
        headers = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
        body = bytes(response.body).decode()
        await _to_its_end(lambda: catalog.remember_answer(key, status=response.status_code, headers=headers, body=body))
    except BaseException:  # also when the request is cancelled
        if mine:
            await _to_its_end(lambda: catalog.free_key(key))  # which leaves an answer that is remembered by now
        raise
    return response


async def _reserve(take: Callable[[], IdempotencyRow | None]) -> IdempotencyRow | None:
    """Take the key, or wait for the answer of the request that has it."""
    pause, waited = 0.05, 0.0
    while (row := await _to_its_end(take)) is not None and row.status is None:
        if waited >= WAIT:
            raise Conflict(f"a request with this {HEADER} is still at work; send this again in a while")
        await asyncio.sleep(pause)
        waited += pause
        pause = min(2 * pause, 1.0)
    return row


async def _to_its_end(step: Callable[[], T]) -> T:
    """Run a step in a thread, and wait for its end even where the request is cancelled meanwhile."""
    thread = asyncio.ensure_future(run_sync(step))
    with CancelScope(shield=True):  # from anyio's cancellation; asyncio's is another
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            await asyncio.wait([thread])
            raise
    return thread.result()


def _fingerprint(request: Request, content: bytes) -> str:
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode())
    digest.update(content)
    return digest.hexdigest()


def _again(first: IdempotencyRow) -> Response:
    body = (first.body or {}).get("json", "")
    headers = {**(first.headers or {}), "Idempotent-Replayed": "true"}
    return Response(body, status_code=cast("int", first.status), headers=headers)
