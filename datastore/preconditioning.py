"""TrackStar's preconditioning: gradients whitened by their second moment, so that what all of them share counts less.

Chang et al. 2024 (arXiv 2410.17413), section 3: a row's encoding is R^-1/2 φ divided by its length, where φ is its
projected gradient and R mixes the second moments of the pool's gradients and of the target's:

    R = λ R_target + (1 − λ) R_pool

λ is such that the two spectra, so weighted, cross at the component `COMPONENTS` (appendix A.1.3: about 1,000 of
65,536): the components before it, in which the target's rows are alike, weigh less. Here the same share of the dims is
taken, and at most the rank that the target's rows can give.

What is ours: the rows are divided by their lengths before the moments are taken, since pool and target may be of
different kinds, whose lengths mean nothing to each other; R is taken over all modules at once and not per module, since
a feature mixes them; and `DAMPING` times the mean eigenvalue is added to every eigenvalue, since a pool of fewer rows
than dims has a singular R.

The map is applied to both sides, since cosines come after it. Cost, with n rows and d dims: n·d² products for the
moment, as many again for the map, and about 10·d³ for the eigenvectors; docs/validation.md has it measured.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from datastore.influence import Floats, normalise

COMPONENTS = 1000 / 65536
"""Share of the dims in which the target's own directions weigh less."""
DAMPING = 0.1
"""Share of the mean eigenvalue that is added to every eigenvalue."""
MAX_DIM = 2048
"""Widest features whose second moment is inverted: twice the dims take eight times as long, at every checkpoint."""


def second_moment(blocks: Iterable[NDArray[np.floating]]) -> Floats:
    """Mean of φ φᵀ over the rows of all blocks (n, d), each divided by its length: (d, d). Zeros do not count."""
    total: Floats | None = None
    rows = 0
    for block in blocks:
        unit = normalise(block)
        product = unit.T @ unit
        total = product if total is None else np.add(total, product, out=total)
        rows += int(unit.any(axis=1).sum())
    if total is None or not rows:
        raise ValueError("a second moment needs a row that is not zero")
    total /= rows
    return total


def mixed(pool: Floats, target: Floats, *, target_rows: int) -> tuple[Floats, float]:
    """R (d, d) from the second moments of pool and target, and the λ that was chosen.

    Spectra cross where λ σ_target = (1 − λ) σ_pool. `target_rows` bounds the target's rank.
    """
    component = max(1, min(round(COMPONENTS * len(pool)), target_rows)) - 1
    of_pool, of_target = (np.linalg.eigvalsh(moment)[::-1][component] for moment in (pool, target))
    share = float(np.clip(of_pool / max(of_pool + of_target, np.finfo(np.float32).tiny), 0, 1))
    return (share * target + (1 - share) * pool).astype(np.float32), share


def inverse_root(moment: Floats) -> Floats:
    """(R + damping)^-1/2 of a symmetric matrix (d, d), itself symmetric."""
    values, vectors = np.linalg.eigh(moment.astype(np.float64) if len(moment) <= 1024 else moment)
    values = np.maximum(values, 0)
    damped = values + DAMPING * values.mean()
    root: Floats = ((vectors / np.sqrt(damped)) @ vectors.T).astype(np.float32)
    return root
