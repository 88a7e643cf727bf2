"""Why rows were chosen: their influence on every single validation row, computed anew for the few that are looked at.

A score keeps only the subtask that gave it. Here the stored features of a page's rows are multiplied with those of all
validation rows in float32, which is exact; the rest of the pool is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from gradstore.types import Explanation, Explanations, NearestExample, SelectedRow, SelectionRecipe, SubtaskScore
from numpy.typing import NDArray

from datastore.answers import Answers
from datastore.browsing import look_through, number_of, turns
from datastore.datasets import Datasets
from datastore.errors import Conflict
from datastore.features import Features
from datastore.influence import Floats, everywhere, influence
from datastore.recipes import Recipes, Sources
from datastore.rows import Example
from datastore.segments import Rows
from datastore.tasks import Tasks
from datastore.tasks.reading import TaskExample


@dataclass(frozen=True)
class _Target:
    """A task's validation rows that the scores count: those with a feature at every checkpoint."""

    task: str
    rows: list[int]
    examples: list[TaskExample]
    features: list[Floats]
    """(m, dim) of each checkpoint."""

    @property
    def subtasks(self) -> list[str]:
        """Names of the subtasks in order of appearance."""
        return list(dict.fromkeys(example.subtask for example in self.examples))


@dataclass(frozen=True)
class Explaining:
    """Explanations of stored selections."""

    answers: Answers
    datasets: Datasets
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
                "explanation compares the features of rows and validation rows"
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
            return self._examples(table.take(places))

        return look_through(places[np.searchsorted(places, after) :], examples, limit=limit, text=text)

    def _examples(self, rows: pa.Table) -> Iterator[tuple[SelectedRow, Example]]:
        for values in rows.to_pylist():
            row = SelectedRow.model_validate(values)
            yield row, next(self.datasets.examples_at(row.dataset, [row.row]))

    def _explained(
        self, recipe: SelectionRecipe, sources: Sources, found: Sequence[tuple[SelectedRow, Example]]
    ) -> list[Explanation]:
        if not found:
            return []
        features = self._features_of(recipe, sources, [row for row, _ in found])
        views = {task: self.features.views([each.id for each in sets]) for task, sets in sources.tasks.items()}
        targets = [self._target(task, own) for task, own in views.items()]
        tables = [influences(features, target.features, recipe.checkpoint_weights) for target in targets]
        explained = []
        for place, (row, example) in enumerate(found):
            by_task = [(target, table[place]) for target, table in zip(targets, tables, strict=True)]
            explained.append(
                Explanation(
                    **row.model_dump(),
                    turns=turns(example),
                    subtasks=[score for target, values in by_task for score in _scores(target, values)],
                    nearest=max((_nearest(*one) for one in by_task), key=lambda nearest: nearest.influence),
                )
            )
        return explained

    def _features_of(self, recipe: SelectionRecipe, sources: Sources, rows: Sequence[SelectedRow]) -> list[Floats]:
        """The features of some rows of the pools, (n, dim) of each checkpoint."""
        views = {id: self.features.views([each.id for each in sets]) for id, sets in sources.datasets.items()}
        return [
            np.concatenate([views[row.dataset][number].features(row.row, row.row + 1) for row in rows])
            for number in range(len(recipe.checkpoints))
        ]

    def _target(self, task: str, views: Sequence[Rows]) -> _Target:
        usable = np.flatnonzero(everywhere([view.valid for view in views])).tolist()
        validation = self.tasks.validation(task)
        features = [view.features(0, view.rows)[usable] for view in views]
        return _Target(task, usable, [validation[row] for row in usable], features)


def influences(train: Sequence[Floats], target: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Influence of each training row on each target row (n, m), the checkpoints' cosines weighted (LESS, eq. 3)."""
    pairs = zip(train, target, weights, strict=True)
    total: Floats = np.sum([np.float32(weight) * influence(rows, wanted) for rows, wanted, weight in pairs], axis=0)
    return total


def _scores(target: _Target, row: Floats) -> Iterator[SubtaskScore]:
    names = np.array([example.subtask for example in target.examples])
    for name in target.subtasks:
        yield SubtaskScore(task=target.task, subtask=name, score=float(row[names == name].mean(dtype=np.float64)))


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
