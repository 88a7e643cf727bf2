"""What a query is answered with where its features are missing, or where several fit.

Missing features are answered with the POST that computes them, as those are computed that they are to be compared with
(`GradientsMissing`); several with a URL for each (`Ambiguous`); and features of which no POST makes the like, imported
ones, with what can be done instead (`ForeignProjection`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlencode

from gradstore.types import Checkpoint, FeatureSet, Run, Task

from datastore.catalog import Catalog
from datastore.errors import Ambiguous, ForeignProjection, GradientsMissing, several
from datastore.features import LIKE_WITH_LIKE, Features
from datastore.parameters import ASKED, FOREIGN, OWN, OWN_KINDS, SHARED, Fit, Query, said, telling
from datastore.selection import rules

_MODELS = {"rds": "base model as it is", "embedding": "sentence encoder"}
"""What the features of a method are best taken at."""


def missing_task(
    found: Sequence[tuple[Fit, dict[str, list[FeatureSet]]]], tasks: Sequence[Task], *, features: Features
) -> GradientsMissing | ForeignProjection:
    """The POST for a task without features; none makes features that go with imported ones."""
    ours = [(fit, targets) for fit, targets in found if not fit.is_foreign]
    fit, targets = (ours or found)[0]
    missing = next(task for task in tasks if task.id not in targets)
    if not ours:
        return foreign(fit.parameters["projection_id"], lacking=f"the task {missing.name}")
    known = features.complete(tasks=[missing.id])
    imported = sorted({each.projection_id for each in known if each.projection_id is not None})
    note = f" (its imported ones have the foreign projection {', '.join(map(repr, imported))})" if imported else ""
    return _task_post(fit, missing, note=note)


def missing_pool(
    query: Query,
    datasets: Sequence[str],
    run: Run | None,
    checkpoints: tuple[str, ...],
    near: Sequence[Fit],
    *,
    catalog: Catalog,
    features: Features,
) -> GradientsMissing | ForeignProjection:
    """The POST for a dataset without features, computed as those of the others are where others have some, or else as
    the task's are."""
    imported = [fit for fit in near if fit.is_foreign]
    if query.projection == FOREIGN or query.projection_id is not None or (imported and imported == list(near)):
        if not imported:
            called = "" if query.projection_id is None else f" with the projection_id {query.projection_id!r}"
            return ForeignProjection(
                f"{_lacking(datasets, imported)} has no imported features{called} at the checkpoints asked for: GET "
                "/imports lists what there is, and POST /imports imports others"
            )
        return foreign(imported[0].parameters["projection_id"], lacking=_lacking(datasets, imported))
    if near:
        ours = [fit for fit in near if fit not in imported]
        nearest = max(ours, key=lambda fit: len(fit.pools))
        owner = next(dataset for dataset in datasets if dataset not in nearest.pools)
        body = {"dataset": owner, **_training(nearest), **computed(nearest.parameters)}
        posts = _posts(body, nearest.parameters)
        return GradientsMissing(f"{owner} has no features that go with the others': {posts}", body=body)
    asked = {name: value for name in ASKED if (value := getattr(query, name)) is not None}
    alike = _of_the_task(query, asked, run.checkpoints if run else (), checkpoints, catalog=catalog, features=features)
    if alike:
        asked = {name: getattr(alike[0], name) for name in SHARED if name in ASKED} | asked
        checkpoints = checkpoints or (() if run else tuple(each.checkpoint for each in alike))
    own = query.method in OWN_KINDS
    if not (own or run or checkpoints):
        runs = catalog.all_runs()
        run = runs[0] if len(runs) == 1 else None
    at = run.checkpoints if run else [catalog.checkpoint(id) for id in checkpoints]
    if query.kind is None and not all(each.has_moments for each in at):
        asked["kind"] = "sgd"  # what is computed by default of a dataset needs Adam's moments
    body = {"dataset": datasets[0] if datasets else _only(catalog.dataset_sizes()) or "<dataset>"}
    if checkpoints:
        body["checkpoints"] = list(checkpoints)
    elif own and run is None:
        body["checkpoints"] = ["<checkpoint>"]
    else:
        body["run"] = run.id if run else "<run>"
    body |= computed(asked)
    owners = " and ".join(datasets) or "any dataset"
    detail = f"there are no features of {owners} at every checkpoint asked for: {_posts(body, asked)}"
    if body.get("checkpoints") == ["<checkpoint>"]:
        model = _MODELS[query.method or ""]
        detail += f', where <checkpoint> is the {model} that POST /checkpoints {{"model": "…"}} registers'
    return GradientsMissing(detail, body=body)


