"""Attributions: which training examples speak for, and against, what a model has said.

A request's rows are questions: the worker computes their features as those of a task are computed, at every checkpoint
of the pool's (worker/kinds/attributions.py), and keeps them under their content; then each dataset is searched by
itself and what was found is merged. Everything here does without torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gradstore.types import (
    AnyJob,
    Attribution,
    AttributionRecipe,
    AttributionRequest,
    FeatureKind,
    InfluentialRow,
    ProblemItem,
    SearchReport,
)
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore.catalog import Catalog
from datastore.datasets import Datasets
from datastore.errors import InvalidInput, refusal
from datastore.features import LIKE_WITH_LIKE, Features
from datastore.identity import content_id
from datastore.index import INDEX_ROWS, Index, Indexes, available
from datastore.influence import Mask, everywhere
from datastore.leases import Jobs, NewShard
from datastore.parameters import Query
from datastore.questions import QuestionFeature, Questions
from datastore.recipes import Recipes
from datastore.rows import Example
from datastore.schema import JobRow
from datastore.search import Ends, Extreme, Pool, exact
from datastore.segments import FeatureView
from datastore.shapes import BadRow, example
from datastore.strict_json import canonical, parse

QUESTION = "question"
"""Origin of a row that says none; it names nothing."""
TEXT = 500
"""Characters of an example's text that an answer holds."""


@dataclass(frozen=True)
class Answered:
    """A question's features, one per checkpoint, or the reason why it has none."""

    features: Sequence[QuestionFeature]
    reason: str | None = None


