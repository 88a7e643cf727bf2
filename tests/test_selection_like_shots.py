"""strategy=shots through a whole store and over HTTP: ROCKET's algorithm 2 by brute force, in float64."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradstore.types import Selection, SelectionRecipe, ShotNearness
from numpy.typing import NDArray
from scipy.optimize import nnls

from datastore import scores
from datastore.errors import InvalidInput
from datastore.nearness import INSIDE
from datastore.selection import duplicates, features, shots
from datastore.store import OpenStore
from tests.serving import Service, problem_of
from tests.stores import DIM, Store, request
from tests.test_answers import answered, asked, paired, rows_of

ROWS = 40
DEGREES = (5, 10, 40, 88, 60, 170)
"""The worked example: a pool around the shots at 0 and 90 degrees."""


def directions(degrees: NDArray[np.floating], dim: int) -> NDArray[np.float32]:
    """Rows of a plane, of different lengths."""
    found = np.zeros((len(degrees), dim), np.float32)
    angles = np.radians(degrees)
    found[:, 0], found[:, 1] = np.cos(angles), np.sin(angles)
    return found * np.arange(1, len(degrees) + 1, dtype=np.float32)[:, None]


def of_the_pool(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    del checkpoint
    return directions(np.array(DEGREES, float)[start:stop], dim)


def of_the_shots(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    del checkpoint
    return directions(np.array([0.0, 90.0])[start:stop], dim)


def filled(root: Path, pool: Any, task: Any, *, rows: int, shots: dict[str, int]) -> Store:
    store = Store.at(root / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    store.pool(rows, name="pool")
    store.features.start(request(dataset="pool", dtype="float32"))
    store.work(pool)
    store.task(shots, folder=root / "task")
    store.features.start(request(task="target", dtype="float32"))
    store.work(task)
    return store


@pytest.fixture
def worked(tmp_path: Path) -> Store:
    """A store with the worked example."""
    return filled(tmp_path, of_the_pool, of_the_shots, rows=len(DEGREES), shots={"zero": 1, "ninety": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with pairs of near-duplicates, and five shots some of which lie among them."""
    return filled(tmp_path, paired, around, rows=ROWS, shots={"algebra": 3, "history": 2})


def around(checkpoint: str, start: int, stop: int, dim: int) -> NDArray[np.float32]:
    """Shots near rows 0, 4, 8, 12 and 16 of the pool."""
    rows = [paired(checkpoint, 4 * number, 4 * number + 1, dim)[0] for number in range(start, stop)]
    noise = np.random.default_rng(start).normal(size=(len(rows), dim))
    return (np.array(rows) + 0.3 * noise).astype(np.float32)


def select(store: Store, **query: Any) -> Selection:
    return answered(store, *asked(store, strategy="shots", **query))


def unit_rows(store: Store, source: Any, rows: int) -> NDArray[np.float64]:
    """Rows of both checkpoints side by side, each times the root of its weight, in float64."""
    recipe, _ = asked(store, k=1)
    parts = []
    for checkpoint, weight in zip(recipe.checkpoints, recipe.checkpoint_weights, strict=True):
        found = source(checkpoint, 0, rows, DIM).astype(np.float64)
        parts.append(np.sqrt(weight) * found / np.linalg.norm(found, axis=1, keepdims=True))
    return np.concatenate(parts, axis=1)


def expected_scores(
    pool: NDArray[np.float64], target: NDArray[np.float64], nearness: ShotNearness, bandwidth: float
) -> NDArray[np.float64]:
    cosines = pool @ target.T
    if nearness == "max_cosine":
        return np.asarray(cosines.max(1))
    if nearness == "centroid":
        return np.asarray(pool @ target.mean(0))
    if nearness == "kde":
        squares = ((pool[:, None] - target[None]) ** 2).sum(-1)
        return np.log(np.exp(-squares / (2 * bandwidth**2)).mean(1))
    weight, found = 1e4, []
    for row in pool:
        weights, _ = nnls(np.vstack([target.T, np.full(len(target), weight)]), np.append(row, weight))
        found.append(-np.linalg.norm(row - target.T @ weights / weights.sum()))
    return np.array(found)


def greedy(pool: NDArray[np.float64], order: list[int], tau: float) -> tuple[list[int], dict[int, int]]:
    kept: list[int] = []
    twins = {}
    for row in order:
        like = [other for other in kept if pool[row] @ pool[other] > tau]
        if like:
            twins[row] = max(like, key=lambda other: pool[row] @ pool[other])
        else:
            kept.append(row)
    return kept, twins


