"""Whose requests are let in, and how many: the key of the environment, those of the catalog, and their limits.

A key that was looked up is known for `KNOWN` seconds, so a revoked one is refused by every API process a second later
at most. Once a key has been made, every request needs one, also after all are revoked.

Requests are limited by a token bucket for each key: a minute's requests at once, then as they flow in. It lives in this
process: with several API processes behind one address a key has as many buckets. The packages that keep such counts in
Redis count windows, not buckets, and would add a broker's failure to every request.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
import time
from dataclasses import dataclass

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from gradstore.types import KeyScope
from sqlalchemy.exc import OperationalError

from datastore.keys import SCOPES, Key, Keys
from datastore.settings import Settings
from service.problems import NotAllowed, NotAuthenticated, TooManyRequests

log = logging.getLogger(__name__)

KNOWN = 1.0  # seconds
ENVIRONMENT = "environment"
"""Id of the key that GRADSTORE_API_KEY is."""


@dataclass
class Bucket:
    """A token bucket: `per_minute` at once, then as many a minute."""

    per_minute: int
    tokens: float
    filled_at: float
    """By the monotonic clock, in seconds."""

    @classmethod
    def full(cls, per_minute: int) -> Bucket:
        """A bucket from which nothing was taken yet."""
        return cls(per_minute, float(per_minute), time.monotonic())

    def take(self) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        now = time.monotonic()
        self.tokens = min(float(self.per_minute), self.tokens + (now - self.filled_at) * self.per_minute / 60)
        self.filled_at = now
        if self.tokens < 1:
            return (1 - self.tokens) * 60 / self.per_minute
        self.tokens -= 1
        return 0.0


class Access:
    """The keys of an API process. Its methods are called in the event loop."""

    def __init__(self, keys: Keys, settings: Settings, *, among_strangers: bool) -> None:
        """`among_strangers`: whether others than this machine's programs reach the server."""
        self._keys = keys
        self._secret = settings.api_key.get_secret_value().encode() if settings.api_key else None
        self._per_minute = settings.requests_per_minute
        self._environment = Key(
            id=ENVIRONMENT, name="GRADSTORE_API_KEY", scopes=SCOPES, requests_per_minute=None, max_upload_bytes=None,
            revoked=False, stale=False,
        )  # fmt: skip
        self._locked = among_strangers or self._secret is not None
        self._looked_at = float("-inf")
        self._known: dict[bytes, tuple[Key, float]] = {}
        self._buckets: dict[str, Bucket] = {}
        self._one_at_a_time = CapacityLimiter(1)  # who waited finds what the one before has looked up

    async def locked(self) -> bool:
        """Whether requests need a key. Raises OperationalError where only the catalog knows."""
        if not self._locked and time.monotonic() - self._looked_at > KNOWN:
            await run_sync(self._look_for_keys, limiter=self._one_at_a_time)
        return self._locked

    async def key(self, authorization: str) -> Key | None:
        """The key that a header carries; None where there is no such key. Raises OperationalError without a catalog."""
        scheme, _, text = authorization.partition(" ")
        given = text.strip().encode()
        if scheme.lower() != "bearer" or not given:
            return None
        if self._secret is not None and secrets.compare_digest(given, self._secret):
            return self._environment
        digest = hashlib.sha256(given).digest()
        known = self._fresh(digest)
        return known or await run_sync(self._look_up, digest, text.strip(), limiter=self._one_at_a_time)

    def count(self, key: Key) -> None:
        """Count a request. Raises `TooManyRequests` where the key has sent enough."""
        if key.id == ENVIRONMENT:
            return
        per_minute = key.requests_per_minute or self._per_minute
        bucket = self._buckets.setdefault(key.id, Bucket.full(per_minute))
        wait = bucket.take()
        if wait:
            raise TooManyRequests(
                f"the key {key.name!r} may send {per_minute:,} requests a minute: wait {wait:.1f} s, or ask whoever "
                "runs the server for a key with more (gradstore keys create NAME --requests-per-minute N)",
                wait=wait,
            )

    async def note_use(self, key: Key) -> None:
        """Record that a key was used, where that was not done lately."""
        if not key.stale:
            return
        for digest, (known, at) in self._known.items():
            if known.id == key.id:
                self._known[digest] = (dataclasses.replace(known, stale=False), at)
        try:
            await run_sync(self._keys.used, key.id)
        except OperationalError as error:
            log.warning("the use of a key was not recorded", extra={"key": key.id, "reason": type(error).__name__})

    def _fresh(self, digest: bytes) -> Key | None:
        known, at = self._known.get(digest, (None, 0.0))
        return known if known is not None and time.monotonic() - at < KNOWN else None

    def _look_up(self, digest: bytes, text: str) -> Key | None:
        found = self._fresh(digest)
        if found is not None:
            return found
        began = time.monotonic()
        found = self._keys.find(text)
        if found is None:
            self._known.pop(digest, None)
        else:
            self._known[digest] = (found, began)
        return found

    def _look_for_keys(self) -> None:
        if time.monotonic() - self._looked_at > KNOWN:
            began = time.monotonic()
            self._locked = self._keys.exist()
            self._looked_at = began


def refuse_unknown(key: Key | None) -> Key:
    """The key, where it is known and not revoked. Raises `NotAuthenticated`."""
    if key is None:
        raise NotAuthenticated(
            "send an API key, Authorization: Bearer <key>: that of GRADSTORE_API_KEY, or one that whoever runs the "
            "server makes with gradstore keys create NAME"
        )
    if key.revoked:
        raise NotAuthenticated(f"the key {key.name!r} is revoked: ask whoever runs the server for another one")
    return key


def require(key: Key | None, scope: KeyScope) -> None:
    """Raise `NotAllowed` unless the key has the scope; where no key is needed, everything is permitted."""
    if key is not None and scope not in key.scopes:
        raise NotAllowed(
            f"this needs a key with the scope {scope!r}, and {key.name!r} has {', '.join(key.scopes)}: ask whoever "
            f"runs the server for one (gradstore keys create NAME --scope {scope})"
        )
