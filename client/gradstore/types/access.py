"""Who may use the service, and what was done with it."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from gradstore.types.base import Body

KeyScope = Literal["read", "write", "admin"]
"""What a key permits; each includes those before it."""


class ApiKey(Body):
    """An API key, without its secret."""

    id: str
    name: str
    scopes: list[KeyScope]
    requests_per_minute: int | None
    """Its own limit; null where the server's default holds."""
    max_upload_bytes: int | None
    """Its own limit; null where the server's holds."""
    created_at: datetime
    revoked_at: datetime | None
    used_at: datetime | None
    """When a request last carried it, give or take a minute."""


class CreatedApiKey(ApiKey):
    """A key that has just been made: its secret is shown this once."""

    key: str


class AuditEntry(Body):
    """A request that was to change something, or was refused for its key."""

    id: str
    at: datetime
    api_key: str | None
    """Id of its key; `environment` for GRADSTORE_API_KEY; null where none was needed, or none was known."""
    client: str | None
    """Address that it came from."""
    request_id: str
    method: str
    path: str
    """Without the query."""
    status: int
