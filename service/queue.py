"""The doorbell: tells workers that there is work. The only file of the service that knows Celery.

Who computes what is decided by the leases in the catalog; a message that is lost or doubled changes nothing, since
workers also look for themselves. So a broker that does not answer is logged, and the request succeeds.
"""

from __future__ import annotations

import logging
from typing import Protocol

from celery import Celery
from gradstore.types import JobKind
from kombu.exceptions import OperationalError

from datastore.doorbell import REQUEST_HEADER, TASK
from datastore.origin import request_id

log = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds given to the broker while a request waits


class Queue(Protocol):
    """A way to wake workers."""

    def ring(self, job_id: str, kind: JobKind) -> None:
        """Wake a worker for a job. Never raises: workers find the job by themselves, later."""

    def alive(self) -> bool:
        """Whether workers would be woken."""


class PollingQueue:
    """Wakes nobody: workers that poll the catalog find their work within `poll_interval`."""

    def ring(self, job_id: str, kind: JobKind) -> None:
        """Do nothing."""

    def alive(self) -> bool:
        """Say yes: polling needs nothing but the catalog."""
        return True


class CeleryQueue:
    """Sends a Celery message through a broker."""

    def __init__(self, broker: str) -> None:
        self._app = Celery("gradstore", broker=broker, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            task_ignore_result=True,
            broker_connection_timeout=TIMEOUT,
            broker_transport_options={"socket_connect_timeout": TIMEOUT, "socket_timeout": TIMEOUT, "max_retries": 0},
        )

    def ring(self, job_id: str, kind: JobKind) -> None:
        """Send the message once; if it cannot be sent, log it."""
        try:
            self._app.send_task(TASK, args=[kind], retry=False, headers={REQUEST_HEADER: request_id.get()})
        except (OperationalError, OSError) as error:
            log.warning("the broker does not answer", extra={"job": job_id, "kind": kind, "reason": str(error)})

    def alive(self) -> bool:
        """Whether the broker answers."""
        try:
            with self._app.connection_for_write(connect_timeout=TIMEOUT) as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=TIMEOUT)
        except (OperationalError, OSError):
            return False
        return True


def queue_of(broker: str) -> Queue:
    """The queue that goes with a broker's URL; without one, workers poll."""
    return CeleryQueue(broker) if broker else PollingQueue()
