"""Choosing adapters for a task, by a real worker on a tiny model, against each adapter merged into the model in
float64, one row and one token at a time. No line of `worker` takes part in the truth.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore.types import AdapterChoiceRequest, AdapterChoiceResult, AdapterSet, Task
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from datastore import adapter_choices
from datastore.adapter_choices import drawn
from datastore.checkpoints import ADAPTER_WEIGHTS, Description
from datastore.errors import Conflict, InUse, InvalidInput
from datastore.rows import Example, Message
from datastore.schema import TaskRow
from datastore.tasks import TaskExample, lines
from tests.processes import wait_for
from tests.workplace import Workplace, tiny_adapter, worker_process
from worker.heartbeat import Heartbeat
from worker.jobs import run
from worker.kinds import adapter_choices as work_of_choices
from worker.loaded import Base
from worker.models import ModelError, load_adapter, several_adapters

NAMES = ("a", "b", "c", "d", "e")
WRITTEN = 6  # tokens that an answer is written with
CHOICES = (" France", " left", " three")
ALPHA = 4


def adapter(place: Workplace, name: str, *, seed: int, template: Any = "tulu", **made_with: Any) -> str:
    """An adapter of the bank, of random tensors; returns its id."""
    made = tiny_adapter(place.model, seed=seed, **made_with)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if "lora_B" in path:
                parameter.mul_(15)
    source = place.folder / f"made-{name}"
    made.save_pretrained(str(source / "adapter"))
    description = Description(
        model=str(place.model), revision=None, method="lora", precision="float32", template=template, max_length=64,
        moments_note="made by hand",
    )  # fmt: skip
    checkpoint = place.context.catalog.add_checkpoint(place.context.checkpoints.add(source, description))
    return place.context.adapters.add(checkpoint.id, name=name)[0].id


@dataclass(frozen=True)
class Alone:
    """The model with one adapter merged into its weights, in float64."""

    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, model: Path, folder: Path) -> Alone:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        weights = load_file(folder / ADAPTER_WEIGHTS)
        rank = json.loads((folder / "adapter_config.json").read_bytes())["r"]
        for name, a in weights.items():
            if name.endswith("lora_A.weight"):
                b = weights[name.replace("lora_A", "lora_B")]
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                with torch.no_grad():
                    loaded.get_submodule(path).weight += ALPHA / rank * b.double() @ a.double()
        return cls(loaded, AutoTokenizer.from_pretrained(model))

    @torch.no_grad()
    def log_probs(self, before: str, after: str) -> list[float]:
        """Of the tokens that have a character of `after`."""
        encoded = self.tokenizer(before + after, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ends = [end for _, end in encoded["offset_mapping"]]
        return [float(logits[at - 1, ids[at]]) for at in range(1, len(ids)) if ends[at] > len(before)]

    def perplexity(self, row: dict[str, Any]) -> float:
        answer = row.get("rationale", row["completion"])
        space = "" if answer[:1].isspace() else " "
        return math.exp(-np.mean(self.log_probs(row["prompt"], f"{space}{answer}</s>")))

    @torch.no_grad()
    def written(self, prompt: str) -> str:
        tokens = self.tokenizer(prompt)["input_ids"]
        begun = len(tokens)
        while len(tokens) < begun + WRITTEN and tokens[-1] != self.tokenizer.eos_token_id:
            tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return str(self.tokenizer.decode(tokens[begun:], skip_special_tokens=True))

    def value(self, row: dict[str, Any]) -> float:
        if row["metric"] == "choice":
            sums = [sum(self.log_probs(row["prompt"], choice)) for choice in CHOICES]
            return float(CHOICES[int(np.argmax(sums))] == row["answers"])
        return float(self.written(row["prompt"]) == row["answers"])


@dataclass(frozen=True)
class World:
    """A bank, a task, and what is true of them."""

    place: Workplace
    ids: dict[str, str]
    alone: dict[str, Alone]
    rows: list[dict[str, Any]]
    """The shots, in the order of the task's rows."""

    def request(self, **changes: Any) -> AdapterChoiceRequest:
        values = {"task": "target", "candidates": 4, "size": 2, "max_new_tokens": WRITTEN} | changes
        return AdapterChoiceRequest.model_validate(values)

    def done(self, **changes: Any) -> AdapterChoiceResult:
        return AdapterChoiceResult.model_validate(self.place.done(self.request(**changes)))

    def sets(self, **changes: Any) -> list[AdapterSet]:
        job = self.place.start(self.request(**changes))
        return self.place.context.adapter_choices.sets(job.id, after=0, limit=1000).data

    def delta(self, name: str) -> dict[str, NDArray[np.float64]]:
        """Each ΔW of an adapter, without its scale."""
        weights = load_file(self.folder(name) / ADAPTER_WEIGHTS)
        return {
            path: (weights[path.replace("lora_A", "lora_B")].double() @ a.double()).numpy()
            for path, a in weights.items()
            if "lora_A" in path
        }

    def folder(self, name: str) -> Path:
        context = self.place.context
        return context.checkpoints.weights(context.catalog.adapter(self.ids[name]).checkpoint)


