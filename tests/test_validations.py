"""Validations over trainings whose outcome is known: a model of one step, whose influences are inner products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gradstore.types import Estimate, ValidationRequest, ValidationResult
from numpy.typing import NDArray

from datastore.errors import Ambiguous, Conflict, Damaged, GradientsMissing, InvalidInput, NotFound
from datastore.influence import influence
from datastore.leases import Claim
from datastore.parameters import Query
from datastore.schema import DatasetRow
from datastore.trainings import Measured, Training
from tests.stores import DIM, Numbers, Store, numbers, request, task_numbers

POOL = 60
SUBTASKS = {"a": 3, "b": 2}
VALIDATION = sum(SUBTASKS.values())
Losses = Callable[[Training], list[float | None]]


@dataclass(frozen=True)
class World:
    """A store with the features of a pool and a task, and no worker."""

    store: Store
    folder: Path
    model: Path

    @classmethod
    def at(cls, folder: Path, *, pool: Numbers = numbers, **changes: Any) -> World:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"hidden_size": 24}')
        store = Store.at(folder / "store", allowed_roots=(folder,))
        for number in range(2):
            store.checkpoint(number, model=str(model))
        store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
        world = cls(store, folder, model)
        store.pool(POOL, name="pool")
        store.task(SUBTASKS, folder=folder / "task")
        world.compute(pool, task_numbers, **changes)
        return world

    def compute(self, pool: Numbers, task: Numbers, **changes: Any) -> None:
        """Have features."""
        for owner, found in ({"dataset": "pool"}, pool), ({"task": "target"}, task):
            self.store.features.start(request(**{**owner, "dtype": "float32", **changes}))
            self.store.work(found)

    def request(self, **changes: Any) -> ValidationRequest:
        """A request for few trainings."""
        values = {"dataset": "pool", "task": "target", "model": str(self.model), "subsets": 12, "batch_size": 4}
        return ValidationRequest.model_validate({**values, "bootstrap_samples": 200, "device_batch_size": 4, **changes})

    def claim(self) -> Claim:
        claim = self.store.jobs.claim("test", kinds=["validation"])
        assert claim is not None, "no training waits"
        return claim

    def train(self, claim: Claim, losses: Losses) -> Training:
        """Do a training as a worker does, with these losses."""
        training = self.store.validations.training(claim.plan, claim.payload)
        if self.store.validations.trainings.get(training.key) is None:
            measured = Measured(losses(training), rows=len(training.rows), tokens=10, seconds=2.0)
            self.store.validations.trainings.put(training, measured)
        return training

    def done(self, asked: ValidationRequest, losses: Losses) -> ValidationResult:
        """Do a whole validation."""
        job, _ = self.store.validations.start(asked)
        while (claim := self.store.jobs.claim("test", kinds=["validation"])) is not None:
            assert self.store.validations.finish(claim, self.train(claim, losses).key)
        job = self.store.jobs.get(job.id)
        assert job.status == "succeeded", job.error
        assert job.result is not None
        return ValidationResult.model_validate(job.result.model_dump())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


def influences(pool: Numbers = numbers, *, dim: int = DIM) -> NDArray[np.float64]:
    """What each row of the pool adds to each validation row (POOL, VALIDATION), at the run's two checkpoints."""
    rates = np.array([1e-4, 5e-5])
    parts = [
        weight * influence(pool(name, 0, POOL, dim), task_numbers(name, 0, VALIDATION, dim))
        for name, weight in zip(("ck_0", "ck_1"), rates / rates.sum(), strict=True)
    ]
    return np.sum(parts, axis=0, dtype=np.float64)


def one_step(effects: NDArray[np.float64], *, noise: float = 0.0) -> Losses:
    """A model that takes one step along the rows trained on: each lowers a loss by its influence."""

    def losses(training: Training) -> list[float | None]:
        generator = np.random.default_rng([training.recipe.seed, *training.rows])
        lowered = effects[list(training.rows)].sum(axis=0) / 10
        return [float(loss) for loss in 3 - lowered + noise * generator.normal(size=effects.shape[1])]

    return losses


# The linear datamodeling score ----------------------------------------------------------------------------------------


