"""Comparisons over trainings whose outcome is known: what is selected, shared and lost, against brute force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import (
    ComparisonRequest,
    ComparisonResult,
    Contestant,
    CostSource,
    Estimate,
    SelectionRecipe,
)

from datastore.correlation import interval, resampled_change
from datastore.errors import Ambiguous, Conflict, Damaged, GradientsMissing, InUse, InvalidInput, NotFound
from datastore.influence import influence
from datastore.leases import Claim
from datastore.trainings import Measured, Training
from service.routes.select import SelectQuery
from tests.stores import DIM, Store, numbers, request, task_numbers

POOL = 60
SUBTASKS = {"a": 3, "b": 2}
VALIDATION = sum(SUBTASKS.values())
K = 12
TRAINING = {"train": True, "batch_size": 4, "device_batch_size": 4, "bootstrap_samples": 200, "repeats": 3}
WAYS: list[dict[str, Any]] = [
    {"method": "influence"},
    {"method": "influence", "aggregate": "avg"},
    {"method": "bm25"},
    {"method": "random"},
]
Losses = Callable[[Training], list[float | None]]


@dataclass(frozen=True)
class World:
    """A store with the features of a pool for a task, and no worker."""

    store: Store
    folder: Path
    model: Path

    @classmethod
    def at(cls, folder: Path) -> World:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"hidden_size": 24}')
        store = Store.at(folder / "store", allowed_roots=(folder,))
        for number in range(2):
            store.checkpoint(number, model=str(model))
        store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
        store.pool(POOL, name="pool")
        store.task(SUBTASKS, folder=folder / "task")
        world = cls(store, folder, model)
        world.compute({"dataset": "pool"}, numbers)
        world.compute({"task": "target"}, task_numbers)
        return world

    def compute(self, owner: dict[str, str], made: Any, **changes: Any) -> None:
        """Have features."""
        self.store.features.start(request(**{**owner, "dtype": "float32", **changes}))
        self.store.work(made)

    def request(self, **changes: Any) -> ComparisonRequest:
        values = {"dataset": "pool", "tasks": ["target"], "k": K, "contestants": WAYS}
        if changes.get("train"):
            values["model"] = str(self.model)
        return ComparisonRequest.model_validate({**values, **changes})

    def step(self, claim: Claim, losses: Losses) -> bool:
        """Do a shard as a worker does, a training with these losses."""
        comparisons, plan, payload = self.store.comparisons, claim.plan, claim.payload
        if "choose" in payload:
            recipe = comparisons.recipe(plan, payload)
            sources = self.store.recipes.sources(recipe)
            if self.store.scoring.known(recipe, sources) is None:
                self.store.scoring.start(recipe, sources)
                self.store.score()
            scores = self.store.scoring.known(recipe, sources)
            assert scores is not None
            selection = self.store.answers.select(recipe, sources, scores, limit=0)
            return comparisons.finish_selection(claim, selection.id, 0.25)
        training = comparisons.training(plan, payload)
        if self.store.trainings.get(training.key) is None:
            measured = Measured(losses(training), rows=len(training.rows), tokens=len(training.rows), seconds=2.0)
            self.store.trainings.put(training, measured)
        return comparisons.finish_training(claim, training.key)

    def claim(self) -> Claim:
        claim = self.store.jobs.claim("test", kinds=["comparison"])
        assert claim is not None, "no shard waits"
        return claim

    def done(self, asked: ComparisonRequest, losses: Losses = lambda _: [1.0] * VALIDATION) -> ComparisonResult:
        """Do a whole comparison."""
        job, _ = self.store.comparisons.start(asked)
        while (claim := self.store.jobs.claim("test", kinds=["comparison"])) is not None:
            assert self.step(claim, losses)
        job = self.store.jobs.get(job.id)
        assert job.status == "succeeded", job.error
        assert job.result is not None
        return ComparisonResult.model_validate(job.result.model_dump())

    def rows(self, selection: str) -> set[int]:
        return {row.row for row in self.store.answers.rows(selection)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


def best(how: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> set[int]:
    """The K best rows by the influences (POOL, VALIDATION) of the run's two checkpoints, made one score a row."""
    rates = np.array([1e-4, 5e-5])
    parts = [
        weight * influence(numbers(name, 0, POOL, DIM), task_numbers(name, 0, VALIDATION, DIM)).astype(np.float64)
        for name, weight in zip(("ck_0", "ck_1"), rates / rates.sum(), strict=True)
    ]
    return set(np.argsort(-how(np.sum(parts, axis=0)))[:K].tolist())


