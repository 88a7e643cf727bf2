"""Comparisons: several ways to select from one pool, for the same tasks and with the same budget, side by side.

A contestant is a set of parameters of /select; whatever method /select knows is one, since recipes, scores and chosen
rows are those of /select. A shard is one selection or one training, so that workers share a comparison and a kill
loses one of them: selections come first, and a training whose selection is not there yet makes it.

What is drawn (the control `random`, clusters) is drawn anew for each repeat, with the repeat's seed: the difference
from the random selection is then of pairs of trainings, each with its own draw and the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations
from typing import Any, get_args

import numpy as np
from gradstore.types import (
    Aggregate,
    AnyJob,
    ComparedCost,
    ComparedLoss,
    ComparedPair,
    ComparedRow,
    ComparedTask,
    ComparisonEstimate,
    ComparisonRequest,
    ComparisonResult,
    Contestant,
    Estimate,
    FinetuneRequest,
    Interval,
    LeftOut,
    ProblemItem,
    Selection,
    SelectionMethod,
    SelectionRecipe,
    Task,
    TrainingRecipe,
    TrainingSettings,
)
from gradstore.types.validations import MAX_TRAININGS
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from datastore import assembly
from datastore.answers import Answers, selection_id
from datastore.catalog import Catalog, use
from datastore.correlation import Numbers, interval, resampled_change
from datastore.costs import Costs
from datastore.errors import Ambiguous, Conflict, GradientsMissing, GradstoreError, InvalidInput, NotFound, refusal
from datastore.finetunes import Finetunes
from datastore.identity import content_id
from datastore.leases import Claim, Jobs, NewShard
from datastore.parameters import Query
from datastore.recipes import Recipes
from datastore.schema import ShardRow
from datastore.selection.top import count
from datastore.tasks import Tasks
from datastore.training_costs import TrainingsCost, cost_of
from datastore.trainings import Measured, Training, Trainings
from datastore.validations import called

_SHARED = tuple(sorted({each.name for each in fields(Query)} & set(Contestant.model_fields)))
"""What a contestant says in the words of a query."""


@dataclass(frozen=True)
class ComparisonPlan:
    """A request resolved to ids."""

    id: str
    settings: dict[str, Any]
    """What workers need."""
    shards: list[dict[str, Any]]
    """Which selection or training each is."""
    uses: list[str]
    finetune: FinetuneRequest | None
    """A fine-tune that costs what one training does; None without trainings."""

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """The shards that are trainings."""
        return [payload for payload in self.shards if "choose" not in payload]


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a catalog."""

    catalog: Catalog
    jobs: Jobs
    tasks: Tasks
    recipes: Recipes
    answers: Answers
    finetunes: Finetunes
    trainings: Trainings
    costs: Costs

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: ComparisonRequest) -> tuple[AnyJob, bool]:
        """Start a comparison, or return the one of the same content; says whether there is work to do.

        Raises `NotFound`, `InvalidInput`, and, naming the contestant, what /select raises for it.
        """
        plan = self.plan(request)
        return self.jobs.create(
            id=plan.id,
            kind="comparison",
            request=request.model_dump(mode="json"),
            plan=plan.settings,
            shards=[NewShard(payload=payload, units=1) for payload in plan.shards],
            name=request.name,
            uses=plan.uses,
        )

    def plan(self, request: ComparisonRequest) -> ComparisonPlan:
        """Resolve a request. Raises what `start` does."""
        pool = self.catalog.dataset(request.dataset)
        tasks = list({task.id: task for task in map(self.catalog.task, request.tasks)}.values())
        _check_splits(request, tasks)
        contestants, left_out = self._contestants(request, pool.id, tasks)
        rows = count(pool.rows, pct=request.pct, k=request.k)
        finetune = self._finetune(request, pool.id, rows) if request.train else None
        recipe = _recipe_of(finetune) if finetune is not None else None
        settings = {
            "dataset": pool.id,
            "rows": rows,
            "tasks": [{"id": task.id, "name": task.name} for task in tasks],
            "contestants": contestants,
            "split": request.split,
            "recipe": None if recipe is None else recipe.model_dump(mode="json"),
            "repeats": request.repeats,
            "bootstrap_samples": request.bootstrap_samples,
        }
        shards = list(_shards(settings))
        if sum("choose" not in payload for payload in shards) > MAX_TRAININGS:
            raise InvalidInput(f"contestants times tasks times repeats are trainings: at most {MAX_TRAININGS:,}")
        return ComparisonPlan(
            id=content_id("cmp", {**settings, "tasks": [task.id for task in tasks]}),
            settings={**settings, "left_out": [one.model_dump(mode="json") for one in left_out]},
            shards=shards,
            uses=[pool.id, *(task.id for task in tasks)],
            finetune=finetune,
        )

    def estimate(self, plan: ComparisonPlan, of_one: Estimate | None) -> ComparisonEstimate:
        """What a plan would cost, from what a fine-tune like one of its trainings would (None without trainings)."""
        settings = plan.settings
        missing = [payload for payload in plan.trainings if not self._is_known(settings, payload)]
        trained = sum("base" not in payload for payload in missing)
        cost = TrainingsCost(0, None, None)
        if of_one is not None:
            cost = cost_of(self.jobs, of_one, recipe=settings["recipe"], missing=trained)
        return ComparisonEstimate(
            contestants=[one["label"] for one in settings["contestants"]],
            left_out=settings["left_out"],
            trainings=len(plan.trainings),
            reused_trainings=len(plan.trainings) - len(missing),
            rows=settings["rows"],
            tokens=cost.tokens,
            seconds=cost.seconds,
            basis=cost.basis,
            memory_bytes=None if of_one is None else of_one.memory_bytes,
        )

    def remove(self, reference: str) -> str:
        """Delete a comparison and the trainings that no other job has, and return its id; its selections stay."""
        return self.jobs.remove(reference, kind="comparison", before=self.trainings.forget_job)

    def _is_known(self, settings: dict[str, Any], payload: dict[str, Any]) -> bool:
        try:
            return self.trainings.get(self.training(settings, payload).key) is not None
        except NotFound:  # its rows are not chosen yet
            return False

    def _finetune(self, request: ComparisonRequest, pool: str, rows: int) -> FinetuneRequest:
        """A fine-tune like one of the trainings, its model resolved. Raises `InvalidInput`."""
        asked = {name: getattr(request, name) for name in TrainingSettings.model_fields}
        finetune = FinetuneRequest.model_validate({**asked, "model": request.model, "dataset": pool, "rows": rows})
        found = self.finetunes.plan(finetune)
        return finetune.model_copy(update={"model": found.model, "revision": found.revision})

    # Contestants ------------------------------------------------------------------------------------------------------

    def _contestants(
        self, request: ComparisonRequest, pool: str, tasks: Sequence[Task]
    ) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """What is compared, each with its recipe for each task; and which methods cannot be."""
        if request.contestants is None:
            return self._possible(request, pool, tasks)
        found: list[dict[str, Any]] = []
        for number, contestant in enumerate(request.contestants):
            label = contestant.label or _label(contestant)
            if label in {one["label"] for one in found}:
                raise refusal(f"two contestants are called {label!r}: give them labels", f"/contestants/{number}/label")
            recipes = {}
            for task in tasks:
                try:
                    recipes[task.id] = self._resolved(contestant, request, pool, task)
                except GradstoreError as error:
                    raise _of_contestant(error, label, number) from error
            found.append({"label": label, "recipes": recipes})
        return found, []

    def _possible(
        self, request: ComparisonRequest, pool: str, tasks: Sequence[Task]
    ) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """Every method for which all that it needs is in the store, and why the others are left out."""
        found: list[dict[str, Any]] = []
        left_out: list[LeftOut] = []
        methods: tuple[SelectionMethod, ...] = get_args(SelectionMethod)
        for method in methods:
            try:
                found += [
                    {
                        "label": _label(contestant),
                        "recipes": {task.id: self._resolved(contestant, request, pool, task) for task in tasks},
                    }
                    for contestant in _variants(method)
                ]
            except (Conflict, InvalidInput, NotFound) as error:
                left_out.append(LeftOut(method=method, task=_lacking(error, tasks), detail=_with_choices(error)))
        if not found:
            raise Conflict(left_out[0].detail)
        return found, left_out

    def _resolved(self, contestant: Contestant, request: ComparisonRequest, pool: str, task: Task) -> dict[str, Any]:
        """A contestant's recipe for a task. Raises what /select does."""
        said = {name: getattr(contestant, name) for name in _SHARED}
        query = Query(tasks=[task.id], datasets=[pool], pct=request.pct, k=request.k, **said)
        recipe, _ = self.recipes.resolve(query, path="/select")
        return recipe.model_dump(mode="json")

    # Workers' side ----------------------------------------------------------------------------------------------------

    def recipe(self, plan: dict[str, Any], payload: dict[str, Any]) -> SelectionRecipe:
        """The recipe of the selection that a shard makes or trains on."""
        contestant = plan["contestants"][payload["contestant"]]
        recipe = SelectionRecipe.model_validate(contestant["recipes"][payload["task"]])
        if recipe.selection_seed is None:
            return recipe
        return recipe.model_copy(update={"selection_seed": (recipe.selection_seed + payload["repeat"]) % (1 << 32)})

    def training(self, plan: dict[str, Any], payload: dict[str, Any]) -> Training:
        """What a shard trains on and measures. Raises `NotFound` where its selection is not there."""
        recipe = TrainingRecipe.model_validate(plan["recipe"])
        if "base" in payload:
            named = ("model", "revision", "template", "max_length", "precision", "quantisation")
            recipe = TrainingRecipe.model_validate({name: getattr(recipe, name) for name in named})
            rows: list[int] = []
        else:
            recipe = recipe.model_copy(update={"seed": (recipe.seed + payload["repeat"]) % (1 << 32)})
            rows = self._rows(selection_id(self.recipe(plan, payload))).tolist()
        return Training(dataset=plan["dataset"], rows=rows, recipe=recipe, task=payload["task"], split=plan["split"])

    def finish_selection(self, claim: Claim, selection: str, choosing_seconds: float | None) -> bool:
        """Commit a selection that is made, and with the last shard the job's result; False where it is not wanted."""
        own = {"selection": selection, "choosing_seconds": choosing_seconds}

        def record(session: Session, shard: ShardRow) -> None:
            shard.payload = {**shard.payload, **own}
            use(session, user=claim.job, used=[selection])

        return assembly.commit(self.jobs, claim, record=record, result=lambda: self.result(claim, **own))

    def finish_training(self, claim: Claim, key: str) -> bool:
        """Commit a training that is done, and with the last shard the job's result; False where it is not wanted."""
        record = partial(self.trainings.record, key)
        return assembly.commit(self.jobs, claim, record=record, result=lambda: self.result(claim, training=key))

    def result(self, claim: Claim, **own: Any) -> ComparisonResult:
        """What a comparison comes to whose shards are all done; `own` is what the claim's own has come to.

        Raises `Damaged` where a training is missing, `NotFound` where a selection is, and `Conflict` where no row of a
        task has a loss.
        """
        plan = claim.plan
        shards = assembly.payloads(self.catalog, claim, **own)
        keys = dict.fromkeys(shard["training"] for shard in shards if "training" in shard)
        measured = {key: self.trainings.kept(key) for key in keys}
        against = _against(plan)
        tasks: list[ComparedTask] = []
        rows: list[ComparedRow] = []
        pairs: list[ComparedPair] = []
        for task in plan["tasks"]:
            losses = _Losses.of(plan, [shard for shard in shards if shard["task"] == task["id"]], measured)
            described, found = losses.task(task, plan), list(self._compared(plan, task, shards, losses, against))
            tasks.append(described)
            rows += found
            pairs += _pairs(task["id"], {row.contestant: self._rows(row.selection) for row in found})
        return ComparisonResult(
            pool=sum(self._pool_origins(plan).values()),
            pool_origins=self._pool_origins(plan),
            tasks=tasks,
            rows=rows,
            pairs=pairs,
            left_out=plan["left_out"],
            against=None if against is None or plan["recipe"] is None else plan["contestants"][against]["label"],
            trainings=len(measured),
            tokens=sum(one.tokens for one in measured.values()),
            seconds=sum(one.seconds for one in measured.values()),
        )

    def _compared(
        self,
        plan: dict[str, Any],
        task: dict[str, Any],
        shards: Sequence[dict[str, Any]],
        losses: _Losses,
        against: int | None,
    ) -> Iterator[ComparedRow]:
        """The contestants' selections for a task."""
        for number, contestant in enumerate(plan["contestants"]):
            mine = [
                shard
                for shard in shards
                if "choose" in shard and (shard["task"], shard["contestant"]) == (task["id"], number)
            ]
            selections = [shard["selection"] for shard in mine]
            first = self.answers.read(selections[0], limit=0)
            yield ComparedRow(
                contestant=contestant["label"],
                task=task["id"],
                task_name=task["name"],
                method=first.recipe.method,
                selection=first.id,
                draws=selections[1:],
                recipe=first.recipe,
                rows=first.count,
                origins=first.origins,
                cost=self._cost(first, mine[0]["choosing_seconds"]),
                loss=losses.of_contestant(number, against, plan),
            )

    def _cost(self, selection: Selection, choosing_seconds: float | None) -> ComparedCost:
        recipe = selection.recipe
        sources = self.costs.sources(recipe)
        seconds = [None] if sources is None else [source.seconds for source in sources]
        known = [each for each in seconds if each is not None]
        return ComparedCost(
            scoring_seconds=self.costs.scoring_seconds(recipe),
            choosing_seconds=choosing_seconds,
            rests_on=sources or [],
            rests_on_seconds=sum(known, 0.0) if len(known) == len(seconds) else None,
        )

    def _rows(self, selection: str) -> NDArray[np.int64]:
        """The rows of the pool that a selection holds, in their order. Raises `NotFound`."""
        found: NDArray[np.int64] = np.sort(self.answers.chosen(selection)["row"].to_numpy())
        return found

    def _pool_origins(self, plan: dict[str, Any]) -> dict[str, int]:
        return self.catalog.dataset(plan["dataset"]).origins


