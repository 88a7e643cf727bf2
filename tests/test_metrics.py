"""How answers are judged."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from datastore.tasks.bbh import PATTERN as BBH
from datastore.tasks.gsm8k import PATTERN as GSM8K
from datastore.tasks.patterns import OnMultiple, Patterns
from datastore.tasks.scienceqa import WRITTEN
from worker.metrics import best_choice, bootstrap_interval, exact_match, subtask_mean, token_f1

RIGHT, WRONG, UNPARSED = (True, True), (False, True), (False, False)


def judge(text: str, answer: str, pattern: str, on_multiple: OnMultiple = "first") -> tuple[bool, bool]:
    """Judge what a pattern finds in a text."""
    with Patterns() as patterns:
        return exact_match(patterns.find(pattern, text, on_multiple=on_multiple), [answer])


def test_the_most_probable_choice_wins_and_the_first_of_equals() -> None:
    assert best_choice([-3.0, -0.5, -2.0]) == 1
    assert best_choice([-1.0, -1.0]) == 0
    assert best_choice([-math.inf, -99.0]) == 1


@pytest.mark.parametrize(
    ("text", "answer", "judged"),
    [
        ("So 2 * 3 = 6.\n#### 6", "6", RIGHT),
        ("#### 6.\n\nQuestion: What next?\n#### 5", "6", RIGHT),
        ("#### 1450000", "1,450,000", RIGHT),
        ("#### $1,450.00", "1450", RIGHT),
        ("####-7", "-7", RIGHT),
        ("#### 60", "6", WRONG),
        ("The answer is 6.", "6", UNPARSED),
        ("#### six", "6", UNPARSED),
        ("", "6", UNPARSED),
    ],
)
def test_gsm8k_answers(text: str, answer: str, judged: tuple[bool, bool]) -> None:
    assert judge(text, answer, GSM8K) == judged


@pytest.mark.parametrize(
    ("text", "fail", "first", "last"),
    [
        ("Answer: The answer is B.", RIGHT, RIGHT, RIGHT),
        ("Reasons first. The answer is B.\n", RIGHT, RIGHT, RIGHT),
        ("The answer is C.", WRONG, WRONG, WRONG),
        ("The answer is B. So the answer is B.", RIGHT, RIGHT, RIGHT),  # a small letter is no match
        ("The answer is B. The answer is B.", UNPARSED, RIGHT, RIGHT),
        ("The answer is B. No: The answer is C.", UNPARSED, RIGHT, WRONG),
        ("The answer is C. The answer is A. The answer is B.", UNPARSED, WRONG, RIGHT),
        ("The answer is B, for sure", RIGHT, RIGHT, RIGHT),  # the full stop is any character
        ("The answer is Boston.", RIGHT, RIGHT, RIGHT),
        ("The answer is B", UNPARSED, UNPARSED, UNPARSED),
        ("The answer is B\n", UNPARSED, UNPARSED, UNPARSED),  # but no line break
        ("The answer is (B).", UNPARSED, UNPARSED, UNPARSED),
        ("B", UNPARSED, UNPARSED, UNPARSED),
        ("", UNPARSED, UNPARSED, UNPARSED),
    ],
)
def test_written_scienceqa_answers(
    text: str, fail: tuple[bool, bool], first: tuple[bool, bool], last: tuple[bool, bool]
) -> None:
    assert judge(text, "B", WRITTEN, "fail") == fail
    assert judge(text, "B", WRITTEN, "first") == first
    assert judge(text, "B", WRITTEN, "last") == last
    assert fail == (judge(text, "B", WRITTEN) if len(re.findall(WRITTEN, text)) == 1 else UNPARSED)  # as MoLA counts


@pytest.mark.parametrize(
    ("text", "answer", "judged"),
    [
        (" Let's think. So the answer is (B).", "(B)", RIGHT),
        ("So the answer is (B).\n\nQ: More?\nA: So the answer is (A).", "(B)", RIGHT),
        ("the answer is: Yes", "yes", RIGHT),
        ("So the answer is } ] >.", "} ] >", RIGHT),
        ("So the answer is 01/03/1963.\nQ: x", "01/03/1963", RIGHT),
        ("So the answer is -219.", "-219", RIGHT),
        ("So the answer is not valid.", "valid", WRONG),
        ("So the answer is (B)", "(A)", WRONG),
        ("I do not know.", "(A)", UNPARSED),
    ],
)
def test_bbh_answers(text: str, answer: str, judged: tuple[bool, bool]) -> None:
    assert judge(text, answer, BBH) == judged


def test_any_of_several_answers_is_right_and_a_text_without_pattern_is_taken_whole() -> None:
    assert exact_match(" Paris.\n", ["London", "paris"]) == RIGHT
    assert exact_match("It is Paris", ["Paris"]) == WRONG
    assert exact_match(" \n", ["Paris"]) == UNPARSED


def test_a_pattern_without_a_group_takes_its_whole_match_and_an_unused_group_takes_nothing() -> None:
    assert judge("a 12 b 34", "12", r"\d+") == RIGHT
    assert judge("x", "x", r"x|(y)") == UNPARSED


def test_words_that_look_like_numbers_are_not() -> None:
    assert exact_match("nan", ["nan"]) == RIGHT
    assert exact_match("1,", ["1"]) == WRONG
    assert exact_match("3.14", ["314"]) == WRONG
    assert exact_match("1" * 1_000_000 + "x", ["1"]) == WRONG, "in no time"


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("Paris", ["paris!"], 1.0),
        ("the city of Paris", ["Paris"], 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("Paris Paris", ["Paris"], 2 * 0.5 * 1 / 1.5),  # a word counts as often as both have it
        ("London", ["Paris"], 0.0),
        ("London", ["Paris", "Greater London"], 2 * 1 * 0.5 / 1.5),
        (" Paris\nQuestion: What else?", ["Paris"], 1.0),
        ("roses\nviolets\nmore", ["roses\nviolets"], 1.0),
        ("", ["Paris"], 0.0),
        ("...", ["the"], 1.0),
        ("1990-91", ["199091"], 1.0),  # as SQuAD's own script has it
        ("«Париж»؟", ["париж"], 1.0),
        ("낮\u1112\u1161\u11ab", ["낮한"], 1.0),  # decomposed and composed Hangul
        ("ঢাকা।", ["ঢাকা"], 1.0),
        ("anything", [], 0.0),
    ],
)
def test_token_f1(text: str, answers: list[str], score: float) -> None:
    assert token_f1(text, answers) == pytest.approx(score)


def test_every_subtask_counts_alike() -> None:
    assert subtask_mean([[1, 1, 1, 1], [0]]) == 0.5


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval([values.tolist()], samples=4000, seed=0)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_interval_of_a_task_keeps_its_subtasks_apart() -> None:
    """Two constant subtasks do not vary, however far apart they are."""
    assert bootstrap_interval([[0.0] * 5, [1.0] * 50], samples=100, seed=0) == (0.5, 0.5)
    groups = [[0.0, 1.0] * 50, [0.0, 1.0] * 200]
    spread = math.sqrt((0.25 / 100 + 0.25 / 400) / 4)
    low, high = bootstrap_interval(groups, samples=4000, seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.05)


def test_an_interval_depends_on_its_seed_alone() -> None:
    values = [[float(value) for value in range(30)]]
    first = bootstrap_interval(values, samples=500, seed=3)
    assert first == bootstrap_interval(values, samples=500, seed=3) != bootstrap_interval(values, samples=500, seed=4)
