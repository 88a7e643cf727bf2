"""Who may come in: with a key whoever has it, without one the programs of this machine; and what of it is recorded.

Plain ASGI, so that streams pass untouched.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from sqlalchemy.exc import OperationalError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from datastore import origin
from datastore.audit import Audit
from datastore.errors import UnexpectedError
from datastore.keys import Key
from service import problems
from service.access import Access, Bucket, refuse_unknown
from service.problems import NotAllowed, Refused
from service.routing import READING

log = logging.getLogger(__name__)

REFUSALS = 60
"""Refusals of one key a minute, and of strangers together, that are recorded; the log has a line for every one."""
SIGNS_OF_LIFE = frozenset({"/health", "/ready"})
"""Answered to all while the catalog, which has the keys, does not answer: they are asked then, and say little."""
SWEPT = 3600.0  # seconds between two deletions of old entries
WRITERS = 4  # threads that record entries


class Door:
    """Lets in who may come in.

    The dashboard's files are open to all who reach the server: a browser asks for them before its user can give a key.

    Where no key is needed, a web page open in a browser of this machine could send forms to the service, or read it
    through a name that resolves to 127.0.0.1. So a request that names another origin or another host is refused.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id = scope["state"]["request_id"]
        try:
            key = await self._admitted(scope)
        except Refused as refusal:
            problem = problems.describe(refusal, request_id=id)
            await problems.respond(problem, problems.headers_of(refusal))(scope, receive, send)
            return
        except OperationalError as error:
            if scope["path"] not in SIGNS_OF_LIFE:
                await problems.no_catalog(error, request_id=id)(scope, receive, send)
                return
            key = None
        origin.api_key.set(key.id if key else None)
        await self.app(scope, receive, send)
        if key is not None:
            await self.access.note_use(key)

    async def _admitted(self, scope: Scope) -> Key | None:
        """The request's key, None where none is needed. Raises `Refused`."""
        headers = Headers(scope=scope)
        if not await self.access.locked():
            _refuse_web_pages(headers)
            return None
        if _is_page(scope):
            return None
        found = scope["state"]["key"] = await self.access.key(headers.get("authorization", ""))
        key = refuse_unknown(found)
        self.access.count(key)
        return key


class Auditing:
    """Records every request that is to change something, and every refusal of a key, before it is answered."""

    def __init__(self, app: ASGIApp, *, audit: Audit) -> None:
        self.app = app
        self.audit = audit
        self._refusals: dict[str | None, Bucket] = {}
        self._swept_at = float("-inf")
        self._writers = CapacityLimiter(WRITERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start" and not answered:
                answered = True
                await self._record(scope, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if not answered:
                gone = isinstance(error, ClientDisconnect)
                await self._record(scope, 499 if gone else problems.STATUS[UnexpectedError])
            raise

    async def _record(self, scope: Scope, status: int) -> None:
        key: Key | None = scope["state"].get("key")
        id = key.id if key else None
        refused = status in problems.OF_KEYS
        if not refused and scope["method"] in READING:
            return
        if refused and self._refusals.setdefault(id, Bucket.full(REFUSALS)).take():
            return
        entry = {
            "api_key": id,
            "client": scope["client"][0] if scope.get("client") else None,
            "request_id": scope["state"]["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
        }
        try:
            await run_sync(self._write, entry, limiter=self._writers)
        except OperationalError:
            log.exception("an entry of the audit log was not written", extra=entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self.audit.record(**entry)
        if time.monotonic() - self._swept_at > SWEPT:
            self._swept_at = time.monotonic()
            self.audit.sweep()


def _refuse_web_pages(headers: Headers) -> None:
    """Raise `NotAllowed` for what a web page of another origin sends, or sends to a name that is not this machine's."""
    host, page = headers.get("host", ""), headers.get("origin")
    if host and not is_loopback(_split(f"//{host}").hostname or ""):
        raise NotAllowed(f"without an API key the service answers to this machine's own names only, not {host}")
    if page is not None and _split(page).netloc != host:
        raise NotAllowed(f"a web page of {page} may not use this service")


def _split(address: str) -> SplitResult:
    """The parts of an address; none of one that is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _is_page(scope: Scope) -> bool:
    """Whether a request is for the dashboard's own files, which hold no data."""
    path: str = scope["path"]
    return scope["method"] in READING and (path in {"/", "/dashboard"} or path.startswith("/dashboard/"))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own.

    >>> is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
