"""Methods of /select that bring scores of their own, where the others compare features of the store.

The scores of one are computed as a scoring job of a single shard, by whoever takes it, from arrays and texts alone: no
model is asked. `open_store` ties each to its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gradstore.types import SelectionMethod, SelectionRecipe

from datastore.influence import TaskScores
from datastore.parameters import Query
from datastore.selection.abilities import References


class OwnScores(Protocol):
    """The scores of one method. The choices of an `Ambiguous` are what `by` could be."""

    def pool(self, query: Query, *, path: str) -> Sequence[str]:
        """Ids of the datasets that a query means which names none; () leaves it to what there is.

        `path` is where the alternatives are asked for. Raises `NotFound` and `Ambiguous`.
        """

    def resolved(self, query: Query, *, datasets: Sequence[str], tasks: Sequence[str], path: str) -> dict[str, Any]:
        """What a recipe of the method has beside what all have, for pools and tasks by their ids.

        `path` is where the alternatives are asked for. Raises `NotFound`, `Ambiguous`, `InvalidInput`, and `Conflict`
        with the POST to send where what the scores rest on is not there.
        """

    def check(self, recipe: SelectionRecipe) -> None:
        """Raise what `resolved` does where a recipe that is sent cannot be answered."""

    def known(self, recipe: SelectionRecipe) -> list[TaskScores] | None:
        """The scores of each task over the pool, if all of them are cached."""

    def work(self, recipe: SelectionRecipe, on_rows: Callable[[int], None]) -> None:
        """Compute the scores that are not cached; `on_rows` hears of `units`. Raises `Conflict` and `NotFound`."""

    def rows(self, recipe: SelectionRecipe) -> int:
        """Rows of the pool."""

    def units(self, recipe: SelectionRecipe) -> int:
        """What the work counts."""

    def subtasks(self, recipe: SelectionRecipe) -> dict[str, tuple[str, ...]]:
        """Names of each task's subtasks, as the scores number them."""

    def reasons(self, recipe: SelectionRecipe) -> dict[int, str]:
        """The pool's rows without a score, and why."""

    def notes(self, recipe: SelectionRecipe) -> list[str]:
        """What whoever reads the answer should know."""


@runtime_checkable
class Placing(Protocol):
    """A method that has places for rows, so that they are compared with each other and with a task's rows."""

    def references(self, recipe: SelectionRecipe) -> References:
        """Where a recipe's pool is, and the rows of its tasks. Raises `Conflict` and `Damaged`."""


Methods = Mapping[SelectionMethod, OwnScores]
"""By name."""
