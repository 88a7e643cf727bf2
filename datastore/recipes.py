"""From the parameters of /select and /scores to a recipe: every default resolved to an id.

With one fit a parameter may be left out; with several, and where features are missing, the answer says how to go
on (datastore/advice.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gradstore.types import Dataset, FeatureSet, Run, SelectionRecipe, Task

from datastore import advice
from datastore.catalog import Catalog
from datastore.catalog_states import Remembered
from datastore.errors import Conflict, InvalidInput, NotFound
from datastore.features import LIKE_WITH_LIKE, Features
from datastore.own_scores import Methods
from datastore.parameters import (
    ASKED,
    FOREIGN,
    OWN,
    OWN_KINDS,
    SHARED,
    WHEN_NAMED,
    Fit,
    Query,
    refuse_idle,
    said,
    with_method,
)
from datastore.schema import SelectionRow
from datastore.selection import rules
from datastore.selection.contamination import DEFAULT_NGRAM

REMEMBERED = 1024  # queries of which it is remembered what they meant
_TASK_KINDS = (("sgd", None), ("adam", "less"), ("adam", "exact"), ("sign", None))
"""A task's features (kind, form) that go with a pool's of any kind of losses' gradients: the first there are."""


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


@dataclass(frozen=True)
class Recipes:
    """Resolves queries against what the catalog holds."""

    catalog: Catalog
    features: Features
    methods: Methods
    _meanings: Remembered[tuple[SelectionRecipe, Sources]] = field(
        default_factory=lambda: Remembered(REMEMBERED), init=False
    )
    """By query: what it meant."""

    def resolve(self, query: Query, *, path: str) -> tuple[SelectionRecipe, Sources]:
        """The recipe that a query means, and the features it reads; `path` is where the alternatives are asked for.

        Asked again before anything was committed to the catalog it is the same, and not looked up. Raises `NotFound`,
        `InvalidInput`, `Ambiguous` and `GradientsMissing`.
        """
        return self._meanings.get(repr(query), self.catalog.state(), lambda: self._resolve(query, path))

    def _resolve(self, query: Query, path: str) -> tuple[SelectionRecipe, Sources]:
        query = with_method(query)
        refuse_idle(query)
        if not query.tasks and rules.needs_task(query):
            raise rules.refused("task", f"method={query.method} selects for a task: name one (task)")
        rules.check(query)
        if query.method in rules.WITHOUT_FEATURES:
            return self._plain(query, path), Sources(datasets={}, tasks={})
        tasks = [self.catalog.task(reference) for reference in dict.fromkeys(query.tasks)]
        pool = self._fits(query)
        found = [(fit, self._targets(fit, tasks)) for fit in pool]
        complete = [(fit, targets) for fit, targets in found if len(targets) == len(tasks)]
        if not complete:
            raise advice.missing_task(found, tasks, features=self.features)
        if len(complete) > 1:
            raise advice.ambiguous(query, [fit for fit, _ in complete], path, catalog=self.catalog)
        fit, targets = complete[0]
        return self._recipe(query, fit, targets), Sources(datasets=fit.pools, tasks=targets)

    def sent(self, recipe: SelectionRecipe) -> Sources:
        """The features that a recipe reads that somebody sends, and whose run must be the one of its checkpoints.

        Raises what `sources` does.
        """
        if recipe.run is not None:
            run = self.catalog.run(recipe.run)
            members = {checkpoint.id for checkpoint in run.checkpoints}
            if run.id != recipe.run:
                raise rules.named("run", recipe.run, id=run.id)
            if not members.issuperset(recipe.checkpoints):
                raise rules.refused("run", f"{run.id} has not all of the recipe's checkpoints: leave it out, as null")
        return self.sources(recipe)

    def sources(self, recipe: SelectionRecipe) -> Sources:
        """The features that a recipe reads. Raises `NotFound`, `InvalidInput` and `GradientsMissing`."""
        if not recipe.tasks and rules.needs_task(recipe):
            raise rules.refused("tasks", f"method={recipe.method} selects for a task: a recipe of it has one")
        rules.check(recipe)
        self._find_all(recipe)
        if recipe.method in self.methods:
            self.methods[recipe.method].check(recipe)
        if recipe.method in rules.WITHOUT_FEATURES:
            return Sources(datasets={}, tasks={})
        kind = recipe.method if recipe.method in OWN_KINDS else None
        if kind != (recipe.kind if recipe.kind in OWN_KINDS else None):
            raise rules.refused("kind", f"method={recipe.method} does not compare features of kind={recipe.kind}")
        if not recipe.checkpoints:
            raise rules.refused("checkpoints", f"method={recipe.method} compares features: a recipe has checkpoints")
        shared = {name: getattr(recipe, name) for name in SHARED}
        own = {name: getattr(recipe, name) for name in OWN}
        known = _TASK_KINDS if recipe.task_kind not in LIKE_WITH_LIKE else ((recipe.task_kind, None),)
        forms = [form for form in known if form[0] == recipe.task_kind and recipe.task_adam in (None, form[1])]
        if recipe.tasks and not forms:
            form = f"task_kind={recipe.task_kind} and task_adam={recipe.task_adam}"
            raise rules.refused("task_kind", f"no features of a task have {form}: send those of an answer of /select")
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
                    raise rules.named(parameter, reference, id=id)
        if isinstance(recipe.quota, dict):
            rules.check_shares(recipe.quota, self._origins(recipe.datasets))

    def _origins(self, datasets: Iterable[str]) -> set[str]:
        return {origin for dataset in datasets for origin in self.catalog.dataset(dataset).origins}

    def _plain(self, query: Query, path: str) -> SelectionRecipe:
        """The recipe of a method that compares no features."""
        own = self.methods.get(query.method or "influence")
        datasets = [self.catalog.dataset(reference).id for reference in dict.fromkeys(query.datasets)]
        if query.match is not None:
            datasets = datasets or list(self.catalog.selection(query.match).recipe["datasets"])
        datasets = datasets or list(own.pool(query, path=path) if own else ()) or self.catalog.pools()
        if not datasets:
            raise Conflict("there is no dataset to select from: upload one with POST /datasets")
        if len(datasets) > 1 and not query.datasets and query.match is None:
            raise advice.several_datasets(query, datasets, path, catalog=self.catalog)
        tasks = [self.catalog.task(reference).id for reference in dict.fromkeys(query.tasks)]
        nothing = dict.fromkeys(name for name, field in SelectionRecipe.model_fields.items() if field.is_required())
        return SelectionRecipe.model_validate(
            nothing
            | {
                "method": query.method,
                "datasets": datasets,
                "tasks": tasks,
                "checkpoints": [],
                "checkpoint_weights": [],
                "aggregate": query.aggregate,
                "combine": query.combine,
                **(own.resolved(query, datasets=datasets, tasks=tasks, path=path) if own else {}),
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
            "nearness": query.nearness,
            "bandwidth": query.bandwidth,
            "tau": query.tau,
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
        query = with_method(query)
        refuse_idle(query)
        fits = self._fits(query)
        found = [fit for fit in fits if not fit.is_foreign]
        if not found:
            raise advice.foreign(fits[0].parameters["projection_id"], lacking="what is computed here")
        if len(found) > 1:
            raise advice.ambiguous(query, found, path, catalog=self.catalog)
        fit = found[0]
        run = fit.run.id if fit.run else None
        return Pools(run, fit.checkpoints, self._weights(fit), fit.parameters, fit.pools)

    def _fits(self, query: Query) -> list[Fit]:
        """The pools that fit a query, whatever its tasks have. Raises `NotFound` and `GradientsMissing`."""
        datasets = [self.catalog.dataset(reference).id for reference in dict.fromkeys(query.datasets)]
        checkpoints = tuple(self.catalog.checkpoint(reference).id for reference in query.checkpoints)
        if len(set(checkpoints)) < len(checkpoints):
            raise rules.refused("checkpoint", "a checkpoint is named twice, and would count twice")
        run = self.catalog.run(query.run) if query.run else None
        near = self._pool_fits(query, datasets, run, checkpoints)
        found = [fit for fit in near if len(fit.pools) == max(1, len(datasets))]
        if not found:
            raise advice.missing_pool(
                query, datasets, run, checkpoints, near, catalog=self.catalog, features=self.features
            )
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
        raise advice.not_stored(owner, recipe.checkpoints, variants[0])

    def _pool_fits(
        self, query: Query, datasets: Sequence[str], run: Run | None, checkpoints: tuple[str, ...]
    ) -> list[Fit]:
        """What fits the query; of the datasets that it names a fit may have only some."""
        known = self.features.complete(datasets=datasets or self.catalog.pools())
        wanted = {name: value for name in ASKED if (value := getattr(query, name)) is not None}
        groups: dict[tuple[Any, ...], dict[str, list[FeatureSet]]] = defaultdict(lambda: defaultdict(list))
        for feature in known:
            if feature.kind in WHEN_NAMED and feature.kind != query.kind:
                continue
            if all(said(name, getattr(feature, name)) == value for name, value in wanted.items()):
                key = tuple(getattr(feature, name) for name in (*OWN, *SHARED))
                groups[key][feature.dataset or ""].append(feature)
        trainings = self._trainings(run, checkpoints, [feature.checkpoint for feature in known])
        found: list[Fit] = []
        for key, pools in groups.items():
            parameters = dict(zip((*OWN, *SHARED), key, strict=True))
            fits = [fit for training in trainings for fit in _covering(pools, parameters, datasets, *training)]
            if not fits and parameters["projection"] == FOREIGN and not run and not checkpoints:
                at = dict.fromkeys(feature.checkpoint for sets in pools.values() for feature in sets)
                fits = [fit for one in at for fit in _covering(pools, parameters, datasets, None, (one,))]
            found += fits
        return found

    def _trainings(
        self, run: Run | None, checkpoints: tuple[str, ...], known: Sequence[str]
    ) -> list[tuple[Run | None, tuple[str, ...]]]:
        """What is asked for, or else every run, and by itself every checkpoint of `known` that belongs to none.

        Imported features of one checkpoint of a run are by themselves where no run has all: see `_pool_fits`.
        """
        if checkpoints:
            return [(run, checkpoints)]
        runs = [run] if run else self.catalog.all_runs()
        members = [(one, tuple(checkpoint.id for checkpoint in one.checkpoints)) for one in runs]
        in_runs = {checkpoint for _, own in members for checkpoint in own}
        alone = [] if run else [checkpoint for checkpoint in dict.fromkeys(known) if checkpoint not in in_runs]
        return [*members, *((None, (checkpoint,)) for checkpoint in alone)]

    def _targets(self, fit: Fit, tasks: Sequence[Task]) -> dict[str, list[FeatureSet]]:
        """The tasks' feature sets that go with a fit."""
        known = self.features.complete(tasks=[task.id for task in tasks])
        fitting = [
            feature for feature in known if all(getattr(feature, name) == fit.parameters[name] for name in SHARED)
        ]
        kind = fit.parameters["kind"]
        found = {}
        for task in tasks:
            for wanted in ((kind, None),) if kind in LIKE_WITH_LIKE else _TASK_KINDS:
                sets = [each for each in fitting if each.task == task.id and (each.kind, each.adam) == wanted]
                chosen = _in_order(sets, fit.checkpoints)
                if chosen is not None:
                    found[task.id] = chosen
                    break
        return found

    def _recipe(self, query: Query, fit: Fit, targets: dict[str, list[FeatureSet]]) -> SelectionRecipe:
        kinds = {(features[0].kind, features[0].adam) for features in targets.values()}
        if len(kinds) > 1:
            raise InvalidInput("the tasks' features are of different kinds: compute them alike with POST /gradients")
        ((task_kind, task_adam),) = kinds
        return SelectionRecipe(
            datasets=list(fit.pools),
            tasks=list(targets),
            checkpoints=list(fit.checkpoints),
            checkpoint_weights=self._weights(fit),
            run=fit.run.id if fit.run else None,
            task_kind=task_kind,
            task_adam=task_adam,
            method=query.method or "influence",
            aggregate=query.aggregate if query.strategy == "shots" else query.aggregate or "less",
            combine=query.combine or "max",
            **fit.parameters,
            **self._resolved(query, list(fit.pools)),
        )

    def _weights(self, fit: Fit) -> list[float]:
        """Mean learning rate of each checkpoint over their sum (LESS, eq. 3)."""
        members = fit.run.checkpoints if fit.run else []
        of_run = {checkpoint.id: checkpoint.learning_rate for checkpoint in members}
        rates = [of_run[id] if id in of_run else self.catalog.checkpoint(id).learning_rate for id in fit.checkpoints]
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
            raise NotFound("dataset or selection", reference, collection=("/datasets", "/selections"))
        if len(found) > 1:
            ids = " and ".join(one.id for one in found)
            raise rules.refused("exclude", f"{reference!r} is the name of {ids}: say which by its id")
        return found[0]


def _covering(
    pools: Mapping[str, list[FeatureSet]],
    parameters: dict[str, Any],
    datasets: Sequence[str],
    run: Run | None,
    checkpoints: tuple[str, ...],
) -> list[Fit]:
    """The datasets with features at all of these checkpoints: together where they are named, else each by itself."""
    covered = {
        dataset: chosen for dataset, sets in pools.items() if (chosen := _in_order(sets, checkpoints)) is not None
    }
    if not datasets:
        return [Fit(run, checkpoints, parameters, {one: sets}) for one, sets in covered.items()]
    ordered = {dataset: covered[dataset] for dataset in datasets if dataset in covered}
    return [Fit(run, checkpoints, parameters, ordered)] if ordered else []


def _in_order(sets: Sequence[FeatureSet], checkpoints: Sequence[str]) -> list[FeatureSet] | None:
    """One feature set for each checkpoint, or None when one is missing."""
    by_checkpoint = {feature.checkpoint: feature for feature in sets}
    if not all(checkpoint in by_checkpoint for checkpoint in checkpoints):
        return None
    return [by_checkpoint[checkpoint] for checkpoint in checkpoints]
