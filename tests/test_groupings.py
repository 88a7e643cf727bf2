"""Groups of rows: clusters against scipy's own cut, and labels by id."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage

from datastore.gradex import UNGROUPED
from datastore.groupings import by_cluster, by_label


def test_clusters_are_those_of_scipys_tree_numbered_as_they_appear() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    tree = linkage(unit.astype(np.float64), "average", metric="cosine")
    for count in (1, 2, 7, 30, 60):
        theirs = cut_tree(tree, n_clusters=count)[:, 0]
        mine = by_cluster(rows * 3, np.ones(60, bool), count=count)
        assert len(set(zip(theirs.tolist(), mine.tolist(), strict=True))) == count == len(set(mine.tolist()))
        assert list(dict.fromkeys(mine.tolist())) == list(range(count))


def test_rows_without_a_feature_are_in_no_cluster() -> None:
    rows = np.eye(4)[[0, 1, 0, 1, 2]]
    found = by_cluster(rows, np.array([True, True, True, False, True]), count=3)
    np.testing.assert_array_equal(found, [0, 1, 0, UNGROUPED, 2])
    np.testing.assert_array_equal(by_cluster(rows[:1], np.ones(1, bool), count=3), [0])
    np.testing.assert_array_equal(by_cluster(rows[:2], np.zeros(2, bool), count=3), [UNGROUPED] * 2)


def test_labels_go_by_a_rows_own_id() -> None:
    found = by_label(["a", None, "b", "c"], {"a": "good", "b": "bad", "d": "good"}, ["bad", "good"])
    np.testing.assert_array_equal(found, [1, UNGROUPED, 0, UNGROUPED])
