"""JSON as RFC 8259 has it: no NaN, no key twice in an object, no lone surrogate, no number beyond a double.

Python's own reader takes all four, and each would make two rows of different meaning look alike, or fail later in
another program. The hook that sees repeated keys costs about a third of the parsing speed. Nesting ends at `DEEPEST`:
how deep Python can follow depends on who asks, so a row taken at the door could stop a worker.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

DEEPEST = 100  # levels of arrays and objects
TOO_DEEP = f"nested deeper than {DEEPEST} levels"


class NotJson(ValueError):
    """Text that is not strict JSON; the message says where and why."""


def parse(text: bytes) -> Any:
    """The value of one JSON text in UTF-8. Lone surrogates are found by `canonical`, which must encode anyway."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise NotJson(
            f"byte 0x{text[error.start]:02X} at position {error.start + 1} is not UTF-8: save the file as UTF-8"
        ) from error
    try:
        value = _DECODER.decode(decoded)
    except NotJson:
        raise
    except json.JSONDecodeError as error:
        raise NotJson(_reason(error)) from error
    except RecursionError as error:
        raise NotJson(TOO_DEEP) from error
    except ValueError as error:  # an integer of more than 4,300 digits
        raise NotJson("a number has too many digits: write it as a string") from error
    if decoded.count("[") + decoded.count("{") > DEEPEST and _too_deep(value):
        raise NotJson(TOO_DEEP)
    return value


def canonical(value: Any) -> bytes:
    """The one text all spellings of a value share: sorted keys, no white space, UTF-8, nothing escaped needlessly.

    >>> canonical(parse(b'{"b": 1.50, "a": "\\\\u00e9"}')).decode()
    '{"a":"é","b":1.5}'
    """
    return _encode(_CANONICAL, value)


def compact(value: Any) -> bytes:
    """The value on one line, its keys in their own order."""
    return _encode(_COMPACT, value)


def _encode(encoder: json.JSONEncoder, value: Any) -> bytes:
    try:
        return encoder.encode(value).encode()
    except UnicodeEncodeError as error:
        unit = ord(error.object[error.start])
        raise NotJson(f"the lone surrogate \\u{unit:04x} stands for no character: it is half of a pair") from error
    except RecursionError as error:
        raise NotJson(TOO_DEEP) from error


def _too_deep(value: Any) -> bool:
    """Whether arrays and objects stand inside each other on more than `DEEPEST` levels."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
    return bool(level)


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise NotJson(
            f"the key {_repeated(pairs)!r} stands twice in one object, and readers differ in which one they take"
        )
    return value


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first key that comes again."""
    last = {name: position for position, (name, _) in enumerate(pairs)}
    return next(name for position, (name, _) in enumerate(pairs) if last[name] != position)


def _constant(name: str) -> NoReturn:
    raise NotJson(f"{name} is not JSON: write null, or leave the field out")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotJson(f"the number {text} is too large for a double: write it as a string")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _reason(error: json.JSONDecodeError) -> str:
    """What a person would say is wrong; the wording of Python's own messages changes between versions."""
    text, at = error.doc, error.pos
    before, here = text[:at].rstrip(), text[at : at + 1]
    place = f"at character {at + 1}"
    trailing = before.endswith(",") and here in ("}", "]")
    reasons = (
        (text.lstrip().startswith(("//", "#", "/*")), "a comment, which JSON does not have"),
        (here == "'", f"single quotes {place}: this is Python's notation; write rows with json.dumps"),
        (error.msg.startswith("Extra data"), f"more than one JSON value: a second one begins {place}"),
        (error.msg.startswith("Invalid control"), f"a raw control character in a string {place}: write it as \\u00xx"),
        (error.msg.startswith("Unterminated"), f"the string that begins {place} never ends"),
        (error.msg.startswith("Illegal trailing") or trailing, f"a comma before the closing bracket {place}"),
        (not text[at:].strip(), f"the row ends too early, {place}: a bracket or a value is missing"),
    )
    plain = f"not JSON {place}: {error.msg[0].lower()}{error.msg[1:]}"
    return next((reason for applies, reason in reasons if applies), plain)
