"""Predictors over planted influence: what depends on the inputs is found, what does not is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
from gradstore.types import GradientsRequest, PredictorRequest, PredictorResult
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.metrics import accuracy_score, confusion_matrix, r2_score
from sklearn.preprocessing import StandardScaler

from datastore import backups
from datastore import prediction_reports as reports
from datastore.errors import GradientsMissing, InvalidInput, NotFound
from datastore.influence import TaskScores
from datastore.learned_scores import key_of
from datastore.parameters import Query, refuse_idle
from datastore.prediction_inputs import Gathering
from datastore.prediction_models import GRIDS, choose, fit, fold_numbers
from datastore.predictors import draw, placed
from tests.stores import Numbers, Store, request

POOL, DIM, HIDDEN = 300, 16, 24
QUICK: dict[str, Any] = {"features": ["hidden"], "model": "ridge", "controls": False}


def hidden(start: int, stop: int) -> NDArray[np.float64]:
    """Hidden states: any numbers, the same for the same row."""
    rows = [np.random.default_rng([row, 7]).normal(size=HIDDEN) for row in range(start, stop)]
    return np.array(rows).reshape(-1, HIDDEN)


def planted(start: int, stop: int) -> NDArray[np.float64]:
    """A row's influence: linear in its hidden state."""
    weights = np.random.default_rng(5).normal(size=HIDDEN)
    found: NDArray[np.float64] = hidden(start, stop) @ weights / (6 * np.linalg.norm(weights))
    return found


