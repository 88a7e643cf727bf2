"""What a text shows at a glance, as numbers: lengths, kinds of characters, digits and code, questions, turns.

Cheap beside any model: tens of microseconds a row. What is asked and what is answered are counted apart, since a loss
is on the answer alone. Counts are log(1 + count), so that a row of 50,000 characters is not a thousand times as far
from the others as one of 50.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import log1p

import numpy as np

from datastore.influence import Floats
from datastore.rows import Example

CODE = frozenset("{}[]();=<>\\|`_#&@^~")
"""Characters that code has more of than prose."""
MATHS = frozenset("+-*/=%$<>^")
PUNCTUATION = frozenset(".,:;!?'\"-")
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_ITEM = re.compile(r"^\s*(?:[-*•]|\(?[0-9A-Za-z][.)])\s", re.MULTILINE)
_OF_A_TEXT = (
    "characters", "words", "lines", "numbers", "items", "questions", "word_length", "different_words", "letters",
    "capitals", "digits", "punctuation", "code", "maths", "white_space", "beyond_ascii",
)  # fmt: skip
LENGTHS = ("asked_characters", "answered_characters")
"""The statistics that a predictor by length alone gets."""
STATISTICS = (
    *(f"asked_{name}" for name in _OF_A_TEXT),
    *(f"answered_{name}" for name in _OF_A_TEXT),
    "turns",
    "answered_share",
)
"""Names of the columns of `statistics`."""


def statistics(examples: Iterable[Example]) -> Floats:
    """The statistics of each example, (n, len(STATISTICS)) float32, all finite."""
    rows = [_row(example) for example in examples]
    return np.array(rows, np.float32).reshape(len(rows), len(STATISTICS))


def lengths(found: Floats) -> Floats:
    """The columns of `statistics` that are lengths (n, 2)."""
    return found[:, [STATISTICS.index(name) for name in LENGTHS]]


def _row(example: Example) -> list[float]:
    asked, answered = _parts(example)
    share = len(answered) / max(len(asked) + len(answered), 1)
    turns = len(example.messages) or 2
    return [*_of_a_text(asked), *_of_a_text(answered), log1p(turns), share]


def _parts(example: Example) -> tuple[str, str]:
    """What the example is asked, and what it answers: the text whose tokens have a loss."""
    if not example.messages:
        return example.prompt or "", example.completion or ""
    said = [(each.role == "assistant", each.prefix + each.content) for each in example.messages]
    return (
        "\n".join(text for answers, text in said if not answers),
        "\n".join(text for answers, text in said if answers),
    )


def _of_a_text(text: str) -> list[float]:
    words = _WORD.findall(text)
    size = max(len(text), 1)
    return [
        log1p(len(text)),
        log1p(len(words)),
        log1p(text.count("\n")),
        log1p(len(_NUMBER.findall(text))),
        log1p(len(_ITEM.findall(text))),
        log1p(text.count("?")),
        sum(map(len, words)) / max(len(words), 1),
        len({word.lower() for word in words}) / max(len(words), 1),
        sum(mark.isalpha() for mark in text) / size,
        sum(mark.isupper() for mark in text) / size,
        sum(mark.isdigit() for mark in text) / size,
        sum(mark in PUNCTUATION for mark in text) / size,
        sum(mark in CODE for mark in text) / size,
        sum(mark in MATHS for mark in text) / size,
        sum(mark.isspace() for mark in text) / size,
        sum(ord(mark) > 127 for mark in text) / size,
    ]
