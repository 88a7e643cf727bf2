"""From the parameters of /select and /scores to a recipe: every default resolved to an id.

With one candidate a parameter may be left out; with several the answer lists them (`Ambiguous`); where features are
missing the answer is the POST that computes them (`GradientsMissing`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlencode

from gradstore.types import (
    AdamForm,
    Aggregate,
    Combine,
    Dataset,
    DedupeBy,
    FeatureDtype,
    FeatureKind,
    FeatureSet,
    Precision,
    ProblemItem,
    Quantisation,
    Reduction,
    Run,
    SelectionMethod,
    SelectionRecipe,
    StoredProjection,
    Strategy,
    Task,
    TemplateName,
)

from datastore.bm25 import BM25_VERSION
from datastore.catalog import Catalog
from datastore.errors import Ambiguous, Conflict, ForeignProjection, GradientsMissing, InvalidInput, NotFound
from datastore.features import UNPROJECTED, Features
from datastore.schema import SelectionRow
from datastore.selection import rules
from datastore.selection.contamination import DEFAULT_NGRAM


@dataclass(frozen=True)
class Query:
    """What a user says about the scores wanted; None and () leave it to what there is."""

    tasks: Sequence[str] = ()
    datasets: Sequence[str] = ()
    run: str | None = None
    checkpoints: Sequence[str] = ()
    weights: Sequence[str] | None = None
    kind: FeatureKind | None = None
    adam: AdamForm | None = None
    reduction: Reduction | None = None
    dim: int | None = None
    dtype: FeatureDtype | None = None
    converted_from: FeatureDtype | Literal["none"] | None = None
    projection: StoredProjection | None = None
    projection_id: str | None = None
    seed: int | None = None
    template: TemplateName | None = None
    max_length: int | None = None
    precision: Precision | None = None
    quantisation: Quantisation | Literal["none"] | None = None
    method: SelectionMethod | None = None
    aggregate: Aggregate | None = None
    combine: Combine | None = None
    selection_seed: int | None = None
    pct: float | None = None
    k: int | None = None
    exclude: Sequence[str] = ()
    exclude_ids: Sequence[str] = ()
    strategy: Strategy | None = None
    among: int | None = None
    clusters: int | None = None
    quota: Sequence[str] = ()
    dedupe: float | None = None
    dedupe_by: DedupeBy | None = None
    match: str | None = None
    ngram: int | None = None
    decontaminate: Sequence[str] = ()
    exclude_contaminated: bool | None = None


@dataclass(frozen=True)
class Sources:
    """The feature sets that a recipe reads, one a checkpoint, in the recipe's order; its method may need none."""

    datasets: dict[str, list[FeatureSet]]
    tasks: dict[str, list[FeatureSet]]


@dataclass(frozen=True)
class Pools:
    """Pools that are asked without a task: one feature set a checkpoint, all with the same parameters."""

    run: str | None
    checkpoints: tuple[str, ...]
    weights: list[float]
    """Weight of each checkpoint: its mean learning rate over the sum."""
    parameters: dict[str, Any]
    sets: dict[str, list[FeatureSet]]
    """Of each dataset, in the order of the checkpoints."""


REMEMBERED = 1024  # queries of which it is remembered what they meant
FOREIGN = "foreign"
"""The projection of imported features."""
_OWN = ("kind", "adam")
"""Parameters of a pool's features that its task's may have otherwise."""
_SHARED = (
    "weights", "reduction", "dim", "dtype", "converted_from", "projection", "projection_id", "projection_version",
    "seed", "template", "max_length", "precision", "quantisation",
)  # fmt: skip
"""Parameters in which the features of pool and task must agree: like is compared with like."""
_ASKED = tuple(name for name in (*_OWN, *_SHARED) if name != "projection_version")
"""Parameters that a query can name."""
_NONE = ("quantisation", "converted_from")
"""Parameters whose absence can be asked for, as `none`."""
OF_GRADIENTS = ("adam", "weights", "reduction", "dim", "projection", "projection_id", "seed")
"""Parameters that say nothing about hidden states; the dim of these is the model's."""
_OWN_KINDS: tuple[Literal["rds", "embedding"], ...] = ("rds", "embedding")
"""Methods that compare the features of the kind of their name, which no other method takes."""
_MODELS = {"rds": "base model as it is", "embedding": "sentence encoder"}
"""What the features of a method are best taken at."""
_WITHOUT_TASKS: frozenset[SelectionMethod] = frozenset({"random"})
_UNUSED: dict[SelectionMethod, tuple[str, ...]] = {
    "influence": (),
    "rds": (),
    "embedding": (),
    "bm25": ("run", "checkpoints", *_ASKED),
    "random": ("run", "checkpoints", *_ASKED, "aggregate", "combine"),
}
"""Parameters of a query that a method does nothing with."""
_TASK_KINDS = (("sgd", None), ("adam", "less"), ("adam", "exact"), ("sign", None))
"""A task's features (kind, form) that go with a pool's of any kind of gradients: the first there are."""


