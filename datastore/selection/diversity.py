"""Rows that differ: greedy k-center, and clusters to take from in equal parts.

Both look at the best candidates only, by default four for each row to choose: diversity among rows that do not help is
worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from datastore.influence import Floats

Reader = Callable[[Sequence[int]], Floats]
"""Rows → their features (m, d), see `PoolFeatures.unit`."""

MAX_CENTERS_AMONG = 8192
"""Candidates of k-center: their products with each other take 4 bytes a pair, 256 MiB."""
BLOCK_BYTES = 64 << 20
SKETCH = 256
"""Numbers of a feature that is clustered: distances are kept within some 9 % (one standard deviation)."""
ROUNDS = 20
MAX_CLUSTER_PRODUCTS = 200_000_000
"""Candidates times clusters: what a round of k-means multiplies, some 20 s of two cores for all rounds."""


def k_center(features: Reader, rows: Sequence[int], k: int) -> list[int]:
    """The first row, and k − 1 times the one that is farthest from all chosen so far: positions in `rows`, in order.

    Greedy k-center (Gonzalez, Clustering to Minimize the Maximum Intercluster Distance, 1985), which covers within
    twice the smallest possible radius. The distance of two unit rows is √(2 − 2·cos); of equal ones the first is taken.
    """
    cosines = gram(features, rows)
    nearest = cosines[0].copy()  # the largest cosine of each row with a chosen one
    nearest[0] = np.inf
    chosen = [0]
    while len(chosen) < min(k, len(rows)):
        farthest = int(nearest.argmin())
        chosen.append(farthest)
        np.maximum(nearest, cosines[farthest], out=nearest)
        nearest[farthest] = np.inf
    return chosen


def gram(features: Reader, rows: Sequence[int]) -> Floats:
    """The cosines of rows with each other (m, m), two blocks of them in memory at once."""
    found = np.empty((len(rows), len(rows)), np.float32)
    step = max(1, BLOCK_BYTES // (4 * features(rows[:1]).shape[1]))
    starts = range(0, len(rows), step)
    for first in starts:
        left = features(rows[first : first + step])
        for second in starts[: first // step + 1]:
            right = left if second == first else features(rows[second : second + step])
            found[first : first + step, second : second + step] = left @ right.T
            found[second : second + step, first : first + step] = found[first : first + step, second : second + step].T
    return found


def clusters(features: Reader, rows: Sequence[int], count: int, seed: int) -> NDArray[np.int64]:
    """The cluster of each row (m,), by k-means on the sphere (faiss) over a sketch of the features.

    Every number of a feature is added to one of 256 sums with a random sign (CountSketch: Charikar, Chen and
    Farach-Colton, 2002), so that m rows take m KiB whatever their dim.
    """
    import faiss  # noqa: PLC0415 - a large library, for this alone

    sketched = _sketches(features, rows, seed)
    means = faiss.Kmeans(
        sketched.shape[1], min(count, len(rows)), niter=ROUNDS, seed=seed % (1 << 31), spherical=True,  # a C int
        min_points_per_centroid=1, max_points_per_centroid=len(rows),
    )  # fmt: skip
    means.train(sketched)
    _, labels = means.index.search(sketched, 1)
    found: NDArray[np.int64] = labels[:, 0]
    return found


def _sketches(features: Reader, rows: Sequence[int], seed: int) -> Floats:
    dim = features(rows[:1]).shape[1]
    generator = np.random.default_rng(seed)
    sums = np.array(generator.integers(0, SKETCH, dim) if dim > SKETCH else range(dim))
    order: NDArray[np.int64] = np.argsort(sums, kind="stable")
    starts = np.flatnonzero(np.diff(sums[order], prepend=-1))
    signs = generator.choice(np.array([-1, 1], np.float32), dim)
    step = max(1, BLOCK_BYTES // (4 * dim))
    blocks = [
        np.add.reduceat(features(rows[first : first + step])[:, order] * signs, starts, axis=1)
        for first in range(0, len(rows), step)
    ]
    found: Floats = np.ascontiguousarray(np.concatenate(blocks), np.float32)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return found