@dataclass(frozen=True)
class Attributions:
    """The attributions of a catalog."""

    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    recipes: Recipes
    features: Features
    questions: Questions
    indexes: Indexes

    def start(self, request: AttributionRequest) -> tuple[AnyJob, bool]:
        """Start an attribution, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, `Ambiguous` and `GradientsMissing`.
        """
        rows = _examples(request)
        recipe, sets = self._resolve(request)
        parameters = _parameters(recipe)
        plan = {
            "recipe": recipe.model_dump(mode="json"),
            "feature_sets": sets,
            "model": self.catalog.checkpoint(recipe.checkpoints[0]).model,
            "questions": [[_key(each, checkpoint, parameters) for checkpoint in recipe.checkpoints] for each in rows],
        }
        meant = {**plan, "search": request.search, "text": request.text}
        pool = sum(self.catalog.dataset(dataset).rows for dataset in recipe.datasets)
        units = (len(rows) + pool) * len(recipe.checkpoints)
        return self.jobs.create(
            id=content_id("attr", meant),
            kind="attribution",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard(payload={}, units=units)],
            name=request.name,
            uses=[*recipe.datasets, *recipe.checkpoints],
        )

    def remove(self, reference: str) -> str:
        """Delete an attribution, and the features of its questions that no other one asks; returns its id."""

        def forget(session: Session, job: JobRow) -> None:
            others = select(JobRow.plan).where(JobRow.kind == "attribution", JobRow.id != job.id)
            kept = {key for plan in session.scalars(others) for key in _keys(plan)}
            self.questions.delete(set(_keys(job.plan)) - kept)

        return self.jobs.remove(reference, kind="attribution", before=forget)

    def sweep(self, *, older_than: float) -> int:
        """Remove what killed processes left unfinished, untouched for so many seconds; returns how many there were."""
        return self.indexes.sweep(older_than=older_than) + self.questions.sweep(older_than=older_than)

    def search(
        self,
        request: AttributionRequest,
        plan: dict[str, Any],
        answered: Sequence[Answered],
        *,
        on_rows: Callable[[int], None],
    ) -> tuple[list[Attribution], list[SearchReport]]:
        """What speaks for and against each question, and how it was found. `on_rows` hears of rows × checkpoints done.

        Raises `Damaged`, and `Conflict` where features have been deleted since the question was asked.
        """
        recipe = AttributionRecipe.model_validate(plan["recipe"])
        unit = _unit([each for each in answered if each.reason is None])
        found = [_Found([], []) for _ in unit]
        reports: list[SearchReport] = []
        done = 0
        for dataset, sets in plan["feature_sets"].items() if len(unit) else ():
            began = time.monotonic()
            views = self.features.views(sets)
            heard = _counted(on_rows, before=done, times=len(sets))
            index = self._index(views, recipe, unit, heard) if request.search == "auto" else None
            valid = everywhere([view.valid for view in views]) if index is None else index.valid
            pool = Pool(views, recipe.checkpoint_weights, valid & self._of_origins(dataset, recipe))
            ends = exact(pool, unit, recipe.k, on_rows=heard) if index is None else index.search(pool, unit, recipe.k)
            for each, own in zip(found, ends, strict=True):
                each.add(dataset, own)
            done += pool.rows * len(sets)
            on_rows(done)
            reports.append(_report(dataset, pool, index, seconds=time.monotonic() - began))
        answers = iter(found)
        return [
            self._attribution(each, next(answers) if each.reason is None else None, recipe.k, text=request.text)
            for each in answered
        ], reports

    def _resolve(self, request: AttributionRequest) -> tuple[AttributionRecipe, dict[str, list[str]]]:
        """The recipe, and the feature sets of each dataset, one per checkpoint. Raises as `start` does."""
        pools = self.recipes.pools(_query(request), path="/attributions")
        known = {origin for dataset in pools.sets for origin in self.catalog.dataset(dataset).origins}
        problems = [
            ProblemItem(pointer=f"/origins/{number}", detail=f"no example of the pool has the origin {origin!r}")
            for number, origin in enumerate(request.origins)
            if origin not in known
        ]
        if problems:
            raise InvalidInput(
                f"{problems[0].detail}; it has {', '.join(map(repr, sorted(known)[:20]))}", errors=problems
            )
        kind: FeatureKind = pools.parameters["kind"]
        if kind == "embedding":
            detail = (
                "an attribution is of the model that has answered, and embeddings are another model's: leave kind out"
            )
            raise refusal(detail, "/kind")
        recipe = AttributionRecipe(
            datasets=list(pools.sets),
            checkpoints=list(pools.checkpoints),
            checkpoint_weights=pools.weights,
            run=pools.run,
            query_kind=kind if kind in LIKE_WITH_LIKE else request.query_kind,
            origins=sorted(set(request.origins)),
            k=request.k,
            **pools.parameters,
        )
        self._refuse_without_moments(recipe)
        return recipe, {dataset: [each.id for each in sets] for dataset, sets in pools.sets.items()}

    def _refuse_without_moments(self, recipe: AttributionRecipe) -> None:
        if recipe.query_kind != "adam":
            return
        for checkpoint in map(self.catalog.checkpoint, recipe.checkpoints):
            if not checkpoint.has_moments:
                detail = f"{checkpoint.id} has no Adam moments: leave query_kind out, or ask for sgd or sign"
                raise refusal(detail, "/query_kind")

    def _index(
        self,
        views: Sequence[FeatureView],
        recipe: AttributionRecipe,
        unit: NDArray[np.float64],
        on_rows: Callable[[int], None],
    ) -> Index | None:
        """The index of a large pool, built now where there is none; None where every row is to be read."""
        if views[0].rows < INDEX_ROWS or not available():
            return None
        index = self.indexes.get(views, recipe.checkpoint_weights)
        if index is not None:
            return index
        pool = Pool(views, recipe.checkpoint_weights, everywhere([view.valid for view in views]))
        if np.count_nonzero(pool.wanted) < INDEX_ROWS:
            return None
        return self.indexes.build(pool, unit, on_rows=on_rows)

    def _of_origins(self, dataset: str, recipe: AttributionRecipe) -> Mask | np.bool_:
        """Which rows the filter by origin lets through (n,); True where there is none."""
        if not recipe.origins:
            return np.True_
        labels = self.datasets.label_columns(dataset)
        return np.isin(labels.origins, recipe.origins)[labels.origin]

    def _attribution(self, answered: Answered, found: _Found | None, k: int, *, text: bool) -> Attribution:
        last = answered.features[-1] if answered.features else None
        most, least = ([], []) if found is None else found.best(k)
        return Attribution(
            reason=answered.reason,
            loss=None if last is None else last.loss,
            tokens=0 if last is None else last.tokens,
            most=[self._row(rank, hit, text=text) for rank, hit in enumerate(most, start=1)],
            least=[self._row(rank, hit, text=text) for rank, hit in enumerate(least, start=1)],
        )

    def _row(self, rank: int, hit: _Hit, *, text: bool) -> InfluentialRow:
        found = next(iter(self.datasets.examples(hit.dataset, hit.row, hit.row + 1)))
        return InfluentialRow(
            rank=rank,
            dataset=hit.dataset,
            row=hit.row,
            id=found.id,
            origin=found.origin,
            score=hit.score,
            per_checkpoint=hit.parts,
            text=_text(found) if text else None,
        )