@dataclass(frozen=True)
class _Candidate:
    """A way to answer: pools, checkpoints and parameters for which every feature exists."""

    run: Run | None
    checkpoints: tuple[str, ...]
    parameters: dict[str, Any]
    pools: dict[str, list[FeatureSet]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipes:
    """Resolves queries against what the catalog holds."""

    catalog: Catalog
    features: Features
    _resolved_before: dict[str, tuple[Hashable, SelectionRecipe, Sources]] = field(default_factory=dict, init=False)
    """By query: the catalog's state, and what the query meant in it."""

    def resolve(self, query: Query, *, path: str) -> tuple[SelectionRecipe, Sources]:
        """The recipe that a query means, and the features it reads; `path` is where the alternatives are asked for.

        Asked again before anything was committed to the catalog it is the same, and not looked up. Raises `NotFound`,
        `InvalidInput`, `Ambiguous` and `GradientsMissing`.
        """
        state, key = self.catalog.state(), repr(query)
        before = self._resolved_before.get(key)
        if before is not None and before[0] == state:
            return before[1:]
        if len(self._resolved_before) >= REMEMBERED:
            self._resolved_before.clear()
        recipe, sources = self._resolve(query, path)
        self._resolved_before[key] = state, recipe, sources
        return recipe, sources

    def _resolve(self, query: Query, path: str) -> tuple[SelectionRecipe, Sources]:
        query = _with_method(query)
        _refuse_idle(query)
        if not query.tasks and query.method not in _WITHOUT_TASKS:
            raise rules.refused("task", f"method={query.method} selects for a task: name one (task)")
        rules.check(query)
        if query.method in rules.WITHOUT_FEATURES:
            return self._plain(query, path), Sources(datasets={}, tasks={})
        tasks = [self.catalog.task(reference) for reference in dict.fromkeys(query.tasks)]
        pool = self._candidates(query)
        found = [(candidate, self._targets(candidate, tasks)) for candidate in pool]
        complete = [(candidate, targets) for candidate, targets in found if len(targets) == len(tasks)]
        if not complete:
            raise self._missing_task(found, tasks)
        if len(complete) > 1:
            raise _ambiguous(query, [candidate for candidate, _ in complete], path)
        candidate, targets = complete[0]
        return self._recipe(query, candidate, targets), Sources(datasets=candidate.pools, tasks=targets)

    def sources(self, recipe: SelectionRecipe) -> Sources:
        """The features that a recipe reads. Raises `NotFound`, `InvalidInput` and `GradientsMissing`."""
        if not recipe.tasks and recipe.method not in _WITHOUT_TASKS:
            raise rules.refused("tasks", f"method={recipe.method} selects for a task: a recipe of it has one")
        rules.check(recipe)
        self._find_all(recipe)
        if recipe.method == "bm25" and recipe.bm25_version != BM25_VERSION:
            raise rules.refused("bm25_version", f"version {recipe.bm25_version} of BM25's scores is not made any more")
        if recipe.method in rules.WITHOUT_FEATURES:
            return Sources(datasets={}, tasks={})
        if not recipe.checkpoints:
            raise rules.refused("checkpoints", f"method={recipe.method} compares features: a recipe has checkpoints")
        shared = {name: getattr(recipe, name) for name in _SHARED}
        own = {name: getattr(recipe, name) for name in _OWN}
        known = _TASK_KINDS if recipe.task_kind not in UNPROJECTED else ((recipe.task_kind, None),)
        forms = [form for form in known if form[0] == recipe.task_kind and recipe.task_adam in (None, form[1])]
        pools = {dataset: self._stored({"dataset": dataset}, recipe, [own | shared]) for dataset in recipe.datasets}
        tasks = {
            task: self._stored({"task": task}, recipe, [{"kind": kind, "adam": adam} | shared for kind, adam in forms])
            for task in recipe.tasks
        }
        return Sources(datasets=pools, tasks=tasks)

    def _find_all(self, recipe: SelectionRecipe) -> None:
        """Raise `NotFound` where the recipe names what is not there, `InvalidInput` where by anything but its id."""
        looks: list[tuple[str, Sequence[str], Callable[[str], Dataset | Task | SelectionRow]]] = [
            ("datasets", recipe.datasets, self.catalog.dataset),
            ("tasks", recipe.tasks, self.catalog.task),
            ("decontaminate", recipe.decontaminate, self.catalog.task),
            ("exclude", recipe.exclude, self._excluded),
            ("match", [] if recipe.match is None else [recipe.match], self.catalog.selection),
        ]
        for parameter, references, look in looks:
            for reference in references:
                if (id := look(reference).id) != reference:
                    raise rules.refused(parameter, f"a recipe holds ids, and {reference!r} is the name of {id}")
        if isinstance(recipe.quota, dict):
            rules.check_shares(recipe.quota, self._origins(recipe.datasets))

    def _origins(self, datasets: Iterable[str]) -> set[str]:
        return {origin for dataset in datasets for origin in self.catalog.dataset(dataset).origins}

    def _plain(self, query: Query, path: str) -> SelectionRecipe:
        """The recipe of a method that reads no features."""
        datasets = [self.catalog.dataset(reference).id for reference in dict.fromkeys(query.datasets)]
        if query.match is not None:
            datasets = datasets or list(self.catalog.selection(query.match).recipe["datasets"])
        datasets = datasets or list(self.catalog.dataset_sizes())
        if not datasets:
            raise Conflict("there is no dataset to select from: upload one with POST /datasets")
        if len(datasets) > 1 and not query.datasets and query.match is None:
            shared = {**_choice(query), "method": query.method, "task": list(query.tasks)}
            shared |= {"aggregate": query.aggregate, "combine": query.combine}
            choices = [f"{path}?{urlencode(_said_only(shared | {'dataset': one}), doseq=True)}" for one in datasets]
            raise Ambiguous(f"there are {len(datasets)} datasets; say which one is meant (dataset)", choices=choices)
        nothing = dict.fromkeys(name for name, field in SelectionRecipe.model_fields.items() if field.is_required())
        return SelectionRecipe.model_validate(
            nothing
            | {
                "method": query.method,
                "datasets": datasets,
                "tasks": [self.catalog.task(reference).id for reference in dict.fromkeys(query.tasks)],
                "checkpoints": [],
                "checkpoint_weights": [],
                "aggregate": query.aggregate,
                "combine": query.combine,
                "bm25_version": BM25_VERSION if query.method == "bm25" else None,
                **self._resolved(query, datasets),
            }
        )

    def _resolved(self, query: Query, datasets: Sequence[str]) -> dict[str, Any]:
        """What a query says about the choice, resolved to ids. Raises `NotFound`, `InvalidInput`."""
        return {
            "pct": query.pct,
            "k": query.k,
            "exclude": list(dict.fromkeys(self._excluded(reference).id for reference in query.exclude)),
            "exclude_ids": sorted(set(query.exclude_ids)),
            "strategy": query.strategy or "top",
            "among": query.among,
            "clusters": query.clusters,
            "selection_seed": (query.selection_seed or 0) if rules.is_drawn(query) else None,
            "quota": rules.quota(query.quota, self._origins(datasets)) if query.quota else None,
            "dedupe": query.dedupe,
            "dedupe_by": rules.dedupe_by(query),
            "match": None if query.match is None else self.catalog.selection(query.match).id,
            "ngram": (query.ngram or DEFAULT_NGRAM) if query.tasks or query.decontaminate else None,
            "decontaminate": [self.catalog.task(reference).id for reference in dict.fromkeys(query.decontaminate)],
            "exclude_contaminated": bool(query.exclude_contaminated),
        }

    def pools(self, query: Query, *, path: str) -> Pools:
        """The pools that a query without tasks means; raises as `resolve` does. Whoever asks projects here, so imported
        features are none of them.
        """
        query = _with_method(query)
        _refuse_idle(query)
        candidates = self._candidates(query)
        found = [candidate for candidate in candidates if not _is_foreign(candidate)]
        if not found:
            raise _foreign(candidates[0].parameters["projection_id"], lacking="what is computed here")
        if len(found) > 1:
            raise _ambiguous(query, found, path)
        candidate = found[0]
        run = candidate.run.id if candidate.run else None
        return Pools(run, candidate.checkpoints, self._weights(candidate), candidate.parameters, candidate.pools)

    def _candidates(self, query: Query) -> list[_Candidate]:
        """The pools that fit a query, whatever its tasks have. Raises `NotFound` and `GradientsMissing`."""
        datasets = [self.catalog.dataset(reference).id for reference in dict.fromkeys(query.datasets)]
        checkpoints = tuple(self.catalog.checkpoint(reference).id for reference in query.checkpoints)
        if len(set(checkpoints)) < len(checkpoints):
            raise rules.refused("checkpoint", "a checkpoint is named twice, and would count twice")
        run = self.catalog.run(query.run) if query.run else None
        near = self._pool_candidates(query, datasets, run, checkpoints)
        found = [candidate for candidate in near if len(candidate.pools) == max(1, len(datasets))]
        if not found:
            raise self._missing_pool(query, datasets, run, checkpoints, near)
        return found

    def _stored(
        self, owner: dict[str, str], recipe: SelectionRecipe, variants: Sequence[dict[str, Any]]
    ) -> list[FeatureSet]:
        """The feature sets of a dataset or task at a recipe's checkpoints, of the first variant that is there."""
        known = self.features.complete(**{f"{noun}s": [id] for noun, id in owner.items()})
        for variant in variants:
            sets = [each for each in known if all(getattr(each, name) == value for name, value in variant.items())]
            if (chosen := _in_order(sets, recipe.checkpoints)) is not None:
                return chosen
        body = {**owner, "checkpoints": list(recipe.checkpoints), **_body(variants[0])}
        raise GradientsMissing(
            f"the features that this was made from are not stored any more: {_post(body)}", body=body
        )

    def _pool_candidates(
        self, query: Query, datasets: Sequence[str], run: Run | None, checkpoints: tuple[str, ...]
    ) -> list[_Candidate]:
        """What fits the query; of the datasets that it names a candidate may have only some."""
        known = self.features.complete(datasets=datasets or list(self.catalog.dataset_sizes()))
        wanted = {name: value for name in _ASKED if (value := getattr(query, name)) is not None}
        groups: dict[tuple[Any, ...], dict[str, list[FeatureSet]]] = defaultdict(lambda: defaultdict(list))
        for feature in known:
            if feature.kind in _OWN_KINDS and feature.kind != query.kind:
                continue
            if all(_said(name, getattr(feature, name)) == value for name, value in wanted.items()):
                key = tuple(getattr(feature, name) for name in (*_OWN, *_SHARED))
                groups[key][feature.dataset or ""].append(feature)
        trainings = self._trainings(run, checkpoints, [feature.checkpoint for feature in known])
        found = []
        for key, pools in groups.items():
            parameters = dict(zip((*_OWN, *_SHARED), key, strict=True))
            for training, members in trainings:
                covered = {
                    dataset: chosen
                    for dataset, sets in pools.items()
                    if (chosen := _in_order(sets, members)) is not None
                }
                if datasets and covered:
                    ordered = {dataset: covered[dataset] for dataset in datasets if dataset in covered}
                    found.append(_Candidate(training, members, parameters, ordered))
                elif not datasets:
                    found += [_Candidate(training, members, parameters, {one: sets}) for one, sets in covered.items()]
        return found

    def _trainings(
        self, run: Run | None, checkpoints: tuple[str, ...], known: Sequence[str]
    ) -> list[tuple[Run | None, tuple[str, ...]]]:
        """What is asked for, or else every run, and by itself every checkpoint of `known` that belongs to none."""
        if checkpoints:
            return [(run, checkpoints)]
        runs = [run] if run else self.catalog.all_runs()
        members = [(one, tuple(checkpoint.id for checkpoint in one.checkpoints)) for one in runs]
        in_runs = {checkpoint for _, own in members for checkpoint in own}
        alone = [] if run else [checkpoint for checkpoint in dict.fromkeys(known) if checkpoint not in in_runs]
        return [*members, *((None, (checkpoint,)) for checkpoint in alone)]

    def _targets(self, candidate: _Candidate, tasks: Sequence[Task]) -> dict[str, list[FeatureSet]]:
        """The tasks' feature sets that go with a candidate."""
        known = self.features.complete(tasks=[task.id for task in tasks])
        fitting = [
            feature
            for feature in known
            if all(getattr(feature, name) == candidate.parameters[name] for name in _SHARED)
        ]
        kind = candidate.parameters["kind"]
        found = {}
        for task in tasks:
            for wanted in ((kind, None),) if kind in UNPROJECTED else _TASK_KINDS:
                sets = [each for each in fitting if each.task == task.id and (each.kind, each.adam) == wanted]
                chosen = _in_order(sets, candidate.checkpoints)
                if chosen is not None:
                    found[task.id] = chosen
                    break
        return found

    def _recipe(self, query: Query, candidate: _Candidate, targets: dict[str, list[FeatureSet]]) -> SelectionRecipe:
        kinds = {(features[0].kind, features[0].adam) for features in targets.values()}
        if len(kinds) > 1:
            raise InvalidInput("the tasks' features are of different kinds: compute them alike with POST /gradients")
        ((task_kind, task_adam),) = kinds
        return SelectionRecipe(
            datasets=list(candidate.pools),
            tasks=list(targets),
            checkpoints=list(candidate.checkpoints),
            checkpoint_weights=self._weights(candidate),
            run=candidate.run.id if candidate.run else None,
            task_kind=task_kind,
            task_adam=task_adam,
            method=query.method or "influence",
            aggregate=query.aggregate or "less",
            combine=query.combine or "max",
            **candidate.parameters,
            **self._resolved(query, list(candidate.pools)),
        )

    def _weights(self, candidate: _Candidate) -> list[float]:
        """Mean learning rate of each checkpoint over their sum (LESS, eq. 3)."""
        members = candidate.run.checkpoints if candidate.run else []
        of_run = {checkpoint.id: checkpoint.learning_rate for checkpoint in members}
        rates = [
            of_run[id] if id in of_run else self.catalog.checkpoint(id).learning_rate for id in candidate.checkpoints
        ]
        known = [rate for rate in rates if rate is not None]
        if len(known) < len(rates) and len(rates) > 1:
            raise InvalidInput(
                "a checkpoint has no learning rate, so the checkpoints cannot be weighted: "
                "register it again with learning_rate, or name a single checkpoint"
            )
        total = sum(known)
        return [rate / total for rate in known] if total > 0 else [1 / len(rates)] * len(rates)

    def _excluded(self, reference: str) -> Dataset | SelectionRow:
        """A dataset or selection by id or name. Raises `NotFound`, and `InvalidInput` where a name is both's."""
        found: list[Dataset | SelectionRow] = []
        for look in (self.catalog.dataset, self.catalog.selection):
            with suppress(NotFound):
                found.append(look(reference))
        if not found:
            raise NotFound("dataset or selection", reference, collection="/datasets and GET /selections")
        if len(found) > 1:
            ids = " and ".join(one.id for one in found)
            raise rules.refused("exclude", f"{reference!r} is the name of {ids}: say which by its id")
        return found[0]

    def _missing_task(
        self, found: Sequence[tuple[_Candidate, dict[str, list[FeatureSet]]]], tasks: Sequence[Task]
    ) -> GradientsMissing | ForeignProjection:
        """The POST for a task without features; none makes features that go with imported ones."""
        ours = [(candidate, targets) for candidate, targets in found if not _is_foreign(candidate)]
        candidate, targets = (ours or found)[0]
        missing = next(task for task in tasks if task.id not in targets)
        if not ours:
            return _foreign(candidate.parameters["projection_id"], lacking=f"the task {missing.name}")
        known = self.features.complete(tasks=[missing.id])
        foreign = sorted({each.projection_id for each in known if each.projection_id is not None})
        note = f" (its imported ones have the foreign projection {', '.join(map(repr, foreign))})" if foreign else ""
        return _task_post(candidate, missing, note=note)

    def _missing_pool(
        self,
        query: Query,
        datasets: Sequence[str],
        run: Run | None,
        checkpoints: tuple[str, ...],
        near: Sequence[_Candidate],
    ) -> GradientsMissing | ForeignProjection:
        """The POST for a dataset without features, computed as those of the others are where others have some."""
        foreign = [candidate for candidate in near if _is_foreign(candidate)]
        if query.projection == FOREIGN or query.projection_id is not None or (foreign and foreign == list(near)):
            named = query.projection_id or next((each.parameters["projection_id"] for each in foreign), None)
            return _foreign(named, lacking=_lacking(datasets, foreign))
        if near:
            ours = [candidate for candidate in near if candidate not in foreign]
            nearest = max(ours, key=lambda candidate: len(candidate.pools))
            owner = next(dataset for dataset in datasets if dataset not in nearest.pools)
            body = {"dataset": owner, **_training(nearest), **_body(nearest.parameters)}
            posts = _posts(body, nearest.parameters)
            return GradientsMissing(f"{owner} has no features that go with the others': {posts}", body=body)
        own = query.method in _OWN_KINDS
        body = {"dataset": datasets[0] if datasets else _only(self.catalog.dataset_sizes()) or "<dataset>"}
        if checkpoints:
            body["checkpoints"] = list(checkpoints)
        elif own and run is None:
            body["checkpoints"] = ["<checkpoint>"]
        else:
            body["run"] = run.id if run else _only(one.id for one in self.catalog.all_runs()) or "<run>"
        asked = {name: value for name in _ASKED if (value := getattr(query, name)) is not None}
        body |= _body(asked)
        owners = " and ".join(datasets) or "any dataset"
        detail = f"there are no features of {owners} at every checkpoint asked for: {_posts(body, asked)}"
        if body.get("checkpoints") == ["<checkpoint>"]:
            model = _MODELS[query.method or ""]
            detail += f', where <checkpoint> is the {model} that POST /checkpoints {{"model": "…"}} registers'
        return GradientsMissing(detail, body=body)


def _with_method(query: Query) -> Query:
    """The query with its method, and how this takes rows and tasks together where nothing else is asked for.

    A kind that one method has to itself names the method. Raises `InvalidInput` where it names another.
    """
    by_kind = next((kind for kind in _OWN_KINDS if kind == query.kind), None)
    method = query.method or by_kind or "influence"
    own = next((kind for kind in _OWN_KINDS if kind == method), None)
    if own is not None and query.kind not in (None, own):
        detail = f"method={method} compares features of kind={own} only: leave kind out"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="kind")])
    if by_kind and method == "influence":
        detail = f"features of kind={by_kind} are compared by method={by_kind}"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter="method")])
    if method == "random":
        return replace(query, method=method)
    several = len(set(query.tasks)) > 1 and method != "influence"
    return replace(
        query,
        method=method,
        kind=own or query.kind,
        aggregate=query.aggregate or ("less" if method == "influence" else "max"),
        combine=query.combine or ("round-robin" if several else "max"),
    )


