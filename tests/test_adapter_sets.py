"""Choosing adapters: ROCKET's algorithm 1 on the vectors worked out by hand, and against plain enumeration."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from datastore.adapter_sets import RankedAdapter, ScoredAdapter, ranked, sets
from datastore.adapter_similarity import Doubles, Factors, similarities

BANK = [
    ScoredAdapter(name, perplexity, accuracy)
    for name, perplexity, accuracy in (
        ("A", 2.0, 0.60), ("B", 2.5, 0.70), ("C", 3.0, 0.72), ("D", 2.2, 0.50), ("E", 6.0, 0.10),
    )
]  # fmt: skip
PAIRS = {"AB": 0.30, "AC": 0.05, "AD": 0.60, "BC": 0.20, "BD": 0.10, "CD": 0.02}


def matrix(candidates: list[RankedAdapter], pairs: dict[str, float]) -> Doubles:
    names = [one.name for one in candidates]
    return np.array(
        [[1.0 if one == other else pairs["".join(sorted(one + other))] for other in names] for one in names]
    )


def named(group: tuple[RankedAdapter, ...]) -> str:
    return "".join(sorted(member.name for member in group))


# The example worked out by hand ---------------------------------------------------------------------------------------


def test_the_worked_example_has_its_ranks_its_totals_and_its_choice() -> None:
    bank = ranked(BANK)
    assert {one.name: one.perplexity_rank for one in bank} == {"A": 1, "B": 3, "C": 4, "D": 2, "E": 5}
    assert {one.name: one.accuracy_rank for one in bank} == {"A": 3, "B": 2, "C": 1, "D": 4, "E": 5}
    candidates = bank[:4]
    assert {one.name for one in candidates} == set("ABCD")
    found = sets(candidates, matrix(candidates, PAIRS), size=2)
    diversity = {named(one.members): one.diversity_rank for one in found}
    assert diversity == {"CD": 1, "AC": 2, "BD": 3, "BC": 4, "AB": 5, "AD": 6}
    assert {named(one.members): one.total for one in found} == {
        "AB": 14, "AC": 11, "AD": 16, "BC": 14, "BD": 14, "CD": 12,
    }  # fmt: skip
    assert named(found[0].members) == "AC"
    assert found[0].omega == pytest.approx(20)


# Plain enumeration ----------------------------------------------------------------------------------------------------

scores = st.lists(
    st.tuples(st.sampled_from([1.5, 2.0, 2.5, 3.0, 9.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    min_size=2,
    max_size=7,
)


def bank_of(found: list[tuple[float, float]]) -> list[ScoredAdapter]:
    return [ScoredAdapter(f"a{number}", *one) for number, one in enumerate(found)]


@given(scores)
def test_ranks_are_ordinal_with_ties_by_perplexity_and_name(found: list[tuple[float, float]]) -> None:
    bank = bank_of(found)
    perplexity, accuracy = np.array(found).T
    # an ordinal rank by scipy, after breaking ties by hand: names are in the order of the list
    by_perplexity = rankdata(perplexity, method="ordinal")
    by_accuracy = rankdata(-accuracy * 100 + by_perplexity / 100, method="ordinal")
    known = {one.name: one for one in ranked(bank)}
    assert [known[one.name].perplexity_rank for one in bank] == by_perplexity.tolist()
    assert [known[one.name].accuracy_rank for one in bank] == by_accuracy.tolist()
    quality = [one.quality for one in ranked(bank)]
    assert quality == sorted(quality)


@given(scores, st.integers(1, 4), st.integers(0, 10_000))
def test_the_chosen_set_has_the_smallest_total_of_all(found: list[tuple[float, float]], size: int, seed: int) -> None:
    candidates = ranked(bank_of(found))
    size = min(size, len(candidates))
    similarity = np.random.default_rng(seed).integers(-3, 4, (len(candidates), len(candidates))) / 4
    similarity = np.triu(similarity, 1) + np.triu(similarity, 1).T
    answer = sets(candidates, similarity, size=size)

    expected: dict[tuple[str, ...], float] = {}
    means = {}
    for group in combinations(range(len(candidates)), size):
        pairs = [similarity[i, j] for i in group for j in group if i < j]
        means[tuple(sorted(candidates[i].name for i in group))] = fmean(pairs) if pairs else 0.0
        expected[tuple(sorted(candidates[i].name for i in group))] = sum(candidates[i].quality for i in group)
    assert {tuple(sorted(one.name for one in each.members)) for each in answer} == set(expected)
    assert sorted(each.diversity_rank for each in answer) == list(range(1, len(expected) + 1))
    for each in answer:
        names = tuple(sorted(one.name for one in each.members))
        assert each.similarity == pytest.approx(means[names])
        assert each.total == expected[names] + each.diversity_rank
        assert each.total >= answer[0].total
        more_diverse = sum(mean < means[names] for mean in means.values())
        assert more_diverse < each.diversity_rank <= sum(mean <= means[names] for mean in means.values())


@given(scores, st.integers(0, 10_000))
def test_the_order_of_the_bank_changes_nothing(found: list[tuple[float, float]], seed: int) -> None:
    bank = bank_of(found)
    shuffled = [bank[number] for number in np.random.default_rng(seed).permutation(len(bank))]
    assert ranked(bank) == ranked(shuffled)


def test_opposed_adapters_are_more_diverse_than_unrelated_ones() -> None:
    candidates = ranked(BANK[:3])
    found = sets(candidates, matrix(candidates, {"AB": 0.1, "AC": -0.2, "BC": 0.0}), size=2)
    diversity = {named(one.members): (one.diversity_rank, one.omega) for one in found}
    assert diversity == {"AC": (1, None), "BC": (2, None), "AB": (3, pytest.approx(10))}


def test_a_perplexity_beyond_all_numbers_is_the_last() -> None:
    odd = [ScoredAdapter("A", float("nan"), 0.5), ScoredAdapter("B", 2.0, 0.5), ScoredAdapter("C", float("inf"), 0.5)]
    assert {one.name: one.perplexity_rank for one in ranked(odd)} == {"B": 1, "A": 2, "C": 3}


# Similarity -----------------------------------------------------------------------------------------------------------


def adapters(seed: int, ranks: tuple[int, ...], *, modules: int = 3) -> list[list[Factors]]:
    """Factors by matrix and adapter; matrices differ in their shapes."""
    generator = np.random.default_rng(seed)
    return [
        [(generator.normal(size=(r, 5 + at)), generator.normal(size=(4 + 2 * at, r))) for r in ranks]
        for at in range(modules)
    ]


@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_cosines_of_updates_are_those_of_the_full_products(seed: int, ranks: list[int]) -> None:
    modules = adapters(seed, tuple(ranks))
    expected = np.zeros((len(ranks), len(ranks)))
    for module in modules:
        updates = np.stack([(b @ a).ravel() for a, b in module])
        updates /= np.linalg.norm(updates, axis=1, keepdims=True)
        expected += updates @ updates.T / len(modules)
    np.testing.assert_allclose(similarities(modules, by="cosine_delta"), expected, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4))
def test_cosines_of_factors_are_a_mean_over_all_tensors(seed: int, rank: int, count: int) -> None:
    modules = adapters(seed, (rank,) * count)
    for one in range(count):
        for other in range(count):
            tensors = [
                (module[one][kind].ravel(), module[other][kind].ravel()) for module in modules for kind in (0, 1)
            ]
            cosines = [left @ right / np.sqrt(left @ left) / np.sqrt(right @ right) for left, right in tensors]
            found = similarities(modules, by="cosine_ab")[one, other]
            assert found == pytest.approx(fmean(cosines), abs=1e-12)


def test_only_the_cosine_of_updates_does_not_depend_on_the_basis() -> None:
    modules = adapters(0, (4, 4))
    turn = np.random.default_rng(1).normal(size=(4, 4))
    turned = [[(turn @ a, b @ np.linalg.inv(turn)), other] for (a, b), other in modules]
    deltas = [similarities(each, by="cosine_delta") for each in (modules, turned)]
    factors = [similarities(each, by="cosine_ab") for each in (modules, turned)]
    np.testing.assert_allclose(deltas[0], deltas[1], atol=1e-9)
    assert abs(factors[0] - factors[1]).max() > 1e-3


def test_an_adapter_that_has_learnt_nothing_is_like_none() -> None:
    (first, other), *_ = adapters(0, (2, 2), modules=1)
    fresh = (first[0], np.zeros_like(first[1]))
    assert similarities([[fresh, other]], by="cosine_delta").tolist() == [[0, 0], [0, pytest.approx(1)]]
