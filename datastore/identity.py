"""Names made from content: the same thing has the same id, so asking again finds what exists."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

DIGITS = 24
"""Hex digits of an id: 96 bits, so that a chance collision among 10^9 things has a probability of about 10^-11."""


def content_id(prefix: str, content: Any) -> str:
    """The id of a JSON value: `prefix_` and the first digits of the SHA-256 of its canonical form.

    >>> content_id("grad", {"b": 1, "a": [2]}) == content_id("grad", {"a": [2], "b": 1})
    True
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{prefix}_{hashlib.sha256(canonical.encode()).hexdigest()[:DIGITS]}"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