def _refuse_idle(query: Query) -> None:
    """Refuse what narrows nothing: what the method does without, and what no feature of the kind could ever have."""
    method = query.method or "influence"
    unused = [name for name in _UNUSED[method] if getattr(query, name) not in (None, (), [])]
    if unused:
        detail = f"method={method} does nothing with {' and '.join(unused)}: leave it out"
        parameters = {"checkpoints": "checkpoint"}
        raise InvalidInput(
            detail, errors=[ProblemItem(detail=detail, parameter=parameters.get(name, name)) for name in unused]
        )
    own: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(UNPROJECTED, OF_GRADIENTS),
        "sgd": ("adam",),
        "sign": ("adam",),
    }
    idle = own.get(query.kind or "", ())
    named = [name for name in idle if getattr(query, name) is not None]
    if named:
        detail = f"features of kind={query.kind} have no {' and no '.join(named)}: leave it out"
        raise InvalidInput(detail, errors=[ProblemItem(detail=detail, parameter=name) for name in named])


def _only(ids: Iterable[str]) -> str | None:
    """The id, where there is one alone."""
    found = list(ids)
    return found[0] if len(found) == 1 else None


def _training(candidate: _Candidate) -> dict[str, object]:
    """A candidate's checkpoints as POST /gradients takes them."""
    return {"run": candidate.run.id} if candidate.run else {"checkpoints": list(candidate.checkpoints)}


