"""How an answer is judged: by log-probability, by an exact match, or by the words it shares with the right one.

Pure functions over texts and numbers; what a model says is `worker.evaluate`'s business.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

_NUMBER = re.compile(r"[-+]?\$?(?:[\d,]*\.\d+|[\d,]*\d)")  # each in one way only: a long one is read as fast
_ARTICLES = {"a", "an", "the"}


def best_choice(log_probs: Sequence[float]) -> int:
    """Position of the most probable choice, the first of equals.

    The numbers are sums over a choice's tokens, not divided by its length (lm-eval's `acc`): choices of one token each,
    as MMLU's, are compared fairly; among choices of many tokens the shorter ones have an advantage.
    """
    return max(range(len(log_probs)), key=lambda choice: log_probs[choice])


def exact_match(found: str | None, answers: Sequence[str]) -> tuple[bool, bool]:
    """Whether the answer that was found in a text is one of `answers`, and whether there was one.

    Numbers are compared as numbers ("1,450.0" is 1450); other answers without case, outer white space and final full
    stop.

    >>> exact_match("1,450.0", ["1450"]), exact_match(None, ["1450"])
    ((True, True), (False, False))
    """
    if found is None or not found.strip():
        return False, False
    return any(_same(found, answer) for answer in answers), True


def _same(found: str, answer: str) -> bool:
    numbers = [_number(text) for text in (found, answer)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _bare(found) == _bare(answer)


def _number(text: str) -> Decimal | None:
    text = text.strip().rstrip(".")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def _bare(text: str) -> str:
    return text.strip().rstrip(".").rstrip().casefold()


def token_f1(text: str, answers: Sequence[str]) -> float:
    """The best F1, between 0 and 1, of the words of `text` against those of an answer (SQuAD, Rajpurkar et al. 2016).

    Words are compared without case, punctuation and English articles. On ASCII text this is SQuAD's own normalisation;
    beyond it, all of Unicode's punctuation is dropped ("؟", "।", "«"), and different encodings of a letter are one. Of
    `text` as many lines count as the answer has, for models that go on after their answer.

    >>> token_f1("the White House, Washington", ["White House"])
    0.8
    """
    lines = text.strip().split("\n")
    return max(
        (_f1(_words("\n".join(lines[: answer.strip().count("\n") + 1])), _words(answer)) for answer in answers),
        default=0.0,
    )


def _words(text: str) -> list[str]:
    normal = unicodedata.normalize("NFKC", text).casefold()
    kept = (mark for mark in normal if mark not in string.punctuation and unicodedata.category(mark)[0] != "P")
    return [word for word in "".join(kept).split() if word not in _ARTICLES]


def _f1(words: Sequence[str], right: Sequence[str]) -> float:
    if not words or not right:
        return float(not words and not right)
    shared = (Counter(words) & Counter(right)).total()
    return 2 * shared / (len(words) + len(right))


def subtask_mean(groups: Sequence[Sequence[float]]) -> float:
    """The mean over subtasks of each one's mean: every subtask counts alike, however many rows it has."""
    return float(np.mean([np.mean(group) for group in groups]))


def bootstrap_interval(groups: Sequence[Sequence[float]], *, samples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `subtask_mean` (Efron 1979): rows are drawn anew within each group.

    One group gives the interval of its plain mean. A group of one row does not vary, so its part is an underestimate.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(samples)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        for start in range(0, samples, 256):  # 256 samples of 10,000 rows are 20 MB
            count = min(256, samples - start)
            means[start : start + count] += values[generator.integers(len(values), size=(count, len(values)))].mean(1)
    low, high = np.percentile(means / len(groups), [2.5, 97.5])
    return float(low), float(high)
