"""From scores and a recipe to the rows that are chosen.

Rows are met in the order in which the tasks want them (tasks.py). One that overlaps with a task's row, or is too much
like one taken before, is passed over; quotas and clusters say how many are taken from where; k-center takes the best
rows apart from each other; of those nearest to shots, others are not put in the place of what is passed over. Where
nothing is passed over the best rows are found without a walk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from math import ceil, sqrt

import numpy as np
from gradstore.types import SelectionRecipe
from numpy.typing import NDArray

from datastore.errors import Conflict
from datastore.influence import Floats, Mask, Subtasks, TaskScores
from datastore.selection import diversity, quotas
from datastore.selection.abilities import References
from datastore.selection.contamination import Contamination
from datastore.selection.diversity import Reader
from datastore.selection.draws import matched
from datastore.selection.duplicates import SAMPLE, FeatureDuplicates, TextDuplicates
from datastore.selection.make_up import Labelled
from datastore.selection.rules import dedupe_by, refused
from datastore.selection.shots import nearest, unlike_each_other
from datastore.selection.tasks import CombinedScores, Filter, Pick, Walks, accepted
from datastore.selection.top import Selected, ranking, top

AMONG = 4
"""Candidates of k-center and clusters for each row to choose."""


@dataclass(frozen=True)
class Chosen:
    """Rows in the order in which they were chosen, and why."""

    rows: Selected
    """(k,)"""
    score: Floats
    """The combined score, or that of the task that took the row (k,)."""
    task: NDArray[np.int16]
    """Number of the task that gave the score, or took the row (k,)."""
    subtask: Subtasks
    """Number of that task's subtask (k,)."""
    notes: list[str] = field(default_factory=list)
    """What did not go as asked."""
    passed_over: dict[int, int] = field(default_factory=dict)
    """`strategy=shots`: near rows that were passed over, best first, and the chosen row that each is most like."""


@dataclass(frozen=True)
class Material:
    """What is known of a pool's rows beside their scores; what a recipe does without is not asked for."""

    origins: Labelled
    text: Callable[[int], str]
    """What a row says."""
    features: Reader
    contamination: Contamination
    lengths: Lengths | None = None
    """For a matched draw."""
    references: References | None = None
    """Where the tasks' rows are, of a method that has places for rows."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of a pool's rows (n,), and those that are wanted (k,)."""

    known: NDArray[np.int32]
    wanted: NDArray[np.int32]


def choose(scores: Sequence[TaskScores], recipe: SelectionRecipe, among: Mask, k: int, material: Material) -> Chosen:
    """The rows that a recipe chooses of the candidates, at most `k`. Raises `Conflict` where there is none."""
    walks = Walks(scores, recipe.combine or "max", among)
    choice = _like_shots if recipe.strategy == "shots" else _choose
    chosen = choice(recipe, walks, k, material)
    if not len(chosen.rows):
        raise Conflict("no row can be chosen: all candidates overlap with a task's rows, or have no share in the quota")
    return chosen


def _choose(recipe: SelectionRecipe, walks: Walks, k: int, material: Material) -> Chosen:
    among = walks.among
    if material.lengths is not None:
        return _matched(recipe, _one_score(walks), among, material, material.lengths)
    keep = _filter(recipe, walks, material, k)
    notes: list[str] = []
    if recipe.strategy == "k-center":
        notes += [f"of {k:,} rows instead of among={recipe.among:,}"] if recipe.among and recipe.among < k else []
        return of_tasks(walks, _apart(recipe, walks, keep, k, material), notes)
    if recipe.strategy == "nearest" and material.references is not None:
        return _of_references(walks, keep, k, material.references)
    if recipe.strategy == "clusters":
        picks = _of_clusters(recipe, walks, keep, k, material, notes)
    elif recipe.quota is not None:
        picks = _of_origins(recipe, walks, keep, k, material, notes)
    elif walks.combined is not None and keep is _everything:
        return _of_combined(walks.combined, top(walks.combined.score, among, k))
    else:
        picks = list(islice(walks.accepted(among, (), keep), k))
    if len(picks) < k:
        notes.append(f"{len(picks):,} rows instead of {k:,}: of the others none could be taken")
    if walks.combined is not None:
        taken = np.zeros(len(among), bool)
        taken[[row for row, _ in picks]] = True
        return _of_combined(walks.combined, ranking(walks.combined.score, taken), notes)
    return of_tasks(walks, picks, notes)


