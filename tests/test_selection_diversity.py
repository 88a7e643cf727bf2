"""k-center and clusters, on features given directly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.influence import Floats, normalise
from datastore.selection import diversity
from datastore.selection.diversity import clusters, gram, k_center


def reader(features: Floats):  # type: ignore[no-untyped-def]  # a Reader
    return lambda rows: features[list(rows)]


@given(st.integers(0, 2000), st.integers(1, 20), st.integers(1, 24))
@settings(deadline=None)
def test_each_center_is_the_farthest_from_those_before(seed: int, rows: int, k: int) -> None:
    features = normalise(np.random.default_rng(seed).normal(size=(rows, 5)))
    order = np.random.default_rng(seed).permutation(rows).tolist()
    found = k_center(reader(features), order, k)
    assert found[0] == 0
    assert len(found) == len(set(found)) == min(k, rows)
    distances = np.linalg.norm(features[order][:, None] - features[order][None], axis=-1)
    for number in range(1, len(found)):
        nearest = distances[:, found[:number]].min(axis=1)
        others = [place for place in range(rows) if place not in found[:number]]
        assert nearest[found[number]] >= nearest[others].max() - 1e-3


def test_products_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normalise(np.random.default_rng(0).normal(size=(25, 8)))
    monkeypatch.setattr(diversity, "BLOCK_BYTES", 4 * 8 * 7)
    np.testing.assert_allclose(gram(reader(features), list(range(25))), features @ features.T, atol=1e-6)


@pytest.mark.parametrize("dim", [40, 3000])
def test_clusters_are_found_again_and_by_their_seed(dim: int) -> None:
    generator = np.random.default_rng(4)
    centers = generator.normal(size=(5, dim))
    truth = generator.integers(0, 5, 300)
    features = normalise(centers[truth] + 0.3 * generator.normal(size=(300, dim)))
    found = clusters(reader(features), list(range(300)), 5, seed=1)
    pairs = (found[:, None] == found[None]) == (truth[:, None] == truth[None])
    assert pairs.mean() > 0.85
    np.testing.assert_array_equal(found, clusters(reader(features), list(range(300)), 5, seed=1))
