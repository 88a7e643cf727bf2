"""Distributions, overlaps and explanations against brute force over the stored numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore import browsing
from datastore.distributions import rank_correlation
from tests.serving import Service, problem_of, serving
from tests.stores import DIM, Store, numbers, request, task_numbers

ROWS = 70
SUBTASKS = {"first": 3, "second": 2}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service over a pool of three origins and two tasks at two checkpoints; row 5 has no feature."""
    folder = tmp_path_factory.mktemp("distributions")
    store = Store.at(folder / "store")
    for number in range(2):
        store.checkpoint(number)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0", "ck_1"], name="warm-up")
    pool = store.pool(ROWS, name="pool")
    store.features.start(request(dataset=pool.id))
    store.work(pool_numbers)
    for name, values in (("one", task_numbers), ("two", other_numbers)):
        store.features.start(request(task=store.task(SUBTASKS, folder=folder / name, name=name).id))
        store.work(values)
    store.catalog.close()
    with serving(folder / "store") as running:
        yield running


def pool_numbers(checkpoint: str, start: int, stop: int, dim: int) -> Any:
    found = numbers(checkpoint, start, stop, dim)
    found[5 - start] = 0
    return found


def other_numbers(checkpoint: str, start: int, stop: int, dim: int) -> Any:
    return numbers(checkpoint, start + 2_000_000, stop + 2_000_000, dim)


def influence(values: Any) -> np.ndarray:
    """Influence of each row of the pool on each validation row of a task, from the numbers themselves: (70, 5)."""
    total = np.zeros((ROWS, 5))
    rates = [1e-4, 0.5e-4]
    for number, rate in enumerate(rates):
        train = numbers(f"ck_{number}", 0, ROWS, DIM).astype(np.float16).astype(np.float64)
        target = values(f"ck_{number}", 0, 5, DIM).astype(np.float16).astype(np.float64)
        unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, target)]
        total += rate / sum(rates) * unit[0] @ unit[1].T
    return total


def scores_of(values: Any) -> np.ndarray:
    """LESS's score of each row, NaN where it has none (70,)."""
    table = influence(values)
    found = np.maximum(table[:, :3].mean(axis=1), table[:, 3:].mean(axis=1))
    found[5] = np.nan
    return found


def best(values: Any) -> list[int]:
    """All rows that have a score, best first."""
    score = scores_of(values)
    return sorted((row for row in range(ROWS) if row != 5), key=lambda row: -score[row])


def answer(service: Service, path: str, **params: Any) -> Any:
    found = service.http.get(path, params=params)
    assert found.status_code == 200, found.text
    return found.json()