def test_the_worked_example_comes_out_of_a_store(worked: Store) -> None:
    found = select(worked, k=4, tau=0.9)
    assert [DEGREES[row] for row in rows_of(found)] == [88, 5, 60]
    np.testing.assert_allclose([row.score for row in found.data], [0.9994, 0.9962, 0.8660], atol=5e-5)
    assert [row.shot for row in found.data] == [1, 0, 1]
    assert found.shots is not None
    report = found.shots
    assert (report.shots, report.budget, report.near, report.passed_over) == (2, 4, 4, 1)
    (passed,) = report.rows
    assert (DEGREES[passed.row], passed.shot, passed.like) == (10, 0, 2)
    assert passed.score == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
    assert any("3 rows instead of 4: 1 of the nearest" in note for note in found.notes)
    assert rows_of(select(worked, k=4, tau=1)) == [DEGREES.index(degrees) for degrees in (88, 5, 10, 60)]


@pytest.mark.parametrize("nearness", ["max_cosine", "centroid", "kde", "hull"])
def test_rows_are_those_of_a_brute_force(store: Store, nearness: ShotNearness) -> None:
    pool, target = unit_rows(store, paired, ROWS), unit_rows(store, around, 5)
    bandwidth = {"bandwidth": 0.5} if nearness == "kde" else {}
    near = expected_scores(pool, target, nearness, 0.5)
    everything = select(store, k=ROWS, tau=1, nearness=nearness, **bandwidth)
    by_row = {row.row: row for row in everything.data}
    np.testing.assert_allclose([by_row[row].score for row in range(ROWS)], near, atol=1e-4)
    assert [by_row[row].shot for row in range(ROWS)] == (pool @ target.T).argmax(1).tolist()
    assert (near < -INSIDE).all() or nearness != "hull", "no row is drawn"
    found = select(store, k=12, tau=0.9, nearness=nearness, **bandwidth)
    assert found.shots is not None
    order = np.argsort(-near, kind="stable")[:12].tolist()
    if nearness == "kde":
        order = rows_of(select(store, k=12, tau=1, nearness=nearness, **bandwidth))
        assert len(set(order)) == 12
    kept, twins = greedy(pool, order, 0.9)
    assert twins, "a pair of near-duplicates is among the nearest"
    assert rows_of(found) == kept
    assert {row.row: kept[row.like - 1] for row in found.shots.rows} == twins
    assert found.count == found.shots.near - found.shots.passed_over == len(kept)


