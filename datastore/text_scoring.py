"""BM25 scores of the recipes' pools, kept like those of features: no model is asked, only the catalog's texts.

What a word of the pool counts depends on all rows of all its datasets: the scores are of the pool as a whole, and a
grown pool's are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gradstore.types import SelectionRecipe

from datastore import bm25
from datastore.bm25 import BM25_VERSION, NO_WORDS, TextTarget
from datastore.catalog import Catalog
from datastore.datasets import Datasets
from datastore.identity import content_id
from datastore.influence import TaskScores
from datastore.parameters import Query
from datastore.scores import ScoreCache
from datastore.selection.rules import refused
from datastore.tasks import Tasks


@dataclass(frozen=True)
class TextScoring:
    """Scores that are made of texts alone."""

    catalog: Catalog
    datasets: Datasets
    tasks: Tasks
    cache: ScoreCache

    def pool(self, query: Query, *, path: str) -> Sequence[str]:  # noqa: ARG002 - the interface
        """Leave it to what there is."""
        return ()

    def resolved(
        self,
        query: Query,  # noqa: ARG002 - the interface
        *,
        datasets: Sequence[str],  # noqa: ARG002
        tasks: Sequence[str],  # noqa: ARG002
        path: str,  # noqa: ARG002
    ) -> dict[str, Any]:
        """The version of the words and weights."""
        return {"bm25_version": BM25_VERSION}

    def check(self, recipe: SelectionRecipe) -> None:
        """Raise `InvalidInput` where the recipe is of another version."""
        if recipe.bm25_version != BM25_VERSION:
            raise refused("bm25_version", f"version {recipe.bm25_version} of BM25's scores is not made any more")

    def known(self, recipe: SelectionRecipe) -> list[TaskScores] | None:
        """The scores of each task over the pool, if all of them are cached."""
        found = [self.cache.get(_key(recipe, task)) for task in recipe.tasks]
        known = [scores for scores in found if scores is not None]
        return known if len(known) == len(found) else None

    def work(self, recipe: SelectionRecipe, on_rows: Callable[[int], None]) -> None:
        """Compute the scores that are not cached yet.

        `on_rows` hears of `units`. Raises `Conflict` where a task has no words, and `NotFound`.
        """
        missing = [task for task in recipe.tasks if self.cache.get(_key(recipe, task)) is None]
        if missing:
            targets = [self._target(task) for task in missing]
            scores = bm25.score(self._texts(recipe), targets, recipe.aggregate or "max", on_rows=on_rows)
            for task, found in zip(missing, scores, strict=True):
                self.cache.put(_key(recipe, task), found, made_from=_made_from(recipe, task))

    def rows(self, recipe: SelectionRecipe) -> int:
        """Rows of the pool."""
        sizes = self.catalog.dataset_sizes()
        return sum(sizes[dataset] for dataset in recipe.datasets)

    def units(self, recipe: SelectionRecipe) -> int:
        """What the work counts: every row is read, and then scored."""
        return 2 * self.rows(recipe)

    def subtasks(self, recipe: SelectionRecipe) -> dict[str, tuple[str, ...]]:
        """Names of each task's subtasks, as the scores number them."""
        return {task: self.tasks.subtasks(task) for task in recipe.tasks}

    def reasons(self, recipe: SelectionRecipe) -> dict[int, str]:
        """The pool's rows without a score, and why."""
        without = [np.flatnonzero(~scores.valid).tolist() for scores in self.known(recipe) or []]
        return {row: NO_WORDS for rows in without for row in rows}

    def notes(self, recipe: SelectionRecipe) -> list[str]:  # noqa: ARG002 - the interface
        """Nothing."""
        return []

    def _texts(self, recipe: SelectionRecipe) -> Iterator[str]:
        for dataset in recipe.datasets:
            yield from (example.text for example in self.datasets.examples(dataset))

    def _target(self, task: str) -> TextTarget:
        rows = self.tasks.validation(task)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(row.subtask for row in rows))}
        return TextTarget([row.example.text for row in rows], [numbers[row.subtask] for row in rows])


def _made_from(recipe: SelectionRecipe, task: str) -> dict[str, Any]:
    """All that a task's scores depend on; the names of other tasks do not."""
    return {
        "method": recipe.method,
        "version": BM25_VERSION,
        "texts": [*recipe.datasets, task],
        "aggregate": recipe.aggregate,
    }


def _key(recipe: SelectionRecipe, task: str) -> str:
    return content_id("score", _made_from(recipe, task))
