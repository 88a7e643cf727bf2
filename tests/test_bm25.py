"""BM25 against the formula that the documentation states, word by word."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from gradstore.types import Aggregate
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore import bm25
from datastore.bm25 import K1, B, TextTarget, score
from datastore.errors import Conflict
from datastore.influence import NO_SUBTASK
from datastore.words import words
from tests import bruteforce

AGGREGATES: list[Aggregate] = ["less", "avg", "max", "min"]
TEXTS = st.lists(st.text("abcde  ", max_size=12), min_size=1, max_size=30)


def formula(pool: Sequence[str], query: str) -> list[float]:
    """The score of each text for a query."""
    rows = [words(text) for text in pool]
    mean = sum(map(len, rows)) / len(rows)
    scores = []
    for row in rows:
        counts, total = Counter(row), 0.0
        for word in words(query):
            containing = sum(word in other for other in rows)
            idf = math.log(1 + (len(rows) - containing + 0.5) / (containing + 0.5))
            if counts[word]:
                total += idf * counts[word] / (counts[word] + K1 * (1 - B + B * len(row) / mean))
        scores.append(total)
    return scores


def target(texts: Sequence[str], subtasks: Sequence[int] | None = None) -> TextTarget:
    return TextTarget(texts, [0] * len(texts) if subtasks is None else subtasks)


@pytest.mark.parametrize("how", AGGREGATES)
@settings(max_examples=30, deadline=None)
@given(pool=TEXTS, queries=TEXTS, other=TEXTS)
def test_scores_are_those_of_the_formula(how: Aggregate, pool: list[str], queries: list[str], other: list[str]) -> None:
    """Of two tasks at once, which share a pass and no score."""
    tasks = [
        target([*texts, "b b c"], [number % 3 for number in range(len(texts) + 1)])
        for texts in (queries, [*other, "a"])
    ]
    found = score(pool, tasks, how)
    for task, given_scores in zip(tasks, found, strict=True):
        usable = [number for number, text in enumerate(task.texts) if words(text)]
        table = np.array([formula(pool, task.texts[number]) for number in usable]).T
        subtasks = [str(task.subtasks[number]) for number in usable]
        valid = np.array([bool(words(text)) for text in pool])
        np.testing.assert_array_equal(given_scores.valid, valid)
        wanted = np.where(valid, bruteforce.aggregated(table, subtasks, how), 0)
        np.testing.assert_allclose(given_scores.score, wanted, rtol=1e-5, atol=1e-6)
        assert (given_scores.subtask[~valid] == NO_SUBTASK).all()


def test_the_subtask_that_gave_the_score_is_told() -> None:
    (found,) = score(["red apple", "blue sky", "red sky", ""], [target(["apple", "sky"], [4, 7])], "max")
    assert found.subtask.tolist() == [4, 7, 7, NO_SUBTASK]
    (mean,) = score(["red apple", "blue sky"], [target(["apple", "sky"], [4, 7])], "avg")
    assert mean.subtask.tolist() == [NO_SUBTASK, NO_SUBTASK]


@pytest.mark.parametrize("how", AGGREGATES)
def test_queries_in_batches_and_rows_in_blocks_give_the_same_scores(
    how: Aggregate, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    pool, queries = ([" ".join(random.choice(list("abcdefghij"), 6)) for _ in range(rows)] for rows in (50, 20))
    asked = target(queries, [number // 4 for number in range(20)])
    (whole,) = score(pool, [asked], how)
    monkeypatch.setattr(bm25, "QUERY_BYTES", 3 * 4 * 10)  # three queries
    monkeypatch.setattr(bm25, "BLOCK_ROWS", 7)
    (parts,) = score(pool, [asked], how)
    np.testing.assert_array_equal(whole.subtask, parts.subtask)
    np.testing.assert_allclose(whole.score, parts.score, rtol=1e-6)


def test_progress_goes_from_nothing_to_twice_the_rows_and_never_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "BLOCK_ROWS", 10)
    seen: list[int] = []
    score(["a b"] * 45, [target(["a"]), target(["b", "c"])], "max", on_rows=seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 90)
    assert len(set(seen)) > 8


class Stopped(Exception):
    """The work is not wanted any more."""


@pytest.mark.parametrize("at", [0, 20, 45, 60])
def test_whoever_hears_of_the_progress_can_end_the_work(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "BLOCK_ROWS", 10)

    def stop(done: int) -> None:
        if done >= at:
            raise Stopped

    with pytest.raises(Stopped):
        score(["a b"] * 45, [target(["a"])], "max", on_rows=stop)


def test_a_task_without_words_is_refused_and_a_pool_without_the_words_has_scores_of_zero() -> None:
    with pytest.raises(Conflict, match="none of the task's 2 validation rows has a word"):
        score(["a"], [target(["", "?!"])], "less")
    for pool in (["x y", "z"], ["", "..."]):
        (found,) = score(pool, [target(["a b", ""])], "max")
        assert not found.score.any()
        assert found.valid.tolist() == [bool(words(text)) for text in pool]


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The CAT_1 sat, it's 3.5!", ["the", "cat", "1", "sat", "it", "s", "3", "5"]),
        ("It's “_Café_”, ＡＢＣ №5\u00a0a_b", ["it", "s", "café", "abc", "no5", "a", "b"]),
        ("東京は12時", ["東", "京", "は", "12", "時"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("ｆｕｌｌ ①", ["full", "1"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("_हिन्दी_में__", ["हिन्दी", "में"]),
        ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
        ("తెలుగు భాష", ["తెలుగు", "భాష"]),
        ("اللُّغَة العربية", ["اللُّغَة", "العربية"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("日本のラーメン。", ["日", "本", "の", "ラ", "ー", "メ", "ン"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("naïve 你好 world", ["naïve", "你", "好", "world"]),
        ("\ud800 é 🎉", ["é"]),
        ("", []),
    ],
)
def test_words_of_any_script(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


@given(st.text())
def test_any_text_has_words_without_spaces_and_its_case_does_not_matter(text: str) -> None:
    found = words(text)
    assert all(word and not any(mark.isspace() or mark == "_" for mark in word) for word in found)
    assert found == words(text.replace("_", " "))
    if text.isascii():
        assert found == words(text.upper()) == words(text + " é")[:-1]
