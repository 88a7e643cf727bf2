"""The rows with the most and the least influence on a question, against a brute force in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gradstore.types import FeatureDtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore import search
from datastore.errors import Damaged
from datastore.gradients import FeatureStore
from datastore.search import Pool, best_of, exact
from datastore.segments import FeatureView
from datastore.shards import CHUNK_ROWS
from tests.stores import block_of

DIM = 24


def view(
    store: FeatureStore, features: NDArray[np.float32], *, dtype: FeatureDtype = "float16", cuts: Sequence[int] = ()
) -> FeatureView:
    """Features in a store, in segments that begin at the cuts."""
    names = []
    for start, stop in zip([0, *cuts], [*cuts, len(features)], strict=True):
        name = f"seg_{len(list(store.root.glob('seg_*')))}"
        store.create(name, rows=stop - start, dim=features.shape[1], dtype=dtype, attributes={})
        for first in range(start, stop, CHUNK_ROWS):
            block = block_of(features[first : min(first + CHUNK_ROWS, stop)])
            digest = store.write(name, start=first - start, attempt=1, block=block)
            store.publish(name, start=first - start, attempt=1, digest=digest)
        names.append(name)
    return store.view(names)


def drawn(rows: int, *, seed: int, dim: int = DIM) -> NDArray[np.float32]:
    """Rows of very different lengths around a few directions; every eleventh is zero, every seventh repeats."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((rows, 4)) @ rng.standard_normal((4, dim)) + rng.standard_normal((rows, dim))
    features *= 10.0 ** rng.uniform(-6, 3, (rows, 1))
    features[7::7] = features[: len(features[7::7])]
    features[10::11] = 0
    return features.astype(np.float32)


def brute_force(views: Sequence[FeatureView], weights: Sequence[float], question: NDArray[np.float64]) -> NDArray:
    """Σ w⟨φ(z)/‖·‖, φ(v)/‖·‖⟩ of every row, in float64, from the features as they are stored; NaN without one."""
    scores = np.zeros(views[0].rows)
    for each, weight, asked in zip(views, weights, question, strict=True):
        rows = each.features(0, each.rows).astype(np.float64)
        lengths = np.sqrt((rows**2).sum(axis=1))
        scores += weight * np.array(
            [np.nan if not n else row @ asked / n for row, n in zip(rows, lengths, strict=True)]
        )
    return scores


def unit(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)


def pool_of(views: Sequence[FeatureView], weights: Sequence[float], wanted: NDArray[np.bool_] | None = None) -> Pool:
    valid = np.logical_and.reduce([each.valid for each in views])
    return Pool(views, weights, valid if wanted is None else valid & wanted)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 300),
    k=st.integers(1, 40),
    checkpoints=st.integers(1, 3),
    seed=st.integers(0, 1000),
    grown=st.booleans(),
    filtered=st.booleans(),
)
def test_what_is_found_is_what_brute_force_finds(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    k: int,
    checkpoints: int,
    seed: int,
    grown: bool,
    filtered: bool,
) -> None:
    store = FeatureStore(tmp_path_factory.mktemp("store"))
    store.root.mkdir(exist_ok=True)
    cuts = [rows // 2] if grown and rows > 1 else []
    views = [view(store, drawn(rows, seed=seed + number), cuts=cuts) for number in range(checkpoints)]
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(checkpoints)).tolist()
    wanted = rng.random(rows) < 0.5 if filtered else None
    questions = unit(rng.standard_normal((2, checkpoints, DIM)))
    pool = pool_of(views, weights, wanted)
    for question, ends in zip(questions, exact(pool, questions, k), strict=True):
        scores = np.where(pool.wanted, brute_force(views, weights, question), np.nan)
        possible = np.flatnonzero(~np.isnan(scores))
        for found, order in ((ends.most, -scores[possible]), (ends.least, scores[possible])):
            true = possible[np.argsort(order, kind="stable")][:k]
            assert len(found.rows) == len(true)
            np.testing.assert_allclose(found.scores, scores[true], rtol=0, atol=1e-12)
            np.testing.assert_allclose(scores[found.rows], scores[true], rtol=0, atol=1e-12)  # twins may change places
        np.testing.assert_allclose(ends.most.parts.sum(axis=1), ends.most.scores)


