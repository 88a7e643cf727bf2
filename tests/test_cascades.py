"""Cascades over planted influence: gradients for a part of the pool, made by a worker that writes given numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from gradstore.types import CascadeEstimate, CascadeRequest, CascadeResult, GradientsRequest, Selection, SelectionRecipe
from numpy.typing import NDArray
from scipy.stats import norm

from datastore.cascades import next_rows, stage_rows
from datastore.errors import Ambiguous, Conflict, GradientsMissing, InvalidInput
from datastore.influence import TaskScores, masked
from datastore.learned_scores import NO_GRADIENT, NOT_COMPUTED, keep
from datastore.leases import Claim
from datastore.parameters import Query
from datastore.prediction_inputs import Inputs
from datastore.predictors import Prediction
from tests.serving import Service, problem_of, serving
from tests.stores import request
from tests.test_predictors import DIM, POOL, World, axis, numbers_of, planted, sent_until_it_starts


def asked(**changes: Any) -> CascadeRequest:
    values = {"dataset": "pool", "task": "target", "dim": DIM, "budget": 0.4, "features": ["hidden"], "model": "ridge"}
    return CascadeRequest.model_validate({**values, "aggregate": "avg", **changes})


class Cascading:
    """A store without a pool's gradients, and a worker of cascades."""

    def __init__(self, world: World) -> None:
        self.world, self.store = world, world.store
        self.computed: list[str] = []

    def compute(self, request: GradientsRequest) -> str:
        """Do a gradients job with the numbers of its rows."""
        job, _ = self.store.features.start(request)
        if job.status != "succeeded":
            self.computed.append(request.dataset or request.task or "")
            if request.dataset is not None:
                ids = [int(example.id or 0) for example in self.store.datasets.examples(request.dataset)]
                self.store.work(numbers_of(rows=lambda start, stop: ids[start:stop]))
        return job.id

    def work(self, claim: Claim) -> CascadeResult:
        return self.store.cascades.work(claim, self.compute, lambda _: None)

    def claim(self) -> Claim:
        claim = self.store.jobs.claim("test", kinds=["cascade"])
        assert claim is not None, "no cascade waits"
        return claim

    def done(self, **changes: Any) -> CascadeResult:
        job, _ = self.store.cascades.start(asked(**changes))
        if job.status != "succeeded":
            claim = self.claim()
            assert self.store.jobs.succeed(claim, result=self.work(claim).model_dump(mode="json"))
        result = self.store.jobs.get(job.id).result
        assert result is not None
        return CascadeResult.model_validate(result.model_dump())

    def select(self, **query: Any) -> Selection:
        recipe, sources = self.store.recipes.resolve(
            Query(**{"tasks": ["target"], "datasets": ["pool"], **query}), path="/select"
        )
        scores = self.store.scoring.known(recipe, sources)
        assert scores is not None
        return self.store.answers.select(recipe, sources, scores, limit=POOL)


@pytest.fixture
def cascading(tmp_path: Path) -> Cascading:
    return Cascading(World.at(tmp_path, gradients=False))


def rows_of(selection: Selection) -> list[int]:
    return [row.row for row in selection.data]


def truth() -> NDArray[np.float64]:
    return planted(0, POOL)


def test_gradients_are_computed_for_the_budget_only_and_the_best_rows_are_among_them(cascading: Cascading) -> None:
    found = cascading.done()
    assert [stage.rows for stage in found.stages] == [60, 30, 30]
    assert (found.computed_rows, found.scored_rows, found.saved_rows) == (120, 120, 180)
    parts = [cascading.store.catalog.dataset(stage.part) for stage in found.stages]
    assert sum(part.rows for part in parts) == 120
    sets = cascading.store.features.complete(datasets=[cascading.store.catalog.dataset("pool").id])
    assert [each.kind for each in sets] == ["hidden"]
    selection = cascading.select(method="cascade", budget=0.4, pct=0.05)
    assert rows_of(selection) == np.argsort(-truth(), kind="stable")[:15].tolist()
    assert "120 of 300 rows" in selection.notes[0]
    assert selection.left_out == {NOT_COMPUTED: 180}
    assert found.stages[1].true is not None
    assert found.stages[0].true is not None
    assert found.stages[1].true > found.stages[0].true + 0.1


