"""On whose behalf a thread or a task works: the request and its API key, which logs name and jobs record.

Context variables reach the threads that anyio starts, too. Each is set where a request comes in (service/) and is None
outside one.
"""

from __future__ import annotations

from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that this code answers."""
api_key: ContextVar[str | None] = ContextVar("api_key", default=None)
"""Id of the API key that it came with, `environment` for that of GRADSTORE_API_KEY; None also where none was needed."""