def _in_order(sets: Sequence[FeatureSet], checkpoints: Sequence[str]) -> list[FeatureSet] | None:
    """One feature set for each checkpoint, or None when one is missing."""
    by_checkpoint = {feature.checkpoint: feature for feature in sets}
    if not all(checkpoint in by_checkpoint for checkpoint in checkpoints):
        return None
    return [by_checkpoint[checkpoint] for checkpoint in checkpoints]


def _is_foreign(candidate: _Candidate) -> bool:
    """Whether a candidate's features are imported."""
    return bool(candidate.parameters["projection"] == FOREIGN)


def _lacking(datasets: Sequence[str], candidates: Sequence[_Candidate]) -> str:
    """The first of the datasets that the imported features closest to what is asked for do without."""
    pools = max((candidate.pools for candidate in candidates), key=len, default={})
    return next((dataset for dataset in datasets if dataset not in pools), "the pool")


def _foreign(projection_id: str | None, *, lacking: str) -> ForeignProjection:
    """Say that features of a foreign projection are compared with their like only, and what lacks these."""
    return ForeignProjection(
        f"the imported features have the foreign projection {projection_id!r}, of which {lacking} has none: features "
        "of different projections cannot be compared. Import the others with the same projection_id (POST /imports), "
        "or have all of them computed here (POST /gradients)"
    )


