"""Why rows were chosen: their text, their score for every subtask, and the validation example nearest to each."""

from __future__ import annotations

from gradstore.types.base import Body
from gradstore.types.datasets import Turn
from gradstore.types.selection import SelectedRow


class SubtaskScore(Body):
    """The influence of a row on the validation rows of a subtask, as the selection's aggregate sees it.

    Their mean for `less` and `avg`, the largest for `max`, the smallest for `min`.
    """

    task: str
    subtask: str
    score: float


class NearestExample(Body):
    """The validation row that a row's influence on is the largest."""

    task: str
    row: int
    """Position among the task's validation rows, from 0."""
    subtask: str
    influence: float
    """Mean over the checkpoints of the cosine of both features, each with its weight."""
    turns: list[Turn]


class Explanation(SelectedRow):
    """A chosen row, and why."""

    turns: list[Turn]
    subtasks: list[SubtaskScore]
    """Every subtask of every task of the recipe, in their order."""
    nearest: NearestExample


class Explanations(Body):
    """A page of the chosen rows of a selection, best first."""

    selection: str
    data: list[Explanation]
    has_more: bool
    next: int | None
    """`after` of the next page; null at the end. A search looks through a part of the rows at once, so a page may hold
    less than `limit`, even nothing, and go on here."""
