"""Why rows were chosen: their influence on every single validation row, computed anew for the few that are looked at.

A score keeps only the subtask that gave it. Here the stored features of a page's rows are multiplied with those of all
validation rows in float32, which is exact; the rest of the pool is not touched.

A page of n rows for m validation rows holds 4·n·m bytes, its own rows, and two blocks of 8 MiB of validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
from gradstore.types import (
    Aggregate,
    Explanation,
    Explanations,
    NearestExample,
    SelectedRow,
    SelectionRecipe,
    SubtaskScore,
)
from numpy.typing import NDArray

from datastore.answers import Answers
from datastore.browsing import look_through, number_of, turns
from datastore.errors import Conflict
from datastore.features import Features
from datastore.influence import Floats, everywhere
from datastore.recipes import Recipes, Sources
from datastore.rows import Example
from datastore.segments import Rows
from datastore.selection.features import PoolFeatures, influences
from datastore.tasks import Tasks
from datastore.tasks.reading import TaskExample


@dataclass(frozen=True)
class _Target:
    """A task's validation rows that the scores count: those with a feature at every checkpoint."""

    task: str
    rows: list[int]
    examples: list[TaskExample]
    views: Sequence[Rows]
    """The features of all validation rows at each checkpoint."""

    @property
    def subtasks(self) -> list[str]:
        """Names of the subtasks in order of appearance."""
        return list(dict.fromkeys(example.subtask for example in self.examples))


@dataclass(frozen=True)
class Explaining:
    """Explanations of stored selections."""

    answers: Answers
    features: Features
    recipes: Recipes
    tasks: Tasks

    def page(
        self, reference: str, *, after: int, limit: int, origin: str | None = None, text: str | None = None
    ) -> Explanations:
        """The first `limit` chosen rows below rank `after` that have this origin and hold this text, each explained.

        Raises `NotFound`, `InvalidInput` where the pool has no such origin, `Conflict` where its method reads no
        features, and `GradientsMissing`.
        """
        selection = self.answers.read(reference, limit=0)
        sources = self.recipes.sources(selection.recipe)
        if not sources.datasets:
            raise Conflict(
                f"{selection.id} was chosen by method={selection.recipe.method}, which reads no features: an "
                "explanation compares the features of rows and validation rows. The chosen rows with their scores are "
                f"at GET /selections/{selection.id}"
            )
        if origin is not None:
            number_of(origin, list(selection.pool_origins))
        found, following = self._found(selection.id, after=after, limit=limit, origin=origin, text=text)
        data = self._explained(selection.recipe, sources, found)
        return Explanations(selection=selection.id, data=data, has_more=following is not None, next=following)

    def _found(
        self, selection: str, *, after: int, limit: int, origin: str | None, text: str | None
    ) -> tuple[list[tuple[SelectedRow, Example]], int | None]:
        """The rows of a page with their examples, and the rank after which the next one begins."""
        table = self.answers.chosen(selection)
        origins = np.array(table["origin"].to_pylist()) if origin is not None else None
        places = np.arange(table.num_rows) if origins is None else np.flatnonzero(origins == origin)

        def examples(places: NDArray[np.int64]) -> Iterator[tuple[SelectedRow, Example]]:
            rows = table.take(places).to_pylist()
            return self.answers.with_examples(SelectedRow.model_validate(values) for values in rows)

        return look_through(places[np.searchsorted(places, after) :], examples, limit=limit, text=text)

    def _explained(
        self, recipe: SelectionRecipe, sources: Sources, found: Sequence[tuple[SelectedRow, Example]]
    ) -> list[Explanation]:
        if not found:
            return []
        rows = self._unit(recipe, sources, [row for row, _ in found])
        views = {task: self.features.views([each.id for each in sets]) for task, sets in sources.tasks.items()}
        targets = [self._target(task, own) for task, own in views.items()]
        tables = [influences(rows, target.views, recipe.checkpoint_weights)[:, target.rows] for target in targets]
        explained = []
        for place, (row, example) in enumerate(found):
            by_task = [(target, table[place]) for target, table in zip(targets, tables, strict=True)]
            explained.append(
                Explanation(
                    **row.model_dump(),
                    turns=turns(example),
                    subtasks=[
                        score for target, values in by_task for score in _scores(target, values, recipe.aggregate)
                    ],
                    nearest=max((_nearest(*one) for one in by_task), key=lambda nearest: nearest.influence),
                )
            )
        return explained

    def _unit(self, recipe: SelectionRecipe, sources: Sources, rows: Sequence[SelectedRow]) -> Floats:
        """Some rows of the pools, see `PoolFeatures.unit`."""
        pools = {id: self.features.views([each.id for each in sets]) for id, sets in sources.datasets.items()}
        starts = dict(zip(pools, accumulate((views[0].rows for views in pools.values()), initial=0), strict=False))
        features = PoolFeatures(list(pools.values()), recipe.checkpoint_weights)
        return features.unit([starts[row.dataset] + row.row for row in rows])

    def _target(self, task: str, views: Sequence[Rows]) -> _Target:
        usable = np.flatnonzero(everywhere([view.valid for view in views])).tolist()
        validation = self.tasks.validation(task)
        return _Target(task, usable, [validation[row] for row in usable], views)


def _scores(target: _Target, row: Floats, how: Aggregate | None) -> Iterator[SubtaskScore]:
    """What each subtask gives to the row's score by this aggregate: `max` and `min` look at single rows, others not."""
    within = {"max": np.max, "min": np.min}.get(how or "less", partial(np.mean, dtype=np.float64))
    names = np.array([example.subtask for example in target.examples])
    for name in target.subtasks:
        yield SubtaskScore(task=target.task, subtask=name, score=float(within(row[names == name])))


def _nearest(target: _Target, row: Floats) -> NearestExample:
    best = int(row.argmax())
    example = target.examples[best]
    return NearestExample(
        task=target.task,
        row=target.rows[best],
        subtask=example.subtask,
        influence=float(row[best]),
        turns=turns(example.example),
    )
