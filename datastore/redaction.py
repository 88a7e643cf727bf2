"""Secrets kept out of what a process writes: its log, its errors, and the errors that it records on jobs.

No message of this project has one. But errors of other libraries end up in all three, and some quote what they were
given: an object store answers a wrong signature with the key that made it. So a process that knows its secrets takes
them out of every line that it logs and of every problem that it tells.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote, urlsplit

from datastore.settings import Settings

VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip
"""Variables of libraries whose values are secrets."""
SHORTEST = 6
"""Characters of a secret that is looked for: a shorter one stands in words that are none."""
HIDDEN = "[hidden]"

API_KEY_PREFIX = "gsk_"
"""What all API keys begin with, so that this and other programs which look for secrets in texts find them."""
API_KEY = re.compile(rf"{API_KEY_PREFIX}[\w-]{{43}}", re.ASCII)

_known: list[re.Pattern[str]] = [API_KEY]


def guard(settings: Settings) -> None:
    """Hide the secrets of the settings and of the environment from now on; to be called when the log is configured."""
    _known[:] = [API_KEY, *_pattern(settings)]
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Redacted(handler.formatter or logging.Formatter()))


def redacted(text: str) -> str:
    """The text without the secrets that this process knows, and without anything that looks like an API key."""
    for pattern in _known:
        text = pattern.sub(HIDDEN, text)
    return text


class _Redacted(logging.Formatter):
    """Another formatter's lines, tracebacks included, without secrets."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Format a line."""
        return redacted(self._inner.format(record))


def _pattern(settings: Settings) -> Iterator[re.Pattern[str]]:
    secrets = sorted({secret for secret in _secrets(settings) if len(secret) >= SHORTEST}, key=len, reverse=True)
    if secrets:
        yield re.compile("|".join(map(re.escape, secrets)))


def _secrets(settings: Settings) -> Iterator[str]:
    if settings.api_key is not None:
        yield settings.api_key.get_secret_value()
    yield from filter(None, map(settings.labeller_key, settings.labellers))
    for url in (settings.catalog, settings.broker):
        password = urlsplit(url).password or ""
        yield from (password, unquote(password), quote(unquote(password), safe=""))
    yield from (os.environ.get(name, "") for name in VARIABLES)
