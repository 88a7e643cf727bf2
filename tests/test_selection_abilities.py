"""Scores and turns in an ability space, against loops; and how well labels are told, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from datastore.influence import NO_SUBTASK, Floats
from datastore.multilabel import label_scores, sample_scores
from datastore.selection import abilities
from datastore.selection.abilities import Places, by_reference, closest, turns


def places_of(rows: int, *, seed: int, dim: int = 6, capabilities: int = 4) -> Places:
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((rows, dim)).astype(np.float32)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    probabilities = rng.random((rows, capabilities), np.float32)
    similarities = rng.standard_normal((rows, capabilities)).astype(np.float32)
    present = rng.random(rows) < 0.8
    return Places(u, probabilities, similarities, present)


def cosine(a: Floats, b: Floats) -> float:
    return float(a.astype(float) @ b.astype(float) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("neighbours", [1, 3, 50])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_nearest_is_the_mean_of_the_largest_cosines(
    neighbours: int, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abilities, "BLOCK", 7)
    pool, references = places_of(30, seed=1), places_of(9, seed=2)
    subtasks = np.arange(9, dtype=np.int16) % 3
    found = abilities.nearest(pool, references, subtasks, neighbours=neighbours, beta=beta)
    wanted = references.probabilities.mean(axis=0)
    for row in range(30):
        if not pool.present[row]:
            assert (found.score[row], found.subtask[row], found.valid[row]) == (0, NO_SUBTASK, False)
            continue
        cosines = [cosine(pool.embedding[row], each) for each in references.embedding]
        expected = np.mean(sorted(cosines)[-min(neighbours, 9) :]) + beta * cosine(pool.probabilities[row], wanted)
        assert found.score[row] == pytest.approx(expected, abs=1e-6)
        assert found.subtask[row] == subtasks[int(np.argmax(cosines))]
    assert closest(pool.embedding, references.embedding)[3] == pytest.approx(
        max(cosine(pool.embedding[3], each) for each in references.embedding), abs=1e-6
    )


def test_prototype_is_the_cosine_with_the_mean_and_capability_the_mean_of_base_vectors() -> None:
    pool, references = places_of(30, seed=1), places_of(9, seed=2)
    centre, wanted = references.embedding.mean(axis=0), references.probabilities.mean(axis=0)
    by_mean = abilities.prototype(pool, references, beta=0.5)
    by_base = abilities.capability(pool, [0, 3])
    for row in np.flatnonzero(pool.present):
        expected = cosine(pool.embedding[row], centre) + 0.5 * cosine(pool.probabilities[row], wanted)
        assert by_mean.score[row] == pytest.approx(expected, abs=1e-6)
        assert by_base.score[row] == pytest.approx((pool.similarities[row, 0] + pool.similarities[row, 3]) / 2)
    assert (by_base.valid == pool.present).all()
    assert (by_mean.subtask == NO_SUBTASK).all()


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, 60), st.sampled_from([1, 2, 256]))
@settings(max_examples=60, deadline=None)
def test_references_take_their_nearest_rows_in_turns(seed: int, references: int, refused: int, first: int) -> None:
    """Against a loop that looks at every row in every turn."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(-2, 3, (40, 3)).astype(np.float32)  # small whole numbers: exact products, and many ties
    wanted = rng.integers(-2, 3, (references, 3)).astype(np.float32)
    among = rng.random(40) < 0.9
    unwanted = set(rng.integers(0, 40, refused).tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abilities, "FIRST_ROWS", first)
        walk, found = by_reference(pool, wanted, among), []
        pick = next(walk, None)
        while pick is not None:
            taken = pick[0] not in unwanted
            if taken:
                found.append(pick)
            try:
                pick = walk.send(taken)
            except StopIteration:
                break
    left = set(np.flatnonzero(among).tolist())
    expected: list[tuple[int, int]] = []
    turn = 0
    while left:
        row = max(left, key=lambda each: (float(pool[each] @ wanted[turn]), -each))
        left.remove(row)
        if row not in unwanted:
            expected.append((row, turn))
            turn = (turn + 1) % references
    assert found == expected


def test_every_reference_gets_its_share() -> None:
    pool, references = places_of(500, seed=3), places_of(7, seed=4)
    walk = by_reference(pool.embedding, references.embedding, pool.present)
    picks = [next(walk), *(walk.send(True) for _ in range(99))]
    counts = np.bincount([reference for _, reference in picks], minlength=7)
    assert counts.tolist() == [15, 15, 14, 14, 14, 14, 14]
    assert len({row for row, _ in picks}) == 100


def test_no_subtask_is_served_twice_before_all_are_served() -> None:
    order = turns([0] * 10 + [1] + [2] * 4)
    assert sorted(order) == list(range(15))
    assert order[:5] == [0, 10, 11, 1, 12]


def test_labels_are_told_as_scikit_learn_counts_them() -> None:
    rng = np.random.default_rng(5)
    true, predicted = rng.random((60, 5)) < 0.4, rng.random((60, 5)) < 0.4
    true[:, 4] = False
    found = sample_scores(predicted, true)
    expected = metrics.precision_recall_fscore_support(true, predicted, average="samples", zero_division=0)
    np.testing.assert_allclose([found.precision, found.recall, found.f1], expected[:3], atol=1e-7)
    assert found.exact_match == pytest.approx(metrics.accuracy_score(true, predicted))
    by_label = label_scores(predicted, true, true[:10], names=list("abcde"))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(true, predicted, zero_division=0)
    assert [each.rows for each in by_label] == support.tolist()
    assert [each.name for each in by_label] == list("abcde")
    np.testing.assert_allclose([each.precision for each in by_label], precision)
    np.testing.assert_allclose([each.recall for each in by_label[:4]], recall[:4])
    np.testing.assert_allclose([each.f1 for each in by_label[:4]], f1[:4])
    assert by_label[4].recall is by_label[4].f1 is None
    assert [each.training_rows for each in by_label] == true[:10].sum(axis=0).tolist()