# What is selected -----------------------------------------------------------------------------------------------------


def test_contestants_select_what_brute_force_selects(world: World) -> None:
    found = world.done(world.request())
    less, avg, bm25, _ = found.rows
    largest_mean = best(lambda rows: np.maximum(rows[:, :3].mean(axis=1), rows[:, 3:].mean(axis=1)))
    assert world.rows(less.selection) == largest_mean
    assert world.rows(avg.selection) == best(lambda rows: rows.mean(axis=1))
    assert bm25.rows == K
    assert [row.contestant for row in found.rows] == ["influence", "influence aggregate=avg", "bm25", "random"]
    assert [row.recipe.aggregate for row in found.rows] == ["less", "avg", "max", None]
    assert less.selection == world.store.answers.read(less.selection, limit=0).id
    assert less.recipe == SelectionRecipe.model_validate(world.store.catalog.selection(less.selection).recipe)


def test_pairs_and_make_up_are_what_counting_gives(world: World) -> None:
    found = world.done(world.request())
    rows = {row.contestant: world.rows(row.selection) for row in found.rows}
    names = list(rows)
    assert [pair.contestants for pair in found.pairs] == [
        (one, other) for place, one in enumerate(names) for other in names[place + 1 :]
    ]
    for pair in found.pairs:
        one, other = (rows[name] for name in pair.contestants)
        assert pair.shared == len(one & other)
        assert pair.jaccard == pytest.approx(len(one & other) / len(one | other))
        assert pair.share == pytest.approx(len(one & other) / K)
    for row in found.rows:
        counts = {f"origin{number}": sum(place % 3 == number for place in rows[row.contestant]) for number in range(3)}
        assert row.origins == {origin: number for origin, number in counts.items() if number}
    assert (found.pool, found.pool_origins) == (POOL, {"origin0": 20, "origin1": 20, "origin2": 20})


def test_selections_of_other_sizes_share_a_part_of_the_smaller_one(world: World) -> None:
    ways = [{"label": "all", "method": "random"}, {"label": "few", "method": "random", "quota": ["origin0:1"]}]
    found = world.done(world.request(k=POOL, contestants=ways))
    assert [row.rows for row in found.rows] == [POOL, 20]
    [pair] = found.pairs
    assert (pair.shared, pair.jaccard, pair.share) == (20, pytest.approx(20 / POOL), 1.0)


def test_each_task_is_selected_for_by_itself(world: World) -> None:
    world.store.task({"c": 2}, folder=world.folder / "other", name="other")
    world.compute({"task": "other"}, numbers)  # these are the pool's own rows 0 and 1
    found = world.done(world.request(tasks=["target", "other", "target"], contestants=WAYS[:2], k=1))
    assert [(row.task_name, row.contestant) for row in found.rows] == [
        ("target", "influence"), ("target", "influence aggregate=avg"),
        ("other", "influence"), ("other", "influence aggregate=avg"),
    ]  # fmt: skip
    assert world.rows(found.rows[2].selection) <= {0, 1}
    assert {pair.task for pair in found.pairs} == {task.task for task in found.tasks}


def test_a_contestant_takes_what_select_takes_but_what_all_of_them_share() -> None:
    names = {"checkpoint": "checkpoints", "task": "", "dataset": "", "combine": "", "match": ""}
    shared = {"task", "dataset", "pct", "k", "limit", "after", "wait", "combine", "match"}
    taken = {names.get(name, name) for name in SelectQuery.model_fields if name not in shared}
    assert set(Contestant.model_fields) - {"label"} == taken