def task(place: Workplace, rows: Sequence[dict[str, Any]], *, name: str = "target") -> Task:
    """A task with these validation rows."""
    path = place.folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = place.context.tasks.store("jsonl", path)
    return place.context.catalog.add_task(
        id=stored.id, name=name, kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=True
    )


def choosing(number: int, **fields: Any) -> dict[str, Any]:
    right = CHOICES[number % 3]
    question = f"Question {number}:" + " how many apples are left?" * (number % 4)
    return {
        "prompt": question, "completion": right.strip(), "subtask": "choosing", "metric": "choice",
        "choices": list(CHOICES), "answers": right, **fields,
    }  # fmt: skip


def shots(alone: dict[str, Alone]) -> list[dict[str, Any]]:
    """Rows of both metrics, some with a rationale; some are answered as one of the adapters answers them."""
    rows = [choosing(number) for number in range(7)]
    for number in (1, 3, 5):
        rows[number]["rationale"] = f"{CHOICES[number % 3].strip()}. Because {number} is left."
    for number in range(6):
        prompt = f"Say {number}:" + " the answer is 5." * (number % 3)
        told = alone["eeecda"[number]].written(prompt)
        rows.append({"prompt": prompt, "completion": told, "answers": told, "subtask": "writing"})
        rows[-1]["metric"] = "exact_match"
    return rows


@pytest.fixture
def world(tmp_path: Path, model: Path, truth: tuple[Path, dict[str, Alone]]) -> World:
    place = Workplace.at(tmp_path, model=model)
    ids = {name: adapter(place, name, seed=number) for number, name in enumerate(NAMES)}
    rows = shots(truth[1])
    task(place, rows)
    return World(place, ids, truth[1], rows)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, dict[str, Alone]]:
    """Each adapter alone: the same that every test's bank has."""
    place = Workplace.at(tmp_path_factory.mktemp("truth"), model=model)
    context = place.context
    found = {}
    for number, name in enumerate(NAMES):
        made = context.catalog.adapter(adapter(place, name, seed=number))
        found[name] = Alone.of(model, context.checkpoints.weights(made.checkpoint))
    return place.folder, found


# Scores ---------------------------------------------------------------------------------------------------------------


