"""API keys: made here from 256 random bits, shown once, and kept as their SHA-256.

A plain hash is right for them, unlike for passwords: a slow, salted one defends what people choose from a few billion
guesses, and nobody guesses one of 2^256. It costs a microsecond where a slow one would cost every request 100 ms. For
the same reason looking it up by an index gives nothing away: who does not have the key cannot choose its hash's digits.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import get_args

from gradstore.types import ApiKey, CreatedApiKey, KeyScope
from sqlalchemy import select, update

from datastore.catalog import Catalog, utc_now
from datastore.errors import Conflict, InvalidInput
from datastore.redaction import API_KEY, API_KEY_PREFIX
from datastore.schema import ApiKeyRow

RANDOM_BYTES = 32
USED = timedelta(minutes=1)
"""How exactly the last use of a key is recorded: a write for every read would be dear."""
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
"""From the narrowest to the widest."""


@dataclass(frozen=True)
class Key:
    """A key, as far as a request that carries it needs to know it."""

    id: str
    name: str
    scopes: Collection[KeyScope]
    requests_per_minute: int | None
    max_upload_bytes: int | None
    revoked: bool
    stale: bool
    """Whether its last recorded use is more than `USED` ago."""


@dataclass(frozen=True)
class Keys:
    """The API keys of a catalog."""

    catalog: Catalog

    def create(
        self,
        name: str,
        *,
        scope: KeyScope,
        requests_per_minute: int | None = None,
        max_upload_bytes: int | None = None,
    ) -> CreatedApiKey:
        """Make a key. Raises `Conflict` where the name is, or ever was, another's: the audit log must not mix them."""
        key = API_KEY_PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        with self.catalog.transaction() as session:
            if session.scalar(select(ApiKeyRow.id).where(ApiKeyRow.name == name)) is not None:
                raise Conflict(f"there is, or was, a key called {name!r}: choose another name")
            row = ApiKeyRow(
                id=f"key_{secrets.token_hex(12)}", name=name, sha256=_hash(key),
                scopes=list(SCOPES[: SCOPES.index(scope) + 1]), requests_per_minute=requests_per_minute,
                max_upload_bytes=max_upload_bytes, created_at=utc_now(), revoked_at=None, used_at=None,
            )  # fmt: skip
            session.add(row)
            session.flush()
            return CreatedApiKey(key=key, **_describe(row).model_dump())

    def all(self) -> list[ApiKey]:
        """All keys, the revoked ones too, the oldest first."""
        with self.catalog.reading() as session:
            return [_describe(row) for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at))]

    def revoke(self, name: str) -> ApiKey:
        """Have a key refused from now on; done again, it changes nothing. Raises `InvalidInput`."""
        with self.catalog.transaction() as session:
            row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.name == name))
            if row is None:
                raise InvalidInput(f"no key is called {name!r}: gradstore keys list shows what there is")
            row.revoked_at = row.revoked_at or utc_now()
            return _describe(row)

    def find(self, key: str) -> Key | None:
        """The key that a request carries; None where it is none of this catalog's."""
        if not API_KEY.fullmatch(key):
            return None
        with self.catalog.reading() as session:
            row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.sha256 == _hash(key)))
            return _key(row) if row is not None else None

    def used(self, id: str) -> None:
        """Record that a key was used just now."""
        with self.catalog.transaction() as session:
            session.execute(update(ApiKeyRow).where(ApiKeyRow.id == id).values(used_at=utc_now()))

    def exist(self, *, usable: bool = False) -> bool:
        """Whether a key was ever made; with `usable`, whether one lets requests in."""
        query = select(ApiKeyRow.id).limit(1)
        with self.catalog.reading() as session:
            return session.scalar(query.where(ApiKeyRow.revoked_at.is_(None)) if usable else query) is not None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _key(row: ApiKeyRow) -> Key:
    return Key(
        id=row.id, name=row.name, scopes=frozenset(row.scopes), requests_per_minute=row.requests_per_minute,
        max_upload_bytes=row.max_upload_bytes, revoked=row.revoked_at is not None,
        stale=row.used_at is None or utc_now() - row.used_at > USED,
    )  # fmt: skip


def _describe(row: ApiKeyRow) -> ApiKey:
    return ApiKey.model_validate(row, from_attributes=True)
