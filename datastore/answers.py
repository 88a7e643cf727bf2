"""Answers of /select and /scores: scores turned into rows with their origins, and kept under the recipe's hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from gradstore import types
from gradstore.types import ScoredRow, SelectedRow, Selection, SelectionRecipe
from numpy.typing import NDArray

from datastore.catalog import Catalog
from datastore.catalog_states import Remembered
from datastore.datasets import Datasets, Origins, RowLabels, joined
from datastore.errors import Busy, Damaged, NotFound
from datastore.identity import content_id
from datastore.influence import NO_SUBTASK, Mask, TaskScores, everywhere
from datastore.recipes import Recipes, Sources
from datastore.rows import Example
from datastore.schema import SelectionRow
from datastore.scoring import Scoring
from datastore.selection.choose import Chosen, Lengths, Material, choose, chosen_from
from datastore.selection.contamination import DEFAULT_NGRAM, Contamination, NgramIndex, Overlap
from datastore.selection.diversity import Reader
from datastore.selection.features import NearestShots, PoolFeatures
from datastore.selection.make_up import Labelled, left_out, locate
from datastore.selection.rules import needs_features, needs_task, refused
from datastore.selection.tasks import CombinedScores, combine
from datastore.selection.top import candidates, fewer, wanted
from datastore.selection.words import text_of
from datastore.selection_files import SCHEMA, SelectionFiles
from datastore.shapes import example
from datastore.strict_json import parse

LONGEST_WAIT = 30.0  # seconds for the selection before, where rows are compared by their features
PAGE, PAGES = 100, 256  # rows of a page, and such pages, that are remembered: some 10 MB
REPORTED = 20
"""Overlaps with tasks' rows that an answer tells."""
REPORTED_TWINS = 100
"""Rows like others, which were passed over, that an answer tells."""
_Names = Sequence[tuple[str | None, tuple[str, ...]]]


@dataclass(frozen=True)
class PoolLabels:
    """The rows of one or several datasets, one after the other."""

    datasets: Sequence[str]
    labels: Sequence[RowLabels]

    @property
    def sizes(self) -> list[int]:
        """Rows of each dataset."""
        return [len(labels.origin) for labels in self.labels]

    @cached_property
    def origins(self) -> Labelled:
        """Origin of every row."""
        found = joined([Origins(labels.origins, labels.origin) for labels in self.labels])
        return Labelled(found.names, found.codes)

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """Own id of every row, or null."""
        return pa.chunked_array([labels.ids for labels in self.labels], pa.string())


@dataclass(frozen=True)
class _Near:
    """Which shots rows are nearest to."""

    shots: int
    chosen: NDArray[np.int64]
    """Of each chosen row (k,)."""
    passed: Chosen
    """The first rows that were passed over."""
    shot: NDArray[np.int64]
    """Of each of these."""


