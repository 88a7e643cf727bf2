"""Which training examples speak for and against an answer: asked, computed, found, kept and forgotten."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import AttributionRequest, AttributionResult, GradientsRequest
from numpy.typing import NDArray

from datastore.attributions import Answered
from datastore.errors import Ambiguous, Conflict, GradientsMissing, InvalidInput, NotFound
from datastore.questions import QuestionFeature, Questions
from datastore.store import OpenStore
from tests.serving import Service, problem_of
from tests.stores import DIM, Store, numbers, request
from tests.workplace import Workplace, numbered
from worker.heartbeat import Stopped
from worker.jobs import run

ROW = {"prompt": "What is 3 and 4?", "completion": "The answer is 7."}


def asked(**wanted: Any) -> AttributionRequest:
    return AttributionRequest.model_validate({"rows": [ROW], **wanted})


@pytest.fixture
def pool(tmp_path: Path) -> Store:
    """A store with features of 60 rows at two checkpoints."""
    store = Store.at(tmp_path / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    store.pool(60, name="pool")
    store.features.start(request(dataset="pool"))
    store.work(numbers)
    return store


def answer(store: Store, wanted: AttributionRequest, *features: NDArray[np.float32]) -> AttributionResult:
    """What the store finds for questions with these features (checkpoints, dim)."""
    job, _ = store.attributions.start(wanted)
    answered = [Answered([QuestionFeature(row, 1.0, 3) for row in rows]) for rows in features]
    plan = store.jobs.plan(job.id)
    data, searches = store.attributions.search(wanted, plan, answered, on_rows=lambda _: None)
    return AttributionResult(
        recipe=plan["recipe"], data=data, searches=searches, computed_rows=0, gradient_seconds=0, seconds=0
    )


def question(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((2, DIM)).astype(np.float32)


def true_scores(store: Store, features: NDArray[np.float32], dataset: str = "pool") -> NDArray[np.float64]:
    """Σ w⟨φ(z)/‖·‖, φ(v)/‖·‖⟩ in float64, from the features as they are stored."""
    sets = store.features.complete(datasets=[store.catalog.dataset(dataset).id])
    weights = {"ck_0": 2 / 3, "ck_1": 1 / 3}  # mean learning rates 1e-4 and 5e-5
    total = np.zeros(sets[0].rows)
    for each in sets:
        rows = store.features.view(each).features(0, each.rows).astype(np.float64)
        asked = features[int(each.checkpoint[-1])].astype(np.float64)
        total += weights[each.checkpoint] * (rows @ asked) / np.linalg.norm(rows, axis=1) / np.linalg.norm(asked)
    return total


# What is found ------------------------------------------------------------------------------------------------------


def test_both_ends_are_found_with_their_parts_origins_and_texts(pool: Store) -> None:
    found = answer(pool, asked(k=5), question()).data[0]
    scores = true_scores(pool, question())
    assert [row.row for row in found.most] == np.argsort(-scores)[:5].tolist()
    assert [row.row for row in found.least] == np.argsort(scores)[:5].tolist()
    assert [row.score for row in found.most] == pytest.approx(np.sort(scores)[::-1][:5].tolist(), abs=1e-12)
    assert found.most[0].score > 0 > found.least[0].score
    for rank, row in enumerate(found.most, start=1):
        assert row.rank == rank
        assert sum(row.per_checkpoint) == pytest.approx(row.score, abs=1e-12)
        assert (row.id, row.origin) == (str(row.row), f"origin{row.row % 3}")
        assert row.text == f"row {row.row}\ndone"


def test_each_row_is_answered_by_itself(pool: Store) -> None:
    wanted = asked(rows=[ROW, {**ROW, "completion": "7."}], k=3)
    both = answer(pool, wanted, question(0), question(1)).data
    for seed, found in enumerate(both):
        scores = true_scores(pool, question(seed))
        assert [row.row for row in found.most] == np.argsort(-scores)[:3].tolist()


def test_only_examples_of_the_origins_asked_for_are_found(pool: Store) -> None:
    result = answer(pool, asked(k=4, origins=["origin2", "origin0"]), question())
    scores = true_scores(pool, question())
    scores[1::3] = -np.inf
    assert [row.row for row in result.data[0].most] == np.argsort(-scores)[:4].tolist()
    assert result.searches[0].rows == 40


def test_several_datasets_are_searched_and_merged(pool: Store) -> None:
    pool.pool(30, name="other", first=1000)
    pool.features.start(request(dataset="other"))
    pool.work(lambda checkpoint, start, stop, dim: numbers(checkpoint, start + 500, stop + 500, dim))
    result = answer(pool, asked(k=8, datasets=["pool", "other"]), question())
    scores = {
        (pool.catalog.dataset(name).id, row): score
        for name in ("pool", "other")
        for row, score in enumerate(true_scores(pool, question(), name))
    }
    best = sorted(scores, key=lambda place: -scores[place])[:8]
    assert [(row.dataset, row.row) for row in result.data[0].most] == best
    assert len({row.dataset for row in result.data[0].most}) == 2
    alone = answer(pool, asked(k=3, datasets=["other"]), question()).data[0]
    assert {row.dataset for row in alone.most + alone.least} == {pool.catalog.dataset("other").id}


def test_texts_are_cut_or_left_out(pool: Store) -> None:
    assert answer(pool, asked(text=False), question()).data[0].most[0].text is None


def test_rows_without_a_feature_are_never_found(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    store.checkpoint(0)
    store.pool(10, name="pool")
    store.features.start(GradientsRequest(dataset="pool", checkpoints=["ck_0"], dims=[DIM]))

    def some(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
        rows = numbers(checkpoint, start, stop, dim)
        rows[::2] = 0
        return rows

    store.work(some)
    result = answer(store, asked(k=10), question()[:1])
    assert sorted(row.row for row in result.data[0].most) == [1, 3, 5, 7, 9]
    assert result.searches[0].rows == 5


# What is asked ------------------------------------------------------------------------------------------------------


def test_the_same_question_is_the_same_job(pool: Store) -> None:
    first, new = pool.attributions.start(asked())
    again, more = pool.attributions.start(asked(run="warm-up", datasets=["pool"]))
    assert first.id.startswith("attr_")
    assert (again.id, new, more) == (first.id, True, False)
    for other in ({"k": 3}, {"origins": ["origin1"]}, {"rows": [{**ROW, "completion": "8."}]}, {"query_kind": "sign"}):
        assert pool.attributions.start(asked(**other))[0].id != first.id


def test_questions_share_their_features_whatever_else_is_asked(pool: Store) -> None:
    def keys(**wanted: Any) -> list[list[str]]:
        found: list[list[str]] = pool.jobs.plan(pool.attributions.start(asked(**wanted))[0].id)["questions"]
        return found

    assert keys() == keys(k=3) == keys(origins=["origin1"])
    assert keys() == keys(rows=[{**ROW, "id": "another", "dataset": "elsewhere"}])
    assert not set(keys()[0]) & set(keys(query_kind="sign")[0])
    assert len(set(keys()[0])) == 2  # one a checkpoint


def test_rows_that_are_none_are_named(pool: Store) -> None:
    with pytest.raises(InvalidInput, match="/rows/1") as caught:
        pool.attributions.start(asked(rows=[ROW, {"prompt": "and?"}, ROW, {"messages": []}]))
    assert [each.pointer for each in caught.value.errors] == ["/rows/1", "/rows/3"]


def _deep(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("extra", ["\ud800", float("nan"), _deep(200)], ids=["half a pair", "nan", "deep"])
def test_what_no_job_could_be_listed_with_is_refused(pool: Store, extra: object) -> None:
    with pytest.raises(InvalidInput, match="/rows/0"):
        pool.attributions.start(asked(rows=[{**ROW, "note": extra}]))
    assert pool.jobs.page(kind="attribution", limit=5).data == []


def test_origins_that_nothing_has_are_named(pool: Store) -> None:
    with pytest.raises(InvalidInput, match="'origin0', 'origin1', 'origin2'") as caught:
        pool.attributions.start(asked(origins=["origin1", "elsewhere"]))
    assert [each.pointer for each in caught.value.errors] == ["/origins/1"]


def test_what_is_missing_or_ambiguous_is_said(pool: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        pool.attributions.start(asked(datasets=["nothing"]))
    with pytest.raises(GradientsMissing):
        pool.attributions.start(asked(dim=99))
    pool.features.start(request(dataset="pool", dims=[2 * DIM]))
    pool.work(numbers)
    with pytest.raises(Ambiguous) as caught:
        pool.attributions.start(asked())
    assert all(choice.startswith("/attributions?") for choice in caught.value.choices)
    assert pool.attributions.start(asked(dim=2 * DIM))[1]


def test_adam_is_refused_where_there_are_no_moments(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    store.checkpoint(0, has_moments=False)
    store.pool(10, name="pool")
    store.features.start(GradientsRequest(dataset="pool", checkpoints=["ck_0"], dims=[DIM], kinds=["sgd"]))
    store.work(numbers)
    with pytest.raises(InvalidInput, match="no Adam moments") as caught:
        store.attributions.start(asked(query_kind="adam"))
    assert caught.value.errors[0].pointer == "/query_kind"


@pytest.mark.parametrize(
    "wanted", [{"rows": []}, {"k": 0}, {"rows": [ROW] * 100, "k": 51}, {"run": "a", "checkpoints": ["b"]}, {"x": 1}]
)
def test_requests_that_cannot_be_meant_are_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        asked(**wanted)


def test_attributions_are_asked_listed_named_and_deleted_over_http(service: Service) -> None:
    service.pool(10, name="pool")
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    body = {"rows": [ROW]}
    assert problem_of(service.http.post("/attributions", json=body), 409).type == "gradients-missing"
    made = service.http.post("/gradients", json={"run": "run", "dims": [DIM], "dataset": "pool", "kinds": ["sgd"]})
    assert made.status_code == 202, made.text
    Store(**{part.name: getattr(service.backend, part.name) for part in fields(OpenStore)}).work(numbers)
    bad = problem_of(service.http.post("/attributions", json={"rows": [ROW, {"prompt": 1}]}), 422)
    assert [each.pointer for each in bad.errors] == ["/rows/1"]
    answer = service.http.post("/attributions", json={**body, "name": "why"})
    job = answer.json()
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/jobs/{job['id']}")
    assert [each["id"] for each in service.http.get("/attributions").json()["data"]] == [job["id"]]
    assert service.http.get("/attributions/why").json()["id"] == job["id"]
    assert service.http.patch("/attributions/why", json={"name": "because"}).json()["name"] == "because"
    problem_of(service.http.delete("/attributions/because"), 409)
    service.http.post(f"/jobs/{job['id']}/cancel")
    assert problem_of(service.http.delete(f"/jobs/{job['id']}"), 409).detail.endswith(
        f"DELETE /attributions/{job['id']}"
    )
    assert service.http.delete("/attributions/because").status_code == 204
    problem_of(service.http.get("/attributions/because"), 404)


# What is kept -------------------------------------------------------------------------------------------------------


def test_a_questions_feature_comes_back_as_it_was(tmp_path: Path) -> None:
    questions = Questions(tmp_path / "questions")
    assert questions.get("question_1") is None
    kept = QuestionFeature(question()[0], 1.25, 7)
    questions.put("question_1", kept)
    questions.put("question_1", kept)
    found = questions.get("question_1")
    assert found is not None
    np.testing.assert_array_equal(found.feature, kept.feature)
    assert (found.loss, found.tokens) == (1.25, 7)
    assert [path.name for path in questions.root.iterdir()] == ["question_1.npy"]
    questions.delete(["question_1", "question_2"])
    assert questions.get("question_1") is None


def test_what_a_killed_process_left_is_swept(pool: Store) -> None:
    questions, indexes = pool.attributions.questions, pool.attributions.indexes
    (questions.root / ".question_1.abc").parent.mkdir(parents=True)
    (questions.root / ".question_1.abc").touch()
    (indexes.root / "unfinished" / "index_1.abc").mkdir(parents=True)
    questions.put("question_2", QuestionFeature(question()[0], 1.0, 1))
    assert pool.attributions.sweep(older_than=60) == 0
    assert pool.attributions.sweep(older_than=-1) == 2
    assert questions.get("question_2") is not None


@pytest.mark.parametrize("damage", [lambda raw: raw[:50], lambda raw: raw[:0], lambda raw: raw[:-9] + b"\1" + raw[-8:]])
def test_a_damaged_feature_is_taken_for_missing(tmp_path: Path, damage: Any) -> None:
    questions = Questions(tmp_path)
    questions.put("question_1", QuestionFeature(question()[0], 1.25, 7))
    path = tmp_path / "question_1.npy"
    path.write_bytes(damage(path.read_bytes()))
    assert questions.get("question_1") is None


def test_deleting_an_attribution_forgets_what_no_other_one_asks(pool: Store) -> None:
    two = [ROW, {**ROW, "completion": "8."}]
    jobs = [pool.attributions.start(asked(rows=rows))[0].id for rows in ([ROW], two)]
    keys = [key for own in pool.jobs.plan(jobs[1])["questions"] for key in own]
    for key in keys:
        pool.attributions.questions.put(key, QuestionFeature(question()[0], 1.0, 1))
    with pytest.raises(Conflict):
        pool.attributions.remove(jobs[1])
    pool.jobs.cancel(jobs[1])
    assert pool.attributions.remove(jobs[1]) == jobs[1]
    assert [pool.attributions.questions.get(key) is not None for key in keys] == [True, True, False, False]
    pool.jobs.cancel(jobs[0])
    pool.attributions.remove(jobs[0])
    assert not list(pool.attributions.questions.root.iterdir())


# The worker ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    """A pool of 12 rows with float32 features at two checkpoints."""
    place = Workplace.at(tmp_path, model=model)
    place.pool(numbered(range(12)), name="pool")
    checkpoints = [place.checkpoint(number).id for number in range(2)]
    place.done(GradientsRequest(dataset="pool", checkpoints=checkpoints, dims=[32], dtype="float32"))
    return place


def found(place: Workplace, **wanted: Any) -> AttributionResult:
    """Ask two checkpoints, do the work, and return what was found."""
    checkpoints = [each.id for each in place.context.catalog.checkpoints(limit=9, after=None).data][::-1]
    job, _ = place.context.attributions.start(asked(checkpoints=checkpoints, **wanted))
    place.work()
    job = place.job(job.id)
    assert job.status == "succeeded", job.error
    assert job.result is not None
    return AttributionResult.model_validate(job.result.model_dump())


def test_a_question_has_the_influence_that_a_tasks_row_would_have(place: Workplace) -> None:
    """The question as the only validation row of a task: its stored features give the same scores."""
    result = found(place, rows=numbered([5]), k=12)
    task = place.task(rows=6)
    place.done(GradientsRequest(task=task.id, checkpoints=result.recipe.checkpoints, dims=[32], dtype="float32"))
    total = np.zeros(12)
    for checkpoint, weight in zip(result.recipe.checkpoints, result.recipe.checkpoint_weights, strict=True):
        pool, target = (
            next(
                place.stored(each.id).astype(np.float64)
                for each in place.context.features.complete(datasets=result.recipe.datasets, tasks=[task.id])
                if each.checkpoint == checkpoint and bool(each.task) is of_task
            )
            for of_task in (False, True)
        )
        row = target[5]  # rows 0 to 5 of the subtask "even"
        total += weight * (pool @ row) / np.linalg.norm(pool, axis=1) / np.linalg.norm(row)
    assert [row.row for row in result.data[0].most] == np.argsort(-total).tolist()
    np.testing.assert_allclose([row.score for row in result.data[0].most], np.sort(total)[::-1], atol=1e-5)
    assert result.data[0].loss is not None
    assert result.data[0].tokens > 0
    assert result.computed_rows == 2


def test_what_was_computed_is_not_computed_again(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(place, k=3)
    monkeypatch.setattr("worker.kinds.attributions.make_engine", None)
    second = found(place, k=5)
    assert (first.computed_rows, second.computed_rows) == (2, 0)
    assert [row.row for row in second.data[0].most][:3] == [row.row for row in first.data[0].most]


def test_a_row_without_a_token_to_learn_from_is_answered_with_the_reason(place: Workplace) -> None:
    endless = {"prompt": "and so on " * 60, "completion": "The end."}
    result = found(place, rows=[endless, ROW], max_length=64)
    assert "max_length is 64" in (result.data[0].reason or "")
    assert (result.data[0].most, result.data[0].least, result.data[0].loss) == ([], [], None)
    assert len(result.data[1].most) == 10
    assert result.computed_rows == 2
    alone = found(place, rows=[endless], max_length=64)
    assert alone.data[0].reason is not None
    assert alone.searches == []


def test_a_cancelled_job_goes_on_with_what_it_has(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = [each.id for each in place.context.catalog.checkpoints(limit=9, after=None).data]
    job, _ = place.context.attributions.start(asked(checkpoints=checkpoints))
    claim = place.claim()
    put = Questions.put

    def put_and_cancel(self: Questions, key: str, feature: QuestionFeature) -> None:
        put(self, key, feature)
        place.context.jobs.cancel(job.id)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Questions, "put", put_and_cancel)
        assert run(claim, place.context) == "stopped"
    assert place.job(job.id).status == "cancelled"
    place.context.jobs.retry(job.id)
    place.work()
    done = place.job(job.id)
    assert done.status == "succeeded"
    assert done.result is not None
    assert done.result.model_dump()["computed_rows"] == 1
    assert done.progress.done == done.progress.total


def test_features_that_were_deleted_meanwhile_end_the_job_with_advice(place: Workplace) -> None:
    checkpoints = [each.id for each in place.context.catalog.checkpoints(limit=9, after=None).data]
    job, _ = place.context.attributions.start(asked(checkpoints=checkpoints))
    gradients = place.context.jobs.page(kind="gradients", limit=1).data[0]
    place.context.features.remove(gradients.id)
    place.work()
    failed = place.job(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "POST /gradients" in failed.error.detail
