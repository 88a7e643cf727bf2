"""The log of a process: one line an event, `key=value` after the message, to stderr."""

from __future__ import annotations

import json
import logging
import sys
import time

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class Formatter(logging.Formatter):
    """Writes what was given as `extra` behind the message."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the interface
        """Add the extras to the line, before a traceback."""
        extras = {key: value for key, value in vars(record).items() if key not in _OWN}
        pairs = "".join(f" {key}={_shown(value)}" for key, value in extras.items())
        return super().formatMessage(record) + pairs


def configure() -> None:
    """Log from INFO on; of other libraries only what goes wrong, of uvicorn too: the API logs its requests itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # On import it gives itself a handler, and passes its lines on as well: they would be written twice.
    hub = logging.getLogger("huggingface_hub")
    hub.handlers.clear()
    hub.addHandler = hub.removeHandler  # type: ignore[method-assign]  # it may be imported only later
    for noisy in ("uvicorn", "httpx", "alembic", "celery", "kombu"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # where it is installed, it asks on every start for another package, which would fetch code from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return json.dumps(text) if isinstance(value, str) and (not text or set(text) & set(' "=\n\r\t')) else text
