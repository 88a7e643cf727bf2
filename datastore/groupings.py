"""Groups of a pool's rows: by where they come from, by labels that are given, by those of an annotation, or by clusters
of their features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from datastore.gradex import UNGROUPED, Groups
from datastore.influence import Mask, normalise

MAX_CLUSTERED = 20_000
"""Rows that are clustered at most: their distances take 8 bytes a pair, 1.6 GB of so many."""


def by_label(ids: Sequence[str | None], labels: Mapping[str, str], names: Sequence[str]) -> Groups:
    """The number among `names` of each row's label (n,), by its own id; `UNGROUPED` of a row without one."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[labels[id]] if id is not None and id in labels else UNGROUPED for id in ids], np.int64)


def by_annotation(labels: NDArray[np.bool_], capabilities: Sequence[str]) -> tuple[Groups, list[str]]:
    """The group of each row (n,), those with the same labels (n, capabilities), and what the groups are called."""
    found, groups = np.unique(labels, axis=0, return_inverse=True)
    names = [" + ".join(capabilities[number] for number in np.flatnonzero(each).tolist()) for each in found]
    return groups.reshape(-1).astype(np.int64), names


def by_cluster(features: NDArray[np.floating], valid: Mask, *, count: int) -> Groups:
    """Agglomerative clusters of the features' directions by cosine and average linkage (n,), numbered as they appear.

    There are exactly so many, unless fewer rows have a feature; a row without one is `UNGROUPED`. Takes 4·n² bytes and,
    for 10,000 rows, some ten seconds.
    """
    from scipy.cluster.hierarchy import linkage  # noqa: PLC0415 - heavy, and of clusters only
    from scipy.spatial.distance import pdist  # noqa: PLC0415

    found = np.full(len(features), UNGROUPED, np.int64)
    rows = np.flatnonzero(valid)
    if len(rows) > 1:
        found[rows] = _cut(linkage(pdist(normalise(features[rows]), "cosine"), "average"), count=count)
    elif len(rows):
        found[rows] = 0
    return found


def _cut(merges: NDArray[np.float64], *, count: int) -> Groups:
    """The clusters that are left before the last `count - 1` merges of scipy's linkage matrix (n,)."""
    rows = len(merges) + 1
    above = np.arange(2 * rows - 1)
    for number, (first, second, *_) in enumerate(merges[: rows - min(count, rows)]):
        above[[int(first), int(second)]] = rows + number
    for node in range(2 * rows - 2, -1, -1):  # a merge comes after what it merges
        above[node] = above[above[node]]
    _, first, clusters = np.unique(above[:rows], return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    found: Groups = order[clusters]
    return found
