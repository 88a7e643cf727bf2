"""A pool of several skills with known labels, made on the spot.

Every skill turns a list of letters into a list of just as many letters, and every skill has the same distribution of
lengths and one-word instructions, so that no skill can be told by length. What differs is what must be learned.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Any

LETTERS = string.ascii_lowercase[:16]
SHORTEST, LONGEST = 4, 7  # letters of a list


def _next_letter(letters: list[str]) -> list[str]:
    return [LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in letters]


def _mirror_letter(letters: list[str]) -> list[str]:
    return [LETTERS[-1 - LETTERS.index(letter)] for letter in letters]


def _swap_pairs(letters: list[str]) -> list[str]:
    swapped = letters.copy()
    for left in range(0, len(letters) - 1, 2):
        swapped[left], swapped[left + 1] = letters[left + 1], letters[left]
    return swapped


SKILLS: dict[str, tuple[tuple[str, ...], Callable[[list[str]], list[str]]]] = {
    "copy": (("copy", "repeat", "echo"), lambda letters: letters),
    "reverse": (("reverse", "flip", "backwards"), lambda letters: letters[::-1]),
    "sort": (("sort", "order", "arrange"), sorted),
    "descend": (("descend", "unsort", "lower"), lambda letters: sorted(letters, reverse=True)),
    "rotate": (("rotate", "roll", "turn"), lambda letters: letters[1:] + letters[:1]),
    "back": (("back", "return", "rewind"), lambda letters: letters[-1:] + letters[:-1]),
    "swap": (("swap", "exchange", "pair"), _swap_pairs),
    "next": (("next", "advance", "shift"), _next_letter),
    "mirror": (("mirror", "reflect", "invert"), _mirror_letter),
    "spread": (("spread", "part", "comb"), lambda letters: letters[::2] + letters[1::2]),
}
"""Skill → (its words, what it does to a list of letters)."""


def example(skill: str, rng: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    words, function = SKILLS[skill]
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(SHORTEST, LONGEST))]
    return f"{rng.choice(words)} : {' '.join(letters)}", " ".join(function(letters))


def pool(rows: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of all skills in turn, shuffled, in open-instruct's form; `dataset` is the skill."""
    rng = random.Random(f"pool {seed}")
    skills = [list(SKILLS)[row % len(SKILLS)] for row in range(rows)]
    rng.shuffle(skills)
    for row, skill in enumerate(skills):
        question, answer = example(skill, rng)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"dataset": skill, "id": f"{skill}_{row}", "messages": messages}


def target(skill: str, rows: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of one skill for a task, with the exact answer as the metric."""
    rng = random.Random(f"target {skill} {seed}")
    for _ in range(rows):
        question, answer = example(skill, rng)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "subtask": skill, "metric": "exact_match", "answers": [answer]}