def numbers_of(first: int = 0, *, rows: Callable[[int, int], list[int]] | None = None) -> Numbers:
    """Hidden states, and gradients whose cosine with the first axis is the planted influence."""

    def numbers(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        places = rows(start, stop) if rows else list(range(first + start, first + stop))
        if dim == HIDDEN:
            return np.concatenate([hidden(row, row + 1) for row in places]).astype(np.float32)
        scores = np.concatenate([planted(row, row + 1) for row in places])
        others = [np.random.default_rng([row, int(checkpoint[-1])]).normal(size=dim - 1) for row in places]
        rest = np.array(others) / np.linalg.norm(others, axis=1, keepdims=True)
        return np.c_[scores, rest * np.sqrt(1 - scores**2)[:, None]].astype(np.float32)

    return numbers


def axis(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """A task whose gradients are all the first axis; its hidden states are any."""
    del checkpoint
    found = np.random.default_rng(9).normal(size=(stop - start, dim)).astype(np.float32)
    return found if dim == HIDDEN else np.eye(1, dim, dtype=np.float32).repeat(stop - start, axis=0)


@dataclass(frozen=True)
class World:
    """A store with a pool, a task, a run of two checkpoints, and the task's gradients."""

    store: Store

    @classmethod
    def at(cls, folder: Path, *, gradients: bool = True) -> World:
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(f'{{"hidden_size": {HIDDEN}}}')
        store = Store.at(folder / "store", allowed_roots=(folder,))
        for number in range(2):
            store.checkpoint(number, model=str(model))
        store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
        world = cls(store)
        store.pool(POOL, name="pool")
        store.task({"a": 2, "b": 1}, folder=folder / "task")
        world.compute(axis, task="target")
        world.compute(axis, task="target", kinds=["hidden"])
        if gradients:
            world.compute(numbers_of(), dataset="pool")
            world.compute(numbers_of(), dataset="pool", kinds=["hidden"])
        return world

    def compute(self, numbers: Numbers, **changes: Any) -> None:
        self.store.features.start(request(**{"dtype": "float32", **changes}))
        self.store.work(numbers)

    def learn(self, **changes: Any) -> PredictorResult:
        """Do a predictor's job."""
        job, _ = self.store.predictors.start(asked(**changes))
        claim = self.store.jobs.claim("test", kinds=["predictor"])
        if claim is not None:
            result = self.store.predictors.work(claim, lambda _: None)
            assert self.store.jobs.succeed(claim, result=result.model_dump(mode="json"))
        job = self.store.jobs.get(job.id)
        assert job.result is not None
        return PredictorResult.model_validate(job.result.model_dump())

    def predicted(self, **changes: Any) -> NDArray[np.float32]:
        found = self.store.predictors.predicted(self.store.predictors.start(asked(**changes))[0].id)
        assert found is not None
        return found.score


def asked(**changes: Any) -> PredictorRequest:
    values = {"dataset": "pool", "task": "target", "dim": DIM, "fraction": 0.4, **QUICK}
    if "sample" in changes or "rows" in changes:
        del values["fraction"]
    return PredictorRequest.model_validate({**values, **changes})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


# What is learnt -------------------------------------------------------------------------------------------------------


def test_influence_that_is_linear_in_the_hidden_states_is_found_by_each_model_and_by_no_control(world: World) -> None:
    found = world.learn(controls=True, model="auto", folds=3)
    assert found.model == "ridge"
    assert found.report.r2 == pytest.approx(1, abs=0.01)
    assert (found.tested_on, found.tested_rows, found.sample_rows) == ("outside", POOL - 120, 120)
    assert found.models[0].model == "ridge"
    assert len(found.models) == 4
    assert all(tried.score > 0.3 for tried in found.models)
    for control in found.controls:
        assert control.report.r2 is not None
        assert control.report.r2 < 0.1, control
    assert found.columns == HIDDEN + 1


def test_nothing_is_found_where_influence_does_not_depend_on_the_inputs(tmp_path: Path) -> None:
    world = World.at(tmp_path, gradients=False)
    world.compute(numbers_of(5000), dataset="pool")
    world.compute(numbers_of(), dataset="pool", kinds=["hidden"])
    found = world.learn()
    assert found.report.r2 is not None
    assert found.report.r2 < 0.05
    assert abs(found.report.spearman) < 0.2


def test_the_report_is_what_scikit_learn_and_scipy_say_of_the_same_rows(world: World) -> None:
    found = world.learn(rows=30, model="ridge")
    guess = world.predicted(rows=30, model="ridge")
    outside = np.setdiff1d(np.arange(POOL), draw(np.arange(POOL), 30, seed=0))
    truth, said = planted(0, POOL)[outside], guess[outside]
    assert found.report.r2 == pytest.approx(r2_score(truth, said), abs=1e-4)
    assert found.report.spearman == pytest.approx(spearmanr(truth, said).statistic, abs=1e-3)
    best = set(np.argsort(-truth)[: int(np.ceil(0.05 * len(truth)))])
    for each in found.report.recalls:
        looked_at = set(np.argsort(-said)[: int(np.ceil(each.budget * len(truth)))])
        assert each.recall == pytest.approx(len(best & looked_at) / len(best))
    assert sum(each.rows for each in found.calibration) == len(outside)
    assert found.calibration[-1].predicted == pytest.approx(np.sort(said)[-27:].mean(), abs=1e-6)


def test_levels_are_quantiles_of_the_sample_and_counted_in_a_confusion_matrix(world: World) -> None:
    found = world.learn(levels=3, model="ridge")
    sample = draw(np.arange(POOL), 120, seed=0)
    outside = np.setdiff1d(np.arange(POOL), sample)
    truth = planted(0, POOL)
    assert found.borders == pytest.approx(np.quantile(truth[sample], [1 / 3, 2 / 3]), abs=1e-6)
    counted = np.array(found.report.confusion)
    levels = np.searchsorted(found.borders, truth[outside], side="right")
    assert counted.sum(axis=1).tolist() == np.bincount(levels, minlength=3).tolist()
    assert found.report.accuracy == pytest.approx(np.trace(counted) / counted.sum())
    assert found.report.accuracy > 0.65
    assert found.report.r2 is None


def test_rows_of_the_sample_are_predicted_by_a_model_that_has_not_seen_them(world: World) -> None:
    sample = draw(np.arange(POOL), 30, seed=0)
    guess = world.learn(rows=30) and world.predicted(rows=30)[sample]
    truth, states = planted(0, POOL)[sample], hidden(0, POOL)[sample]
    inputs = np.c_[states, np.log1p(np.linalg.norm(states, axis=1))].astype(np.float32)
    settings = world.learn(rows=30).settings
    place = fold_numbers(30, 5, seed=0)
    for fold in range(5):
        fitted = fit(inputs[place != fold], truth[place != fold], model="ridge", settings=settings, seed=0, levels=0)
        assert guess[place == fold] == pytest.approx(fitted.predict(inputs[place == fold])[0], abs=1e-4)


def test_the_same_seed_predicts_the_same_and_another_one_draws_another_sample(world: World) -> None:
    for model in ("ridge", "boosting", "mlp"):
        first = world.learn(rows=40, model=model, predictor_seed=3)
        kept = world.predicted(rows=40, model=model, predictor_seed=3)
        world.store.predictors.remove(world.store.predictors.start(asked(rows=40, model=model, predictor_seed=3))[0].id)
        again = world.learn(rows=40, model=model, predictor_seed=3)
        assert again.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})
        assert np.array_equal(world.predicted(rows=40, model=model, predictor_seed=3), kept)
    other = world.learn(rows=40, predictor_seed=4)
    assert other.report != world.learn(rows=40, predictor_seed=3).report


