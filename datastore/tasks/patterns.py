"""Regular expressions that come with a task's rows: they say where in a text the answer is, in bounded time.

Python's `re` cannot be stopped and holds every other thread meanwhile, so that one row with `(a|a)*$` would stop the
service. `regex` reads the same expressions, lets other threads run and stops when told.
"""

from __future__ import annotations

import regex

LONGEST = 500  # characters of an expression
PATIENCE = 1.0  # seconds of looking for one answer


class BadPattern(ValueError):
    """An expression that cannot be used; the message says why."""


class TooSlow(BadPattern):
    """An expression that has looked for an answer for too long."""


def check(pattern: str) -> None:
    """Raise BadPattern unless `pattern` is a regular expression of at most `LONGEST` characters."""
    if len(pattern) > LONGEST:
        raise BadPattern(f"pattern must be a text of at most {LONGEST} characters")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise BadPattern(f"pattern is no regular expression: {error}") from error


def answer(pattern: str, text: str) -> str | None:
    """What the first match of `pattern` in `text` says: its first group, where it has one. None without a match.

    Raises TooSlow after `PATIENCE`.

    >>> answer(r"#### (\\S+)", "2 + 2 = 4\\n#### 4"), answer("[0-9]", "four")
    ('4', None)
    """
    try:
        match = regex.search(pattern, text, timeout=PATIENCE, concurrent=True)
    except TimeoutError as error:
        raise TooSlow(f"pattern takes more than {PATIENCE:g} s to look through a text: make it simpler") from error
    if match is None:
        return None
    found: str | None = match[1] if match.re.groups else match[0]
    return found or ""
