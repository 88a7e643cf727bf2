"""Near-duplicates: the rows that are kept are those of the definition, every pair compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.errors import InvalidInput
from datastore.influence import Floats, normalise
from datastore.selection import duplicates
from datastore.selection.duplicates import FeatureDuplicates, TextDuplicates, jaccard, shingles

TAUS = [0.3, 0.6, 0.8, 0.9, 0.95, 0.99]


def planted(rows: int, dim: int, seed: int) -> Floats:
    """Unit rows, many of them near another one: by 0.999 to 0.7."""
    generator = np.random.default_rng(seed)
    found = normalise(generator.normal(size=(rows, dim)))
    for row in range(rows // 3, rows):
        noise = normalise(generator.normal(size=(1, dim)))[0]
        found[row] = found[generator.integers(0, row)] + generator.choice([0.03, 0.3, 0.5, 1.0]) * noise
    return normalise(found)


def kept_by_definition(features: Floats, order: Sequence[int], tau: float) -> list[int]:
    kept: list[int] = []
    for row in order:
        if not kept or (features[kept] @ features[row]).max() <= tau:
            kept.append(row)
    return kept


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("whole", [True, False])
def test_by_features_what_is_kept_is_what_every_pair_says(
    monkeypatch: pytest.MonkeyPatch, tau: float, block: int, *, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(duplicates, "KEPT_BYTES", 1)
    features = planted(150, 64, seed=block)
    monkeypatch.setattr(duplicates, "BLOCK_BYTES", 4 * 64 * block)
    order = np.random.default_rng(5).permutation(150).tolist()
    found = FeatureDuplicates(lambda rows: features[list(rows)], tau, iter(order), rows=150)
    kept = [row for row in order if found.keep(row)]
    assert kept == kept_by_definition(features, order, tau)
    assert len(kept) < 150


def test_rows_that_come_in_another_order_than_foreseen_are_compared_as_well() -> None:
    features = planted(120, 32, seed=1)
    order = np.random.default_rng(6).permutation(120).tolist()
    found = FeatureDuplicates(lambda rows: features[list(rows)], 0.9, iter(sorted(order)), rows=120)
    assert [row for row in order if found.keep(row)] == kept_by_definition(features, order, 0.9)


def test_a_block_of_short_rows_is_no_larger_than_its_products_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 10)
    features = normalise(np.random.default_rng(2).normal(size=(60, 64)))
    asked: list[int] = []

    def reading(rows: Sequence[int]) -> Floats:
        asked.append(len(rows))
        return features[list(rows)]

    found = FeatureDuplicates(reading, 0.95, iter(range(60)), rows=60)
    assert all(found.keep(row) for row in range(60))
    assert asked == [1, *[10] * 6]


def test_a_walk_that_meets_few_of_the_rows_ahead_reads_few_that_it_does_not_meet() -> None:
    features = normalise(np.random.default_rng(4).normal(size=(5000, 16)))
    read: list[int] = []

    def reading(rows: Sequence[int]) -> Floats:
        read.extend(rows)
        return features[list(rows)]

    found = FeatureDuplicates(reading, 0.999, iter(range(5000)), rows=100)
    assert all(found.keep(row) for row in range(0, 5000, 50))
    assert len(read) < duplicates.BLOCK_ROWS * 2 + 4 * 100


def test_near_one_few_rows_are_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "KEPT_BYTES", 1)
    generator = np.random.default_rng(3)
    features = normalise(generator.normal(size=(600, 256)))
    read: list[int] = []

    def reading(rows: Sequence[int]) -> Floats:
        read.extend(rows)
        return features[list(rows)]

    found = FeatureDuplicates(reading, 0.95, iter(range(600)), rows=600)
    assert all(found.keep(row) for row in range(600))
    assert len(read) < 620


@pytest.mark.parametrize(("bound", "value"), [("MOST_BYTES", 4 * 256 * 99), ("MOST_PRODUCTS", 256 * 99.5**2 / 2)])
def test_more_rows_than_can_be_compared_are_refused_before_they_are_read(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: float
) -> None:
    monkeypatch.setattr(duplicates, bound, value)
    features = normalise(np.random.default_rng(3).normal(size=(600, 256)))
    read: list[int] = []

    def reading(rows: Sequence[int]) -> Floats:
        read.extend(rows)
        return features[list(rows)]

    with pytest.raises(InvalidInput, match=r"at most 99 rows .* 100 are asked for: .* dedupe_by=text"):
        FeatureDuplicates(reading, 0.3, iter(range(600)), rows=100).keep(0)
    assert read == [0]
    assert FeatureDuplicates(reading, 0.3, iter(range(600)), rows=99).keep(0)
    monkeypatch.setattr(duplicates, "KEPT_BYTES", 1)  # an eighth of the numbers is kept
    assert FeatureDuplicates(reading, 0.95, iter(range(600)), rows=100).keep(0)


def test_a_walk_that_passes_over_rows_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 50)
    monkeypatch.setattr(duplicates, "MOST_PRODUCTS", 16 * 5 * 1000)
    families = normalise(np.random.default_rng(3).normal(size=(5, 16)))
    features = families[np.arange(3000) % 5]
    found = FeatureDuplicates(lambda rows: features[list(rows)], 0.99, iter(range(3000)), rows=20)
    with pytest.raises(InvalidInput, match=r"of 1,0\d\d rows met 5 could be taken, and 20 are wanted: ask for fewer"):
        list(map(found.keep, range(3000)))


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=14).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=14), st.sampled_from([0.2, 0.5, 0.75, 0.9, 1.0]), st.integers(0, 14))
@settings(deadline=None)
def test_by_text_what_is_kept_is_what_every_pair_says(texts: list[str], tau: float, sample: int) -> None:
    found = TextDuplicates(lambda row: texts[row], tau, first=range(min(sample, len(texts))))
    runs = [
        {tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))} for words in map(str.split, texts)
    ]
    runs = [{run for run in mine if run} for mine in runs]
    kept: list[int] = []
    for row, mine in enumerate(runs):
        near = [len(mine & runs[other]) / len(mine | runs[other]) if mine | runs[other] else 1.0 for other in kept]
        if not near or max(near) < tau:
            kept.append(row)
    assert [row for row in range(len(texts)) if found.keep(row)] == kept


def test_rows_that_share_a_long_prompt_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counted(one: np.ndarray, other: np.ndarray) -> float:
        nonlocal compared
        compared += 1
        return jaccard(one, other)

    monkeypatch.setattr(duplicates, "jaccard", counted)
    prompt = " ".join(f"word{number}" for number in range(100))
    texts = [f"{prompt} " + " ".join(f"own{row}x{number}" for number in range(60)) for row in range(100)]
    found = TextDuplicates(lambda row: texts[row], 0.75, first=range(64))
    assert all(found.keep(row) for row in range(100))
    assert compared == 0


def test_case_and_punctuation_do_not_part_two_texts() -> None:
    one, other = shingles("What is the capital of France?"), shingles("what is THE capital, of France")
    assert jaccard(one, other) == 1
    assert jaccard(one, shingles("What is the capital of Spain?")) == pytest.approx(1 / 3)