@dataclass(frozen=True)
class Answers:
    """Selections and score vectors."""

    catalog: Catalog
    datasets: Datasets
    recipes: Recipes
    scoring: Scoring
    ngrams: NgramIndex
    files: SelectionFiles
    _comparing: Lock = field(default_factory=Lock, compare=False, repr=False)
    """Held while rows are compared with each other: what that takes is taken once."""
    _pages: Remembered[Selection] = field(default_factory=lambda: Remembered(PAGES), compare=False, repr=False)

    def find(self, recipe: SelectionRecipe, *, limit: int, after: int = 0) -> Selection | None:
        """The selection that this recipe has given before; None where there is none, or its rows are lost.

        Asked again before anything was committed to the catalog, a short page is not read again.
        """
        id = selection_id(recipe)
        try:
            if limit > PAGE or not self.files.path(id).exists():
                return self.read(id, limit=limit, after=after)
            read = partial(self.read, id, limit=limit, after=after)
            return self._pages.get((id, limit, after), self.catalog.state(), read)
        except (NotFound, Damaged):
            return None

    def read(self, reference: str, *, limit: int, after: int = 0) -> Selection:
        """A selection and a page of its rows, from rank `after` + 1 on. Raises `NotFound`."""
        return self._answer(self.catalog.selection(reference), limit=limit, after=after)

    def page(self, *, limit: int, after: str | None) -> tuple[list[Selection], bool]:
        """A page of selections, without their rows."""
        rows, has_more = self.catalog.selections(limit=limit, after=after)
        return [self._answer(row, limit=0, after=0) for row in rows], has_more

    def select(
        self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores], *, limit: int, after: int = 0
    ) -> Selection:
        """Choose rows by their scores and record the selection. Raises `Conflict` where no row can be chosen.

        One selection whose rows are compared by their features is made at a time; who asks for the same meanwhile is
        given what was made. Raises `Busy` where that takes longer than `LONGEST_WAIT`.
        """
        if needs_features(recipe) is None:
            return self._select(recipe, sources, scores, limit=limit, after=after)
        with self._alone():
            known = self.find(recipe, limit=limit, after=after)
            return self._select(recipe, sources, scores, limit=limit, after=after) if known is None else known

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Held while rows are compared with each other. Raises `Busy`."""
        if not self._comparing.acquire(timeout=LONGEST_WAIT):
            raise Busy(
                "another selection whose rows are compared by their features is still being made, and one is made at a "
                "time: ask again in a minute"
            )
        try:
            yield
        finally:
            self._comparing.release()

    def _select(
        self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores], *, limit: int, after: int
    ) -> Selection:
        pool = self._pool(recipe)
        excluded = self._excluded(recipe, pool)
        valid = everywhere([task.valid for task in scores])
        among = candidates(valid, excluded)
        with self._material(recipe, sources, pool) as material:
            k = len(material.lengths.wanted) if material.lengths is not None else None
            k = wanted(valid, excluded, pct=recipe.pct, k=recipe.k if k is None else k)
            chosen = choose(scores, recipe, among, k, material)
            contamination = self._contamination(recipe, pool, chosen, material.contamination)
            near = None
            if recipe.strategy == "shots":
                near = self._near(recipe, sources, chosen, vector(scores, recipe), material.features)
        summary = {
            "count": len(chosen.rows),
            "pool": len(valid) if excluded is None else int((~excluded).sum()),
            "left_out": left_out(self.scoring.reasons(recipe, sources), excluded),
            "origins": pool.origins.counts(chosen.rows),
            "pool_origins": pool.origins.counts(),
            "contamination": None if contamination is None else contamination.model_dump(mode="json"),
            "shots": None if near is None else self._report(recipe, pool, chosen, near, k).model_dump(mode="json"),
            "notes": [
                *self.scoring.notes(recipe, sources),
                *self._unknown_ids(recipe, pool),
                *fewer(recipe.k, k),
                *chosen.notes,
            ],
        }
        id = selection_id(recipe)
        table = _table(pool, chosen, self._names(recipe, sources))
        if near is not None:
            table = table.append_column("shot", pa.array(near.chosen))
        self.files.write(id, table)
        row = self.catalog.add_selection(id=id, recipe=recipe.model_dump(mode="json"), summary=summary)
        return self._answer(row, limit=limit, after=after)

    def scored(
        self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores], *, start: int, stop: int
    ) -> list[ScoredRow]:
        """Rows `start:stop` of the score vector, in the order of the pool."""
        combined = vector(scores, recipe)
        size = len(combined.score)
        rows = np.arange(min(start, size), min(stop, size))
        table = _table(self._pool(recipe), chosen_from(combined, rows), self._names(recipe, sources))
        found = []
        for row, valid in zip(table.to_pylist(), combined.valid[rows].tolist(), strict=True):
            missing = {} if valid else {"score": None, "task": None, "subtask": None}
            found.append(ScoredRow.model_validate(row | missing))
        return found

    def score_table(self, recipe: SelectionRecipe, sources: Sources, scores: Sequence[TaskScores]) -> pa.Table:
        """The whole score vector as a table, a null score where a row has no feature."""
        combined = vector(scores, recipe)
        everything = chosen_from(combined, np.arange(len(combined.score)))
        table = _table(self._pool(recipe), everything, self._names(recipe, sources)).drop_columns(["rank"])
        masked = pa.array(combined.score, mask=~combined.valid)
        return table.set_column(table.schema.get_field_index("score"), "score", masked)

    def chosen(self, selection: str) -> pa.Table:
        """All rows of a selection as a table, best first. Raises `NotFound`."""
        return self.files.table(self.catalog.selection(selection).id)

    def origins(self, recipe: SelectionRecipe) -> Origins:
        """The origin of every row of a recipe's pool."""
        return joined([self.datasets.origins(dataset) for dataset in recipe.datasets])

    def rows(self, selection: str) -> Iterator[SelectedRow]:
        """All rows of a selection, best first."""
        return self.files.rows(self.catalog.selection(selection).id)

    def lines(self, selection: str) -> Iterator[bytes]:
        """The original rows of a selection, best first, each as one line without its end."""
        return (line for _, line in self.rows_and_lines(selection))

    def rows_and_lines(self, selection: str) -> Iterator[tuple[SelectedRow, bytes]]:
        """All rows of a selection, best first, each with its original line, without its end."""
        return self._with_lines(self.rows(selection))

    def rows_and_examples(self, selection: str) -> Iterator[tuple[SelectedRow, Example]]:
        """All rows of a selection, best first, each with the example that it is."""
        return self.with_examples(self.rows(selection))

    def with_examples(self, rows: Iterable[SelectedRow]) -> Iterator[tuple[SelectedRow, Example]]:
        """Some rows of selections, each with the example that it is."""
        for row, line in self._with_lines(rows):
            yield row, example(parse(line), file=row.origin)[0]

    def _with_lines(self, rows: Iterable[SelectedRow]) -> Iterator[tuple[SelectedRow, bytes]]:
        with ExitStack() as stack:
            readers: dict[str, Callable[[int], bytes]] = {}
            for row in rows:
                if row.dataset not in readers:
                    readers[row.dataset] = stack.enter_context(self.datasets.reader(row.dataset))
                yield row, readers[row.dataset](row.row)

    def table(self, selection: str) -> Path:
        """The Parquet file of a selection's rows: their places and scores."""
        return self.files.path(self.catalog.selection(selection).id)

    def remove(self, reference: str) -> str:
        """Delete a selection and return its id. Raises `NotFound`, `InUse`."""
        return self.catalog.remove(SelectionRow, reference, delete_files=self.files.remove)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return self.files.sweep(older_than=older_than) + self.ngrams.sweep(older_than=older_than)

    def _answer(self, row: SelectionRow, *, limit: int, after: int) -> Selection:
        data = self.files.page(row.id, limit=limit, after=after) if limit else []
        return Selection.model_validate(
            {
                "id": row.id,
                "name": row.name,
                "recipe": row.recipe,
                **row.summary,
                "data": data,
                "has_more": after + len(data) < row.summary["count"],
                "created_at": row.created_at,
            }
        )

    def _pool(self, recipe: SelectionRecipe) -> PoolLabels:
        return PoolLabels(recipe.datasets, [self.datasets.label_columns(dataset) for dataset in recipe.datasets])

    def _names(self, recipe: SelectionRecipe, sources: Sources) -> _Names:
        """Each task of the scores and its subtasks, as they are numbered."""
        if not needs_task(recipe):
            return [(None, ())]
        known = self.scoring.subtasks(recipe, sources)
        return [(task, known[task]) for task in recipe.tasks]

    def _excluded(self, recipe: SelectionRecipe, pool: PoolLabels) -> Mask | None:
        """Rows to leave out: those with the text of an excluded example, or an excluded id (n,); None for none."""
        if not recipe.exclude and not recipe.exclude_ids:
            return None
        excluded: Mask = np.zeros(sum(pool.sizes), bool)
        if recipe.exclude:
            unwanted = np.concatenate([self._text_keys(reference) for reference in recipe.exclude])
            excluded |= np.isin(np.concatenate([self._text_keys(dataset) for dataset in recipe.datasets]), unwanted)
        if recipe.exclude_ids:
            excluded |= np.asarray(pc.is_in(pool.ids, value_set=pa.array(recipe.exclude_ids, pa.string())))
        return excluded

    def _unknown_ids(self, recipe: SelectionRecipe, pool: PoolLabels) -> list[str]:
        """What to say where ids to leave out are no row's."""
        if not recipe.exclude_ids:
            return []
        known = pc.is_in(pa.array(recipe.exclude_ids, pa.string()), value_set=pool.ids.combine_chunks())
        unknown = [id for id, found in zip(recipe.exclude_ids, known.to_pylist(), strict=True) if not found]
        return [f"no row has {len(unknown):,} of the ids to leave out, such as {unknown[0]!r}"] if unknown else []

    def _text_keys(self, reference: str) -> NDArray[np.uint64]:
        """A key of the text of each example of a dataset or selection (n,)."""
        if not reference.startswith("sel_"):
            return self.datasets.text_keys(reference)
        places = self.files.table(reference, columns=["dataset", "row"])
        keys = [np.empty(0, np.uint64)]
        for dataset in pc.unique(places["dataset"]).to_pylist():
            rows = places.filter(pc.equal(places["dataset"], dataset))["row"].to_numpy()
            keys.append(self.datasets.text_keys(dataset)[rows])
        return np.concatenate(keys)

    @contextmanager
    def _material(self, recipe: SelectionRecipe, sources: Sources, pool: PoolLabels) -> Iterator[Material]:
        """What a choice looks at beside scores; its texts are read while the context is open."""

        @cache
        def stored() -> PoolFeatures:
            return PoolFeatures(self.scoring.rows(sources), recipe.checkpoint_weights)

        references = self.scoring.references(recipe)
        tasks = dict.fromkeys([*recipe.tasks, *recipe.decontaminate])
        with ExitStack() as stack:
            readers = [stack.enter_context(self.datasets.example_reader(dataset)) for dataset in recipe.datasets]

            def text(row: int) -> str:
                ((number, place),) = locate([row], pool.sizes)
                return text_of(readers[number](place))

            yield Material(
                origins=pool.origins,
                text=text,
                features=lambda rows: stored().unit(rows) if references is None else references.pool[list(rows)],
                contamination=Contamination(
                    text, [self.ngrams.of(task, recipe.ngram or DEFAULT_NGRAM) for task in tasks]
                ),
                lengths=self._lengths(recipe),
                references=references,
            )

    def _contamination(
        self, recipe: SelectionRecipe, pool: PoolLabels, chosen: Chosen, found: Contamination
    ) -> types.Contamination | None:
        """What the chosen rows share with tasks' rows."""
        if not found.tasks:
            return None
        rows = chosen.rows.tolist()
        kept = [(row, overlap) for row, overlap in zip(rows, found.of_all(rows), strict=True) if overlap is not None]
        known = {row for row, _ in kept}
        dropped = [pair for pair in found.found() if pair[0] not in known]
        return types.Contamination(
            tasks=[task.task for task in found.tasks],
            ngram=recipe.ngram or DEFAULT_NGRAM,
            chosen=len(kept),
            dropped=len(dropped),
            unchecked=sum(task.unchecked for task in found.tasks),
            overlaps=[self._overlap(pool, row, overlap) for row, overlap in (kept + dropped)[:REPORTED]],
        )

    def _overlap(self, pool: PoolLabels, row: int, overlap: Overlap) -> types.Overlap:
        ((number, place),) = locate([row], pool.sizes)
        return types.Overlap(
            dataset=pool.datasets[number],
            row=place,
            id=pool.ids[row].as_py(),
            task=overlap.task,
            split=overlap.split,
            task_row=overlap.row,
            text=overlap.text,
        )

    def _near(
        self, recipe: SelectionRecipe, sources: Sources, chosen: Chosen, scores: CombinedScores, features: Reader
    ) -> _Near:
        """The nearest shots of the rows that were chosen, and of the first that were passed over."""
        passed = np.array(list(chosen.passed_over)[:REPORTED_TWINS], np.int64)
        shots = NearestShots(self.scoring.shots(sources), recipe.checkpoint_weights)
        return _Near(
            shots=shots.count,
            chosen=shots.of(features, chosen.rows, chosen.task),
            passed=chosen_from(scores, passed),
            shot=shots.of(features, passed, scores.task[passed]),
        )

    def _report(
        self, recipe: SelectionRecipe, pool: PoolLabels, chosen: Chosen, near: _Near, budget: int
    ) -> types.ShotsReport:
        """What strategy=shots looked at."""
        ranks = {row: rank for rank, row in enumerate(chosen.rows.tolist(), 1)}
        rows = near.passed.rows.tolist()
        places = locate(rows, pool.sizes)
        passed = zip(
            rows, places, near.passed.score.tolist(), near.passed.task.tolist(), near.shot.tolist(), strict=True
        )
        return types.ShotsReport(
            shots=near.shots,
            budget=budget,
            near=len(ranks) + len(chosen.passed_over),
            passed_over=len(chosen.passed_over),
            rows=[
                types.PassedOver(
                    dataset=pool.datasets[number],
                    row=place,
                    id=pool.ids[row].as_py(),
                    score=score,
                    task=recipe.tasks[task],
                    shot=shot,
                    like=ranks[chosen.passed_over[row]],
                )
                for row, (number, place), score, task, shot in passed
            ],
        )

    def _lengths(self, recipe: SelectionRecipe) -> Lengths | None:
        """Supervised tokens of the pool's rows and of the selection to match. Raises `InvalidInput`, `Conflict`."""
        if recipe.match is None:
            return None
        model = self.read(recipe.match, limit=0).recipe
        if model.datasets != recipe.datasets:
            raise refused("match", f"{recipe.match} was chosen from other datasets: leave dataset out")
        if not model.checkpoints:
            raise refused("match", f"{recipe.match} was chosen without features, so the lengths of rows are not known")
        sources = self.recipes.sources(model)
        known = np.concatenate([views[0].tokens for views in self.scoring.rows(sources)])
        places = self.files.table(recipe.match, columns=["dataset", "row"]).to_pydict()
        sizes = [len(views[0].tokens) for views in self.scoring.rows(sources)]
        starts = dict(zip(recipe.datasets, accumulate(sizes, initial=0), strict=False))
        rows = [starts[dataset] + row for dataset, row in zip(places["dataset"], places["row"], strict=True)]
        return Lengths(known=known, wanted=known[rows])