# What it costs --------------------------------------------------------------------------------------------------------


def test_costs_are_those_that_jobs_have_recorded(world: World) -> None:
    less, _, bm25, random = world.done(world.request()).rows
    gradients = {job.id: job for job in world.store.jobs.page(kind="gradients", limit=10).data}
    assert {source.job for source in less.cost.rests_on} == set(gradients)
    known = [job.result.model_dump()["seconds"] for job in gradients.values() if job.result is not None]
    assert less.cost.rests_on_seconds == pytest.approx(sum(known))
    scoring = world.store.jobs.get(world.store.scoring.job_id(less.recipe)).result
    assert scoring is not None
    assert less.cost.scoring_seconds == scoring.model_dump()["seconds"]
    assert less.cost.choosing_seconds == 0.25
    assert (bm25.cost.rests_on, bm25.cost.rests_on_seconds) == ([], 0.0)
    assert bm25.cost.scoring_seconds is not None
    assert (random.cost.scoring_seconds, random.cost.rests_on_seconds) == (0.0, 0.0)


def test_the_warm_up_is_part_of_what_influence_rests_on(world: World) -> None:
    with world.store.catalog.transaction() as session:
        from datastore.schema import RunRow

        session.get_one(RunRow, "run_1").finetune = "ft_gone"
    less = world.done(world.request()).rows[0]
    assert less.cost.rests_on[0] == CostSource(job="ft_gone", kind="finetune", seconds=None)
    assert less.cost.rests_on_seconds is None


# What is possible -----------------------------------------------------------------------------------------------------


def test_by_default_all_that_the_store_has_is_compared_and_the_rest_told(world: World) -> None:
    found = world.done(world.request(contestants=None))
    assert {row.contestant for row in found.rows} >= {
        "influence aggregate=less", "influence aggregate=avg", "influence aggregate=max", "influence aggregate=min",
        "bm25", "random",
    }  # fmt: skip
    left = {one.method: one for one in found.left_out}
    assert {"rds", "embedding"} <= left.keys()
    assert "POST /gradients" in left["rds"].detail
    assert '"rds"' in left["rds"].detail
    assert {row.method for row in found.rows}.isdisjoint(left)


def test_a_task_without_features_leaves_influence_out_and_says_which_it_is(world: World) -> None:
    other = world.store.task({"c": 2}, folder=world.folder / "other", name="other")
    found = world.done(world.request(contestants=None, tasks=["target", "other"]))
    [left] = [one for one in found.left_out if one.method == "influence"]
    assert left.task == other.id
    assert f'"task": "{other.id}"' in left.detail
    assert {row.method for row in found.rows} == {"bm25", "random"}


def test_a_contestant_that_cannot_be_answered_is_named_with_what_to_post(world: World) -> None:
    with pytest.raises(GradientsMissing, match=r"contestant 'rds': .*POST /gradients") as missing:
        world.store.comparisons.start(world.request(contestants=[*WAYS, {"method": "rds"}]))
    assert missing.value.body["kinds"] == ["rds"]
    world.compute({"dataset": "pool"}, numbers, dims=[DIM, 8])
    world.compute({"task": "target"}, task_numbers, dims=[DIM, 8])
    with pytest.raises(Ambiguous, match="contestant 'mine': 2 sets of features fit") as several:
        world.store.comparisons.start(world.request(contestants=[{"label": "mine"}]))
    assert len(several.value.choices) == 2
    ambiguous = world.done(world.request(contestants=None)).left_out
    assert any(one.method == "influence" and "name one of them" in one.detail for one in ambiguous)


def test_what_a_contestant_names_and_is_not_there_is_told_with_the_contestant(world: World) -> None:
    with pytest.raises(NotFound, match=r"^contestant 'mine': no checkpoint is called 'ck_none'; GET /checkpoints"):
        world.store.comparisons.start(world.request(contestants=[{"label": "mine", "checkpoints": ["ck_none"]}]))


