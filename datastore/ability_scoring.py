"""Scores by a projector's embeddings (method=cods): how near rows of a pool are to a task's in an ability space.

The arithmetic is in datastore/selection/abilities.py, and takes a second for 200,000 rows and 300 references: scores
are computed where they are asked for, and kept in the cache of scores under all that they depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gradstore.types import SelectionRecipe
from sqlalchemy import select

from datastore import advice
from datastore.catalog import Catalog
from datastore.catalog_states import Remembered
from datastore.embeddings import ABSENT, Embeddings
from datastore.errors import Conflict
from datastore.identity import content_id
from datastore.influence import Subtasks, TaskScores
from datastore.parameters import Query
from datastore.projectors import Projectors
from datastore.schema import JobRow
from datastore.scores import ScoreCache
from datastore.selection import abilities
from datastore.selection.abilities import Places, References
from datastore.selection.rules import named, needs_task, refused
from datastore.tasks import Tasks

COMPARED = 4
"""Pools whose places a process remembers."""


@dataclass(frozen=True)
class AbilityScoring:
    """Scores that are made of embeddings."""

    catalog: Catalog
    tasks: Tasks
    projectors: Projectors
    embeddings: Embeddings
    cache: ScoreCache
    _compared: Remembered[References] = field(default_factory=lambda: Remembered(COMPARED), compare=False, repr=False)

    # A method's scores ------------------------------------------------------------------------------------------------

    def pool(self, query: Query, *, path: str) -> Sequence[str]:
        """The datasets whose rows the projector has placed."""
        owners = self.embeddings.owners(self._projector(query, path))
        return [owner for owner in owners if owner.startswith("ds_")]

    def resolved(self, query: Query, *, datasets: Sequence[str], tasks: Sequence[str], path: str) -> dict[str, Any]:
        """The projector and what is said of its space. Raises `NotFound`, `Ambiguous`, `Conflict`, `InvalidInput`."""
        projector = self._projector(query, path)
        found = {"by": projector, "neighbours": query.neighbours, "beta": query.beta}
        self._check(projector, [*datasets, *tasks], query.capabilities)
        return {**found, "capabilities": list(dict.fromkeys(query.capabilities))}

    def check(self, recipe: SelectionRecipe) -> None:
        """Raise as `resolved` does."""
        if recipe.by is None:
            raise refused("by", "a recipe of method=cods names its projector")
        if (id := self.projectors.trained(recipe.by).id) != recipe.by:
            raise named("by", recipe.by, id=id)
        if needs_task(recipe) and (recipe.beta is None or (recipe.strategy != "prototype" and not recipe.neighbours)):
            raise refused("neighbours", "a recipe of method=cods says how many neighbours count, and what beta is")
        self._check(recipe.by, [*recipe.datasets, *recipe.tasks], recipe.capabilities)

    def known(self, recipe: SelectionRecipe) -> list[TaskScores]:
        """The scores of each task over the pool, or of the capabilities that are asked for."""
        keys = [self._key(recipe, task) for task in _asked(recipe)]
        found = [self.cache.get(key) for key in keys]
        known = [scores for scores in found if scores is not None]
        return known if len(known) == len(keys) else self._scored(recipe)

    def work(self, recipe: SelectionRecipe, on_rows: Callable[[int], None]) -> None:
        """Have the scores cached."""
        self.known(recipe)
        on_rows(self.rows(recipe))

    def rows(self, recipe: SelectionRecipe) -> int:
        """Rows of the pool."""
        sizes = self.catalog.dataset_sizes()
        return sum(sizes[dataset] for dataset in recipe.datasets)

    def units(self, recipe: SelectionRecipe) -> int:
        """What the work counts: rows."""
        return self.rows(recipe)

    def subtasks(self, recipe: SelectionRecipe) -> dict[str, tuple[str, ...]]:
        """Names of each task's subtasks, as the scores number them."""
        return {task: self.tasks.subtasks(task) for task in recipe.tasks}

    def reasons(self, recipe: SelectionRecipe) -> dict[int, str]:
        """The pool's rows without a place."""
        return dict.fromkeys(np.flatnonzero(~self.known(recipe)[0].valid).tolist(), ABSENT)

    def notes(self, recipe: SelectionRecipe) -> list[str]:
        """Rows of tasks that have no place, and rows of the pool that lie where a task's row does."""
        if not recipe.tasks:
            return []
        references = self.references(recipe)
        total = sum(self.catalog.task(task).validation for task in recipe.tasks)
        missing, notes = total - len(references.embedding), list[str]()
        if missing:
            notes.append(f"{missing:,} of {total:,} validation rows have no place, and are left out")
        if recipe.dedupe is not None and references.closest is not None:
            valid = self.known(recipe)[0].valid
            same = int((references.closest[valid] > recipe.dedupe).sum())
            if same:
                notes.append(
                    f"{same:,} rows of the pool lie where a row of the task does (cosine over {recipe.dedupe:g}), and "
                    "are passed over: a projector that tells capabilities well puts many rows in one place"
                )
        return notes

    def references(self, recipe: SelectionRecipe) -> References:
        """Where a recipe's pool is, and the rows of its tasks in the order of their turns."""
        key = (recipe.by, tuple(recipe.datasets), tuple(recipe.tasks))
        return self._compared.get(key, self.catalog.state(), lambda: self._references(recipe))

    # ------------------------------------------------------------------------------------------------------------------

    def _references(self, recipe: SelectionRecipe) -> References:
        pool = self._pool(recipe)
        found = [(number, *self._target(recipe, task)) for number, task in enumerate(recipe.tasks)]
        order = abilities.turns([(number, subtask) for number, _, own in found for subtask in own.tolist()])
        dim = pool.embedding.shape[1]
        rows = np.concatenate([np.empty((0, dim), np.float32), *(places.embedding for _, places, _ in found)])[order]
        task = np.concatenate([np.empty(0, np.int16), *(np.full(len(own), n, np.int16) for n, _, own in found)])[order]
        subtask = np.concatenate([np.empty(0, np.int16), *(own for _, _, own in found)])[order]
        closest = abilities.closest(pool.embedding, rows) if len(rows) else None
        return References(pool.embedding, rows, task, subtask, closest)

    def _scored(self, recipe: SelectionRecipe) -> list[TaskScores]:
        pool = self._pool(recipe)
        scores = list(self._scores(recipe, pool))
        for task, found in zip(_asked(recipe), scores, strict=True):
            self.cache.put(self._key(recipe, task), found, made_from=self._made_from(recipe, task))
        return scores

    def _scores(self, recipe: SelectionRecipe, pool: Places) -> Iterator[TaskScores]:
        if recipe.strategy == "capability":
            names = self.projectors.capabilities(recipe.by or "")
            yield abilities.capability(pool, [names.index(name) for name in recipe.capabilities])
            return
        for task in recipe.tasks:
            references, subtasks = self._target(recipe, task)
            beta = recipe.beta or 0.0
            if recipe.strategy == "prototype":
                yield abilities.prototype(pool, references, beta=beta)
            else:
                yield abilities.nearest(pool, references, subtasks, neighbours=recipe.neighbours or 1, beta=beta)

    def _pool(self, recipe: SelectionRecipe) -> Places:
        return abilities.joined([self.embeddings.of(recipe.by or "", dataset) for dataset in recipe.datasets])

    def _target(self, recipe: SelectionRecipe, task: str) -> tuple[Places, Subtasks]:
        """The rows of a task that have a place, and their subtasks. Raises `Conflict` where there are none."""
        places = self.embeddings.of(recipe.by or "", task)
        if not places.present.any():
            raise Conflict(f"none of the validation rows of {task} has a place: its streams have none of them")
        return places[places.present], self._numbers(task)[places.present]

    def _numbers(self, task: str) -> Subtasks:
        """The number of each validation row's subtask (rows,)."""
        names = self.tasks.subtasks(task)
        return np.array([names.index(row.subtask) for row in self.tasks.validation(task)], np.int16)

    def _projector(self, query: Query, path: str) -> str:
        """The projector that a query means: the one it names, or the only one. Raises `NotFound`, `Conflict`."""
        if query.by is not None:
            return self.projectors.trained(query.by).id
        known = select(JobRow.id).where(JobRow.kind == "projector", JobRow.status == "succeeded")
        with self.catalog.reading() as session:
            found = list(session.scalars(known.order_by(JobRow.id)))
        if not found:
            raise Conflict(
                "method=cods selects by a projector, and there is none: POST /projectors with the streams and the "
                "annotations of rows whose capabilities are known"
            )
        if len(found) > 1:
            raise advice.several_sources(query, found, path, noun="projectors")
        return found[0]

    def _check(self, projector: str, owners: Sequence[str], asked: Sequence[str]) -> None:
        for owner in owners:
            self.embeddings.only(projector, owner)
        names = self.projectors.capabilities(projector)
        unknown = next((name for name in asked if name not in names), None)
        if unknown is not None:
            raise refused("capabilities", f"{projector} knows no {unknown!r}; it tells {', '.join(names)}")

    def _made_from(self, recipe: SelectionRecipe, task: str | None) -> dict[str, Any]:
        """All that scores depend on; the names of other tasks do not."""
        owners = [*recipe.datasets, *([task] if task else [])]
        return {
            "method": recipe.method,
            "texts": owners,  # with which the scores go
            "embeddings": [self.embeddings.only(recipe.by or "", owner) for owner in owners],
            "strategy": recipe.strategy if recipe.strategy in {"prototype", "capability"} else "nearest",
            "neighbours": recipe.neighbours,
            "beta": recipe.beta,
            "capabilities": recipe.capabilities,
        }

    def _key(self, recipe: SelectionRecipe, task: str | None) -> str:
        return content_id("score", self._made_from(recipe, task))


def _asked(recipe: SelectionRecipe) -> list[str | None]:
    """What scores are for: tasks, or capabilities and so none."""
    return list(recipe.tasks) or [None]