def test_every_number_is_that_of_the_adapter_alone(world: World) -> None:
    result = world.done(name="mine")
    page = world.place.context.adapter_choices.shots("mine", after=0, limit=100)
    assert (len(page.data), page.has_more, result.shots) == (13, False, 13)
    assert result.scored_adapters == 5
    by_prompt = {row["prompt"]: row for row in world.rows}
    examples = world.place.context.tasks.validation(world.place.context.catalog.task("target").id)
    perplexities: dict[str, list[float]] = {name: [] for name in NAMES}
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    for number, shot in enumerate(page.data):
        row = by_prompt[examples[number].example.prompt or ""]
        assert (shot.row, shot.subtask, shot.rationale) == (number, row["subtask"], "rationale" in row)
        assert [score.adapter for score in shot.scores] == [one.adapter for one in result.adapters]
        found = {score.adapter: score for score in shot.scores}
        for name in NAMES:
            score = found[world.ids[name]]
            perplexities[name].append(world.alone[name].perplexity(row))
            values[name].append(world.alone[name].value(row))
            assert score.perplexity == pytest.approx(perplexities[name][-1], rel=1e-4)
            assert score.value == values[name][-1]
    right = {name: float(np.mean(values[name])) for name in NAMES}
    assert len(set(right.values())) > 2, "or a wrong measure could pass"
    for one in result.adapters:
        assert one.name is not None
        assert one.perplexity == pytest.approx(np.mean(perplexities[one.name]), rel=1e-4)
        assert one.accuracy == pytest.approx(right[one.name])
    fluent = sorted(NAMES, key=lambda name: np.mean(perplexities[name]))
    exact = sorted(NAMES, key=lambda name: (-right[name], np.mean(perplexities[name])))
    ranks = {one.name: (one.perplexity_rank, one.accuracy_rank) for one in result.adapters}
    assert ranks == {name: (fluent.index(name) + 1, exact.index(name) + 1) for name in NAMES}
    best = sorted(NAMES, key=lambda name: (sum(ranks[name]), np.mean(perplexities[name])))
    assert [one.name for one in result.adapters] == best
    assert result.candidates == [world.ids[name] for name in best[:4]]
    assert [one.candidate for one in result.adapters] == [True] * 4 + [False]


def test_the_chosen_set_is_that_of_plain_enumeration(world: World) -> None:
    for similarity in ("cosine_ab", "cosine_delta"):
        result = world.done(size=3, similarity=similarity)
        names = [one.name or "" for one in result.adapters][:4]
        alike = np.array([[_similarity(world, one, other, similarity) for other in names] for one in names])
        np.testing.assert_allclose(result.similarities, alike, atol=1e-6)
        quality = {one.name: one.perplexity_rank + one.accuracy_rank for one in result.adapters}
        means = {
            group: np.mean([alike[names.index(one), names.index(other)] for one, other in combinations(group, 2)])
            for group in combinations(names, 3)
        }
        diversity = {group: place for place, group in enumerate(sorted(means, key=means.__getitem__), 1)}
        totals = {group: sum(quality[name] for name in group) + diversity[group] for group in means}
        found = world.sets(size=3, similarity=similarity)
        assert [set(each.members) for each in found[:1]] == [set(result.chosen.members)]
        told = {frozenset(each.members): (each.total, each.diversity_rank) for each in found}
        assert told == {
            frozenset(world.ids[name] for name in group): (totals[group], diversity[group]) for group in totals
        }
        assert [each.total for each in found] == sorted(totals.values())
        assert result.chosen.total == min(totals.values())
        assert (len(found), result.sets) == (4, 4)
        chosen = {one.adapter for one in result.adapters if one.chosen}
        assert chosen == set(result.chosen.members)


def _similarity(world: World, one: str, other: str, kind: str) -> float:
    if kind == "cosine_delta":
        mine, its = world.delta(one), world.delta(other)
    else:
        mine, its = (
            {path: each.double().numpy() for path, each in load_file(world.folder(name) / ADAPTER_WEIGHTS).items()}
            for name in (one, other)
        )
    cosines = [float((a * its[path]).sum() / np.linalg.norm(a) / np.linalg.norm(its[path])) for path, a in mine.items()]
    return float(np.mean(cosines))


def test_a_shard_of_one_finds_what_several_in_a_batch_find(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    together = world.done(name="together")
    monkeypatch.setattr(adapter_choices, "TOGETHER", 1)
    world.place.context.adapter_choices.scores.delete(scores_of(world.place))
    alone = world.done(name="alone", size=3)
    assert alone.scored_adapters == 5
    for one, other in zip(together.adapters, alone.adapters, strict=True):
        assert (one.name, one.accuracy) == (other.name, other.accuracy)
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-5)


def scores_of(place: Workplace) -> list[str]:
    return [path.name for path in place.context.settings.adapter_scores.glob("ad_*")]