def test_bad_contestants_are_refused_by_their_place(world: World) -> None:
    refused = [
        ([{"method": "bm25"}, {"method": "bm25"}], "/contestants/1/label"),
        ([{"method": "random"}, {"method": "bm25", "dim": 8}], "/contestants/1/dim"),
        ([{"method": "random", "quota": ["nowhere:1"]}], "/contestants/0/quota"),
    ]
    for contestants, pointer in refused:
        with pytest.raises(InvalidInput) as error:
            world.store.comparisons.start(world.request(contestants=contestants))
        assert [one.pointer for one in error.value.errors] == [pointer]


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"pct": 0.1}, "either pct"),
        ({"k": None}, "either pct"),
        ({"train": True, "model": None}, "name it"),
        ({"epochs": 2, "repeats": 3}, "only a training takes repeats and epochs: send train=true"),
        ({"model": "tiny"}, "only a training takes model: send train=true"),
        ({"contestants": []}, "at least 1"),
        ({"contestants": [{"method": "nothing"}]}, "Input should be"),
        ({"contestants": [{"pct": 0.1}]}, "Extra inputs"),
        ({"contestants": [{"run": "a", "checkpoints": ["b"]}]}, "either a run or checkpoints"),
        ({"tasks": []}, "at least 1"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(world: World, changes: dict[str, Any], detail: str) -> None:
    with pytest.raises(ValueError, match=detail):
        world.request(**changes)


def test_a_split_without_rows_is_refused(world: World) -> None:
    with pytest.raises(InvalidInput, match="no test rows"):
        world.store.comparisons.start(world.request(split="test", **TRAINING))


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_the_same_request_is_the_same_job(world: World) -> None:
    first, fresh = world.store.comparisons.start(world.request())
    again, also = world.store.comparisons.start(world.request(tasks=["target", "target"]))
    assert (again.id, first.progress.total) == (first.id, len(WAYS))
    assert (fresh, also) == (True, False)
    assert world.store.comparisons.start(world.request(k=K + 1))[0].id != first.id
    assert world.store.comparisons.start(world.request(contestants=WAYS[:3]))[0].id != first.id


def test_what_a_comparison_names_is_not_deleted_before_it(world: World) -> None:
    found = world.done(world.request(**TRAINING))
    with pytest.raises(InUse):
        world.store.answers.remove(found.rows[0].selection)
    job = world.store.jobs.page(kind="comparison", limit=1).data[0]
    assert len(world.store.trainings.keys(older_than=-1)) == found.trainings
    world.store.trainings.sweep(world.store.catalog, older_than=-1)
    assert len(world.store.trainings.keys(older_than=-1)) == found.trainings
    world.store.comparisons.remove(job.id)
    assert not world.store.trainings.keys(older_than=-1)
    world.store.answers.remove(found.rows[0].selection)


def test_a_training_that_is_lost_is_told(world: World) -> None:
    job, _ = world.store.comparisons.start(world.request(**TRAINING))
    for _ in range(job.progress.total - 1):
        assert world.step(world.claim(), lambda _: [1.0] * VALIDATION)
    world.store.trainings.delete(world.store.trainings.keys(older_than=-1))
    with pytest.raises(Damaged, match="was deleted while its job was at work"):
        world.step(world.claim(), lambda _: [1.0] * VALIDATION)


# Trainings ------------------------------------------------------------------------------------------------------------


def outcome(training: Training) -> list[float | None]:
    """A model that starts at 3, and learns from every row of `origin0`; noise by seed."""
    noise = np.random.default_rng([training.recipe.seed, len(training.rows)]).normal(scale=0.01, size=VALIDATION)
    learnt = sum(row % 3 == 0 for row in training.rows) / 10
    return [float(3 - learnt + one) for one in (noise if training.rows else 0 * noise)]


def test_losses_are_the_means_of_the_trainings_and_differences_are_in_pairs(world: World) -> None:
    good_ones = {"label": "good", "method": "random", "quota": ["origin0:1"]}
    ways = [{"label": "chosen"}, {"method": "random"}, good_ones]
    found = world.done(world.request(contestants=ways, **TRAINING), outcome)
    plan = world.store.jobs.plan(world.store.jobs.page(kind="comparison", limit=1).data[0].id)
    task = found.tasks[0]
    assert (task.base_loss, task.measured_rows, task.left_out_rows) == (3.0, VALIDATION, 0)
    expected = [
        [
            np.mean(
                [
                    loss or 0
                    for loss in outcome(
                        world.store.comparisons.training(
                            plan, {"contestant": number, "task": task.task, "repeat": repeat}
                        )
                    )
                ]
            )
            for repeat in range(3)
        ]
        for number in range(3)
    ]
    for row, losses in zip(found.rows, expected, strict=True):
        assert row.loss is not None
        assert row.loss.by_seed == pytest.approx(losses)
        assert row.loss.value == pytest.approx(np.mean(losses))
        assert row.loss.interval.low <= row.loss.value <= row.loss.interval.high
    chosen, random, good = (row.loss for row in found.rows)
    assert chosen is not None
    assert random is not None
    assert good is not None
    assert found.against == "random"
    assert (random.difference, random.difference_interval) == (None, None)
    assert good.difference == pytest.approx(np.mean(np.subtract(expected[2], expected[1])))
    assert good.difference_interval is not None
    assert good.difference_interval.high < 0  # twelve rows of origin0 beside some four
    assert (found.trainings, found.tokens, found.seconds) == (1 + 9, 9 * K, 20.0)


def test_what_is_drawn_is_drawn_anew_for_each_seed_and_what_is_scored_is_not(world: World) -> None:
    found = world.done(world.request(**TRAINING), outcome)
    *others, random = found.rows
    assert all(row.draws == [] for row in others)
    draws = [random.selection, *random.draws]
    assert len({frozenset(world.rows(selection)) for selection in draws}) == 3
    seeds = [world.store.answers.read(selection, limit=0).recipe.selection_seed for selection in draws]
    assert seeds == [0, 1, 2]


def test_an_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):  # trainings and rows both vary
        values = -0.2 + generator.normal(scale=0.1, size=(12, 1)) + generator.normal(scale=0.3, size=(1, 40))
        low, high = interval(resampled_change(values, samples=300, seed=0))
        hits += low <= -0.2 <= high
    assert 0.85 <= hits / 200 <= 0.99