def test_a_draw_has_its_seed(store: Store) -> None:
    draws = [rows_of(select(store, k=10, nearness="kde", selection_seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert select(store, k=10, nearness="kde").recipe.selection_seed == 0
    assert select(store, k=10, nearness="hull").recipe.selection_seed == 0
    assert select(store, k=10).recipe.selection_seed is None


@pytest.mark.parametrize("nearness", ["max_cosine", "hull"])
def test_blocks_change_nothing(store: Store, nearness: ShotNearness, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = select(store, k=15, nearness=nearness)
    monkeypatch.setattr(scores, "PIECE_ROWS", 7)
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 3)
    monkeypatch.setattr(features, "BLOCK_ROWS", 2)
    monkeypatch.setattr(shots, "TWIN_BLOCK", 2)
    store.answers.remove(whole.id)
    again = select(store, k=15, nearness=nearness)
    assert again.model_dump(exclude={"created_at"}) == whole.model_dump(exclude={"created_at"})


def test_a_recipe_alone_gives_its_selection_again(store: Store) -> None:
    for query in ({"k": 9}, {"pct": 0.3, "nearness": "kde", "bandwidth": 2.0, "exclude_ids": ["3"]}):
        first = select(store, **query)
        store.answers.remove(first.id)
        recipe = SelectionRecipe.model_validate(json.loads(first.recipe.model_dump_json()))
        again = answered(store, recipe, store.recipes.sources(recipe))
        assert again.model_dump(exclude={"created_at"}) == first.model_dump(exclude={"created_at"})


@pytest.mark.parametrize(
    ("query", "parameter", "words"),
    [
        ({"quota": ["equal"]}, "quota", "says where rows come from"),
        ({"dedupe": 0.9}, "dedupe", "say tau"),
        ({"among": 30}, "among", "belongs to"),
        ({"aggregate": "avg"}, "aggregate", "say nearness"),
        ({"combine": "round-robin"}, "combine", "one score"),
        ({"bandwidth": 2.0}, "bandwidth", "nearness=kde"),
        ({"selection_seed": 1}, "selection_seed", "nothing else is drawn"),
        ({"method": "bm25"}, "strategy", "reads no features"),
        ({"method": "random", "tasks": []}, "strategy", "reads no features"),
        ({"strategy": "top", "tau": 0.9}, "tau", "belongs to strategy=shots"),
        ({"strategy": "top", "nearness": "kde"}, "nearness", "belongs to strategy=shots"),
    ],
    ids=str,
)
def test_what_does_not_go_with_shots_is_refused(
    store: Store, query: dict[str, Any], parameter: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        asked(store, **{"k": 5, "strategy": "shots", **query})
    assert caught.value.errors[0].parameter == parameter


def test_a_recipe_whose_parts_do_not_fit_is_refused(store: Store) -> None:
    recipe, _ = asked(store, k=5, strategy="shots")
    for change, words in (
        ({"nearness": None}, "has nearness"),
        ({"tau": None}, "nearness and tau"),
        ({"aggregate": "less"}, "aggregate=max"),
        ({"nearness": "kde", "aggregate": None}, "bandwidth"),
    ):
        with pytest.raises(InvalidInput, match=words):
            store.recipes.sources(recipe.model_copy(update=change))


def test_too_many_rows_to_compare_are_refused_with_what_to_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_BYTES", 4 * 2 * DIM * 8)
    assert select(store, k=8).count
    with pytest.raises(InvalidInput, match=r"at most 8 rows .* tau=1") as caught:
        select(store, k=9)
    assert caught.value.errors[0].parameter == "tau"
    assert select(store, k=9, tau=1).count == 9


# Over HTTP --------------------------------------------------------------------------------------------------------


def work(service: Service, source: Any) -> None:
    """Do the gradients shards that wait."""
    Store(**{part.name: getattr(service.backend, part.name) for part in fields(OpenStore)}).work(source)


@pytest.fixture
def leaky(service: Service, tmp_path: Path) -> Service:
    """The worked example's features; row 3 says what the shot at 90° does, and row 0 what a test row does."""
    long = "a question of many words that nobody would write a second time by chance at all"
    said = ["seven is prime", "row one", "row two", long, "row four", "row five"]
    lines = [json.dumps({"prompt": text, "completion": "yes"}) for text in said]
    service.upload(("\n".join(lines) + "\n").encode(), name="pool")
    folder = tmp_path / "leaky"
    folder.mkdir()
    for split, texts in {"validation": ["the shot at zero", long], "test": ["seven is prime"]}.items():
        rows = [json.dumps({"prompt": text, "completion": "yes", "subtask": "s"}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    backend = service.backend
    stored = backend.tasks.store("jsonl", folder)
    backend.catalog.add_task(
        id=stored.id, name="target", kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
    )
    service.http.post("/runs", json={"checkpoints": [service.checkpoint()["id"]], "name": "run"})
    for owner, source in (({"dataset": "pool", "kinds": ["sgd"]}, of_the_pool), ({"task": "target"}, of_the_shots)):
        answer = service.http.post("/gradients", json={"run": "run", "dims": [16], "dtype": "float32", **owner})
        assert answer.status_code == 202, answer.text
        work(service, source)
    return service


def test_leaks_are_told_and_left_out_when_asked(leaky: Service) -> None:
    params = {"task": "target", "strategy": "shots", "k": 4, "tau": 0.9}
    told = leaky.http.get("/select", params=params).json()
    assert [row["row"] for row in told["data"]] == [3, 0, 4]
    assert told["contamination"]["chosen"] == 2
    leaks = [(one["row"], one["split"], one["task_row"]) for one in told["contamination"]["overlaps"]]
    assert leaks == [(3, "validation", 1), (0, "test", 0)]
    clean = leaky.http.get("/select", params={**params, "exclude_contaminated": True}).json()
    assert [row["row"] for row in clean["data"]] == [1, 4, 5], "the next nearest are met instead"
    assert (clean["contamination"]["chosen"], clean["contamination"]["dropped"]) == (0, 2)


def test_what_is_made_of_a_selection_is_made_of_this_one(leaky: Service) -> None:
    params = {"task": "target", "strategy": "shots", "k": 4}
    selection = leaky.http.get("/select", params=params).json()
    where = f"/selections/{selection['id']}"
    assert leaky.http.get(where).json() == selection
    why = leaky.http.get(f"{where}/explanations").json()["data"]
    assert [row["nearest"]["row"] for row in why] == [row["shot"] for row in selection["data"]]
    recipe = leaky.http.get(f"{where}/provenance").json()["recipe"]
    assert (recipe["strategy"], recipe["nearness"], recipe["tau"]) == ("shots", "max_cosine", 0.9)
    assert len(leaky.http.get(f"{where}/content").content.splitlines()) == 3
    again = leaky.http.post("/selections", json={"recipe": selection["recipe"]}).json()
    assert again["id"] == selection["id"]
    scored = leaky.http.get("/scores", params={"task": "target", "strategy": "shots", "nearness": "hull"}).json()
    by_row = {row["row"]: row["score"] for row in scored["data"]}
    heights = [np.cos(np.radians(degrees - 45)) - np.sqrt(0.5) for degrees in (40, 60)]  # over the chord of the shots
    assert [-by_row[2], -by_row[4]] == pytest.approx(heights, abs=1e-4)


def test_what_is_no_threshold_and_no_nearness_is_refused(leaky: Service) -> None:
    problem = problem_of(leaky.http.get("/select?task=target&k=3&strategy=shots&tau=1.5"), 422)
    assert problem.errors[0].parameter == "tau"
    problem = problem_of(leaky.http.get("/select?task=target&k=3&strategy=shots&nearness=far"), 422)
    assert problem.errors[0].parameter == "nearness"