def test_another_choice_over_the_same_shots_scores_nothing_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.done(name="first")
    world.place.context.adapter_choices.remove("first")
    assert len(scores_of(world.place)) == 5

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an adapter was scored again")

    monkeypatch.setattr(work_of_choices, "several_adapters", never)
    for changes in ({"size": 3}, {"similarity": "cosine_delta"}, {"candidates": 5}, {"template": "tulu"}):
        again = world.done(**changes)
        assert again.scored_adapters == 0
        assert [one.perplexity for one in again.adapters] == [one.perplexity for one in first.adapters]
    estimate = world.place.context.adapter_choices.estimate(world.request(size=3))
    assert (estimate.adapters, estimate.reused_adapters, estimate.passes, estimate.sets) == (5, 5, 0, 4)


@pytest.mark.parametrize(
    "changes", [{"max_length": 30}, {"max_new_tokens": 2}, {"precision": "bfloat16"}, {"template": "chat"}], ids=str
)
def test_what_changes_a_number_is_scored_anew(world: World, changes: dict[str, Any]) -> None:
    choices = world.place.context.adapter_choices
    assert world.done(adapters=["a", "b"]).scored_adapters == 2
    estimate = choices.estimate(world.request(adapters=["a", "b", "c"], **changes))
    assert (estimate.reused_adapters, estimate.passes) == (0, 2 * 13 * 3)
    assert world.done(adapters=["a", "b", "c"], **changes).scored_adapters == 3
    assert choices.estimate(world.request(adapters=["c", "d"])).reused_adapters == 0
    known = choices.estimate(world.request(adapters=["b", "c", "d"], **changes))
    assert (known.reused_adapters, known.basis) == (2, "measured")
    assert known.seconds is not None
    assert known.seconds > 0


def test_scores_that_are_damaged_are_made_again(world: World) -> None:
    first = world.done(name="first")
    folder = world.place.context.settings.adapter_scores / scores_of(world.place)[0]
    (folder / "losses.npy").write_bytes(b"damaged")
    assert world.done(size=3).scored_adapters == 1
    assert world.place.context.adapter_choices.finished("first")[1] == first
    for name in scores_of(world.place):
        (world.place.context.settings.adapter_scores / name / "values.npy").unlink()
    with pytest.raises(Exception, match="delete the choice and send it again"):
        world.place.context.adapter_choices.shots("first", after=0, limit=1)


def test_a_loss_that_is_not_finite_ranks_last_and_is_told_as_none(world: World) -> None:
    choices = world.place.context.adapter_choices
    job = world.place.start(world.request())
    plan = world.place.context.jobs.plan(job.id)
    for number, name in enumerate(NAMES):
        loss = [math.nan, math.inf, 900.0, 0.5, 0.25][number]
        choices.keep(plan, world.ids[name], [loss, *[0.5] * 11, None], [1.0, *[0.0] * 11, None])
    world.place.work()
    _, result = choices.finished(job.id)
    assert [one.name for one in result.adapters[:2]] == ["e", "d"]
    assert [one.perplexity is None for one in result.adapters] == [False, False, True, True, True]
    assert {one.accuracy for one in result.adapters} == {1 / 12}
    assert len(choices.sets(job.id, after=0, limit=9).data) == 6
    last = choices.shots(job.id, after=12, limit=9)
    assert [(score.perplexity, score.value) for score in last.data[0].scores] == [(None, None)] * 5


# The golden vector ----------------------------------------------------------------------------------------------------

GOLDEN = {"a": (2.0, 0.60), "b": (2.5, 0.70), "c": (3.0, 0.72), "d": (2.2, 0.50), "e": (6.0, 0.10)}
PAIRS = {"ab": 0.30, "ac": 0.05, "ad": 0.60, "bc": 0.20, "bd": 0.10, "cd": 0.02}


