"""Scores as a whole: their distribution, what a cut takes of it, and what the selections of several tasks share."""

from __future__ import annotations

from gradstore.types.base import Body
from gradstore.types.selection import SelectionRecipe


class Cuts(Body):
    """What /select would choose, a little more at every step: the lists go side by side."""

    pct: list[float]
    """The fraction of the pool that is asked for."""
    rows: list[int]
    """Rows that it chooses."""
    scores: list[float]
    """Score of the last row that it chooses."""
    origins: dict[str, list[int]]
    """Chosen rows of each origin."""


class ScoreDistribution(Body):
    """A histogram of the scores of a pool, and what every cut through it takes."""

    recipe: SelectionRecipe
    rows: int
    """Rows of the pool: a fraction is one of these."""
    scored: int
    """Rows that have a score."""
    edges: list[float]
    """Borders of the histogram's bins, one more than there are bins."""
    counts: dict[str, list[int]]
    """By origin, the most frequent first: rows between two edges, the lower one included (in the last bin both)."""
    cuts: Cuts


class TaskOverlap(Body):
    """What two tasks have in common."""

    tasks: tuple[str, str]
    """Ids, in the order of the recipe."""
    shared: int
    """Rows that the selections of both hold."""
    jaccard: float
    """`shared` over the rows that one of the selections holds, or both."""
    rank_correlation: float | None
    """Spearman's, over all rows that both score; null where a task scores all rows the same."""


class Overlaps(Body):
    """What the selections of several tasks have in common, for each pair."""

    recipe: SelectionRecipe
    count: int
    """Rows that each task's selection holds."""
    pairs: list[TaskOverlap]