def test_a_sample_of_its_own_teaches_the_whole_pool_and_is_tested_out_of_fold(tmp_path: Path) -> None:
    world = World.at(tmp_path, gradients=False)
    world.compute(numbers_of(), dataset="pool", kinds=["hidden"])
    world.store.pool(80, name="sample", first=50)
    world.compute(numbers_of(50), dataset="sample")
    found = world.learn(sample="sample")
    assert (found.tested_on, found.tested_rows, found.sample_rows) == ("folds", 80, 80)
    guess = world.predicted(sample="sample")
    assert r2_score(planted(0, POOL), guess) > 0.95
    strangers = world.store.pool(20, name="strangers", first=POOL + 5)
    world.compute(numbers_of(POOL + 5), dataset=strangers.id)
    world.store.predictors.start(asked(sample="strangers"))
    claim = world.store.jobs.claim("test", kinds=["predictor"])
    assert claim is not None
    with pytest.raises(InvalidInput, match="20 rows of the sample"):
        world.store.predictors.work(claim, lambda _: None)


def test_truth_outside_a_sample_of_its_own_is_used_where_it_is_stored(world: World) -> None:
    world.store.pool(80, name="sample", first=50)
    world.compute(numbers_of(50), dataset="sample")
    found = world.learn(sample="sample")
    assert (found.tested_on, found.tested_rows) == ("outside", POOL - 80)


def test_what_is_missing_is_said_with_the_request_that_makes_it(tmp_path: Path) -> None:
    world = World.at(tmp_path, gradients=False)
    with pytest.raises(GradientsMissing, match="POST /gradients"):
        world.store.predictors.start(asked())
    world.compute(numbers_of(), dataset="pool")
    with pytest.raises(GradientsMissing, match=r'kind=hidden at ck_1.*POST /gradients .*"kinds": \["hidden"\]'):
        world.store.predictors.start(asked())
    with pytest.raises(GradientsMissing, match="embeddings"):
        world.store.predictors.start(asked(features=["embedding"]))
    with pytest.raises(NotFound):
        world.store.predictors.start(asked(task="nothing"))
    with pytest.raises(InvalidInput, match="at least 10 rows"):
        world.store.predictors.start(asked(fraction=0.01))


# The output layer's gradient ------------------------------------------------------------------------------------------