def not_stored(owner: dict[str, str], checkpoints: Sequence[str], parameters: dict[str, Any]) -> GradientsMissing:
    """The POST for features that a recipe was made from, and that have been deleted since."""
    body = {**owner, "checkpoints": list(checkpoints), **computed(parameters)}
    return GradientsMissing(f"the features that this was made from are not stored any more: {_post(body)}", body=body)


def foreign(projection_id: str | None, *, lacking: str) -> ForeignProjection:
    """Say that features of a foreign projection are compared with their like only, and what lacks these."""
    return ForeignProjection(
        f"the imported features have the foreign projection {projection_id!r}, of which {lacking} has none: features "
        "of different projections cannot be compared. Import the others with the same projection_id (POST /imports), "
        "or have all of them computed here (POST /gradients)"
    )


def ambiguous(query: Query, fits: Sequence[Fit], path: str, *, catalog: Catalog) -> Ambiguous:
    """Say that one of these fits is to be named; each choice is a URL that does, by names where there are some."""
    choices = [f"{path}?{urlencode(_parameters(query, fit, catalog), doseq=True)}" for fit in fits]
    differing = ", ".join(("dataset", "run", "checkpoint", *ASKED))
    return Ambiguous(
        f"{len(choices)} sets of features fit; say which one is meant ({differing}), for example {choices[0]}",
        choices=choices,
    )


def several_datasets(query: Query, datasets: Sequence[str], path: str, *, catalog: Catalog) -> Ambiguous:
    """Say that one of these datasets is to be named; each choice is a URL that does, by its name where it has one."""
    shared = _of_own_scores(query)
    called = [catalog.dataset(id).name or id for id in datasets]
    found = f"there are {len(datasets)} datasets"
    return several(found, called, parameter="dataset", path=path, said=_said_only(shared | {"dataset": None}))


def several_sources(query: Query, ids: Sequence[str], path: str, *, noun: str) -> Ambiguous:
    """Say whose scores are to be named, of predictors, cascades, estimates or projectors (`noun`, plural)."""
    shared = _of_own_scores(query)
    return several(f"{len(ids)} {noun} fit", ids, parameter="by", path=path, said=_said_only(shared))


def told_apart(found: Sequence[Sequence[FeatureSet]], path: str) -> list[str]:
    """For each of several ways to answer, by its feature sets of one checkpoint each, a path that says in what it
    differs from the others.
    """
    ways = [
        {"checkpoint": [each.checkpoint for each in sets]}
        | {name: [said(name, getattr(sets[0], name))] for name in ASKED}
        for sets in found
    ]
    differing = [name for name in ways[0] if len({tuple(way[name]) for way in ways}) > 1]
    return [f"{path}?{urlencode({name: way[name] for name in differing}, doseq=True)}" for way in ways]


def _of_the_task(
    query: Query,
    asked: dict[str, Any],
    run: Sequence[Checkpoint],
    checkpoints: Sequence[str],
    *,
    catalog: Catalog,
    features: Features,
) -> list[FeatureSet]:
    """Features of a query's first task that what is asked for could be compared with, one a checkpoint: of the run or
    the checkpoints that are named, else of a run that has them all, or of one checkpoint; none where there are none.
    """
    if not query.tasks:
        return []
    kind = query.kind if query.kind in LIKE_WITH_LIKE else "sgd"
    wanted = {name: value for name, value in asked.items() if name in SHARED}
    alike: dict[tuple[Any, ...], dict[str, FeatureSet]] = {}
    for each in features.complete(tasks=[catalog.task(query.tasks[0]).id]):
        fits = all(said(name, getattr(each, name)) == value for name, value in wanted.items())
        if each.kind == kind and each.projection_id is None and fits:
            alike.setdefault(tuple(getattr(each, name) for name in SHARED), {})[each.checkpoint] = each
    named = list(checkpoints) or [each.id for each in run]
    trainings = [named] if named else [[each.id for each in one.checkpoints] for one in catalog.all_runs()]
    for sets in alike.values():
        for training in trainings:
            if training and all(checkpoint in sets for checkpoint in training):
                return [sets[checkpoint] for checkpoint in training]
    return [] if named or not alike else list(next(iter(alike.values())).values())[:1]