def _task_post(candidate: _Candidate, missing: Task, *, note: str) -> GradientsMissing:
    of_pool = candidate.parameters
    shared = {name: of_pool[name] for name in _ASKED if name not in _OWN or of_pool["kind"] in UNPROJECTED}
    body: dict[str, object] = {"task": missing.id, **_training(candidate), **_body(shared)}
    return GradientsMissing(
        f"the task {missing.name} has no features that go with the pool's{note}: {_posts(body, shared)}", body=body
    )


def _body(parameters: dict[str, Any]) -> dict[str, object]:
    """Parameters as POST /gradients takes them; of what was converted, those of what it was made from."""
    several = {"dim": "dims", "kind": "kinds"}
    if parameters.get("converted_from") not in (None, "none"):
        parameters = {**parameters, "dtype": parameters["converted_from"]}
    return {
        several.get(name, name): [value] if name in several else value
        for name, value in _telling(parameters).items()
        if name in _ASKED
        and value is not None
        and name != "converted_from"
        and (name, value) != ("quantisation", "none")
    }


def _posts(body: dict[str, object], parameters: dict[str, Any]) -> str:
    """The requests that make features with these parameters: the computation, and a conversion where there is one."""
    if parameters.get("converted_from") in (None, "none"):
        return _post(body)
    owner = {name: body[name] for name in ("dataset", "task") if name in body}
    second = json.dumps({**owner, "dtype": parameters["dtype"]})
    return f"{_post(body)}, and POST /conversions {second} then makes what goes with it"