@dataclass(frozen=True)
class _Hit:
    """A row of a dataset that was found."""

    dataset: str
    row: int
    parts: list[float]

    @property
    def score(self) -> float:
        return sum(self.parts)


@dataclass(frozen=True)
class _Found:
    """What was found for a question in the datasets so far."""

    most: list[_Hit]
    least: list[_Hit]

    def add(self, dataset: str, ends: Ends) -> None:
        self.most.extend(_hits(dataset, ends.most))
        self.least.extend(_hits(dataset, ends.least))

    def best(self, k: int) -> tuple[list[_Hit], list[_Hit]]:
        """The most extreme of all datasets at either end."""
        return sorted(self.most, key=lambda hit: -hit.score)[:k], sorted(self.least, key=lambda hit: hit.score)[:k]


def _hits(dataset: str, extreme: Extreme) -> list[_Hit]:
    return [_Hit(dataset, *each) for each in zip(extreme.rows.tolist(), extreme.parts.tolist(), strict=True)]


def _report(dataset: str, pool: Pool, index: Index | None, *, seconds: float) -> SearchReport:
    return SearchReport(
        dataset=dataset,
        method="exact" if index is None else "index",
        rows=int(pool.wanted.sum()),
        index=None if index is None else index.id,
        recall=None if index is None else index.measured.recall,
        candidates=None if index is None else index.measured.candidates,
        seconds=seconds,
    )


def _examples(request: AttributionRequest) -> list[Example]:
    """The request's rows as examples. Raises `InvalidInput` naming those that are none."""
    found, problems = [], []
    for number, row in enumerate(request.rows):
        try:
            found.append(question(parse(canonical(row))))
        except (BadRow, ValueError) as error:  # not JSON: numbers that are none, half a surrogate pair, too deep
            problems.append(ProblemItem(pointer=f"/rows/{number}", detail=str(error)))
    if problems:
        first = problems[0]
        raise InvalidInput(f"{first.pointer}: {first.detail}", errors=problems)
    return found


def question(row: dict[str, Any]) -> Example:
    """A row of a request as an example. Raises `BadRow`."""
    return example(row, file=QUESTION)[0]


def _query(request: AttributionRequest) -> Query:
    own = {"rows", "datasets", "origins", "k", "search", "text", "checkpoints", "query_kind", "name"}
    asked = request.model_dump(exclude=own)
    return Query(tasks=(), datasets=request.datasets, checkpoints=request.checkpoints or (), **asked)


def _parameters(recipe: AttributionRecipe) -> dict[str, Any]:
    """What a question's feature depends on, beside its text and the checkpoint."""
    names = {
        "weights", "adam", "reduction", "projection", "projection_version", "seed", "dim", "template", "max_length",
        "precision", "quantisation",
    }  # fmt: skip
    found = recipe.model_dump(mode="json", include=names)
    adam = (found["adam"] or "less") if recipe.query_kind == "adam" else None
    form = {"logodds_form": recipe.logodds_form} if recipe.query_kind == "logodds" else {}
    return {**found, **form, "kind": recipe.query_kind, "adam": adam}


def _key(example: Example, checkpoint: str, parameters: dict[str, Any]) -> str:
    turns = [[message.role, message.prefix, message.content] for message in example.messages]
    text = [turns, example.prompt, example.completion]
    return content_id("question", {"text": text, "checkpoint": checkpoint, **parameters})


def _keys(plan: dict[str, Any]) -> Iterator[str]:
    return (key for keys in plan["questions"] for key in keys)


def _unit(answered: Sequence[Answered]) -> NDArray[np.float64]:
    """The questions' features divided by their lengths: (questions, checkpoints, dim)."""
    rows = np.array([[each.feature for each in one.features] for one in answered], np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True) if len(rows) else rows


def _counted(on_rows: Callable[[int], None], *, before: int, times: int) -> Callable[[int], None]:
    """Count the rows of several datasets and checkpoints on."""
    return lambda done: on_rows(before + done * times)


def _text(example: Example) -> str:
    turns = [message.prefix + message.content for message in example.messages]
    text = "\n".join(turns or [example.prompt or "", example.completion or ""])
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