def test_the_output_layers_gradient_is_computed_for_all_rows_and_predicts_which_are_best(cascading: Cascading) -> None:
    cascading.done(features=["output"])
    sets = cascading.store.features.complete(datasets=[cascading.store.catalog.dataset("pool").id])
    assert [(each.kind, each.dim, each.projection) for each in sets] == [("output", DIM, "blocks")]
    selection = cascading.select(method="cascade", budget=0.4, pct=0.05)
    assert rows_of(selection) == np.argsort(-truth(), kind="stable")[:15].tolist()
    with pytest.raises(InvalidInput, match="kind=output does not go with a task's gradients"):
        cascading.store.cascades.start(asked(kind="output"))


def test_a_row_in_doubt_is_computed_before_one_that_is_surely_not_among_the_best() -> None:
    generator = np.random.default_rng(0)
    score, doubt = generator.normal(size=100), generator.uniform(0.1, 1, size=100)
    known = np.arange(100) < 20
    true = np.where(known, score + 3, 0).astype(np.float32)
    truth = TaskScores(true, np.zeros(100, np.int16), known)
    inputs = Inputs([], dense=np.zeros((100, 1), np.float32), valid=np.arange(100) != 99)
    found = Prediction([], score.astype(np.float32), np.zeros(100, np.int64), np.zeros(0), doubt)
    reached = np.quantile([*true[:20], *score[20:99]], 0.95)
    chances = norm.sf(reached, loc=score, scale=doubt)  # of each row, to be among the best
    chances[known], chances[99] = -1, -1
    assert next_rows(found, truth, known, inputs, 10).tolist() == sorted(np.argsort(-chances)[:10].tolist())
    surely = replace(found, doubt=None)
    assert next_rows(surely, truth, known, inputs, 10).tolist() != next_rows(found, truth, known, inputs, 10).tolist()
    assert 99 in next_rows(found, truth, known, inputs, 80)
    assert 99 not in next_rows(found, truth, known, inputs, 79)


def test_with_the_whole_budget_the_selection_is_that_of_all_gradients(tmp_path: Path) -> None:
    cascading = Cascading(World.at(tmp_path))
    cascading.done(budget=1)
    for aggregate in ("avg",):
        mine = cascading.select(method="cascade", by=None, k=POOL)
        store = cascading.store
        recipe, sources = store.recipes.resolve(
            Query(tasks=["target"], datasets=["pool"], dim=DIM, aggregate=aggregate, k=POOL), path="/select"
        )
        job = store.scoring.start(recipe, sources)
        store.score()
        assert store.jobs.get(job.id).status == "succeeded"
        theirs = cascading.select(dim=DIM, aggregate=aggregate, k=POOL)
        assert rows_of(mine) == rows_of(theirs)
        assert [row.score for row in mine.data] == pytest.approx([row.score for row in theirs.data], abs=1e-5)


def test_a_cascade_that_was_killed_finds_what_it_had_computed(cascading: Cascading) -> None:
    job, _ = cascading.store.cascades.start(asked())
    claim = cascading.claim()

    def killed(request: GradientsRequest) -> str:
        if len(cascading.computed) == 3:  # hidden states, the sample, the first round
            raise KeyboardInterrupt
        return cascading.compute(request)

    with pytest.raises(KeyboardInterrupt):
        cascading.store.cascades.work(claim, killed, lambda _: None)
    before = list(cascading.computed)
    cascading.store.jobs.release(claim)
    again = cascading.claim()
    result = cascading.work(again)
    assert cascading.computed[:3] == before
    assert len(cascading.computed) == 4
    assert cascading.store.jobs.plan(job.id)["part_0"] == result.stages[0].part == before[1]


def test_the_same_cascade_elsewhere_computes_the_same_rows(cascading: Cascading, tmp_path: Path) -> None:
    other = Cascading(World.at(tmp_path / "other", gradients=False))
    mine, theirs = cascading.done(), other.done()
    assert mine.model_dump(exclude={"seconds"}) == theirs.model_dump(exclude={"seconds"})