@dataclass(frozen=True)
class _Losses:
    """The losses of a task's rows after the trainings of a comparison."""

    base: Numbers
    """(1, rows): of the model before any training; (0, 0) where nothing is trained."""
    trained: dict[int, Numbers]
    """Of each contestant (repeats, rows)."""
    left_out: int

    @classmethod
    def of(cls, plan: dict[str, Any], shards: Sequence[dict[str, Any]], measured: Mapping[str, Measured]) -> _Losses:
        """From what a task's shards have recorded: rows are left out that have no loss in one of them."""
        if plan["recipe"] is None:
            return cls(np.empty((0, 0)), {}, 0)
        base = np.stack([measured[shard["training"]].values for shard in shards if "base" in shard])
        trained = {
            number: np.stack(
                [
                    measured[shard["training"]].values
                    for shard in shards
                    if "training" in shard and shard.get("contestant") == number
                ]
            )
            for number in range(len(plan["contestants"]))
        }
        usable = np.isfinite(np.concatenate([base, *trained.values()])).all(axis=0)
        if not usable.any():
            raise Conflict("no row of the task has a loss: a larger max_length may leave something of their answers")
        kept = {number: losses[:, usable] for number, losses in trained.items()}
        return cls(base[:, usable], kept, int((~usable).sum()))

    def task(self, task: dict[str, Any], plan: dict[str, Any]) -> ComparedTask:
        """What is measured of the task, and the base model's loss."""
        none = not len(self.base)
        return ComparedTask(
            task=task["id"],
            task_name=task["name"],
            base_loss=None if none else float(self.base.mean()),
            base_interval=None if none else _interval(_resampled(self.base, plan)),
            measured_rows=self.base.shape[1],
            left_out_rows=self.left_out,
        )

    def of_contestant(self, number: int, against: int | None, plan: dict[str, Any]) -> ComparedLoss | None:
        """The loss after training on a contestant's selections, beside that on the random ones."""
        if number not in self.trained:
            return None
        mine = self.trained[number]
        changes = None if against is None or against == number else mine - self.trained[against]
        return ComparedLoss(
            value=float(mine.mean()),
            interval=_interval(_resampled(mine, plan)),
            by_seed=mine.mean(axis=1).tolist(),
            difference=None if changes is None else float(changes.mean()),
            difference_interval=None if changes is None else _interval(_resampled(changes, plan)),
        )


