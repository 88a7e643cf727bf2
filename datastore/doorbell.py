"""What a ring is called between those who ring, the service and its workers, and those who hear: the workers."""

from __future__ import annotations

TASK = "gradstore.work"
"""Name of the workers' Celery task; its one argument is the kind of job that waits, or None for any."""
REQUEST_HEADER = "gradstore_request"
"""Header of its messages: the id of the request that it was sent for, if it was."""