def selection_id(recipe: SelectionRecipe) -> str:
    """The id of the selection that a recipe gives.

    What has its default says nothing: a parameter that is new in a later version changes no id.
    """
    return content_id("sel", recipe.model_dump(mode="json", exclude_defaults=True))


def vector(scores: Sequence[TaskScores], recipe: SelectionRecipe) -> CombinedScores:
    """One score a row. Raises `InvalidInput` where several tasks choose without one."""
    if recipe.combine == "round-robin" or recipe.combine == "balanced":  # noqa: PLR1714  # mypy narrows the type by ==
        detail = f"combine={recipe.combine} gives no row one score: ask for max or mean, or for each task by itself"
        raise refused("combine", detail)
    return combine(scores, recipe.combine or "max")


def _table(pool: PoolLabels, chosen: Chosen, names: _Names) -> pa.Table:
    places = locate(chosen.rows.tolist(), pool.sizes)
    tasks = chosen.task.tolist()
    origins = pa.array(pool.origins.names, pa.string())
    return pa.table(
        {
            "rank": np.arange(1, len(places) + 1),
            "dataset": [pool.datasets[dataset] for dataset, _ in places],
            "row": [row for _, row in places],
            "id": pool.ids.take(pa.array(chosen.rows)),
            "origin": origins.take(pa.array(pool.origins.codes[chosen.rows])),
            "score": chosen.score,
            "task": [names[task][0] for task in tasks],
            "subtask": [
                None if number == NO_SUBTASK else names[task][1][number]
                for task, number in zip(tasks, chosen.subtask.tolist(), strict=True)
            ],
        },
        schema=SCHEMA,
    )