def _resampled(values: Numbers, plan: dict[str, Any]) -> Numbers:
    """The mean in each bootstrap sample of the trainings and rows; all contestants are drawn with the same draws."""
    return resampled_change(values, samples=plan["bootstrap_samples"], seed=plan["recipe"]["seed"])


def _interval(samples: Numbers) -> Interval:
    low, high = interval(samples)
    return Interval(low=low, high=high)


def _shards(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The selections, and then the trainings: the base model's losses first, and repeat by repeat."""
    tasks, contestants = [task["id"] for task in settings["tasks"]], settings["contestants"]
    trains = settings["recipe"] is not None
    for task in tasks:
        for number, contestant in enumerate(contestants):
            drawn = contestant["recipes"][task]["selection_seed"] is not None
            for repeat in range(settings["repeats"] if drawn and trains else 1):
                yield {"choose": True, "contestant": number, "task": task, "repeat": repeat}
    if trains:
        yield from ({"base": True, "task": task} for task in tasks)
        for repeat in range(settings["repeats"]):
            for task in tasks:
                yield from (
                    {"contestant": number, "task": task, "repeat": repeat} for number in range(len(contestants))
                )


def _against(plan: dict[str, Any]) -> int | None:
    """Number of the contestant that losses are compared with: the first that selects at random."""
    methods = [next(iter(one["recipes"].values()))["method"] for one in plan["contestants"]]
    return methods.index("random") if "random" in methods else None


def _pairs(task: str, rows: Mapping[str, NDArray[np.int64]]) -> Iterator[ComparedPair]:
    """What each pair of contestants has in common."""
    for one, other in combinations(rows, 2):
        shared = len(np.intersect1d(rows[one], rows[other], assume_unique=True))
        yield ComparedPair(
            task=task,
            contestants=(one, other),
            shared=shared,
            jaccard=shared / (len(rows[one]) + len(rows[other]) - shared),
            share=shared / min(len(rows[one]), len(rows[other])),
        )


def _variants(method: SelectionMethod) -> list[Contestant]:
    """A method in the ways in which it is compared by default: influence with every aggregate."""
    if method != "influence":
        return [Contestant(method=method)]
    aggregates: tuple[Aggregate, ...] = get_args(Aggregate)
    return [Contestant(method=method, aggregate=aggregate) for aggregate in aggregates]


def _label(contestant: Contestant) -> str:
    """What a contestant is called that has no label: its method, and by what else was said of it."""
    said = contestant.model_dump(mode="json", exclude_defaults=True, exclude={"label", "method"})
    return " ".join(filter(None, [contestant.method or contestant.kind or "influence", called(said)]))


def _lacking(error: GradstoreError, tasks: Sequence[Task]) -> str | None:
    """The task whose features are missing, where it is one's."""
    body = error.body if isinstance(error, GradientsMissing) else {}
    return next((task.id for task in tasks if body.get("task") == task.id), None)


def _with_choices(error: GradstoreError) -> str:
    """What an error says, with what may be chosen of."""
    if isinstance(error, Ambiguous):
        return f"{error}; name one of them as a contestant"
    return str(error)


def _of_contestant(error: GradstoreError, label: str, number: int) -> GradstoreError:
    """An error that says which contestant it is about."""
    detail = f"contestant {label!r}: {error}"
    if isinstance(error, GradientsMissing):
        return GradientsMissing(detail, body=error.body)
    if isinstance(error, Ambiguous):
        return Ambiguous(detail, choices=error.choices)
    if isinstance(error, InvalidInput):
        place = f"/contestants/{number}"
        items = [
            ProblemItem(pointer=f"{place}/{one.parameter}" if one.parameter else place, detail=one.detail)
            for one in error.errors
        ]
        return InvalidInput(detail, errors=items or [ProblemItem(pointer=place, detail=str(error))])
    if isinstance(error, Conflict):
        return Conflict(detail)
    if isinstance(error, NotFound):
        return NotFound(error.noun, error.name, collection=error.collection, of=f"contestant {label!r}: ")
    return error


def _recipe_of(finetune: FinetuneRequest) -> TrainingRecipe:
    return TrainingRecipe.model_validate({name: getattr(finetune, name) for name in TrainingRecipe.model_fields})


def _check_splits(request: ComparisonRequest, tasks: Sequence[Task]) -> None:
    """Raise `InvalidInput` where a task has no rows to measure."""
    for task in tasks if request.train else ():
        if not (task.test if request.split == "test" else task.validation):
            raise refusal(f"the task {task.name} has no {request.split} rows: upload it again with some", "/split")