@pytest.mark.parametrize(("bins", "steps"), [(1, 1), (7, 10), (60, 200), (500, 1000)])
def test_a_distribution_counts_every_score_once(service: Service, bins: int, steps: int) -> None:
    found = answer(service, "/scores/distribution", task="one", bins=bins, steps=steps)
    score = scores_of(task_numbers)
    assert (found["rows"], found["scored"]) == (ROWS, ROWS - 1)
    assert len(found["edges"]) == bins + 1
    assert found["edges"][0] == pytest.approx(np.nanmin(score), abs=1e-6)
    assert found["edges"][-1] == pytest.approx(np.nanmax(score), abs=1e-6)
    for origin in range(3):
        own = [score[row] for row in range(ROWS) if row % 3 == origin and row != 5]
        counts = found["counts"][f"origin{origin}"]
        assert sum(counts) == len(own)
        if bins == 7:  # no score lies within rounding of a border
            assert counts == np.histogram(own, np.array(found["edges"]) + np.array([-1e-6, *[0] * 6, 1e-6]))[0].tolist()


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_every_cut_takes_what_select_would_choose(service: Service, steps: int) -> None:
    cuts = answer(service, "/scores/distribution", task="one", steps=steps)["cuts"]
    order = best(task_numbers)
    for place in range(0, steps, max(1, steps // 20)):
        chosen = order[: cuts["rows"][place]]
        taken = {name: rows[place] for name, rows in cuts["origins"].items() if rows[place]}
        assert taken == Counter(f"origin{row % 3}" for row in chosen)
        assert cuts["scores"][place] == pytest.approx(scores_of(task_numbers)[chosen[-1]], abs=1e-6)
        selection = answer(service, "/select", task="one", pct=cuts["pct"][place], limit=0)
        assert (selection["count"], selection["origins"]) == (len(chosen), taken)


def test_scores_that_are_not_there_are_a_job(tmp_path: Path) -> None:
    with serving(tmp_path / "store") as service:
        service.task("lonely")
        problem = problem_of(service.http.get("/scores/distribution", params={"task": "lonely"}), 409)
        assert problem.type == "gradients-missing"


@pytest.mark.parametrize("k", [1, 10, 69, 70])
def test_overlaps_are_those_of_the_selections(service: Service, k: int) -> None:
    found = answer(service, "/overlaps", task=["one", "two"], k=k)
    first, second = (set(best(values)[:k]) for values in (task_numbers, other_numbers))
    (pair,) = found["pairs"]
    assert pair["tasks"] == found["recipe"]["tasks"]
    assert found["count"] == min(k, 69)
    assert pair["shared"] == len(first & second)
    assert pair["jaccard"] == pytest.approx(len(first & second) / len(first | second))
    ranks = [
        np.argsort(np.argsort(scores_of(values)[np.arange(ROWS) != 5])) for values in (task_numbers, other_numbers)
    ]
    assert pair["rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)


def test_one_task_has_nothing_to_be_compared_with(service: Service) -> None:
    problem_of(service.http.get("/overlaps", params={"task": "one", "k": 3}), 422)
    problem_of(service.http.get("/overlaps", params={"task": ["one", "two"]}), 422)
    twice = problem_of(service.http.get("/overlaps", params={"task": ["one", "one"], "k": 3}), 422)
    assert "names something twice" in twice.detail
    joined = problem_of(service.http.get("/overlaps", params={"task": ["one", "two"], "k": 3, "combine": "mean"}), 422)
    assert "leave it out" in joined.detail


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_that_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    columns = [np.array(column, float) for column in zip(*pairs, strict=True)]
    ranks = [[np.mean([(column < x).sum(), (column <= x).sum() - 1]) for x in column] for column in columns]
    found = rank_correlation(*columns)
    if any(len(set(column)) == 1 for column in columns):
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)  # in float32


@pytest.fixture(scope="module")
def selection(service: Service) -> dict[str, Any]:
    """The best half for both tasks together."""
    found: dict[str, Any] = answer(service, "/select", task=["one", "two"], pct=0.5, limit=100)
    return found


def explained(service: Service, selection: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The explanations of all pages."""
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = answer(service, f"/selections/{selection['id']}/explanations", after=after, **wanted)
        found += page["data"]
        after = page["next"]
        assert page["has_more"] == (after is not None)
    return found


@pytest.mark.parametrize("limit", [1, 8, 100])
def test_explanations_are_the_influences_on_every_validation_row(
    service: Service, selection: dict[str, Any], limit: int
) -> None:
    tables = {"one": influence(task_numbers), "two": influence(other_numbers)}
    names = {answer(service, f"/tasks/{name}")["id"]: name for name in tables}
    found = explained(service, selection, limit=limit)
    assert [row["rank"] for row in found] == list(range(1, selection["count"] + 1))
    for row, chosen in zip(found, selection["data"], strict=True):
        assert {name: row[name] for name in chosen} == chosen
        assert [turn["content"] for turn in row["turns"]] == [f"row {row['row']}", "done"]
        for score in row["subtasks"]:
            own = tables[names[score["task"]]][row["row"]]
            expected = own[:3] if score["subtask"] == "first" else own[3:]
            assert score["score"] == pytest.approx(expected.mean(), abs=1e-6)
        assert [(names[score["task"]], score["subtask"]) for score in row["subtasks"]] == [
            ("one", "first"), ("one", "second"), ("two", "first"), ("two", "second"),
        ]  # fmt: skip
        assert max(score["score"] for score in row["subtasks"]) == pytest.approx(row["score"], abs=1e-6)
        nearest = row["nearest"]
        values = {(name, place): tables[name][row["row"], place] for name in tables for place in range(5)}
        task, place = max(values, key=lambda one: values[one])
        assert (names[nearest["task"]], nearest["row"]) == (task, place)
        assert nearest["influence"] == pytest.approx(values[task, place], abs=1e-6)
        text = f"{task} {nearest['subtask']} {place if place < 3 else place - 3}"
        assert nearest["turns"][0]["content"] == text


@pytest.mark.parametrize(
    ("aggregate", "within", "over"), [("avg", np.mean, None), ("max", np.max, max), ("min", np.min, min)]
)
def test_a_subtasks_score_is_what_the_selections_aggregate_makes_of_its_rows(
    service: Service, aggregate: str, within: Callable[[Any], float], over: Callable[[Any], float] | None
) -> None:
    table = influence(task_numbers)
    selection = answer(service, "/select", task="one", aggregate=aggregate, k=8)
    for row in explained(service, selection, limit=100):
        own = table[row["row"]]
        scores = {score["subtask"]: score["score"] for score in row["subtasks"]}
        assert scores == pytest.approx({"first": within(own[:3]), "second": within(own[3:])}, abs=1e-6)
        expected = own.mean() if over is None else over(scores.values())
        assert row["score"] == pytest.approx(expected, abs=1e-6)
        if over is not None:
            assert row["score"] == pytest.approx(scores[row["subtask"]], abs=1e-6)


@pytest.mark.parametrize("origin", [None, "origin1"])
@pytest.mark.parametrize("text", [None, "ROW 1", "nowhere"])
@pytest.mark.parametrize("searched", [2, 10_000])
def test_explanations_are_found_by_origin_and_text(
    service: Service,
    selection: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    origin: str | None,
    text: str | None,
    searched: int,
) -> None:
    monkeypatch.setattr(browsing, "SEARCHED", searched)
    wanted = {"limit": 3} | ({"origin": origin} if origin else {}) | ({"q": text} if text else {})
    expected = [
        row["rank"]
        for row in selection["data"]
        if origin in {None, row["origin"]} and (text is None or text.lower() in f"row {row['row']}")
    ]
    assert [row["rank"] for row in explained(service, selection, **wanted)] == expected


def test_an_origin_that_the_pool_does_not_have_is_refused(service: Service, selection: dict[str, Any]) -> None:
    path = f"/selections/{selection['id']}/explanations"
    assert problem_of(service.http.get(path, params={"origin": "nobody"}), 422).errors[0].parameter == "origin"
    assert answer(service, path, after=10**25)["data"] == []


def test_without_its_features_a_selection_is_not_explained(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    store.checkpoint(0)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="warm-up")
    jobs = []
    for what in (
        {"dataset": store.pool(9, name="pool").id},
        {"task": store.task({"a": 2}, folder=tmp_path / "task").id},
    ):
        jobs.append(store.features.start(request(**what))[0].id)
        store.work(numbers)
    store.catalog.close()
    with serving(tmp_path / "store") as service:
        selection = answer(service, "/select", task="target", k=2)
        path = f"/selections/{selection['id']}/explanations"
        assert answer(service, path)["data"]
        assert service.http.delete(f"/gradients/{jobs[1]}").status_code == 204
        problem = problem_of(service.http.get(path), 409)
        assert problem.type == "gradients-missing"
        assert answer(service, f"/selections/{selection['id']}")["count"] == 2
