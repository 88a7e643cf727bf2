"""Workers woken by Celery messages. The only module of the worker that knows Celery.

A message is a doorbell: whoever hears it does shards until none waits. Which shards, the leases in the catalog decide,
so a message that is lost, doubled or delivered to a worker of other kinds costs at most `LOOK_INTERVAL` seconds: every
worker also looks by itself, from the timer of Celery's own loop. A worker that finds more than it can do rings for
others.

The pool is `solo`: a shard runs in the process's main thread, where a signal reaches it, and a forked child of a
process that has used CUDA could not use it again. A busy solo worker answers no ping, so its sign of life is in the
catalog (`Caretaker`). While the broker is away the worker waits for it; the jobs wait in the catalog.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from celery import Celery, bootsteps, signals
from gradstore.types import JobKind
from kombu.exceptions import OperationalError
from sqlalchemy.exc import SQLAlchemyError

from datastore.doorbell import REQUEST_HEADER, TASK
from datastore.errors import first_line
from worker.context import Context
from worker.loop import Caretaker, drain

log = logging.getLogger(__name__)

LOOK_INTERVAL = 5.0  # seconds
VISIBILITY_TIMEOUT = 60  # seconds after which an unanswered ring is delivered again, which is harmless


class Doorbell:
    """A worker's Celery application."""

    def __init__(
        self,
        context: Context,
        caretaker: Caretaker,
        *,
        kinds: Collection[JobKind],
        look_interval: float = LOOK_INTERVAL,
    ) -> None:
        self._context = context
        self._caretaker = caretaker
        self._kinds = tuple(kinds)
        self.app = Celery("gradstore", broker=context.settings.broker, set_as_current=False)
        self.app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
            task_acks_late=True,  # a ring is answered when the work is done
            task_reject_on_worker_lost=True,
            worker_prefetch_multiplier=1,  # rings beyond the one at hand are for others
            broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT},
            broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None,
            worker_redirect_stdouts=False,
            worker_cancel_long_running_tasks_on_connection_loss=True,  # there is none: a solo worker notices later
        )

        @self.app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
        def hear(task: Any, kind: str | None = None) -> None:
            self._ring_heard(kind, task.request.get(REQUEST_HEADER))

        self.app.steps["consumer"].add(_look_step(self.look, look_interval))

    def run(self) -> int:
        """Listen and look until the process is asked to stop; returns its exit status."""
        stop = partial(_leave, self._context)
        signals.worker_shutting_down.connect(stop)
        signals.setup_logging.connect(_leave_logging_alone)
        try:
            worker = self.app.Worker(
                hostname=f"gradstore@{self._context.owner}",
                pool="solo",
                concurrency=1,
                quiet=True,
                without_gossip=True,
                without_mingle=True,
            )
            worker.start()
        finally:
            signals.worker_shutting_down.disconnect(stop)
            signals.setup_logging.disconnect(_leave_logging_alone)
        return int(worker.exitcode or 0)

    def look(self, woken_by: str = "look") -> None:
        """Do what waits, heard of or not."""
        try:
            shards = drain(self._context, self._caretaker, kinds=self._kinds, on_claim=self._pass_on_once())
        except SQLAlchemyError as error:
            log.warning("the catalog does not answer", extra={"reason": first_line(error)})
        else:
            if shards:
                log.info("nothing waits any more", extra={"shards": shards, "woken_by": woken_by})

    def _ring_heard(self, kind: str | None, request: str | None) -> None:
        log.info("ring heard", extra={"kind": kind, **({"request": request} if request else {})})
        self.look("ring")

    def _pass_on_once(self) -> Callable[[], None]:
        """A function that rings for another worker the first time it is called, if there is work for one."""
        rung = False

        def ring() -> None:
            nonlocal rung
            if rung or not self._context.jobs.waiting(kinds=self._kinds):
                return
            rung = True
            try:
                self.app.send_task(TASK, args=[None], retry=False)
            except (OperationalError, OSError) as error:
                log.warning("the broker does not answer", extra={"reason": str(error)})

        return ring


def _leave(context: Context, **_: Any) -> None:
    context.leaving.set()


def _leave_logging_alone(**_: Any) -> None:
    """Celery configures logging unless somebody else says that they do: the process has (worker/command.py)."""


def _look_step(look: Callable[[], None], interval: float) -> type[bootsteps.StartStopStep]:
    """The step of Celery's consumer that looks every `interval` seconds."""

    class Look(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
        """Looks for work between messages, in the consumer's own loop: never beside a task."""

        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            """Set the timer; the consumer starts anew after each loss of its connection."""
            self._timer = consumer.timer.call_repeatedly(interval, look)

        def stop(self, consumer: Any) -> None:  # noqa: ARG002 - the interface
            """Take the timer away."""
            self._timer.cancel()

    return Look