def scaled(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """The hidden states in the place of gradients of the output layer, each row of a size of its own."""
    sizes = np.random.default_rng([start, stop]).uniform(0.01, 100, size=(stop - start, 1))
    return (numbers_of()(checkpoint, start, stop, dim) * sizes).astype(np.float32)


def test_the_output_layers_gradient_goes_in_by_its_direction_and_its_cosines_with_the_tasks(world: World) -> None:
    world.compute(scaled, dataset="pool", kinds=["output"], dims=[HIDDEN])
    plan = world.store.predictors.plan(asked(features=["output", "loss"]))
    inputs = Gathering(world.store.features, world.store.datasets, world.store.tasks).gather(plan)
    rows = np.arange(40, 90)
    found = inputs.of(rows)
    assert found.shape == (50, inputs.columns)
    wanted = hidden(40, 90) / np.linalg.norm(hidden(40, 90), axis=1, keepdims=True)
    np.testing.assert_allclose(found[:, 2 : 2 + HIDDEN], wanted, atol=1e-6)
    with pytest.raises(GradientsMissing, match=r'"kinds": \["output"\].*"dims": \[24\]'):
        world.learn(features=["output", "similarity"])
    world.compute(axis, task="target", kinds=["output"], dims=[HIDDEN])
    learnt = world.learn(features=["output", "similarity"])
    assert learnt.report.r2 is not None
    assert learnt.report.r2 > 0.9
    assert learnt.columns == HIDDEN + 1 + 5
    assert {each.model for each in world.learn(features=["output"], model="auto").models} == {"ridge", "kernel", "mlp"}


def test_the_output_layers_gradient_is_compared_with_its_like_and_meant_where_it_is_named(world: World) -> None:
    for owner in ({"dataset": "pool"}, {"task": "target"}):
        world.compute(numbers_of() if "dataset" in owner else axis, **owner, kinds=["output"], dims=[DIM])
    named, unnamed = (
        world.store.recipes.resolve(Query(tasks=["target"], datasets=["pool"], kind=kind, dim=DIM), path="/scores")[0]
        for kind in ("output", None)
    )
    assert (named.kind, named.task_kind) == ("output", "output")
    assert (unnamed.kind, unnamed.task_kind) == ("adam", "sgd")
    with pytest.raises(InvalidInput, match="have no weights"):
        refuse_idle(Query(kind="output", weights=["*"]))


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_figures_of_a_report_are_those_of_scikit_learn_and_scipy() -> None:
    generator = np.random.default_rng(0)
    truth, guess = generator.normal(size=200), generator.normal(size=200).round(1)
    assert reports.r2(truth, guess) == pytest.approx(r2_score(truth, guess))
    assert reports.rank_correlation(truth, guess) == pytest.approx(spearmanr(truth, guess).statistic)
    borders = reports.edges(truth, 4)
    true, said = reports.levels_of(truth, borders), reports.levels_of(guess, borders)
    assert reports.confusion(true, said, 4) == confusion_matrix(true, said, labels=range(4)).tolist()
    assert np.bincount(true).tolist() == [50, 50, 50, 50]
    assert accuracy_score(true, said) == np.trace(reports.confusion(true, said, 4)) / 200
    assert reports.recall(truth, truth, budget=0.05) == 1
    assert reports.recall(truth, -truth, budget=0.5) == 0


def test_rows_of_the_same_text_share_a_score() -> None:
    scores = TaskScores(np.array([1, 2, 3], np.float32), np.array([0, 1, 0], np.int16), np.array([True, True, False]))
    found = placed(np.array([7, 5, 9, 7, 1], np.uint64), np.array([5, 7, 9], np.uint64), scores)
    assert found.valid.tolist() == [True, True, False, True, False]
    assert found.score.tolist() == [2, 1, 0, 2, 0]


def test_folds_have_equal_sizes_and_hold_each_row_once() -> None:
    assert sorted(np.bincount(fold_numbers(23, 5, seed=1)).tolist()) == [4, 4, 5, 5, 5]
    assert not np.array_equal(fold_numbers(23, 5, seed=1), fold_numbers(23, 5, seed=2))


def test_a_column_that_never_differs_and_a_level_that_never_occurs_do_no_harm() -> None:
    features = np.c_[np.ones(30), np.arange(30)].astype(np.float32)
    [found] = choose(features, np.arange(30.0), models=["ridge"], folds=3, seed=0, levels=0)
    assert np.isfinite(found.out_of_fold).all()
    [sure] = choose(features, np.zeros(30, np.int64), models=["ridge"], folds=3, seed=0, levels=3)
    assert sure.score == 1


def test_the_radial_kernels_doubt_is_that_of_a_gaussian_process() -> None:
    generator = np.random.default_rng(3)
    features = generator.normal(size=(80, 5))
    target = np.sin(features[:, 0]) + features[:, 1]
    settings = {"alpha": 0.1, "width": 0.3}
    learnt, rows = features[:60].astype(np.float32), features.astype(np.float32)
    fitted = fit(learnt, target[:60], model="kernel", settings=settings, seed=0, levels=0)
    scaled = StandardScaler().fit(features[:60])
    process = GaussianProcessRegressor(RBF(settings["width"] * np.sqrt(5)), alpha=0.1, optimizer=None)
    process.fit(scaled.transform(features[:60]), (target[:60] - target[:60].mean()) / target[:60].std())
    mean, spread = process.predict(scaled.transform(features), return_std=True)
    doubt = fitted.doubt(rows)
    assert doubt is not None
    assert fitted.predict(rows)[0] == pytest.approx(mean * target[:60].std() + target[:60].mean(), abs=1e-4)
    assert doubt == pytest.approx(spread * target[:60].std(), abs=1e-4)
    assert doubt[60:].min() > doubt[:60].max()
    assert fit(learnt, target[:60], model="ridge", settings=settings, seed=0, levels=0).doubt(rows) is None


def test_a_backup_has_what_was_predicted(world: World, tmp_path: Path) -> None:
    world.learn()
    before = world.predicted()
    backups.backup(world.store, tmp_path / "backup")
    again = Store.at(tmp_path / "again")
    backups.restore(again, tmp_path / "backup")
    [job] = again.jobs.page(kind="predictor", limit=2, after=None).data
    kept = again.predictors.predicted(job.id)
    assert kept is not None
    np.testing.assert_array_equal(kept.score, before)
    again.catalog.close()


def test_what_a_predictor_has_learnt_from_is_part_of_what_its_scores_cost(world: World) -> None:
    world.learn(features=["hidden", "similarity"])
    query = Query(tasks=["target"], datasets=["pool"], method="predicted", k=3)
    recipe, _ = world.store.recipes.resolve(query, path="/select")
    gradients = [job.id for job in world.store.jobs.page(kind="gradients", limit=10).data]
    sources = world.store.comparisons.costs.sources(recipe) or []
    assert sorted(source.job for source in sources) == sorted([recipe.by or "", *gradients])
    assert None not in [source.seconds for source in sources]


def test_a_prediction_that_is_lost_is_made_again_for_the_selections_that_use_it(world: World) -> None:
    world.learn()
    store = world.store
    before, (job, _) = world.predicted(), store.predictors.start(asked())
    query = Query(tasks=["target"], datasets=["pool"], method="predicted", k=3)
    recipe, sources = store.recipes.resolve(query, path="/select")
    store.answers.select(recipe, sources, store.scoring.known(recipe, sources) or [], limit=3)
    rmtree(store.settings.scores / key_of(job.id))
    again, new = store.predictors.start(asked())
    assert (again.id, again.status, new, again.progress.done) == (job.id, "queued", True, 0)
    world.learn()
    assert np.array_equal(world.predicted(), before)


# What it would cost ---------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_read_and_fitted_and_starts_nothing(world: World) -> None:
    predictors = world.store.predictors
    found = predictors.estimate(asked(dry_run=True))
    assert world.store.jobs.page(kind="predictor", limit=10, after=None).data == []
    pool, task = world.store.catalog.dataset("pool").id, world.store.catalog.task("target").id
    sets = {each.id: each for each in world.store.features.complete(datasets=[pool], tasks=[task])}
    read = [sets[id] for id in found.feature_sets]
    assert sorted((each.kind, each.dataset is not None, each.checkpoint) for each in read) == [
        ("adam", True, "ck_0"), ("adam", True, "ck_1"), ("hidden", True, "ck_1"), ("sgd", False, "ck_0"),
        ("sgd", False, "ck_1"),
    ]  # fmt: skip
    assert found.read_bytes == sum(each.bytes for each in read)
    assert (found.rows, found.sample_rows, found.fits) == (POOL, 120, len(GRIDS["ridge"]) * 5 + 1)
    assert (found.done, found.seconds, found.basis) == (False, None, None)
    result = world.learn()
    again, half = predictors.estimate(asked()), predictors.estimate(asked(fraction=0.2))
    assert (again.done, again.basis, again.seconds) == (True, "measured", pytest.approx(result.seconds))
    assert (half.done, half.seconds) == (False, pytest.approx(result.seconds / 2))
    assert predictors.estimate(asked(model="mlp")).seconds is None
    with pytest.raises(InvalidInput, match="at least 10 rows"):
        predictors.estimate(asked(fraction=0.01))


# What is missing ------------------------------------------------------------------------------------------------------


def sent_until_it_starts(world: World, start: Callable[[], Any]) -> list[GradientsRequest]:
    """Send the POST of every refusal until the request is taken, and return those that were sent."""
    sent: list[GradientsRequest] = []
    while len(sent) < 5:
        try:
            start()
        except GradientsMissing as missing:
            sent.append(GradientsRequest.model_validate(missing.body))
            world.store.features.start(sent[-1])
            world.store.work(axis if sent[-1].task else numbers_of())
        else:
            return sent
    raise AssertionError(f"the same request is refused after {sent}")


@pytest.mark.parametrize("named", [{}, {"run": "warm-up"}, {"checkpoints": ["ck_0"]}, {"kind": "sgd"}])
def test_the_posts_that_are_advised_lead_to_a_predictor_of_the_gradients_that_the_task_has(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    world = World.at(tmp_path, gradients=False)
    wanted = asked(**{"dim": None, "features": ["hidden", "similarity"], **named})
    pool, hidden = sent_until_it_starts(world, lambda: world.store.predictors.start(wanted))
    assert (pool.dataset, pool.dims, pool.dtype) == (world.store.catalog.dataset("pool").id, [DIM], "float32")
    assert (hidden.kinds, hidden.dataset) == (["hidden"], pool.dataset)
    if named:
        return
    world.store.checkpoint(5, has_moments=False, model=str(tmp_path / "model"))
    world.compute(axis, task="target", run=None, checkpoints=["ck_5"])
    plain = sent_until_it_starts(
        world, lambda: world.store.predictors.start(asked(checkpoints=["ck_5"], input_checkpoint="ck_1"))
    )
    assert [(each.checkpoints, each.kinds, each.dims) for each in plain] == [(["ck_5"], ["sgd"], [DIM])]