def chosen_from(combined: CombinedScores, rows: Selected) -> Chosen:
    """Rows with their combined scores."""
    return _of_combined(combined, rows)


def of_tasks(walks: Walks, picks: Sequence[Pick], notes: Sequence[str] = ()) -> Chosen:
    """Rows that one task each has taken: with its score, or the combined one where there is one."""
    pairs = np.array(picks, np.int64).reshape(-1, 2)
    rows, tasks = pairs[:, 0], pairs[:, 1]
    if walks.combined is not None:
        return _of_combined(walks.combined, rows, notes)
    return Chosen(
        rows=rows,
        score=np.stack([task.score for task in walks.scores])[tasks, rows],
        task=tasks.astype(np.int16),
        subtask=np.stack([task.subtask for task in walks.scores])[tasks, rows],
        notes=list(notes),
    )


def _of_combined(combined: CombinedScores, rows: Selected, notes: Sequence[str] = ()) -> Chosen:
    return Chosen(rows, combined.score[rows], combined.task[rows], combined.subtask[rows], list(notes))


def _one_score(walks: Walks) -> CombinedScores:
    if walks.combined is None:
        raise ValueError("a draw has one score a row")
    return walks.combined


def _matched(
    recipe: SelectionRecipe, drawn: CombinedScores, among: Mask, material: Material, lengths: Lengths
) -> Chosen:
    """A matched draw; rows that overlap with a task, where they are to be left out, are drawn again."""
    rows = _without_overlaps(
        recipe, material, among, lambda left: matched(lengths.known, drawn.score, left, lengths.wanted)
    )
    missed = (Counter(lengths.wanted.tolist()) - Counter(lengths.known[rows].tolist())).total()
    notes = [f"{missed:,} of {len(lengths.wanted):,} rows could not be matched: no row of their length was left"]
    return _of_combined(drawn, rows, notes if missed else [])


def _without_overlaps(
    recipe: SelectionRecipe, material: Material, among: Mask, take: Callable[[Mask], Selected]
) -> Selected:
    """What is taken among rows; those that overlap with a task, where they are to be left out, are taken out of these,
    and it is taken anew.
    """
    rows = take(among)
    while recipe.exclude_contaminated:
        overlaps = material.contamination.of_all(rows.tolist())
        unwanted = rows[[overlap is not None for overlap in overlaps]]
        if not len(unwanted):
            break
        among = among.copy()
        among[unwanted] = False
        rows = take(among)
    return rows


def _like_shots(recipe: SelectionRecipe, walks: Walks, k: int, material: Material) -> Chosen:
    """The `k` rows nearest to the shots less those too much like one before, in whose place nothing is put."""
    scores, among = _one_score(walks), walks.among
    by, seed = recipe.nearness or "max_cosine", recipe.selection_seed or 0
    rows = _without_overlaps(recipe, material, among, lambda left: nearest(scores.score, left, k, by=by, seed=seed))
    found = unlike_each_other(material.features, rows.tolist(), 1.0 if recipe.tau is None else recipe.tau)
    notes = [f"{len(rows):,} rows instead of {k:,}: of the others none could be taken"] if len(rows) < k else []
    if found.twins:
        alike = f"{len(found.twins):,} of the nearest have a cosine over {recipe.tau:g} with one taken before"
        notes.append(f"{len(found.rows):,} rows instead of {k:,}: {alike}, and nothing is put in their place")
    taken = _of_combined(scores, np.array(found.rows, np.int64), notes)
    return replace(taken, passed_over=found.twins)


def _everything(row: int) -> bool:  # noqa: ARG001 - a filter
    return True


def _of_references(walks: Walks, keep: Filter, k: int, references: References) -> Chosen:
    """Rows that the tasks' own rows take in turns, each for the task and subtask of the row that took it."""
    pairs = np.array(list(islice(accepted(references.walk(walks.among), keep), k)), np.int64).reshape(-1, 2)
    rows, task = pairs[:, 0], references.task[pairs[:, 1]]
    score = np.stack([each.score for each in walks.scores])[task, rows]
    notes = [f"{len(rows):,} rows instead of {k:,}: of the others none could be taken"] if len(rows) < k else []
    return Chosen(rows, score, task, references.subtask[pairs[:, 1]], notes)