def _task_post(fit: Fit, missing: Task, *, note: str) -> GradientsMissing:
    of_pool = fit.parameters
    shared = {name: of_pool[name] for name in ASKED if name not in OWN or of_pool["kind"] in LIKE_WITH_LIKE}
    body: dict[str, object] = {"task": missing.id, **_training(fit), **computed(shared)}
    return GradientsMissing(
        f"the task {missing.name} has no features that go with the pool's{note}: {_posts(body, shared)}", body=body
    )


def _lacking(datasets: Sequence[str], fits: Sequence[Fit]) -> str:
    """The first of the datasets that the imported features closest to what is asked for do without."""
    pools = max((fit.pools for fit in fits), key=len, default={})
    return next((dataset for dataset in datasets if dataset not in pools), "the pool")


def _only(ids: Iterable[str]) -> str | None:
    """The id, where there is one alone."""
    found = list(ids)
    return found[0] if len(found) == 1 else None


def _training(fit: Fit) -> dict[str, object]:
    """A fit's checkpoints as POST /gradients takes them."""
    return {"run": fit.run.id} if fit.run else {"checkpoints": list(fit.checkpoints)}


def computed(parameters: dict[str, Any]) -> dict[str, object]:
    """Parameters as POST /gradients takes them; of what was converted, those of what it was made from."""
    several = {"dim": "dims", "kind": "kinds"}
    if parameters.get("converted_from") not in (None, "none"):
        parameters = {**parameters, "dtype": parameters["converted_from"]}
    return {
        several.get(name, name): [value] if name in several else value
        for name, value in telling(parameters).items()
        if name in ASKED
        and value is not None
        and name != "converted_from"
        and (name, value) != ("quantisation", "none")
    }


def _posts(body: dict[str, object], parameters: dict[str, Any]) -> str:
    """The requests that make features with these parameters: the computation, and a conversion where there is one."""
    if parameters.get("converted_from") in (None, "none"):
        return _post(body)
    owner = {name: body[name] for name in ("dataset", "task") if name in body}
    narrower = "int4" if parameters["converted_from"] == "int8" else "int8"  # where no dtype is asked for
    second = json.dumps({**owner, "dtype": parameters.get("dtype", narrower)})
    return f"{_post(body)}, and POST /conversions {second} then makes what goes with it"


def _post(body: dict[str, object]) -> str:
    return f"POST /gradients {json.dumps(body)} computes them"


def _parameters(query: Query, fit: Fit, catalog: Catalog) -> dict[str, Any]:
    pools = [catalog.dataset(id).name or id for id in fit.pools]
    chosen = {**_choice(query), "task": list(query.tasks), "dataset": pools}
    if fit.run is not None and not query.checkpoints:
        chosen["run"] = fit.run.name or fit.run.id
    else:
        chosen["checkpoint"] = [catalog.checkpoint(id).name or id for id in fit.checkpoints]
    own = telling(fit.parameters)
    chosen |= {name: said(name, own[name]) for name in ASKED if name in own}
    return _said_only(chosen | {"aggregate": query.aggregate, "combine": query.combine})


def _choice(query: Query) -> dict[str, Any]:
    """What a query says about how rows are chosen, as an URL says it."""
    values = {name: getattr(query, name) for name in rules.OF_THE_CHOICE}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _of_own_scores(query: Query) -> dict[str, Any]:
    """What a query of a method with scores of its own says, as an URL says it."""
    several = {"task": list(query.tasks), "dataset": list(query.datasets), "capabilities": list(query.capabilities)}
    names = ("method", "by", "budget", "aggregate", "combine", "neighbours", "beta")
    return {**_choice(query), **several, **{name: getattr(query, name) for name in names}}


def _said_only(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None and value is not False and value != []}