def _telling(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters without those that say nothing about their kind."""
    hidden = parameters.get("kind") in UNPROJECTED
    return {name: value for name, value in parameters.items() if not (hidden and name in OF_GRADIENTS)}


def _said(name: str, value: Any) -> Any:
    """A parameter as a query names it: features without quantisation, or conversion, can be asked for, too."""
    return "none" if name in _NONE and value is None else value


def _post(body: dict[str, object]) -> str:
    return f"POST /gradients {json.dumps(body)} computes them"


def _ambiguous(query: Query, candidates: Sequence[_Candidate], path: str) -> Ambiguous:
    choices = [f"{path}?{urlencode(_parameters(query, candidate), doseq=True)}" for candidate in candidates]
    differing = ", ".join(("dataset", "run", "checkpoint", *_ASKED))
    return Ambiguous(
        f"{len(choices)} sets of features fit; say which one is meant ({differing}), for example {choices[0]}",
        choices=choices,
    )


def _parameters(query: Query, candidate: _Candidate) -> dict[str, Any]:
    chosen = {**_choice(query), "task": list(query.tasks), "dataset": list(candidate.pools)}
    if candidate.run is not None and not query.checkpoints:
        chosen["run"] = candidate.run.id
    else:
        chosen["checkpoint"] = list(candidate.checkpoints)
    telling = _telling(candidate.parameters)
    chosen |= {name: _said(name, telling[name]) for name in _ASKED if name in telling}
    return _said_only(chosen | {"aggregate": query.aggregate, "combine": query.combine})


def _choice(query: Query) -> dict[str, Any]:
    """What a query says about how rows are chosen, as an URL says it."""
    values = {name: getattr(query, name) for name in rules.OF_THE_CHOICE}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _said_only(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None and value is not False and value != []}
