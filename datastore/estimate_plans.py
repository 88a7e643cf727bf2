"""What a request for estimates means: the features that fit, the groups of the pool, and the subsets of each shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
from gradstore.types import Dataset, EstimatesRequest, FeatureSet, Task
from gradstore.types.estimates import MAX_GROUPS

from datastore import advice, exact_estimates
from datastore.annotations import Annotations
from datastore.catalog import Catalog
from datastore.datasets import Datasets
from datastore.errors import Ambiguous, Conflict, GradientsMissing, refusal
from datastore.estimate_worlds import EstimateWorlds
from datastore.features import Features
from datastore.groupings import MAX_CLUSTERED
from datastore.leases import Jobs, NewShard
from datastore.parameters import SHARED, said
from datastore.subset_searches import SEARCHES

ESTIMATES_VERSION = 1
"""Counted up when the arithmetic changes, so that old results are not found again."""
KIND = "logodds"
SHARD_SUBSETS = 250
"""Subsets that a worker does at a time: about a second for 10,000 rows of 100 dims."""
MAX_DIM = 512
"""Numbers of a feature at most: a subset's Hessian takes 8·d² bytes."""
MAX_MEMBERSHIPS = 100_000_000
"""Subsets times groups: the ridge regression takes 8 bytes of each."""
MAX_SEARCHED = 200
"""Groups of a stepwise or backward search at most: it makes K(K+1)/2 estimates."""
_NAMED = ("logodds_form", "dim", "dtype", "projection", "seed", "template", "max_length", "precision", "quantisation")
"""Parameters of features that a request can name."""


@dataclass(frozen=True)
class EstimatePlans:
    """What requests for estimates mean in a catalog."""

    catalog: Catalog
    jobs: Jobs
    datasets: Datasets
    features: Features
    annotations: Annotations
    worlds: EstimateWorlds

    def plan(self, request: EstimatesRequest) -> tuple[dict[str, Any], list[NewShard]]:
        """A request resolved to ids, and its shards. Raises what `start` does."""
        pool = self.catalog.dataset(request.dataset)
        tasks = [self.catalog.task(reference) for reference in dict.fromkeys(request.tasks)]
        features, of_tasks = self._feature_sets(request, pool.id, tasks)
        if features.dim > MAX_DIM:
            raise refusal(f"a regression on {features.dim:,} dims takes too long: at most {MAX_DIM}", "/dim")
        for each in (features, *of_tasks):
            if each.excluded >= each.rows:
                raise Conflict(
                    f"no row of {each.dataset or each.task} has a feature in {each.id}, so nothing can be estimated: "
                    "GET /gradients/{id}/rows says why; a larger max_length may leave something of the answers"
                )
        checkpoint = self.catalog.checkpoint(features.checkpoint)
        if checkpoint.method != "lora":
            raise refusal(f"{checkpoint.id} has no adapter: estimates are of training one further", "/checkpoint")
        annotation = self._annotation(request, pool)
        names = self._group_names(request, pool.id, pool.rows, annotation)
        plan: dict[str, Any] = {
            "version": ESTIMATES_VERSION,
            "dataset": pool.id,
            "tasks": {task.id: features.id for task, features in zip(tasks, of_tasks, strict=True)},
            "feature_set": features.id,
            "checkpoint": checkpoint.id,
            "parameters": checkpoint.parameters,
            "group_by": request.group_by,
            "names": names,
            "labels": request.labels,
            "search": request.search,
            "metric": request.metric,
            "c": request.c,
            "scale": (request.abs_scale or request.scale) if request.rescale else None,
            "relative": request.rescale and request.abs_scale is None,
        }
        if annotation is not None:
            plan["annotation"] = annotation
        shards = list(_shards(request, names))
        if request.mode == "exact":
            self._check_measurable(request, features, tasks)
            plan["exact"] = exact_estimates.settings(request, features)
            shards = list(exact_estimates.one_by_one(shards))
        return plan, shards

    def _check_measurable(self, request: EstimatesRequest, features: FeatureSet, tasks: Sequence[Task]) -> None:
        """Raise `InvalidInput` where a step cannot be taken back through the projection, or measured as asked."""
        if features.projection == "foreign":
            raise refusal(f"{features.id} was imported: its projection cannot be taken back for mode=exact", "/mode")
        for task in tasks:
            if request.metric == "accuracy" and self.worlds.metric(task.id) == "none":
                raise refusal(f"the task {task.name} has not one metric to be measured: send metric=loss", "/metric")

    def _feature_sets(
        self, request: EstimatesRequest, pool: str, tasks: Sequence[Task]
    ) -> tuple[FeatureSet, list[FeatureSet]]:
        """The pool's features, and those of each task that go with them. Raises `GradientsMissing` and `Ambiguous`."""
        checkpoint = None if request.checkpoint is None else self.catalog.checkpoint(request.checkpoint).id
        asked = {name: value for name in _NAMED if (value := getattr(request, name)) is not None}
        fits = [
            features
            for features in self.features.complete(datasets=[pool])
            if features.kind == KIND
            and checkpoint in (None, features.checkpoint)
            and all(said(name, getattr(features, name)) == value for name, value in asked.items())
        ]
        if not fits:
            raise _missing({"dataset": pool}, checkpoint, asked)
        known = self.features.complete(tasks=[task.id for task in tasks])
        found = [(features, [_partner(features, task, known) for task in tasks]) for features in fits]
        complete = [(features, own) for features, partners in found if len(own := _all(partners)) == len(tasks)]
        if not complete:
            features, partners = found[0]
            without = next(task for task, own in zip(tasks, partners, strict=True) if own is None)
            shared = {name: getattr(features, name) for name in _NAMED}
            raise _missing({"task": without.id}, features.checkpoint, shared)
        if len(complete) > 1:
            choices = advice.told_apart([[features] for features, _ in complete], "/estimates")
            raise Ambiguous(
                f"{len(complete)} sets of features fit; say which one is meant, for example {choices[0]}",
                choices=choices,
            )
        return complete[0]

    def _annotation(self, request: EstimatesRequest, pool: Dataset) -> str | None:
        """The annotation whose labels make the groups. Raises `InvalidInput` where it does not cover the pool."""
        if request.annotations is None:
            return None
        id = self.jobs.get(request.annotations, kind="annotation").id
        labels, known = self.annotations.labels(id)
        owner = self.jobs.plan(id)["owner"]
        if owner != pool.id:
            raise refusal(f"{id} has labels of {owner}, and the pool is {pool.id}: annotate the pool", "/annotations")
        without = np.flatnonzero(~(known & labels.any(axis=1)))
        if len(without):
            raise refusal(
                f"{id} has no label of {len(without):,} of {pool.rows:,} rows, the first of them row {without[0]}: "
                "label all rows (POST /annotations), or send group_by=label with the labels that there are",
                "/annotations",
            )
        return id

    def _group_names(self, request: EstimatesRequest, dataset: str, rows: int, annotation: str | None) -> list[str]:
        """What the groups are called, in order. Raises `InvalidInput`."""
        if request.group_by == "cluster":
            count = request.clusters or 0
            if count > rows:
                raise refusal(f"the pool has {rows:,} rows", "/clusters")
            if rows > MAX_CLUSTERED:
                raise refusal(f"at most {MAX_CLUSTERED:,} rows are clustered, and the pool has {rows:,}", "/group_by")
            names = [str(number) for number in range(count)]
        elif annotation is not None:
            names = self.worlds.annotated(annotation)[1]
            if len(set(names)) < len(names):
                raise refusal("two sets of labels read alike, joined by +: rename these capabilities", "/annotations")
        elif request.labels is not None:
            names = sorted(set(request.labels.values()))
        else:
            names = sorted(self.datasets.label_columns(dataset).origins)
        if len(names) > MAX_GROUPS:
            raise refusal(f"there are {len(names):,} groups, and at most {MAX_GROUPS:,} are compared", "/group_by")
        if len(names) < 2:
            raise refusal(f"there is one group alone, {names[0]!r}: subsets must differ", "/group_by")
        subsets = len(request.subsets) if request.subsets is not None else request.drawn
        if request.search not in SEARCHES and subsets * len(names) > MAX_MEMBERSHIPS:
            detail = f"{subsets:,} subsets of {len(names):,} groups: at most {MAX_MEMBERSHIPS:,} of both, multiplied"
            raise refusal(detail, "/subsets" if request.subsets is not None else "/count")
        if request.search in ("stepwise", "backward") and len(names) > MAX_SEARCHED:
            detail = f"search={request.search} takes at most {MAX_SEARCHED} groups, and there are {len(names):,}"
            raise refusal(detail, "/search")
        return names