def _filter(recipe: SelectionRecipe, walks: Walks, material: Material, k: int) -> Filter:
    """Keep the rows that overlap with no task and are like none kept before; to keep a row is to take it."""
    filters: list[Filter] = []
    if recipe.exclude_contaminated:
        filters.append(lambda row: material.contamination.of(row) is None)
    near = material.references.closest if material.references is not None else None
    if near is not None and recipe.dedupe is not None:
        limit = recipe.dedupe
        filters.append(lambda row: bool(near[row] <= limit))
    ahead = (row for row, _ in walks.accepted(walks.among, (), _everything))
    if recipe.dedupe is not None and dedupe_by(recipe) == "text":
        filters.append(TextDuplicates(material.text, recipe.dedupe, first=islice(ahead, SAMPLE)).keep)
    elif recipe.dedupe is not None:
        filters.append(FeatureDuplicates(material.features, recipe.dedupe, ahead, rows=k).keep)
    if not filters:
        return _everything
    return lambda row: all(keep(row) for keep in filters)


def _candidates(recipe: SelectionRecipe, walks: Walks, keep: Filter, k: int) -> list[Pick]:
    """The best rows, of which k-center and clusters choose."""
    wanted = max(k, AMONG * k if recipe.among is None else recipe.among)
    return list(islice(walks.accepted(walks.among, (), keep), wanted))


def _apart(recipe: SelectionRecipe, walks: Walks, keep: Filter, k: int, material: Material) -> list[Pick]:
    picks = _candidates(recipe, walks, keep, k)
    if not picks:
        return []
    if recipe.among is None:
        picks = picks[: max(k, diversity.MAX_CENTERS_AMONG)]
    if len(picks) > diversity.MAX_CENTERS_AMONG:
        most = diversity.MAX_CENTERS_AMONG
        raise refused("strategy", f"k-center chooses at most {most:,} rows: ask for fewer, or take strategy=clusters")
    return [picks[place] for place in diversity.k_center(material.features, [row for row, _ in picks], k)]


def _of_clusters(
    recipe: SelectionRecipe, walks: Walks, keep: Filter, k: int, material: Material, notes: list[str]
) -> list[Pick]:
    plain = _filter(recipe.model_copy(update={"dedupe": None}), walks, material, k)
    rows = [row for row, _ in _candidates(recipe, walks, plain, k)]
    if not rows:
        return []
    count = min(recipe.clusters or ceil(sqrt(k)), len(rows))
    if len(rows) * count > diversity.MAX_CLUSTER_PRODUCTS:
        most = f"{diversity.MAX_CLUSTER_PRODUCTS:,} candidates times clusters"
        detail = f"{count:,} clusters of {len(rows):,} candidates take too long to find, at most {most}: ask for fewer"
        raise refused("among" if recipe.among is not None else "clusters", f"{detail} (clusters, among)")
    groups = np.full(len(walks.among), -1)
    groups[rows] = diversity.clusters(material.features, rows, count, recipe.selection_seed or 0)
    picks, given = quotas.fill(walks, groups, [Fraction(1)] * count, k, keep)
    notes.append(f"{sum(number > 0 for number in given):,} of {count:,} clusters of {len(rows):,} candidates")
    return picks


def _of_origins(
    recipe: SelectionRecipe, walks: Walks, keep: Filter, k: int, material: Material, notes: list[str]
) -> list[Pick]:
    """As many rows of each origin as the quota says; origins that have none in it share what is left over."""
    names, codes = material.origins.names, material.origins.codes
    there = np.bincount(codes[walks.among], minlength=len(names)).tolist()
    if isinstance(recipe.quota, dict):
        named = recipe.quota
        others = len(named)
        weights = [Fraction(repr(share)) for share in named.values()]
        weights.append(1 - sum(weights, Fraction(0)))
        places = {name: place for place, name in enumerate(named)}
        groups = np.array([places.get(name, others) for name in names])[codes]
        labels = [*named, "the other origins"]
    else:
        weights = [Fraction(1 if recipe.quota == "equal" else rows) for rows in there]
        groups, labels = codes.astype(np.int64), list(names)
    picks, given = quotas.fill(walks, groups, weights, k, keep)
    total = sum(weights, Fraction(0))
    for label, weight, number in zip(labels, weights, given, strict=True):
        if number < int(k * weight / total):
            notes.append(f"{label}: {number:,} rows instead of {int(k * weight / total):,}, there are no more to take")
    return picks
