"""Which adapters to mix for a task: scores on K shots in, ranks and sets of adapters out (ROCKET, arXiv 2408.15915,
algorithm 1).

Every adapter of the bank is ranked by its perplexity on the shots and by its accuracy; the M with the smallest sum of
both ranks are candidates; of all sets of N candidates the one is chosen whose ranks, with the rank of its diversity
among the sets, sum up least. Ranks are 1 for the best and never shared: of equal adapters the one with the lower
perplexity comes first, then the one whose name does.

The scale is the paper's: with C(8, 4) = 70 sets the diversity's rank weighs as much as both others together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import fsum
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ScoredAdapter:
    """What an adapter makes of the shots."""

    name: str
    perplexity: float
    """Mean over the shots of exp(mean negative log-likelihood of the answer's tokens)."""
    accuracy: float
    """Share of the shots that it answers exactly."""


@dataclass(frozen=True)
class RankedAdapter(ScoredAdapter):
    """An adapter among all that were scored."""

    perplexity_rank: int
    accuracy_rank: int

    @property
    def quality(self) -> int:
        """The sum of both ranks: the less the better."""
        return self.perplexity_rank + self.accuracy_rank


@dataclass(frozen=True)
class AdapterSet:
    """Some candidates together."""

    members: tuple[RankedAdapter, ...]
    similarity: float
    """Mean over the pairs of members; 0 where there is one member only."""
    diversity_rank: int

    @property
    def omega(self) -> float | None:
        """The paper's diversity, 1 / similarity; None where that is not positive and the set is more diverse still."""
        return 1 / self.similarity if self.similarity > 0 else None

    @property
    def total(self) -> int:
        """All ranks of the members, and that of their diversity: the less the better."""
        return sum(member.quality for member in self.members) + self.diversity_rank


def ranked(scores: Sequence[ScoredAdapter]) -> list[RankedAdapter]:
    """All adapters with their ranks among each other, those with the smallest sum of ranks first.

    Names differ. A perplexity that is not finite comes last.
    """
    by_perplexity = _places(scores, key=_fluency)
    by_accuracy = _places(scores, key=lambda one: (-one.accuracy, *_fluency(one)))
    found = [
        RankedAdapter(
            name=one.name,
            perplexity=one.perplexity,
            accuracy=one.accuracy,
            perplexity_rank=by_perplexity[one.name],
            accuracy_rank=by_accuracy[one.name],
        )
        for one in scores
    ]
    return sorted(found, key=lambda one: (one.quality, *_fluency(one)))


def sets(candidates: Sequence[RankedAdapter], similarity: NDArray[np.floating], *, size: int) -> list[AdapterSet]:
    """Every set of `size` candidates, the one to choose first.

    `similarity` (m, m) is that of the candidates, in their order; its lower triangle is not read. Diversity is ranked
    by the mean over a set's pairs, ascending: that is the order of the paper's 1 / mean where means are positive, and a
    mean of 0 or less is the most diverse instead of the least. Of equal sets the one with the lower sum of perplexities
    is taken, then the one whose names come first.
    """
    groups = [tuple(group) for group in combinations(range(len(candidates)), size)]
    means = {group: _mean_similarity(group, similarity) for group in groups}

    def preference(group: tuple[int, ...]) -> tuple[float, list[str]]:
        members = [candidates[number] for number in group]
        return fsum(one.perplexity for one in members), sorted(one.name for one in members)

    by_diversity = sorted(groups, key=lambda group: (means[group], *preference(group)))
    found = {
        group: AdapterSet(tuple(candidates[number] for number in group), means[group], place)
        for place, group in enumerate(by_diversity, start=1)
    }
    return [found[group] for group in sorted(groups, key=lambda group: (found[group].total, *preference(group)))]


def _mean_similarity(group: Sequence[int], similarity: NDArray[np.floating]) -> float:
    """Summed exactly, so that sets of equal similarities are equal whatever the order of their members."""
    pairs = [float(similarity[one, other]) for one, other in combinations(group, 2)]
    return fsum(pairs) / len(pairs) if pairs else 0.0


def _fluency(one: ScoredAdapter) -> tuple[float, str]:
    return (one.perplexity if np.isfinite(one.perplexity) else np.inf), one.name


def _places(scores: Sequence[ScoredAdapter], *, key: Callable[[ScoredAdapter], tuple[Any, ...]]) -> dict[str, int]:
    return {one.name: place for place, one in enumerate(sorted(scores, key=key), start=1)}