def _shards(request: EstimatesRequest, names: Sequence[str]) -> Iterator[NewShard]:
    """A shard for each range of subsets, or one for a search."""
    groups = len(names)
    if request.search in SEARCHES:
        yield NewShard({}, units=groups if request.search == "forward-scan" else groups * (groups + 1) // 2)
        return
    if request.subsets is not None:
        given = list(_given(request.subsets, names))
        for start in range(0, len(given), SHARD_SUBSETS):
            yield NewShard({"subsets": given[start : start + SHARD_SUBSETS]}, units=len(given[start:][:SHARD_SUBSETS]))
        return
    count, size = request.drawn, max(1, floor(Fraction(str(request.fraction)) * groups))
    for start in range(0, count, SHARD_SUBSETS):
        stop = min(start + SHARD_SUBSETS, count)
        payload = {"draw": [start, stop], "size": size, "seed": request.draw_seed}
        yield NewShard(payload, units=stop - start)


def _given(subsets: Sequence[Sequence[str]], names: Sequence[str]) -> Iterator[list[int]]:
    numbers = {name: number for number, name in enumerate(names)}
    for place, subset in enumerate(subsets):
        unknown = next((name for name in subset if name not in numbers), None)
        if unknown is not None:
            there = ", ".join(map(repr, names[:20]))
            raise refusal(f"no group is called {unknown!r}; there are {there}", f"/subsets/{place}")
        if not subset:
            raise refusal("a subset has at least one group", f"/subsets/{place}")
        yield sorted({numbers[name] for name in subset})


def _partner(features: FeatureSet, task: Task, known: Sequence[FeatureSet]) -> FeatureSet | None:
    """The task's features that go with a pool's."""
    alike = ("kind", "logodds_form", "checkpoint", *SHARED)
    return next(
        (
            each
            for each in known
            if each.task == task.id and all(getattr(each, name) == getattr(features, name) for name in alike)
        ),
        None,
    )


def _all(partners: Sequence[FeatureSet | None]) -> list[FeatureSet]:
    return [partner for partner in partners if partner is not None]


def _missing(owner: dict[str, str], checkpoint: str | None, named: dict[str, Any]) -> GradientsMissing:
    """The POST for features that are not there."""
    body: dict[str, Any] = {**owner, "checkpoints": [checkpoint or "<checkpoint>"], "kinds": [KIND]}
    body |= {"dims": [named["dim"]] if named.get("dim") else [100]}
    body |= {name: value for name, value in named.items() if name != "dim" and value is not None and value != "none"}
    [id] = owner.values()
    return GradientsMissing(
        f"{id} has no log-odds features to estimate from: POST /gradients {json.dumps(body)} computes them", body=body
    )
