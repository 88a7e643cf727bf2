"""The index: how much of the truth it finds, what it says of that, how it grows, and when it is gone."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore import attributions, index, search
from datastore.gradients import FeatureStore
from datastore.index import RECALL_AT, Indexes, Truth, drawn_rows
from datastore.search import Pool, exact
from datastore.segments import FeatureView
from tests.stores import Store, numbers, request
from tests.test_attributions import answer, asked, question, true_scores
from tests.test_search import pool_of, unit, view

DIM = 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a test: fewer directions than the rows have numbers, and few candidates."""
    monkeypatch.setattr(index, "REDUCED", 16)
    monkeypatch.setattr(index, "CANDIDATES", (120, 200, 400))
    monkeypatch.setattr(attributions, "INDEX_ROWS", 60)


def clustered(rows: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Rows around 40 centres of falling weight in a space of few directions, with noise; every 50th is zero."""
    rng = np.random.default_rng([seed, 1])
    shared = np.random.default_rng(9)
    directions = shared.standard_normal((24, DIM)) * np.linspace(2, 0.2, 24)[:, None]
    centres = shared.standard_normal((40, 24))
    features = (centres[rng.integers(40, size=rows)] + 0.5 * rng.standard_normal((rows, 24))) @ directions
    features += 0.1 * rng.standard_normal((rows, DIM))
    features[49::50] = 0
    return features.astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    made = FeatureStore(tmp_path / "features")
    made.root.mkdir()
    return made


def questions(count: int = 20, *, seed: int = 5, checkpoints: int = 1) -> NDArray[np.float64]:
    rows = [clustered(2 * count, seed=seed + number)[:count] for number in range(checkpoints)]
    return unit(np.stack(rows, axis=1))


def recall(found: list[Any], true: list[Any]) -> float:
    """Share of the true rows at both ends that are found."""
    pairs = [(getattr(a, end), getattr(b, end)) for a, b in zip(found, true, strict=True) for end in ("most", "least")]
    return float(np.mean([np.isin(b.rows, a.rows).mean() for a, b in pairs]))


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_it_finds_what_it_says_it_finds(store: FeatureStore, tmp_path: Path, checkpoints: int) -> None:
    views = [view(store, clustered(3000, seed=number)) for number in range(checkpoints)]
    pool = pool_of(views, [0.7, 0.3][:checkpoints] if checkpoints > 1 else [1.0])
    built = Indexes(tmp_path / "indexes").build(pool, questions(8, seed=50, checkpoints=checkpoints))
    others = questions(checkpoints=checkpoints)
    found, true = built.search(pool, others, 100), exact(pool, others, 100)
    assert built.measured.recall >= 0.95
    assert recall(found, true) >= built.measured.recall - 0.05
    assert len(built.candidates(built.reduce(pool, others)[0], pool, 120)) <= 240
    for one, other in zip(found, true, strict=True):  # scores of what is found are exact
        shared, mine, its = np.intersect1d(one.most.rows, other.most.rows, return_indices=True)
        assert len(shared) > 50
        np.testing.assert_array_equal(one.most.scores[mine], other.most.scores[its])
        assert (np.diff(one.most.scores) <= 0).all()
        assert (np.diff(one.least.scores) >= 0).all()
    assert np.array_equal(built.valid, pool.wanted)


def test_an_index_that_finds_too_little_takes_more_candidates_and_says_so(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "REDUCED", 2)
    noise = np.random.default_rng(0).standard_normal((3000, DIM)).astype(np.float32)
    pool = pool_of([view(store, noise)], [1.0])
    built = Indexes(tmp_path / "indexes").build(pool, np.zeros((0, 1, DIM)))
    assert built.measured.candidates == 400
    assert built.measured.recall < 0.9
    probes = unit(np.random.default_rng(1).standard_normal((40, 1, DIM)))
    reduced = built.reduce(pool, probes)
    rows = [np.isin(true.most.rows, built.candidates(row, pool, 400)).mean()
            for row, true in zip(reduced, exact(pool, probes, 100), strict=True)]  # fmt: skip
    assert np.mean(rows) == pytest.approx(built.measured.recall, abs=0.1)


def test_only_rows_that_are_wanted_are_candidates(store: FeatureStore, tmp_path: Path) -> None:
    each = view(store, clustered(3000))
    pool = pool_of([each], [1.0])
    built = Indexes(tmp_path / "indexes").build(pool, questions(4, seed=50))
    half = Pool([each], [1.0], pool.wanted & (np.arange(3000) % 2 == 0))
    candidates = built.candidates(built.reduce(half, questions(1))[0], half, 150)
    assert len(candidates) > 150
    assert half.wanted[candidates].all()
    few = Pool([each], [1.0], pool.wanted & (np.arange(3000) < 30))
    (ends,) = built.search(few, questions(1), 5)
    assert ends.most.rows.tolist() == exact(few, questions(1), 5)[0].most.rows.tolist()


def grown(store: FeatureStore, before: FeatureView, rows: NDArray[np.float32]) -> FeatureView:
    return store.view([name for part in (before, view(store, rows)) for name, _ in part.names])


def test_a_grown_pool_takes_over_what_exists(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes = Indexes(tmp_path / "indexes")
    before = view(store, clustered(2000))
    first = indexes.build(pool_of([before], [1.0]), questions(4, seed=50))
    longer = grown(store, before, clustered(100, seed=3))
    read: list[tuple[int, int]] = []
    original = index.directions
    monkeypatch.setattr(index, "directions", lambda *args, **how: read.append(args[1:]) or original(*args, **how))
    pool = pool_of([longer], [1.0])
    second = indexes.build(pool, questions(4, seed=50))
    assert read == [(2000, 2100)]
    assert (second.id != first.id, second.measured) == (True, first.measured)
    names = sorted(path.name for path in (indexes.root / second.id).iterdir())
    assert names == ["empty.faiss", "manifest.json", "part-0.faiss", "part-1.faiss", "projection.npy", "valid.npy"]
    own, other = (indexes.root / each.id / "part-0.faiss" for each in (first, second))
    assert own.stat().st_ino == other.stat().st_ino
    assert recall(second.search(pool, questions(), 50), exact(pool, questions(), 50)) > 0.9
    twice = pool_of([grown(store, longer, clustered(2000, seed=4))], [1.0])
    read.clear()
    third = indexes.build(twice, questions(4, seed=50))
    assert read[0] == (0, 1024)  # measured again: it has doubled
    assert json.loads((indexes.root / third.id / "manifest.json").read_text())["measured_rows"] == 4100
    assert recall(third.search(twice, questions(), 50), exact(twice, questions(), 50)) > 0.9


def test_it_is_found_again_and_goes_with_its_features(store: FeatureStore, tmp_path: Path) -> None:
    indexes = Indexes(tmp_path / "indexes")
    pool = pool_of([view(store, clustered(500))], [1.0])
    assert indexes.get(pool.views, pool.weights) is None
    built = indexes.build(pool, questions(4))
    again = Indexes(tmp_path / "indexes").get(pool.views, pool.weights)
    assert again is not None
    assert (again.id, again.measured, again.bytes) == (built.id, built.measured, built.bytes)
    one, other = (each.search(pool, questions(1), 10)[0].most for each in (built, again))
    assert one.rows.tolist() == other.rows.tolist()
    assert indexes.build(pool, questions(4)).id == built.id  # another worker has built it, too
    assert indexes.delete("seg_unknown") == 0
    assert indexes.delete(pool.views[0].names[0][0]) == 1
    assert indexes.get(pool.views, pool.weights) is None
    assert not list((indexes.root / "unfinished").iterdir())


# Parts, and what is held while they are made -------------------------------------------------------------------------


def parts_of(root: Path, name: str) -> list[list[int]]:
    """Rows of each part, as the manifest has them; the files are as many."""
    ranges: list[list[int]] = json.loads((root / name / "manifest.json").read_text())["ranges"]
    assert len(list((root / name).glob("part-*.faiss"))) == len(ranges)
    return ranges


def test_what_is_found_does_not_depend_on_the_size_of_parts(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of([view(store, clustered(3000), cuts=[1300]), view(store, clustered(3000, seed=1))], [0.7, 0.3])
    asked = questions(8, checkpoints=2)
    found = []
    for number, rows in enumerate((10_000, 1024, 500)):
        monkeypatch.setattr(index, "PART_ROWS", rows)
        built = Indexes(tmp_path / str(number)).build(pool, questions(4, seed=50, checkpoints=2))
        candidates = [built.candidates(row, pool, 150).tolist() for row in built.reduce(pool, asked)]
        found.append((built.id, built.measured, candidates))
    assert found[1:] == found[:1] * 2
    assert parts_of(tmp_path / "0", found[0][0]) == [[0, 1300], [1300, 3000]]
    assert parts_of(tmp_path / "1", found[0][0]) == [[0, 1024], [1024, 1300], [1300, 2324], [2324, 3000]]
    assert all(stop - start <= 500 + 1023 for start, stop in parts_of(tmp_path / "2", found[0][0]))


def test_what_is_found_does_not_depend_on_the_size_of_blocks(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of([view(store, clustered(3000))], [1.0])
    found = []
    for number, rows in enumerate((1024, 300, 70)):
        monkeypatch.setattr(search, "BLOCK_BYTES", 4 * DIM * rows)
        built = Indexes(tmp_path / str(number)).build(pool, questions(4, seed=50))
        candidates = [set(built.candidates(row, pool, 150).tolist()) for row in built.reduce(pool, questions(8))]
        found.append((built.measured, candidates))
    for measured, candidates in found[1:]:  # a product of other blocks is rounded otherwise
        assert measured.candidates == found[0][0].candidates
        assert measured.recall == pytest.approx(found[0][0].recall, abs=0.002)
        assert all(len(one ^ other) <= 4 for one, other in zip(candidates, found[0][1], strict=True))


def test_an_index_with_one_part_for_each_segment_is_found_and_grows_by_smaller_ones(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes = Indexes(tmp_path / "indexes")
    before = view(store, clustered(2000))
    first = indexes.build(pool_of([before], [1.0]), questions(4, seed=50))
    assert parts_of(indexes.root, first.id) == [[0, 2000]]
    monkeypatch.setattr(index, "PART_ROWS", 1024)
    assert indexes.get([before], [1.0]) is not None
    longer = grown(store, before, clustered(1500, seed=3))
    second = indexes.build(pool_of([longer], [1.0]), questions(4, seed=50))
    assert parts_of(indexes.root, second.id) == [[0, 2000], [2000, 3024], [3024, 3500]]
    pool = pool_of([grown(store, longer, clustered(100, seed=4))], [1.0])
    third = indexes.build(pool, questions(4, seed=50))
    assert parts_of(indexes.root, third.id) == [[0, 2000], [2000, 3024], [3024, 3500], [3500, 3600]]
    for part in range(3):
        files = [indexes.root / each.id / f"part-{part}.faiss" for each in (second, third)]
        assert files[0].stat().st_ino == files[1].stat().st_ino
    assert recall(third.search(pool, questions(), 50), exact(pool, questions(), 50)) > 0.9
    assert indexes.delete(before.names[0][0]) == 3
    assert not list(indexes.root.glob("index_*"))


@given(
    rows=st.integers(1, 300),
    probes=st.integers(1, 4),
    cuts=st.sets(st.integers(1, 299), max_size=8),
    first=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_the_truth_is_that_of_all_scores_and_as_large_whatever_the_rows(
    rows: int, probes: int, cuts: set[int], first: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-20, 20, (probes, rows)).astype(np.float32)  # ties are common
    wanted = rng.random(rows) < 0.8
    places = np.where(rng.random(probes) < 0.7, rng.integers(rows, size=probes), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "RECALL_AT", first)
        truth = Truth(places)
        for start, stop in pairwise([0, *sorted(cut for cut in cuts if cut < rows), rows]):
            truth.add(start, scores[:, start:stop], wanted[start:stop])
    assert truth.rows.shape == (2, probes, first)
    assert {each.size for each in vars(truth).values()} == {probes, 2 * probes * first}
    for probe, itself in enumerate(places):
        others = np.flatnonzero(wanted & (np.arange(rows) != itself))
        for end, sign in enumerate((-1, 1)):
            expected = others[np.argsort(sign * scores[probe, others], kind="stable")][:first]
            found = truth.rows[end, probe]
            assert found[found >= 0].tolist() == expected.tolist()


def test_the_recall_is_that_of_a_pass_over_all_rows(store: FeatureStore, tmp_path: Path) -> None:
    pool = pool_of([view(store, clustered(3000))], [1.0])
    asked = questions(8, seed=50)
    built = Indexes(tmp_path / "indexes").build(pool, asked)
    rows = drawn_rows(pool.wanted, index.PROBES, np.random.default_rng(1))
    of_rows = [
        Pool(pool.views, [1.0], pool.wanted & (np.arange(3000) != row)) for row in rows
    ]  # a row's own product is no finding
    probes = [(unit(pool.views[0].take(rows[n : n + 1]))[:, None], own) for n, own in enumerate(of_rows)]
    shares: list[list[tuple[float, float]]] = [[], []]
    for group, cases in enumerate([[(asked[n : n + 1], pool) for n in range(8)], probes]):
        for probe, own in cases:
            candidates = built.candidates(built.reduce(pool, probe)[0], pool, built.measured.candidates + 1)
            (ends,) = exact(own, probe, RECALL_AT)
            most, least = (np.isin(end.rows, candidates).mean() for end in (ends.most, ends.least))
            shares[group].append((most, least))
    expected = min(np.mean(group, axis=0).min() for group in shares)
    assert built.measured.recall == pytest.approx(expected, abs=0.002)


@given(wanted=st.lists(st.booleans(), max_size=60), number=st.integers(0, 70), piece=st.integers(1, 70))
def test_rows_are_drawn_the_same_however_the_mask_is_read(wanted: list[bool], number: int, piece: int) -> None:
    mask = np.array(wanted, bool)
    valid = np.flatnonzero(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MASK_ROWS", piece)
        found = drawn_rows(mask, number, np.random.default_rng(3))
    expected = np.sort(np.random.default_rng(3).choice(valid, min(number, len(valid)), replace=False))
    assert found.tolist() == expected.tolist()


def test_a_build_holds_no_number_for_each_row(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "SAMPLE_ROWS", 200)
    monkeypatch.setattr(index, "MASK_ROWS", 1000)
    features = np.random.default_rng(0).standard_normal((40_000, 8)).astype(np.float32)
    peaks = []
    for rows in (2000, 2000, 40_000):  # the first one imports and compiles
        pool = pool_of([view(store, features[:rows])], [1.0])
        tracemalloc.start()
        try:
            Indexes(tmp_path / "indexes").build(pool, np.zeros((0, 1, 8)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        peaks.append(peak)
    assert peaks[2] - peaks[1] < 4 * 38_000  # its lengths alone would be a float32 for each row


# Attributions of large pools ----------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Store:
    return large_store(tmp_path, numbers)


def large_store(tmp_path: Path, features: Callable[[str, int, int, int], NDArray[np.float32]]) -> Store:
    """A store with features of 200 rows at two checkpoints."""
    store = Store.at(tmp_path / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    store.pool(200, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(features)
    return store


def test_a_pool_of_few_rows_with_a_feature_is_read_whole(tmp_path: Path) -> None:
    def few(name: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        return numbers(name, start, stop, dim) * (np.arange(start, stop) < 50)[:, None]

    (report,) = answer(large_store(tmp_path, few), asked(k=5), question()).searches
    assert (report.method, report.rows) == ("exact", 50)


def test_a_large_pool_is_searched_by_an_index_that_the_first_attribution_builds(large: Store) -> None:
    first = answer(large, asked(k=5), question())
    (report,) = first.searches
    assert (report.method, report.rows) == ("index", 200)
    assert report.recall is not None
    assert report.candidates == 120
    assert report.index is not None
    assert (large.settings.indexes / report.index / "manifest.json").exists()
    scores = true_scores(large, question())
    assert [row.row for row in first.data[0].most] == np.argsort(-scores)[:5].tolist()
    assert [row.score for row in first.data[0].least] == pytest.approx(np.sort(scores)[:5].tolist(), abs=1e-12)
    second = answer(large, asked(k=4, origins=["origin1"]), question())
    assert second.searches[0].index == report.index
    assert {row.origin for row in second.data[0].most} == {"origin1"}
    everything = answer(large, asked(k=5, search="exact"), question())
    assert everything.searches[0].method == "exact"
    assert everything.data == first.data


def test_the_index_is_deleted_with_its_features(large: Store) -> None:
    answer(large, asked(), question())
    assert list(large.settings.indexes.glob("index_*"))
    large.features.remove(large.jobs.page(kind="gradients", limit=1).data[0].id)
    assert not list(large.settings.indexes.glob("index_*"))


def test_without_faiss_every_row_is_read(large: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributions, "available", lambda: False)
    assert answer(large, asked(), question()).searches[0].method == "exact"
