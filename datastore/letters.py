"""Capabilities by letters: how a labeller is told them, and which replies count.

A reply counts only where all of it is a comma list of letters that were offered: "A, C". Prose is no reply, however
many capital letters it has: "A rather long answer" begins with one, and says nothing of a capability.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from gradstore.types import Capability

INSTRUCTIONS = (
    "You label requests with the capabilities that answering them well relies on. Reply with the letters of the "
    "capabilities, separated by commas, most important first, and with nothing else. Do not answer the request."
)
_LIST = re.compile(r"\s*[A-Z]{1,2}(\s*,\s*[A-Z]{1,2})*\s*", re.ASCII)


def letters(number: int) -> str:
    """The letters of an option, counted from 0: A to Z, then AA, AB, and so on to ZZ.

    >>> letters(0), letters(25), letters(26), letters(701)
    ('A', 'Z', 'AA', 'ZZ')
    """
    first, last = divmod(number, len(ascii_uppercase))
    return (ascii_uppercase[first - 1] if first else "") + ascii_uppercase[last]


MOST = len(ascii_uppercase) * (len(ascii_uppercase) + 1)
"""Options that there are letters for."""


def options(reply: str, count: int) -> list[int] | None:
    """The numbers of the options that a reply lists, in ascending order; None where it is no list of letters among
    those of `count` options.

    >>> options("A, C", 13), options(" B ", 13), options("A rather long answer", 13), options("A, N", 13)
    ([0, 2], [1], None, None)
    """
    if not _LIST.fullmatch(reply):
        return None
    numbers = {letters(number): number for number in range(count)}
    found = [numbers.get(part.strip()) for part in reply.split(",")]
    known = {number for number in found if number is not None}
    return None if None in found else sorted(known)


def question(capabilities: Sequence[Capability], text: str) -> str:
    """What a labeller is asked about a text."""
    listed = (
        f"{letters(number)}. {capability.name}" + (f": {capability.definition}" if capability.definition else "")
        for number, capability in enumerate(capabilities)
    )
    return "Capabilities:\n" + "\n".join(listed) + f"\n\nRequest:\n{text}\n\nLetters:"
