"""Rows as they are looked at: pages, origins, searches and lengths, against what the uploaded file says."""

from __future__ import annotations

import json
import os
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from datastore import browsing
from datastore.settings import Settings
from datastore.usage import PARTS
from tests.serving import Service, problem_of, serving

ROWS: list[dict[str, Any]] = [
    {"dataset": ("a", "b", "b")[number % 3], "id": str(number), "messages": [
        {"role": "user", "content": f"Question {number}\nof Straße {number % 5}" + " long" * (number % 7)},
        {"role": "assistant", "content": "YES" if number % 4 else "no"},
    ]}
    for number in range(50)
]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with one dataset."""
    with serving(tmp_path_factory.mktemp("browsing") / "store") as running:
        content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        assert running.upload(content, name="pool").status_code == 201
        yield running


def walked(service: Service, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of all pages, with the same question."""
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = service.http.get("/datasets/pool/rows", params={**wanted, "after": after}).json()
        assert page["has_more"] == (page["next"] is not None)
        found += page["data"]
        after = page["next"]
    return found


def text_of(row: dict[str, Any]) -> str:
    return "\n".join(turn["content"] for turn in row["messages"]).casefold()


@pytest.mark.parametrize("limit", [1, 7, 50, 1000])
def test_pages_cover_every_row_once_with_its_text(service: Service, limit: int) -> None:
    found = walked(service, limit=limit)
    assert [row["row"] for row in found] == list(range(50))
    for row, uploaded in zip(found, ROWS, strict=True):
        assert (row["id"], row["origin"]) == (uploaded["id"], uploaded["dataset"])
        assert row["turns"] == [{**turn, "prefix": ""} for turn in uploaded["messages"]]


@pytest.mark.parametrize("origin", [None, "a", "b"])
@pytest.mark.parametrize("text", [None, "yes", "STRASSE 3", "question 4", "nowhere"])
@pytest.mark.parametrize("searched", [1, 4, 10_000])
def test_a_search_finds_what_reading_everything_finds(
    service: Service, monkeypatch: pytest.MonkeyPatch, origin: str | None, text: str | None, searched: int
) -> None:
    monkeypatch.setattr(browsing, "SEARCHED", searched)
    wanted = {"limit": 3} | ({"origin": origin} if origin else {}) | ({"q": text} if text else {})
    expected = [
        number
        for number, row in enumerate(ROWS)
        if origin in {None, row["dataset"]} and (text is None or text.casefold() in text_of(row))
    ]
    assert [row["row"] for row in walked(service, **wanted)] == expected


def test_a_page_looks_through_a_bounded_part(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "SEARCHED", 10)
    page = service.http.get("/datasets/pool/rows", params={"q": "nowhere", "after": 5}).json()
    assert page == {"dataset": page["dataset"], "data": [], "has_more": True, "next": 15}


@pytest.mark.parametrize("after", [50, 10**9, 10**30])
def test_beyond_the_last_row_is_an_empty_page(service: Service, after: int) -> None:
    page = service.http.get("/datasets/pool/rows", params={"after": after}).json()
    assert (page["data"], page["next"]) == ([], None)


def test_rows_with_a_prompt_and_a_completion_have_two_turns(service: Service) -> None:
    service.upload(b'{"prompt": "one", "completion": "two"}\n', name="short")
    page = service.http.get("/datasets/short/rows").json()
    assert [(turn["role"], turn["content"]) for turn in page["data"][0]["turns"]] == [
        ("prompt", "one"),
        ("completion", "two"),
    ]


def test_an_origin_that_no_row_has_is_refused_with_those_there_are(service: Service) -> None:
    problem = problem_of(service.http.get("/datasets/pool/rows", params={"origin": "c"}), 422)
    assert problem.errors[0].parameter == "origin"
    assert "'a', 'b'" in problem.detail or "'b', 'a'" in problem.detail
    problem_of(service.http.get("/datasets/nobody/rows"), 404)


@pytest.mark.parametrize("bins", [1, 3, 40, 200])
def test_lengths_are_those_of_the_lines(service: Service, bins: int) -> None:
    found = service.http.get("/datasets/pool/lengths", params={"bins": bins}).json()
    edges = found["edges"]
    assert edges == sorted(set(edges))
    assert len(edges) <= bins + 1
    assert list(found["origins"]) == ["b", "a"]
    for origin, lengths in found["origins"].items():
        sizes = [len(json.dumps(row)) for row in ROWS if row["dataset"] == origin]
        assert (lengths["rows"], lengths["shortest"], lengths["longest"]) == (len(sizes), min(sizes), max(sizes))
        assert lengths["median"] == statistics.median(sizes)
        counts = [sum(low <= size < high for size in sizes) for low, high in pairwise(edges)]
        assert lengths["counts"] == counts
        assert sum(counts) == len(sizes)


def test_rows_of_one_length_have_one_bin(service: Service) -> None:
    service.upload(b'{"prompt": "same", "completion": "x"}\n' * 3, name="same")
    found = service.http.get("/datasets/same/lengths").json()
    assert [lengths["counts"] for lengths in found["origins"].values()] == [[3]]


def test_a_dataset_that_is_deleted_is_not_found_by_what_is_remembered_of_it(service: Service) -> None:
    service.upload(b'{"prompt": "gone", "completion": "x", "dataset": "here"}\n', name="gone")
    assert service.http.get("/datasets/gone/rows", params={"origin": "here"}).is_success
    assert service.http.delete("/datasets/gone").status_code == 204
    problem_of(service.http.get("/datasets/gone/rows", params={"origin": "here"}), 404)


def test_usage_is_what_the_disk_has(service: Service) -> None:
    usage = service.http.get("/usage").json()
    folder: Path = service.backend.settings.data
    sizes = {
        path: path.stat().st_size
        for root, _, names in os.walk(folder)
        for path in (Path(root) / name for name in names)
    }
    datasets = sum(size for path, size in sizes.items() if path.relative_to(folder).parts[0] == "datasets")
    assert usage["bytes"]["datasets"] == datasets > 0
    # the catalog's log of writes may grow in the meantime
    assert sum(usage["bytes"].values()) == pytest.approx(sum(sizes.values()), rel=0.2)
    assert usage["counts"]["datasets"] == len(service.http.get("/datasets").json()["data"])
    assert usage["free_bytes"] > 0


def test_usage_tells_every_folder_of_the_store_apart(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "store")
    properties = (name for name, value in vars(Settings).items() if isinstance(value, property))
    folders = {found for name in properties if isinstance(found := getattr(settings, name), Path)}
    assert settings.features_cache in folders
    assert {folder.relative_to(settings.data).as_posix() for folder in folders} == set(PARTS)


def test_usage_counts_every_noun(tmp_path: Path) -> None:
    with serving(tmp_path / "store") as service:
        service.pool(3, name="pool")
        service.task()
        service.finetune(dataset="pool")
        counts = service.http.get("/usage").json()["counts"]
    none = dict.fromkeys(("adapters", "checkpoints", "runs", "selections", "taxonomies"), 0)
    assert counts == {"datasets": 1, "tasks": 1, "finetunes": 1} | none