def test_a_row_without_a_loss_somewhere_is_left_out_everywhere(world: World) -> None:
    def losses(training: Training) -> list[float | None]:
        found = outcome(training)
        return [None, *found[1:]] if training.recipe.seed == 1 else found

    found = world.done(world.request(**TRAINING), losses)
    assert (found.tasks[0].measured_rows, found.tasks[0].left_out_rows) == (VALIDATION - 1, 1)
    with pytest.raises(Conflict, match="no row of the task has a loss"):
        world.done(world.request(k=5, **TRAINING), lambda _: [None] * VALIDATION)


def test_trainings_are_shared_with_later_comparisons(world: World) -> None:
    world.done(world.request(contestants=WAYS[:2], **TRAINING), outcome)
    before = world.store.trainings.keys(older_than=-1)
    of_one = Estimate(
        rows=K, tokens=100, bytes=0, free_bytes=0, seconds=10.0, basis="estimated", memory_bytes=7, reused_rows=0
    )
    plan = world.store.comparisons.plan(world.request(contestants=WAYS, **TRAINING))
    estimate = world.store.comparisons.estimate(plan, of_one)
    assert (estimate.trainings, estimate.reused_trainings) == (1 + 4 * 3, 1 + 2 * 3)
    assert (estimate.rows, estimate.tokens, estimate.memory_bytes) == (K, 2 * 3 * 4 * 100, 7)
    assert estimate.basis == "measured"
    world.done(world.request(contestants=WAYS, **TRAINING), outcome)
    assert before < world.store.trainings.keys(older_than=-1)
    without = world.store.comparisons.estimate(world.store.comparisons.plan(world.request()), None)
    assert (without.trainings, without.seconds, without.contestants[-1]) == (0, None, "random")
