"""Choices of adapters through the service, by the client and the command line, with a worker in the test's process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradstore import AsyncGradientStore, Conflict, GradientStore, Invalid, NotFound, cli

from tests.serving import Service, form_files, problem_of, serving
from tests.workplace import tiny_adapter
from worker.context import Context
from worker.jobs import run

NAMES = ("one", "two", "three")
ASKED: dict[str, Any] = {"task": "target", "candidates": 3, "size": 2, "max_new_tokens": 2}


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    with serving(tmp_path / "store", allowed_roots=(tmp_path, model.parent)) as running:
        rows = [
            {"prompt": f"Is {number} even?", "completion": "yes", "choices": [" yes", " no"], "answers": " yes"}
            for number in range(5)
        ]
        files = {"validation.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}
        made = running.http.post("/tasks", data={"name": "target", "kind": "jsonl"}, files=form_files(files))
        assert made.is_success, made.text
        yield running


@pytest.fixture
def store(service: Service, tmp_path: Path, model: Path) -> Iterator[GradientStore]:
    """A client of a service with three adapters."""
    with GradientStore(service.url, backoff=0.01) as client:
        for seed, name in enumerate(NAMES):
            tiny_adapter(model, seed=seed).save_pretrained(str(tmp_path / name))
            client.adapters.upload(tmp_path / name, name=name, base_model=str(model))
        yield client


@pytest.fixture
def work(service: Service) -> Callable[[], None]:
    """Do the shards that wait."""

    def done() -> None:
        context = Context.open(service.backend.settings, torch.device("cpu"))
        while (claim := context.jobs.claim("test", kinds=["adapter-choice"])) is not None:
            assert run(claim, context) == "succeeded", context.jobs.get(claim.job).error

    return done


def test_a_choice_from_the_question_to_its_pages(
    service: Service, store: GradientStore, work: Callable[[], None], model: Path
) -> None:
    estimate = store.adapter_choices.estimate(**ASKED)
    assert (estimate.adapters, estimate.reused_adapters, estimate.shots, estimate.sets) == (3, 0, 5, 3)
    assert (estimate.passes, estimate.seconds) == (2 * 5 * 3, None)
    assert list(store.adapter_choices.list()) == []
    asked = store.adapter_choices.create(**ASKED, base_model=str(model), target="q_proj", name="mine")
    assert (asked.kind, asked.status, asked.progress.total) == ("adapter-choice", "queued", 30)
    with pytest.raises(Conflict, match="can be read once it has succeeded"):
        list(store.adapter_choices.sets("mine"))
    work()
    done = store.adapter_choices.wait(asked)
    assert (done.progress.done, done.result.sets, done.result.shots) == (30, 3, 5)
    assert {one.name for one in done.result.adapters} == set(NAMES)
    sets = list(store.adapter_choices.sets("mine"))
    assert [each.total for each in sets] == sorted(each.total for each in sets)
    assert sets[0] == done.result.chosen
    assert [shot.row for shot in store.adapter_choices.shots("mine")] == list(range(5))
    page = service.http.get("/adapters/choices/mine/sets", params={"limit": 1, "after": 1}).json()
    assert (page["data"][0], page["has_more"]) == (sets[1].model_dump(mode="json"), True)
    assert store.adapter_choices.create(**ASKED, base_model=str(model), target="q_proj").id == asked.id
    usage = store.usage()
    assert (usage.counts["adapters"], usage.counts["adapters/choices"]) == (3, 1)
    assert usage.bytes["adapter-scores"] > 0
    assert len(done.result.to_pandas()) == 3


def test_adapters_of_a_choice_are_kept_until_it_is_deleted(
    store: GradientStore, service: Service, work: Callable[[], None]
) -> None:
    asked = store.adapter_choices.create(**ASKED, adapters=["one", "two"])
    assert asked.id in problem_of(service.http.delete("/adapters/one"), 409).detail
    store.adapters.delete("three")
    work()
    problem_of(service.http.delete("/tasks/target"), 409)
    store.adapter_choices.rename(asked.id, "mine")
    store.adapter_choices.delete("mine")
    with pytest.raises(NotFound):
        store.adapter_choices.get(asked.id)
    again = store.adapter_choices.estimate(**ASKED, adapters=["one", "two"])
    assert again.reused_adapters == 2
    store.adapters.delete("one")


def test_what_is_refused_names_the_place(service: Service, store: GradientStore) -> None:
    for body, pointer in (
        ({"size": 4, "candidates": 4}, "/size"),
        ({"adapters": ["one", "one"]}, "/adapters"),
    ):
        problem = problem_of(service.http.post("/adapters/choices", json=ASKED | body), 422)
        assert [error.pointer for error in problem.errors] == [pointer]
    for unknown in ({"task": "nothing"}, {"adapters": ["nothing"]}):
        problem_of(service.http.post("/adapters/choices", json=ASKED | unknown), 404)
    problem_of(service.http.get("/adapters/choices/nothing/shots"), 404)
    with pytest.raises(Invalid, match="adapters are named"):
        store.adapter_choices.create(**ASKED, adapters="one", rank=2)


def test_the_same_from_the_command_line_and_awaited(
    service: Service,
    store: GradientStore,
    work: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADSTORE_URL", service.url)

    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as left:
            cli.app(list(words), prog_name="gradstore")
        heard = capsys.readouterr()
        assert left.value.code == 0, heard.err
        return heard.out.strip()

    words = ["--task", "target", "--candidates", "3", "--size", "2", "--max-new-tokens", "2"]
    choose = ["adapters", "choose", *words, "--adapter", "one", "--adapter", "two", "--adapter", "three"]
    assert json.loads(said(*choose, "--dry-run", "--json"))["adapters"] == 3
    made = said(*choose, "--name", "mine")
    assert made.startswith("choice_")
    work()
    shown = said("adapter-choices", "show", "mine").splitlines()
    assert shown[0].split() == ["adapter", "perplexity", "accuracy", "ranks", "chosen"]
    assert sum(line.rstrip().endswith("chosen") for line in shown[1:]) == 2
    assert len(said("adapter-choices", "rows", made, "--json").splitlines()) == 3
    assert made in said("adapter-choices", "list")

    async def awaited() -> list[int]:
        async with AsyncGradientStore(service.url) as other:
            return [each.total async for each in other.adapter_choices.sets("mine")]

    assert asyncio.run(awaited()) == [each.total for each in store.adapter_choices.sets("mine")]
    said("adapter-choices", "delete", "mine")
