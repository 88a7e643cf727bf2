"""The log of a process: one line an event, to stderr, as text (`key=value` after the message) or as JSON.

A line carries what its event was given as `extra`, and whatever else is being worked on there: the id of the request
that is answered, and in a worker the job, its shard and the id of the request that started it. So one search for a
request's id finds the lines of the API and of every worker.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Literal

from datastore import redaction
from datastore.origin import request_id
from datastore.settings import Settings

Format = Literal["text", "json"]

_ABOUT: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters as their escapes: what a request names must not clear or colour the terminal of who reads."""
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


@contextmanager
def about(labels: Mapping[str, Any]) -> Iterator[None]:
    """Mark the lines that are written in this thread meanwhile, a library's too."""
    token = _ABOUT.set({**_ABOUT.get(), **labels})
    try:
        yield
    finally:
        _ABOUT.reset(token)


class TextFormatter(logging.Formatter):
    """A line for people: time, level, logger and message, and behind it what else is known."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line and its traceback, without control characters of what they quote."""
        return super().format(record).translate(_CONTROLS)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the interface
        """Add what else is known to the line, before a traceback."""
        pairs = "".join(f" {key}={_shown(value)}" for key, value in _known(record).items())
        return super().formatMessage(record) + pairs


class JsonFormatter(TextFormatter):
    """A line for programs: one JSON object, tracebacks inside it."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the object: `time`, `level`, `logger`, `message`, what else is known, and `traceback`."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_known(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


FORMATTERS: dict[Format, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def configure(format: Format = "text") -> None:
    """Log from INFO on; of other libraries only what goes wrong, of uvicorn too: the API logs its requests itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[format]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # On import it gives itself a handler, and passes its lines on as well: they would be written twice.
    hub = logging.getLogger("huggingface_hub")
    hub.handlers.clear()
    hub.addHandler = hub.removeHandler  # type: ignore[method-assign]  # it may be imported only later
    for noisy in ("uvicorn", "httpx", "alembic", "celery", "kombu"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # where it is installed, it asks on every start for another package, which would fetch code from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def begin(settings: Settings) -> None:
    """Log as the settings say, from now on without the secrets that they and the environment hold."""
    configure(settings.log_format)
    redaction.guard(settings)


def _known(record: logging.LogRecord) -> dict[str, Any]:
    """What the event was given, and what is being worked on where it happened."""
    answered = request_id.get()
    extras = {key: value for key, value in vars(record).items() if key not in _OWN}
    return {**({"request": answered} if answered else {}), **_ABOUT.get(), **extras}


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return (
        json.dumps(text)
        if isinstance(value, str) and (not text or not text.isprintable() or set(text) & set(' "='))
        else text
    )