def test_of_rows_with_equal_scores_the_first_comes_first(tmp_path: Path) -> None:
    features = np.tile(np.array([[3.0, 4.0, 0.0]], np.float32), (50, 1))
    pool = pool_of([view(_made(tmp_path), features)], [1.0])
    ends = exact(pool, unit(np.array([[[1.0, 0.0, 0.0]]])), 5)[0]
    assert ends.most.rows.tolist() == ends.least.rows.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(ends.most.scores, 0.6, atol=1e-3)  # float16


def test_opposite_rows_are_found_at_opposite_ends(tmp_path: Path) -> None:
    features = drawn(40, seed=3)
    features[5], features[6] = features[12] * 100, -features[12]
    pool = pool_of([view(_made(tmp_path), features, dtype="float32")], [1.0])
    ends = exact(pool, unit(features[12][None, None]), 3)[0]
    assert set(ends.most.rows[:2].tolist()) == {5, 12}
    assert ends.least.rows[0] == 6
    assert ends.least.scores[0] == pytest.approx(-1)


def test_questions_asked_at_once_share_a_pass_as_far_as_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of([view(_made(tmp_path), drawn(60, seed=1))], [1.0])
    questions = unit(np.random.default_rng(0).standard_normal((5, 1, DIM)))
    together = exact(pool, questions, 4)
    monkeypatch.setattr(search, "SCORES_BYTES", 2 * 4 * 60)
    passes: list[int] = []
    for one, other in zip(together, exact(pool, questions, 4, on_rows=passes.append), strict=True):
        assert one.most.rows.tolist() == other.most.rows.tolist()
    assert passes.count(60) == 3


def test_candidates_are_ranked_among_themselves(tmp_path: Path) -> None:
    views = [view(_made(tmp_path), drawn(80, seed=5))]
    pool = pool_of(views, [1.0])
    question = unit(np.random.default_rng(1).standard_normal((1, DIM)))
    candidates = np.flatnonzero(pool.wanted)[::3]
    ends = best_of(pool, question, candidates, 4)
    scores = brute_force(views, [1.0], question)
    assert ends.most.rows.tolist() == sorted(candidates.tolist(), key=lambda row: -scores[row])[:4]


def test_a_pass_notices_bytes_that_were_changed(tmp_path: Path) -> None:
    each = view(_made(tmp_path), drawn(30, seed=2))
    chunk = next((tmp_path / "features").glob("seg_0/data.zarr/features/c.*"))
    raw = bytearray(chunk.read_bytes())
    raw[100] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(Damaged, match="checksum"):
        exact(pool_of([each], [1.0]), unit(np.ones((1, 1, DIM))), 3)


@pytest.mark.parametrize("cuts", [[], [1024, 1500]])
@pytest.mark.parametrize("chunk", [1024, 128])
def test_some_rows_are_read_as_they_are_stored(
    tmp_path: Path, cuts: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.shards.CHUNK_BYTES", chunk * 2 * DIM)  # long rows have few in a chunk
    each = view(_made(tmp_path), drawn(2300, seed=4), cuts=cuts)
    rows = np.array([0, 3, 1023, 1024, 1499, 1500, 2299])
    np.testing.assert_array_equal(each.stored_rows(rows), each.stored(0, 2300)[rows])
    assert each.stored_rows(np.array([], np.int64)).shape == (0, DIM)
    for bad in ([2300], [-1], [3, 3], [5, 2]):
        with pytest.raises(IndexError):
            each.stored_rows(np.array(bad))


def test_missing_bytes_of_some_rows_are_damage(tmp_path: Path) -> None:
    each = view(_made(tmp_path), drawn(30, seed=2))
    chunk = next((tmp_path / "features").glob("seg_0/data.zarr/features/c.*"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(Damaged, match="too early"):
        each.take(np.array([20]))
    chunk.unlink()
    with pytest.raises(Damaged, match="missing"):
        each.take(np.array([20]))


def _made(folder: Path) -> FeatureStore:
    store = FeatureStore(folder / "features")
    store.root.mkdir()
    return store