def test_the_vector_worked_out_by_hand(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A to E with these perplexities and accuracies: {a, c} is chosen."""
    choices = world.place.context.adapter_choices
    name_of = {id: name for name, id in world.ids.items()}

    def similarity(_: object, __: object, ids: Sequence[str]) -> NDArray[np.float64]:
        pairs = [["".join(sorted(name_of[one] + name_of[other])) for other in ids] for one in ids]
        return np.array([[PAIRS.get(pair, 1.0) for pair in row] for row in pairs])

    monkeypatch.setattr(type(choices), "_similarities", similarity)
    job = world.place.start(world.request())
    for name, (perplexity, accuracy) in GOLDEN.items():
        plan = world.place.context.jobs.plan(job.id)
        choices.keep(plan, world.ids[name], [math.log(perplexity)] * 13, [accuracy] * 13)
    world.place.work()
    _, result = choices.finished(job.id)
    ranks = {one.name: (one.perplexity_rank, one.accuracy_rank) for one in result.adapters}
    assert ranks == {"a": (1, 3), "b": (3, 2), "c": (4, 1), "d": (2, 4), "e": (5, 5)}
    assert {name_of[id] for id in result.candidates} == set("abcd")
    assert {name_of[id] for id in result.chosen.members} == {"a", "c"}
    found = {
        "".join(sorted(name_of[id] for id in each.members)): (each.diversity_rank, each.total)
        for each in choices.sets(job.id, after=0, limit=10).data
    }
    assert found == {"cd": (1, 12), "ac": (2, 11), "bd": (3, 14), "bc": (4, 14), "ab": (5, 14), "ad": (6, 16)}
    assert result.chosen.omega == pytest.approx(1 / 0.05)


# Shots ----------------------------------------------------------------------------------------------------------------


def rows_of(counts: dict[str, int]) -> list[TaskExample]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return [TaskExample(Example(None, "test", prompt="p", completion="c"), name, "none") for name in names]


def test_shots_are_drawn_from_all_subtasks_alike() -> None:
    examples = rows_of({"a": 10, "b": 3, "c": 40})
    found = drawn(examples, 12, seed=0)
    assert found is not None
    assert found == sorted(set(found))
    assert Counter(examples[row].subtask for row in found) == {"a": 5, "b": 3, "c": 4} or Counter(
        examples[row].subtask for row in found
    ) == {"a": 4, "b": 3, "c": 5}
    assert drawn(examples, 12, seed=0) == found != drawn(examples, 12, seed=1)
    assert drawn(examples, 53, seed=0) is None
    assert drawn(examples, None, seed=0) is None
    few = {examples[row].subtask for seed in range(40) for row in drawn(examples, 1, seed=seed) or ()}
    assert few == {"a", "b", "c"}


def test_drawn_shots_are_scored_and_numbered_as_the_tasks_rows(world: World) -> None:
    result = world.done(adapters=["a", "b"], shots=4, seed=3, name="few")
    assert result.shots == 4
    page = world.place.context.adapter_choices.shots("few", after=1, limit=2)
    assert page.has_more
    whole = world.done(adapters=["a", "b"], name="all")
    assert whole.scored_adapters == 2
    of_all = {shot.row: shot for shot in world.place.context.adapter_choices.shots("all", after=0, limit=99).data}
    for shot in page.data:
        of_row = {score.adapter: score for score in of_all[shot.row].scores}
        for score in shot.scores:
            assert score.perplexity == pytest.approx(of_row[score.adapter].perplexity, rel=1e-5)
            assert score.value == of_row[score.adapter].value


def test_a_rationale_stands_in_the_place_of_the_answer() -> None:
    turns = (Message("user", "Which?"), Message("assistant", " A", "It is:"))
    plain = TaskExample(Example("1", "t", messages=turns), "s", "choice", (" A", " B"), (" A",))
    assert plain.reasoned is plain.example
    told = TaskExample(plain.example, "s", "choice", (" A", " B"), (" A",), rationale=" A, since it is red.")
    assert told.reasoned.messages == (turns[0], Message("assistant", " A, since it is red.", "It is:"))
    text = TaskExample(Example("1", "t", prompt="Which?", completion="A"), "s", "none", rationale="A, as it is red.")
    assert (text.reasoned.prompt, text.reasoned.completion) == ("Which?", "A, as it is red.")


def test_a_task_without_rationales_is_stored_as_before_there_were_any() -> None:
    [plain] = rows_of({"s": 1})
    assert "rationale" not in json.loads(lines([plain]))
    told = TaskExample(plain.example, "s", "none", rationale="because")
    assert json.loads(lines([told])) == json.loads(lines([plain])) | {"rationale": "because"}


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": 6, "candidates": 8}, "5 adapters are as is said, and 6 are to be chosen"),
        ({"adapters": ["a", "b", "a"]}, "a is named twice"),
        ({"rank": 7}, "0 adapters are as is said"),
        ({"task": "mute"}, "have no metric .subtask all"),
        ({"adapters": ["a", "wide"]}, "different ranks .2; 3.*ask for cosine_delta"),
        ({"adapters": ["a", "narrow"]}, "different targets"),
        ({"adapters": ["a", "chatty"]}, "different chat formats .chat, tulu.: name one"),
        ({"adapters": ["a", "elsewhere"]}, "of 2 base models"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(world: World, changes: dict[str, Any], told: str) -> None:
    place = world.place
    if "adapters" in changes:
        make = {
            "wide": {"r": 3}, "narrow": {"targets": ("q_proj",)}, "chatty": {"template": "chat"},
        }  # fmt: skip
        other = changes["adapters"][1]
        if other in make:
            adapter(place, other, seed=9, **make[other])
        if other == "elsewhere":
            moved = place.context.catalog.checkpoint(place.context.catalog.adapter("b").checkpoint)
            copied = moved.model_copy(update={"id": "ck_other", "model": "org/other", "name": None})
            place.context.catalog.add_checkpoint(copied)
            (place.context.settings.checkpoints / "ck_other").symlink_to(place.context.settings.checkpoints / moved.id)
            place.context.adapters.add("ck_other", name="elsewhere")
    task(place, [{"prompt": "Say", "completion": "it"}], name="mute")
    with pytest.raises(InvalidInput, match=told):
        place.start(world.request(**changes))


def test_a_request_contradicts_itself_in_words() -> None:
    for changes, told in (
        ({"adapters": ["a"], "rank": 2}, "adapters are named: leave rank out"),
        ({"candidates": 3, "size": 4}, "candidates is at least size"),
    ):
        with pytest.raises(ValidationError, match=told):
            AdapterChoiceRequest.model_validate({"task": "target", **changes})


def test_too_many_sets_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_choices, "MAX_SETS", 9)
    with pytest.raises(InvalidInput, match="5 candidates make 10 sets of 2, and at most 9"):
        world.place.start(world.request(candidates=5))
    assert world.place.start(world.request(candidates=4)).status == "queued"


def test_adapters_of_other_ranks_and_targets_are_compared_by_what_they_add(world: World) -> None:
    adapter(world.place, "wide", seed=9, r=3)
    adapter(world.place, "narrow", seed=10, targets=("q_proj",))
    result = world.done(adapters=["a", "wide", "narrow"], similarity="cosine_delta", candidates=3)
    assert len(result.similarities) == 3
    at = {one.name: result.candidates.index(one.adapter) for one in result.adapters}
    own = np.diag(result.similarities)
    assert own[at["a"]] == pytest.approx(1)
    assert own[at["narrow"]] == pytest.approx(0.5)  # of the matrices that the others are on it has half


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_an_adapter_in_a_choice_is_not_deleted(world: World) -> None:
    context = world.place.context
    job = world.place.start(world.request(adapters=["a", "b"]))
    with pytest.raises(InUse, match=job.id):
        context.adapters.remove("a")
    with pytest.raises(InUse, match=job.id):
        context.catalog.remove(TaskRow, "target")
    context.adapters.remove("c")
    with pytest.raises(Conflict, match="has succeeded"):
        context.adapter_choices.sets(job.id, after=0, limit=1)
    context.jobs.cancel(job.id)
    context.adapter_choices.remove(job.id)
    context.adapters.remove("a")


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_lost_file_of_an_adapter_is_told(world: World, fault: str) -> None:
    job = world.place.start(world.request())
    path = world.folder("d") / ADAPTER_WEIGHTS
    content = path.read_bytes()
    path.unlink()
    if fault == "changed":
        path.write_bytes(content[:-4] + b"\1\2\3\4")
    world.place.work()
    ended = world.place.job(job.id)
    assert ended.status == "failed"
    assert ended.error is not None
    told = "has changed since it came" if fault == "changed" else "is missing"
    assert "of the adapter d (ck_" in ended.error.detail
    assert told in ended.error.detail
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    world.place.context.jobs.retry(job.id)
    world.place.work()
    assert world.place.job(job.id).status == "succeeded"


def test_answers_beyond_the_longest_length_are_told(world: World) -> None:
    job = world.place.start(world.request(max_length=2))
    world.place.work()
    ended = world.place.job(job.id)
    assert ended.error is not None
    assert "no shot has a token of its answer within max_length=2" in ended.error.detail


def test_several_adapters_leave_the_base_model_as_it_was(world: World) -> None:
    base = world.place.context.loaded.base(Base(str(world.place.model)))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    folders = {world.ids[name]: world.folder(name) for name in NAMES[:3]}
    with several_adapters(base, folders) as model:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    load_adapter(base, world.folder("a"))


def test_an_adapter_that_does_not_fit_is_named(world: World, tmp_path: Path) -> None:
    base = world.place.context.loaded.base(Base(str(world.place.model)))
    before = set(base.state_dict())
    folders = {world.ids[name]: world.folder(name) for name in NAMES[:2]}
    last = world.ids["b"]
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folders[last].iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    config = json.loads((copied / "adapter_config.json").read_bytes())
    for changes, told in (
        ({"r": 3}, f"{last}: .*size mismatch"),
        ({"init_lora_weights": "pissa"}, f"{last}: it began with a part of the base weights"),
    ):
        (copied / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=told), several_adapters(base, {**folders, last: copied}):
            pass
        assert set(base.state_dict()) == before


@pytest.mark.slow
def test_a_killed_worker_loses_one_shard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    task(world.place, [choosing(number) for number in range(200)], name="many")  # of one adapter each
    job = world.place.start(world.request(task="many"))
    with worker_process(world.place) as process:
        wait_for(lambda: len(scores_of(world.place)) >= 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = set(scores_of(world.place))
    scored: list[str] = []
    keep = type(world.place.context.adapter_choices).keep

    def seen(self: Any, plan: dict[str, Any], id: str, *given: Any) -> None:
        scored.append(id)
        keep(self, plan, id, *given)

    monkeypatch.setattr(type(world.place.context.adapter_choices), "keep", seen)
    deadline = time.monotonic() + 120
    while world.place.job(job.id).status != "succeeded":
        assert time.monotonic() < deadline, world.place.job(job.id)
        world.place.work()
        time.sleep(0.1)
    assert sorted(scored) == sorted(set(world.ids.values()) - {name.rpartition("_")[0] for name in kept})
    assert len(scores_of(world.place)) == 5


def test_two_workers_share_the_adapters(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_choices, "TOGETHER", 2)
    job = world.place.start(world.request())
    other = world.place.another()
    claims = [(place, place.claim()) for place in (world.place, other, world.place)]
    assert [len(claim.payload["adapters"]) for _, claim in claims] == [2, 2, 1]
    for place, claim in claims[::-1]:
        assert run(claim, place.context) == "succeeded"
    assert world.place.context.adapter_choices.finished(job.id)[1].scored_adapters == 5


def test_a_shard_goes_on_with_what_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.done(adapters=["a", "b"])
    job = world.place.start(world.request(adapters=["a", "b", "c"]))
    reported: list[int] = []
    monkeypatch.setattr(Heartbeat, "report", lambda _, done: reported.append(done))
    world.place.work()
    assert world.place.context.adapter_choices.finished(job.id)[1].scored_adapters == 1
    assert min(reported) > 2 * 2 * 13
    assert max(reported) == 3 * 2 * 13