def test_select_says_which_cascade_to_send_for_until_it_is_done(cascading: Cascading) -> None:
    query = Query(tasks=["target"], datasets=["pool"], method="cascade", budget=0.4, pct=0.1)
    with pytest.raises(Conflict, match=r'POST /cascades .*"budget": 0.4'):
        cascading.store.recipes.resolve(query, path="/select")
    job, _ = cascading.store.cascades.start(asked())
    with pytest.raises(Conflict, match=f"{job.id} is queued: ask again"):
        cascading.store.recipes.resolve(query, path="/select")
    cascading.done()
    recipe, _ = cascading.store.recipes.resolve(query, path="/select")
    assert (recipe.by, recipe.aggregate) == (job.id, "avg")
    cascading.done(budget=0.2)
    with pytest.raises(Ambiguous, match=r"2 cascades fit; say which one is meant \(by\)") as several:
        cascading.select(method="cascade", pct=0.1)
    urls = [urlsplit(url) for url in several.value.choices]
    assert {(url.path, *parse_qs(url.query)["method"]) for url in urls} == {("/select", "cascade")}
    assert job.id in [parse_qs(url.query)["by"][0] for url in urls]
    with pytest.raises(InvalidInput, match=r"has the budget 0\.4"):
        cascading.select(method="cascade", by=job.id, budget=0.2, pct=0.1)
    sent = SelectionRecipe.model_validate(recipe.model_dump())
    assert cascading.store.recipes.sent(sent).datasets == {}
    with pytest.raises(InvalidInput, match="says by what"):
        cascading.store.recipes.sent(sent.model_copy(update={"by": None}))


def test_a_deleted_cascade_takes_its_parts_with_it(cascading: Cascading) -> None:
    found = cascading.done(name="mine")
    store = cascading.store
    job, _ = store.cascades.start(asked())
    store.features.start(request(name="mine", dataset="pool"))  # each kind has its own names
    assert {stage.part for stage in found.stages} <= set(store.catalog.dataset_sizes())
    assert store.cascades.remove("mine") == job.id
    assert list(store.catalog.dataset_sizes()) == [store.catalog.dataset("pool").id]
    assert store.predictors.predicted(job.id) is None


def test_parts_are_no_pools_that_a_question_could_mean(cascading: Cascading) -> None:
    cascading.done()
    with pytest.raises(GradientsMissing):
        cascading.store.recipes.resolve(Query(tasks=["target"], pct=0.1), path="/select")


def test_what_a_cascade_needs_is_asked_for(cascading: Cascading) -> None:
    with pytest.raises(GradientsMissing, match="POST /gradients"):
        cascading.store.cascades.start(asked(dim=99))
    with pytest.raises(InvalidInput, match="a cascade learns from 10 at least"):
        cascading.store.cascades.start(asked(budget=0.01))
    with pytest.raises(InvalidInput, match="does not go with a task"):
        cascading.store.cascades.start(asked(kind="rds"))


@pytest.mark.parametrize(("budget", "share", "rounds"), [(0.2, 0.5, 2), (1, 1, 3), (0.5, 0.1, 7), (0.04, 0.5, 20)])
def test_the_stages_spend_the_budget_to_the_row(budget: float, share: float, rounds: int) -> None:
    found = stage_rows(asked(budget=budget, sample_share=share, rounds=rounds), 300)
    assert sum(found) == int(budget * 300)
    assert found[0] >= 10
    assert all(found)


def test_select_and_predictors_answer_over_http_until_they_are_done(service: Service) -> None:
    service.pool(name="pool")
    service.task("target")
    asked = {"task": "target", "dataset": "pool", "method": "cascade", "budget": 0.2, "pct": 0.1}
    problem = problem_of(service.http.get("/select", params=asked), 409)
    assert "POST /cascades" in problem.detail
    assert '"budget": 0.2' in problem.detail
    predicted = {name: value for name, value in asked.items() if name != "budget"} | {"method": "predicted"}
    problem = problem_of(service.http.get("/select", params=predicted), 409)
    assert "POST /predictors" in problem.detail
    idle = problem_of(service.http.get("/select", params={**asked, "method": "predicted"}), 422)
    assert "does nothing with budget" in idle.detail
    missing = problem_of(service.http.post("/cascades", json={"dataset": "pool", "task": "target", "budget": 0.2}), 409)
    assert missing.type == "gradients-missing"
    missing = problem_of(service.http.post("/predictors", json={"dataset": "pool", "task": "target"}), 409)
    assert missing.type == "gradients-missing"
    assert service.http.get("/predictors").json()["data"] == []
    assert service.http.get("/cascades").json()["data"] == []