def test_scores_that_are_the_influences_of_the_model_predict_it_fully(world: World) -> None:
    found = world.done(world.request(), one_step(influences()))
    [scores] = found.scores
    assert scores.value == pytest.approx(1)
    assert scores.interval.low == pytest.approx(1)
    assert [(target.row, target.subtask) for target in scores.targets] == list(enumerate("aaabb"))
    assert (found.trainings, found.tokens, found.seconds, found.rows) == (12, 120, 24.0, POOL // 2)
    assert (found.left_out_targets, scores.unscored_rows, scores.difference) == (0, 0, None)


def test_scores_of_other_rows_predict_nothing(tmp_path: Path) -> None:
    def shuffled(name: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        order = np.random.default_rng(7).permutation(POOL)
        return numbers(name, 0, POOL, dim)[order][start:stop]

    world = World.at(tmp_path, pool=shuffled)
    [scores] = world.done(world.request(subsets=60), one_step(influences())).scores
    assert abs(scores.value) < 0.3


def test_a_score_is_what_pandas_finds_in_the_same_trainings(world: World) -> None:
    losses = one_step(influences(), noise=0.1)
    found = world.done(world.request(subsets=30, scores=[{"kind": "adam"}, {"control": "random"}]), losses)
    job = next(iter(world.store.jobs.page(limit=1, kind="validation").data))
    plan = world.store.jobs.plan(job.id)
    trainings = [world.store.validations.training(plan, {"subset": n, "repeat": 0}) for n in range(30)]
    table = pd.DataFrame([losses(training) for training in trainings])
    predicted = pd.DataFrame([influences()[list(training.rows)].sum(axis=0) for training in trainings])
    expected = [-table[row].rank().corr(predicted[row].rank()) for row in range(VALIDATION)]
    ours, control = found.scores
    np.testing.assert_allclose([target.value for target in ours.targets], expected, atol=1e-6)
    assert ours.value == pytest.approx(np.mean(expected))
    assert ours.interval.low < ours.value < ours.interval.high
    np.testing.assert_allclose([point.loss for point in ours.points], table.mean(axis=1))
    np.testing.assert_allclose([point.predicted for point in ours.points], predicted.mean(axis=1), atol=1e-4)
    assert (control.label, control.recipe) == ("random", None)
    assert control.difference == pytest.approx(control.value - ours.value)
    assert control.difference_interval is not None
    assert control.difference_interval.high < 0


def test_trainings_that_all_end_alike_say_nothing_of_scores(world: World) -> None:
    with pytest.raises(Conflict, match="every training ended with the same losses"):
        world.done(world.request(), lambda _: [1.5] * VALIDATION)


def test_subtasks_are_predicted_as_the_mean_of_their_rows(world: World) -> None:
    losses = one_step(influences(), noise=0.1)
    [scores] = world.done(world.request(targets="subtasks"), losses).scores
    assert [(target.row, target.subtask) for target in scores.targets] == [(None, "a"), (None, "b")]
    plan = world.store.jobs.plan(world.store.jobs.page(limit=1).data[0].id)
    rows = [world.store.validations.training(plan, {"subset": n, "repeat": 0}) for n in range(12)]
    measured = pd.DataFrame([losses(training) for training in rows])[[0, 1, 2]].mean(axis=1)
    predicted = pd.Series([influences()[list(training.rows)][:, :3].sum() for training in rows])
    assert scores.targets[0].value == pytest.approx(-measured.rank().corr(predicted.rank()), abs=1e-6)


def test_repeats_differ_in_their_seed_and_are_averaged(world: World) -> None:
    effects = influences()
    once = world.done(world.request(subsets=20), one_step(effects, noise=0.1)).scores[0].value
    often = world.done(world.request(subsets=20, repeats=5), one_step(effects, noise=0.1))
    assert often.trainings == 20 * 5
    assert often.scores[0].value > once + 0.1
    assert len(often.scores[0].points) == 20


def test_the_same_seed_draws_the_same_subsets_and_another_one_others(world: World, tmp_path: Path) -> None:
    losses = one_step(influences(), noise=0.1)
    found = world.done(world.request(), losses)
    elsewhere = World.at(tmp_path / "elsewhere")
    again = elsewhere.done(elsewhere.request(), losses)
    assert [scores.targets for scores in again.scores] == [scores.targets for scores in found.scores]
    assert again.scores[0].interval == found.scores[0].interval
    other = world.done(world.request(seed=1), losses)
    assert other.scores[0].points != found.scores[0].points


def test_a_row_without_a_feature_counts_as_nothing_and_a_target_without_one_is_left_out(tmp_path: Path) -> None:
    def with_zeros(name: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        rows = numbers(name, start, stop, dim)
        rows[:2] = 0
        return rows

    world = World.at(tmp_path, pool=with_zeros)
    losses = one_step(influences(with_zeros))
    found = world.done(world.request(), lambda training: [None, *losses(training)[1:]])
    [scores] = found.scores
    assert (scores.unscored_rows, found.left_out_targets) == (2, 1)
    assert [target.row for target in scores.targets] == [1, 2, 3, 4]
    assert scores.value == pytest.approx(1)


def test_whitened_features_are_compared_on_the_same_trainings(world: World) -> None:
    wanted = [{"label": "plain"}, {"label": "white", "precondition": "trackstar"}]
    found = world.done(world.request(scores=wanted), one_step(influences(), noise=0.1))
    assert found.trainings == 12
    plain, white = found.scores
    assert plain.mixing == []
    values = [whitened(name) for name in ("ck_0", "ck_1")]
    np.testing.assert_allclose(white.mixing, [share for _, share in values], rtol=1e-4)
    expected = (2 * values[0][0] + values[1][0]) / 3
    plan = world.store.jobs.plan(world.store.jobs.page(limit=1).data[0].id)
    rows = [world.store.validations.training(plan, {"subset": n, "repeat": 0}).rows for n in range(12)]
    predicted = [expected[list(chosen)].sum(axis=0).mean() for chosen in rows]
    np.testing.assert_allclose([point.predicted for point in white.points], predicted, atol=1e-3)


def whitened(checkpoint: str) -> tuple[NDArray[np.float64], float]:
    """The cosines (POOL, VALIDATION) after R^-1/2 by its definition, and the share of the task's second moment in R."""
    sides = [numbers(checkpoint, 0, POOL, DIM), task_numbers(checkpoint, 0, VALIDATION, DIM)]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in map(np.float64, sides)]
    moments = [unit.T @ unit / len(unit) for unit in units]
    first = [np.linalg.norm(moment, 2) for moment in moments]  # of 16 dims, 1,000 / 65,536 are less than one: the first
    share = first[0] / (first[0] + first[1])
    mixed = share * moments[1] + (1 - share) * moments[0]
    mixed += 0.1 * np.trace(mixed) / DIM * np.eye(DIM)
    # |R^-1/2 a|² = aᵀ R^-1 a: no root is needed for a cosine
    inverse = np.linalg.inv(mixed)
    lengths = [np.sqrt(np.einsum("nd,de,ne->n", rows, inverse, rows)) for rows in sides]
    return (sides[0] @ inverse @ sides[1].T) / np.outer(*lengths), share


# Leaving out the best rows --------------------------------------------------------------------------------------------


def test_without_its_best_rows_a_target_has_the_loss_that_their_influence_says(world: World) -> None:
    effects = influences()
    wanted = [{"aggregate": "avg"}, {"control": "random"}]
    asked = world.request(kind="leave-top-k-out", k=6, repeats=3, scores=wanted)
    found = world.done(asked, one_step(effects))
    best, control = found.scores
    top = np.argsort(-effects.mean(axis=1))[:6]
    assert found.trainings == 3 + 2 * 3  # of the same rows with other seeds
    without = 3 - np.delete(effects, top, axis=0).sum(axis=0) / 10
    np.testing.assert_allclose([point.loss for point in best.points], without.mean(), atol=1e-5)
    others = [point.random_loss for point in best.points]
    assert len(set(others)) == 3
    np.testing.assert_allclose(best.value, without.mean() - np.mean([other or 0 for other in others]), atol=1e-5)
    assert best.value > control.value
    assert best.interval.low < best.value < best.interval.high


def test_the_best_rows_are_those_of_a_selection(world: World) -> None:
    store = world.store
    for aggregate in ("less", "max", "min", "avg"):
        plan = store.validations.plan(
            world.request(kind="leave-top-k-out", k=7, scores=[{"aggregate": aggregate}])
        ).settings
        recipe, sources = store.recipes.resolve(Query(tasks=["target"], k=7, aggregate=aggregate), path="/select")
        store.scoring.start(recipe, sources)
        store.score()
        scores = store.scoring.known(recipe, sources)
        assert scores is not None
        chosen = {row.row for row in store.answers.select(recipe, sources, scores, limit=7).data}
        left = set(range(POOL)) - set(store.validations.training(plan, {"best": 0, "repeat": 0}).rows)
        assert left == chosen


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_trainings_are_shared_by_all_scores_and_by_later_validations(world: World) -> None:
    losses = one_step(influences())
    world.done(world.request(), losses)

    def never(training: Training) -> list[float | None]:
        raise AssertionError("this training exists")

    found = world.done(world.request(scores=[{"control": "random"}], targets="subtasks"), never)
    assert (found.trainings, found.seconds) == (12, 24.0)


def test_an_estimate_counts_the_trainings_that_are_missing_at_the_rate_of_those_before(world: World) -> None:
    validations = world.store.validations
    of_one = Estimate(rows=30, tokens=5, bytes=0, free_bytes=0, seconds=3.0, basis="estimated", memory_bytes=7)
    plan = validations.plan(world.request(epochs=2))
    new = validations.estimate(plan, of_one)
    assert (new.trainings, new.reused_trainings, new.rows, new.tokens) == (12, 0, 30, 5 * 2 * 12)
    assert (new.seconds, new.basis, new.memory_bytes) == (3.0 * 12, "estimated", 7)
    world.done(world.request(epochs=2), one_step(influences()))  # at 10 tokens in 2 seconds
    more = validations.estimate(validations.plan(world.request(epochs=2, subsets=22)), of_one)
    assert (more.trainings, more.reused_trainings, more.tokens) == (22, 12, 5 * 2 * 10)
    assert (more.seconds, more.basis) == (pytest.approx(20.0), "measured")
    assert validations.estimate(plan, of_one.model_copy(update={"seconds": None})).seconds == 0


def test_deleting_a_validation_forgets_the_trainings_that_no_other_one_has(world: World) -> None:
    losses = one_step(influences())
    world.done(world.request(name="first"), losses)
    world.done(world.request(name="more", subsets=13, targets="subtasks"), losses)
    root = world.store.validations.trainings.root
    assert len(list(root.iterdir())) == 13
    world.store.validations.remove("more")
    assert len(list(root.iterdir())) == 12
    with pytest.raises(Conflict, match="val_"):
        world.store.catalog.remove(DatasetRow, "pool")
    world.store.validations.remove("first")
    assert not list(root.iterdir())


def test_trainings_that_no_validation_has_recorded_are_swept_up_in_time(world: World) -> None:
    world.done(world.request(subsets=3), one_step(influences()))
    trainings, asked = world.store.validations.trainings, world.request(subsets=4)
    plan = world.store.validations.plan(asked).settings
    unrecorded = world.store.validations.training(plan, {"subset": 3, "repeat": 0})
    trainings.put(unrecorded, Measured([1.0], rows=1, tokens=1, seconds=1.0))
    world.store.trainings.sweep(world.store.catalog, older_than=3600)
    assert len(list(trainings.root.iterdir())) == 4
    world.store.trainings.sweep(world.store.catalog, older_than=-1)
    assert len(list(trainings.root.iterdir())) == 3
    assert trainings.get(unrecorded.key) is None


def test_a_training_that_was_deleted_before_it_was_recorded_is_done_again(world: World) -> None:
    losses = one_step(influences())
    world.store.validations.start(world.request(subsets=3))
    claim = world.claim()
    key = world.train(claim, losses).key
    world.store.validations.trainings.delete([key])
    with pytest.raises(Damaged, match="the next attempt does it again"):
        world.store.validations.finish(claim, key)
    assert world.store.validations.finish(claim, world.train(claim, losses).key)


def test_whoever_ends_last_finds_the_result(world: World) -> None:
    losses = one_step(influences())
    job, _ = world.store.validations.start(world.request(subsets=3))
    claims = [world.claim() for _ in range(3)]
    keys = [world.train(claim, losses).key for claim in claims]
    assert world.store.validations.finish(claims[2], keys[2])
    assert world.store.validations.finish(claims[0], keys[0])
    assert world.store.jobs.get(job.id).status == "running"
    assert world.store.validations.finish(claims[1], keys[1])
    done = world.store.jobs.get(job.id)
    assert done.status == "succeeded"
    assert done.result is not None
    assert done.progress.done == done.progress.total == 3
    assert done.progress.unit == "trainings"


def test_a_cancelled_validation_goes_on_with_the_trainings_that_are_missing(world: World) -> None:
    losses = one_step(influences())
    job, _ = world.store.validations.start(world.request(subsets=4))
    first, second = world.claim(), world.claim()
    assert world.store.validations.finish(first, world.train(first, losses).key)
    world.store.jobs.cancel(job.id)
    assert not world.store.validations.finish(second, world.train(second, losses).key)
    assert world.store.jobs.claim("test", kinds=["validation"]) is None
    world.store.jobs.retry(job.id)
    assert world.store.jobs.get(job.id).progress.done == 1
    done = world.done(world.request(subsets=4), losses)
    assert done.trainings == 4


def test_a_stalled_worker_that_wakes_late_changes_nothing(world: World) -> None:
    losses = one_step(influences())
    job, _ = world.store.validations.start(world.request(subsets=3))
    stalled = world.claim()
    key = world.train(stalled, losses).key
    world.store.jobs.release(stalled)
    again = world.claim()
    assert not world.store.validations.finish(stalled, key)
    assert world.store.validations.finish(again, key)
    assert world.store.jobs.get(job.id).progress.done == 1


def test_a_training_that_was_lost_is_told_of(world: World) -> None:
    losses = one_step(influences())
    world.store.validations.start(world.request(subsets=3))
    claims = [world.claim() for _ in range(3)]
    keys = [world.train(claim, losses).key for claim in claims]
    for claim, key in zip(claims[:2], keys, strict=False):
        world.store.validations.finish(claim, key)
    world.store.validations.trainings.delete(keys[:1])
    with pytest.raises(Damaged, match="delete the job and send it again"):
        world.store.validations.finish(claims[2], keys[2])


def test_the_first_of_two_workers_outcomes_is_kept(world: World) -> None:
    world.store.validations.start(world.request(subsets=3))
    training = world.store.validations.training((claim := world.claim()).plan, claim.payload)
    trainings = world.store.validations.trainings
    first = trainings.put(training, Measured([1.0], rows=1, tokens=1, seconds=1.0))
    assert (
        trainings.put(training, Measured([2.0], rows=1, tokens=1, seconds=1.0)) == first == trainings.get(training.key)
    )
    assert [path.name for path in trainings.root.iterdir()] == [f"{training.key}.json"]


# Requests -------------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_again_is_the_same_validation(world: World) -> None:
    job, begun = world.store.validations.start(world.request(name="mine"))
    assert begun
    assert job.id.startswith("val_")
    pool, task = world.store.catalog.dataset("pool").id, world.store.catalog.task("target").id
    same, _ = world.store.validations.start(world.request(dataset=pool, task=task))
    assert (same.id, same.name) == (job.id, "mine")
    for changes in ({"subsets": 13}, {"seed": 1}, {"targets": "subtasks"}, {"learning_rate": 1.0}, {"fraction": 0.4}):
        assert world.store.validations.start(world.request(**changes))[0].id != job.id


@pytest.mark.parametrize(
    ("changes", "pointer", "detail"),
    [
        ({"split": "test", "targets": "subtasks"}, "/split", "has no test rows"),
        ({"fraction": 0.001, "kind": "leave-top-k-out", "k": POOL}, "/k", "of 60 rows that trains on 0"),
        ({"scores": [{}, {}]}, "/scores/1/label", "two scores are called 'scores'"),
        ({"scores": [{"kind": "sgd", "adam": "less"}]}, None, "adam"),
    ],
)
def test_what_cannot_be_done_is_refused_where_it_stands(
    world: World, changes: dict[str, Any], pointer: str | None, detail: str
) -> None:
    with pytest.raises(InvalidInput, match=detail) as refused:
        world.store.validations.start(world.request(**changes))
    assert [item.pointer for item in refused.value.errors] == [pointer]


def test_scores_are_looked_for_as_by_select(world: World) -> None:
    with pytest.raises(GradientsMissing, match=r"kind=sign: there are no features .*POST /gradients"):
        world.store.validations.start(world.request(scores=[{"kind": "sign"}]))
    with pytest.raises(NotFound):
        world.store.validations.start(world.request(scores=[{"run": "none"}]))
    world.compute(numbers, task_numbers, dims=[8])
    with pytest.raises(Ambiguous, match=r"scores: 2 sets of features fit.*dim"):
        world.store.validations.start(world.request())
    wanted = [{"dim": 8}, {"dim": DIM, "checkpoints": ["ck_0"]}]
    plan = world.store.validations.plan(world.request(scores=wanted)).settings
    assert [scores["label"] for scores in plan["scores"]] == ["dim=8", f"dim={DIM} checkpoints=ck_0"]
    assert [scores["recipe"]["checkpoints"] for scores in plan["scores"]] == [["ck_0", "ck_1"], ["ck_0"]]


def test_features_too_wide_to_be_whitened_are_refused(tmp_path: Path) -> None:
    world = World.at(tmp_path, dims=[5000])
    with pytest.raises(InvalidInput, match=r"5,000 dims takes too long to invert: at most 2,048"):
        world.store.validations.start(world.request(scores=[{"precondition": "trackstar"}]))