def test_a_dry_run_says_what_would_be_computed_and_writes_nothing(tmp_path: Path) -> None:
    cascading = Cascading(World.at(tmp_path, gradients=False))
    body = asked().model_dump(mode="json", exclude_defaults=True) | {"dry_run": True}

    def estimated(service: Service) -> CascadeEstimate:
        answer = service.http.post("/cascades", json=body)
        assert answer.status_code == 200, answer.text
        return CascadeEstimate.model_validate(answer.json())

    with serving(tmp_path / "store", allowed_roots=(tmp_path,)) as service:
        before = [service.http.get(f"/{noun}").json()["data"] for noun in ("jobs", "datasets")]
        found = estimated(service)
        assert [service.http.get(f"/{noun}").json()["data"] for noun in ("jobs", "datasets")] == before
        assert (found.done, found.rows, found.stages, found.saved_rows) == (False, POOL, [60, 30, 30], 180)
        assert found.gradients.rows == 2 * 120  # at both checkpoints
        assert found.gradients.bytes > 2 * 120 * DIM * 4
        assert [(each.rows, each.reused_rows) for each in found.inputs] == [(POOL, 0)]
        assert found.seconds == sum(each.seconds or 0 for each in (found.gradients, *found.inputs)) > 0
        result = cascading.done()
        assert [stage.rows for stage in result.stages] == found.stages
        assert (result.computed_rows, result.saved_rows) == (120, found.saved_rows)
        again = estimated(service)
        assert again.done
        assert [(each.rows, each.reused_rows) for each in again.inputs] == [(0, POOL)]
        refused = service.http.post("/cascades", json=body | {"budget": 0.01})
        assert problem_of(refused, 422).errors[0].pointer == "/budget"


def test_the_post_that_is_advised_is_of_what_was_asked_for(tmp_path: Path) -> None:
    world = World.at(tmp_path, gradients=False)
    wanted = asked(dim=8, dtype="float16", seed=3, max_length=128)
    (sent,) = sent_until_it_starts(world, lambda: world.store.cascades.start(wanted))
    assert (sent.task, sent.dims, sent.dtype, sent.seed) == (world.store.catalog.task("target").id, [8], "float16", 3)


def test_rows_without_a_gradient_are_told_from_those_that_were_not_worth_one(tmp_path: Path) -> None:
    cascading = Cascading(World.at(tmp_path, gradients=False))
    found = cascading.done()
    part = cascading.store.catalog.dataset(found.stages[0].part)
    keys = cascading.store.datasets.text_keys(cascading.store.catalog.dataset("pool").id)
    failed = int(np.flatnonzero(np.isin(keys, cascading.store.datasets.text_keys(part.id)))[3])
    job, _ = cascading.store.cascades.start(asked())
    scores = cascading.store.predictors.predicted(job.id)
    assert scores is not None
    valid = scores.valid.copy()
    valid[failed] = False
    cascading.store.predictors.cache.delete(job.id)
    keep(
        cascading.store.predictors.cache, job.id, cascading.store.jobs.plan(job.id),
        masked(scores.score, scores.subtask, valid),
    )  # fmt: skip
    assert cascading.select(method="cascade", pct=0.05).left_out == {NOT_COMPUTED: 180, NO_GRADIENT: 1}


def test_gradients_that_no_checkpoint_could_give_are_refused_before_the_cascade_begins(tmp_path: Path) -> None:
    world = World.at(tmp_path, gradients=False)
    world.store.checkpoint(5, has_moments=False, model=str(tmp_path / "model"))
    world.compute(axis, task="target", run=None, checkpoints=["ck_5"])
    wanted = asked(checkpoints=["ck_5"], input_checkpoint="ck_1")
    with pytest.raises(InvalidInput, match="moments"):
        world.store.cascades.start(wanted)
    world.store.cascades.start(wanted.model_copy(update={"kind": "sgd"}))
