"""The main job through real processes: pool and task in, scores, selection and a trained model out, all of it checked.

One service with its worker serves the module, driven by the client people use. What it answers is compared with a
computation from raw gradients that shares no code with it (tests/bruteforce.py).
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gradstore import GradientStore, recipes
from gradstore.errors import Conflict, Invalid, JobFailed, NotFound
from gradstore.results import FinetuneResult, Selection
from gradstore.types import Checkpoint, EvaluationRow, Task, UploadedDataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from tests import bruteforce
from tests.bruteforce import Floats, Gradients
from tests.processes import ServiceProcess
from tests.stores import Store
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.slow

ROWS, GROWN = 40, 44
ENDLESS = {"id": "endless", "prompt": "and so on " * 80, "completion": "The end."}
TRAINING: dict[str, Any] = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 5e-3, "epochs": 2, "batch_size": 4,
    "device_batch_size": 2, "max_length": 128,
}  # fmt: skip
SKETCHES: tuple[dict[str, Any], ...] = (
    {"projection": "blocks", "dims": [256, 1024]},
    {"projection": "sjlt", "dims": [256]},
    {"projection": "fft", "dims": [256]},
    {"projection": "rademacher", "dims": [4096], "dtype": "float32"},
)
"""What is computed at every checkpoint, for the pool and for the task."""
ANSWERS = ("Yes, évidemment.", "No: a number.")


def conversation(number: int) -> list[dict[str, str]]:
    """Several turns, of which the last one is an answer of two."""
    what = (str(number), "red", "green", "blue")[number % 4]
    turns = [("system", "Be brief 🙂"), ("user", "Is white a colour?"), ("assistant", ANSWERS[0])]
    turns += [("user", f" And {what}? \n"), ("assistant", ANSWERS[number % 4 == 0])]
    return [{"role": role, "content": content} for role, content in turns]


def sum_of(number: int) -> list[dict[str, str]]:
    """A question and its answer."""
    question, answer = f"Add {number} + {number + 7}.", f"The answer is {2 * number + 7}."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pool_row(number: int) -> dict[str, Any]:
    """A row: a sum, a conversation or, of another kind than the task, prompt and completion."""
    row: dict[str, Any] = {"dataset": f"origin{number % 4}", "id": f"row-{number}", "extra": {"kept": [number, None]}}
    match number % 3:
        case 0:
            return row | {"messages": sum_of(number)}
        case 1:
            return row | {"messages": conversation(number)}
        case _:
            return row | {"prompt": f"Let's count from {number}:", "completion": f"{number + 1}, {number + 2}" * 2}


def pool_lines(first: int, last: int) -> list[bytes]:
    """Rows as lines; each is written in one of several ways that JSON allows."""
    styles: list[dict[str, Any]] = [
        {}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"sort_keys": True, "separators": (" , ", ": ")},
    ]  # fmt: skip
    rows = [pool_row(number) for number in range(first, last)] + ([ENDLESS] if first == 0 else [])
    return [json.dumps(row, **styles[place % 4]).encode() for place, row in enumerate(rows)]


def task_rows(first: int, count: int) -> list[dict[str, Any]]:
    """So many rows in each of two subtasks, in turn."""
    rows: list[dict[str, Any]] = []
    for number in range(first, first + count):
        rows.append({"messages": sum_of(number), "subtask": "sums", "pattern": "answer is (\\d+)"})
        rows.append({"messages": conversation(number), "subtask": "talks", "choices": list(ANSWERS)})
    return rows


def written(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """A folder of JSONL files."""
    folder.mkdir()
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass
class World:
    """A running service, and what the steps of the main job have left in it."""

    service: ServiceProcess
    store: GradientStore
    folder: Path
    model: Path
    pool: UploadedDataset
    task: Task
    warmup: FinetuneResult

    def gradients(self, **request: Any) -> Any:
        """Compute gradients at the warm-up's checkpoints and return the result."""
        request = {"run": self.warmup.run, "dtype": "float16"} | request
        return self.store.gradients.wait(self.store.gradients.create(**request), poll=0.3).result

    def train(self, **request: Any) -> FinetuneResult:
        """Fine-tune and return the result."""
        job = self.store.finetunes.create(model=str(self.model), **TRAINING | request)
        return self.store.finetunes.wait(job, poll=0.3).result

    def scores(self, **question: Any) -> list[float | None]:
        """The score of every row of the pool."""
        pool: dict[str, Any] = {"dataset": self.pool.id, "run": self.warmup.run, "precision": "float32"}
        return [row.score for row in self.store.scores(**{"task": self.task.id, **pool, **question})]

    def select(self, **question: Any) -> Selection:
        """A selection from the pool for the task; 20 % by features of 1,024 dims unless said otherwise."""
        pool: dict[str, Any] = {"dataset": self.pool.id, "run": self.warmup.run, "kind": "adam", "dim": 1024}
        how_many = {} if "k" in question else {"pct": 0.2}
        return self.store.select(**{"task": self.task.id, **pool, **how_many, **question})

    @cached_property
    def disk(self) -> Store:
        """The service's store as it lies on the disk."""
        return Store.at(self.service.folder)

    def stored(self, feature_set: str) -> Floats:
        """The features of a feature set as they lie on the disk: (rows, dim)."""
        view = self.disk.store.view(self.disk.features.segments(feature_set))
        return view.features(0, view.rows).astype(np.float64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The main job up to the gradients of pool and task."""
    folder = tmp_path_factory.mktemp("flow")
    model = save_tiny_model(folder / "model")
    (folder / "pool.jsonl").write_bytes(b"\n".join(pool_lines(0, ROWS)))
    files = written(folder / "target", validation=task_rows(100, 3), test=task_rows(200, 4))
    with ServiceProcess(folder / "store", allow=folder) as service, service.client() as store:
        pool = store.datasets.upload(folder / "pool.jsonl", name="pool")
        task = store.tasks.upload(files, name="target", kind="jsonl")
        first = store.finetunes.create(dataset=pool.id, model=str(model), fraction=0.5, name="warm-up", **TRAINING)
        warmup = store.finetunes.wait(first, progress=True, poll=0.3).result
        world = World(service, store, folder, model, pool, task, warmup)
        for sketch in SKETCHES:
            world.gradients(dataset=pool.id, **sketch)
            world.gradients(task=task.id, **sketch)
        world.gradients(dataset=pool.id, dims=[256], kinds=["adam", "sgd", "sign", "hidden", "rds"], adam="both")
        world.gradients(task=task.id, dims=[256], kinds=["sgd", "hidden", "rds"])
        yield world


# Steps --------------------------------------------------------------------------------------------------------------


def test_the_pool_is_described_and_comes_back_byte_for_byte(world: World) -> None:
    assert (world.pool.rows, world.pool.created, world.pool.report.skipped) == (ROWS + 1, True, 0)
    assert world.pool.origins == {f"origin{number}": 10 for number in range(4)} | {"pool.jsonl": 1}
    assert list(world.store.datasets.lines("pool")) == pool_lines(0, ROWS)
    copy = world.store.datasets.download("pool", world.folder / "copy.jsonl", source=world.pool.sources[0].sha256)
    assert copy.read_bytes() == (world.folder / "pool.jsonl").read_bytes()


def test_a_warm_up_leaves_a_checkpoint_per_epoch_with_moments_and_its_mean_learning_rate(world: World) -> None:
    run = world.store.runs.get(world.warmup.run)
    assert world.warmup.rows + world.warmup.skipped_rows == 20
    assert [checkpoint.epoch for checkpoint in run.checkpoints] == [1, 2]
    assert [checkpoint.step for checkpoint in run.checkpoints] == [5, 10]
    assert run.name == "warm-up"
    assert run.finetune == world.store.finetunes.get("warm-up").id
    for checkpoint, steps in zip(run.checkpoints, (range(1, 6), range(6, 11)), strict=True):
        assert checkpoint.has_moments
        assert (checkpoint.model, checkpoint.template, checkpoint.max_length) == (str(world.model), "tulu", 128)
        rates = [point.learning_rate for point in world.warmup.loss_curve if point.step in steps]
        assert checkpoint.learning_rate == pytest.approx(np.mean(rates), rel=1e-6)


def test_gradients_say_what_they_left_and_which_rows_have_none(world: World) -> None:
    result = world.gradients(dataset=world.pool.id, **SKETCHES[0])
    described = {(one.checkpoint, one.dim, one.dtype, one.kind, one.rows) for one in result.feature_sets}
    assert described == {
        (checkpoint, dim, "float16", "adam", ROWS + 1) for checkpoint in world.warmup.checkpoints for dim in (256, 1024)
    }
    assert result.rows == ROWS + 1
    assert result.computed_rows == 2 * (ROWS + 1)
    assert [(row.row, row.checkpoint) for row in result.excluded] == [
        (ROWS, checkpoint) for checkpoint in world.warmup.checkpoints
    ]
    assert "max_length is 128" in result.excluded[0].reason
    kinds = {one.kind for one in world.gradients(task=world.task.id, **SKETCHES[0]).feature_sets}
    assert kinds == {"sgd"}


def test_a_selection_is_the_best_of_the_scores_and_brings_the_original_lines(world: World) -> None:
    selection = world.select()
    scores = np.array(world.scores(kind="adam", dim=1024), dtype=np.float64)  # None becomes NaN
    assert math.isnan(scores[ROWS])
    best = np.argsort(-scores[:ROWS], kind="stable")[:8]
    assert [row.row for row in selection.data] == best.tolist()
    assert [row.score for row in selection.data] == scores[best].tolist()
    assert [row.rank for row in selection.data] == list(range(1, 9))
    assert (selection.count, selection.pool) == (8, ROWS + 1)
    assert selection.left_out == {world.gradients(dataset=world.pool.id, dims=[256, 1024]).excluded[0].reason: 1}
    lines = pool_lines(0, ROWS)
    assert list(world.store.selections.lines(selection.id)) == [lines[row] for row in best]
    assert [(row.id, row.origin) for row in selection.data] == [(f"row-{row}", f"origin{row % 4}") for row in best]
    assert sum(selection.origins.values()) == 8
    assert {(row.row % 3, row.subtask) for row in selection.data} == {(1, "talks")}  # conversations like the task's
    assert world.select(k=3).data == [row for row in selection.data if row.rank <= 3]


def test_a_selection_streams_its_rows_and_its_table_from_the_question_itself(world: World) -> None:
    selection = world.select()
    asked: dict[str, Any] = {
        "task": "target",
        "pct": 0.2,
        "dataset": "pool",
        "run": "warm-up",
        "kind": "adam",
        "dim": 1024,
    }
    streamed = httpx.get(f"{world.service.url}/select", params=asked, headers={"Accept": "application/x-ndjson"})
    assert streamed.headers["content-type"] == "application/x-ndjson"
    assert streamed.headers["content-location"] == f"/selections/{selection.id}"
    assert streamed.content == b"".join(line + b"\n" for line in world.store.selections.lines(selection.id))
    table = httpx.get(f"{world.service.url}/select", params=asked, headers={"Accept": "text/csv"})
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [(row["file"], int(row["row"]), float(row["score"])) for row in rows] == [
        ("pool", row.row, row.score) for row in selection.data
    ]
    saved = world.store.selections.save(selection.id, world.folder / "selection.csv")
    assert saved.read_bytes() == table.content


def test_the_score_vector_is_the_same_in_every_form(world: World) -> None:
    question: dict[str, Any] = {"task": "target", "dataset": "pool", "run": "warm-up", "kind": "adam", "dim": 1024}
    page = np.array([row.score for row in world.store.scores(**question)], dtype=np.float32)
    npy = np.load(world.store.save_scores(world.folder / "scores.npy", **question))
    table = pq.read_table(world.store.save_scores(world.folder / "scores.parquet", **question))
    np.testing.assert_array_equal(npy, page)
    assert npy.dtype == np.float32
    np.testing.assert_array_equal(np.array(table["score"].to_pylist(), dtype=np.float32), page)
    assert table["score"].null_count == 1
    assert table["row"].to_pylist() == list(range(ROWS + 1))
    assert table["id"].to_pylist()[:2] == ["row-0", "row-1"]


def test_what_was_selected_trains_a_model_that_is_better_at_the_task_and_downloads(world: World) -> None:
    selection = world.select()
    tuned = world.store.finetunes.create(
        selection=selection.id, model=str(world.model), name="tuned", **TRAINING | {"epochs": 5}
    )
    result = world.store.finetunes.wait(tuned, poll=0.3).result
    assert result.rows == selection.count
    assert len(result.checkpoints) == 5
    assert result.loss_curve[-1].loss < result.loss_curve[0].loss
    evaluation = world.store.evaluations.wait(world.store.evaluations.create(finetune="tuned", tasks=["target"]))
    rows: dict[tuple[str, str | None], EvaluationRow] = {
        (row.model, row.subtask): row for row in evaluation.result.rows
    }
    assert rows.keys() == {(model, part) for model in ("base", "tuned") for part in ("sums", "talks", None)}
    assert {(row.task, row.task_name) for row in rows.values()} == {(world.task.id, "target")}
    before, after = rows["base", None].loss, rows["tuned", None].loss
    assert before is not None
    assert after is not None
    assert after < before
    assert rows["base", "talks"].metric == "choice"
    assert rows["base", "sums"].metric == "exact_match"
    assert {row.examples for (_, part), row in rows.items() if part} == {4}

    adapter = world.store.finetunes.download("tuned", world.folder / "adapter")
    packed = world.store.finetunes.download("tuned", world.folder / "adapter.zip")
    with zipfile.ZipFile(packed) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            path.name: path.read_bytes() for path in adapter.iterdir()
        }
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), str(adapter))
    weights = load_file(adapter / "adapter_model.safetensors")
    put = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert put.keys() == weights.keys()
    assert all(torch.equal(put[name], value) for name, value in weights.items())
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    test = bruteforce.lines_of(world.folder / "target" / "test.jsonl")
    for model, folder in (("base", None), ("tuned", adapter)):
        losses = bruteforce.raw_gradients(world.model, folder, test, tokenizer).losses
        for part in ("sums", "talks"):
            expected = np.mean([loss for loss, row in zip(losses, test, strict=True) if row["subtask"] == part])
            assert rows[model, part].loss == pytest.approx(expected, rel=1e-4)


def test_the_whole_flow_as_one_call_finds_what_exists(world: World) -> None:
    done = recipes.less(
        world.store, pool="pool", task="target", model=str(world.model), warmup_fraction=0.5, dim=1024, pct=0.2,
        dtype="float16", **TRAINING,
    )  # fmt: skip
    assert done.warmup.result.run == world.warmup.run
    assert done.selection.id == world.select().id
    assert done.evaluation is not None
    before = {job.id for job in world.store.jobs.list()}
    again = recipes.less(
        world.store, pool="pool", task="target", model=str(world.model), warmup_fraction=0.5, dim=1024, pct=0.2,
        dtype="float16", **TRAINING,
    )  # fmt: skip
    assert again.evaluation == done.evaluation
    copied = shutil.copytree(world.folder / "target", world.folder / "renamed")
    found = recipes.less(
        world.store, pool="pool", task=copied, task_kind="jsonl", model=str(world.model), warmup_fraction=0.5, dim=1024,
        pct=0.2, dtype="float16", **TRAINING,
    )  # fmt: skip
    assert (found.task.id, found.evaluation) == (world.task.id, done.evaluation)
    assert {job.id for job in world.store.jobs.list()} == before


# Asking ---------------------------------------------------------------------------------------------------------------


def test_asking_again_answers_at_once_with_the_same_job(world: World) -> None:
    asked: dict[str, Any] = {"dataset": "pool", "run": "warm-up", "dims": [1024, 256], "dtype": "float16"}
    first = world.store.gradients.get(world.store.gradients.create(**asked | {"dims": [256, 1024]}).id)
    for path, body in (
        ("gradients", asked | {"dims": [256, 1024]}),
        ("finetunes", {"dataset": "pool", "model": str(world.model), "fraction": 0.5, **TRAINING}),
    ):
        answer = httpx.post(f"{world.service.url}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "succeeded"
    assert httpx.post(f"{world.service.url}/gradients", json=asked | {"dims": [256, 1024]}).json()["id"] == first.id
    fewer = world.store.gradients.create(**asked | {"dims": [256]})
    assert fewer.status == "succeeded"
    assert fewer.result is not None
    assert fewer.result.computed_rows == 0


def test_a_cost_is_told_beforehand_and_comes_true(world: World) -> None:
    asked: dict[str, Any] = {"dataset": "pool", "run": "warm-up", "dims": [64], "dtype": "float16"}
    asked["projection"] = "rademacher"
    before = world.store.gradients.estimate(**asked)
    assert (before.rows, before.reused_rows) == (2 * (ROWS + 1), 0)
    assert before.seconds is not None
    assert before.memory_bytes is not None
    assert not [job for job in world.store.gradients.list() if job.request.dims == [64]]
    result = world.gradients(**asked)
    assert sum(one.bytes for one in result.feature_sets) == before.bytes
    assert before.tokens == pytest.approx(result.tokens, rel=0.5)
    after = world.store.gradients.estimate(**asked)
    assert (after.rows, after.bytes, after.tokens, after.reused_rows) == (0, 0, 0, 2 * (ROWS + 1))
    training: dict[str, Any] = {"dataset": "pool", "model": str(world.model), "fraction": 0.5, **TRAINING}
    cost = world.store.finetunes.estimate(**training)
    assert cost.rows == 20
    assert cost.tokens == pytest.approx(world.warmup.tokens, rel=0.5)
    kept = sum(world.store.checkpoints.get(checkpoint).bytes for checkpoint in world.warmup.checkpoints)
    assert cost.bytes == pytest.approx(kept, rel=0.3)


def test_a_dataset_grown_by_a_tenth_computes_a_tenth(world: World) -> None:
    (world.folder / "more.jsonl").write_bytes(b"\n".join(pool_lines(ROWS, GROWN)))
    grown = world.store.datasets.upload(world.folder / "more.jsonl", append_to="pool", name="grown")
    assert (grown.rows, grown.prefix) == (GROWN + 1, world.pool.id)
    cost = world.store.gradients.estimate(dataset="grown", run="warm-up", dims=[256, 1024], dtype="float16")
    assert (cost.rows, cost.reused_rows) == (2 * 4, 2 * (ROWS + 1))
    result = world.gradients(dataset="grown", dims=[256, 1024])
    assert result.computed_rows == 2 * 4
    old = {(one.checkpoint, one.dim): one.id for one in world.gradients(dataset="pool", dims=[256, 1024]).feature_sets}
    for one in result.feature_sets:
        np.testing.assert_array_equal(world.stored(one.id)[: ROWS + 1], world.stored(old[one.checkpoint, one.dim]))
    chosen = world.select(dataset="grown", pct=1.0)
    assert {row.row for row in chosen.data} == {*range(ROWS), *range(ROWS + 1, GROWN + 1)}
    before = {row.row: row.score for row in world.select(pct=1.0).data}
    assert {row.row: row.score for row in chosen.data if row.row < ROWS} == pytest.approx(before, abs=1e-6)


def test_a_jobs_events_tell_its_progress_and_its_end(world: World) -> None:
    job = world.store.gradients.create(dataset="pool", run="warm-up", dims=[32], token_budget=64)
    states = list(world.store.jobs.events(job.id))
    assert states[-1].status == "succeeded"
    assert all(state.status in {"queued", "running"} for state in states[:-1])
    done = [state.progress.done for state in states]
    assert done == sorted(done)
    assert (states[-1].progress.done, states[-1].progress.total) == (2 * (ROWS + 1), 2 * (ROWS + 1))
    wire = httpx.get(f"{world.service.url}/jobs/{job.id}/events")
    assert wire.headers["content-type"].startswith("text/event-stream")
    event, data = wire.text.strip().splitlines()[-2:]
    assert event == "event: finished"
    assert json.loads(data.removeprefix("data: "))["id"] == job.id


def test_several_candidates_are_listed_by_urls_that_answer_and_a_missing_one_by_what_to_post(world: World) -> None:
    world.gradients(dataset="pool", dims=[256], precision="bfloat16")
    world.gradients(task="target", dims=[256], precision="bfloat16")
    with pytest.raises(Conflict) as caught:
        world.store.select(task="target", dataset="pool", k=3)
    urls = [item.detail for item in caught.value.problem.errors]
    answers = [httpx.get(url) for url in urls]
    assert [answer.status_code for answer in answers] == [200] * len(urls)
    ids = {answer.json()["id"] for answer in answers}
    assert len(ids) == len(urls) >= 8  # adam, exact, sgd, sign and bfloat16 at 256 dims, hidden, 1,024 dims, rademacher
    with pytest.raises(Conflict) as caught:
        world.store.select(task="target", dataset="pool", run="warm-up", kind="adam", dim=2048, pct=0.2)
    assert caught.value.problem.type == "gradients-missing"
    body = json.loads(caught.value.problem.detail.partition("POST /gradients ")[2].rpartition(" computes")[0])
    assert body == {"dataset": world.pool.id, "run": world.warmup.run, "kinds": ["adam"], "dims": [2048]}
    assert world.store.gradients.estimate(**body).rows == 2 * (ROWS + 1)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_or_not_allowed_is_refused_in_words(world: World, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="allowed folders") as caught:
        world.store.finetunes.create(dataset="pool", model="/etc")
    assert caught.value.problem.errors[0].pointer == "/model"
    (world.folder / "no-model").mkdir(exist_ok=True)
    with pytest.raises(Invalid, match=r"no config\.json"):
        world.store.finetunes.create(dataset="pool", model=str(world.folder / "no-model"))
    with pytest.raises(NotFound, match="nothing"):
        world.store.gradients.create(dataset="pool", run="nothing")


def test_a_damaged_model_fails_its_job_in_words_and_the_log_has_the_traceback(world: World) -> None:
    damaged = world.folder / "damaged"
    shutil.copytree(world.model, damaged, dirs_exist_ok=True)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(JobFailed, match="cannot be loaded") as caught:
        world.store.finetunes.wait(world.store.finetunes.create(dataset="pool", model=str(damaged), **TRAINING))
    assert caught.value.problem is not None
    assert "Traceback" not in caught.value.problem.detail
    assert str(caught.value.request_id).startswith("log_")
    log = world.service.log
    assert str(caught.value.request_id) in log
    assert "Traceback" in log


def test_a_model_that_has_changed_since_the_warm_up_gives_no_features(world: World) -> None:
    changing = world.folder / "changing"
    save_tiny_model(changing, seed=1)
    training = TRAINING | {"epochs": 1, "model": str(changing)}
    job = world.store.finetunes.create(dataset="pool", fraction=0.3, **training)
    run = world.store.finetunes.wait(job).result.run
    save_tiny_model(changing, seed=2)
    with pytest.raises((Invalid, JobFailed), match="files have changed"):
        world.gradients(dataset="pool", run=run, dims=[32])


# Brought along --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brought:
    """The same training twice: by the service, and by a Trainer in this process that knows nothing of it."""

    own: list[str]
    """Checkpoints of the service."""
    folders: list[Path]
    """What the Trainer has saved."""
    theirs: list[Checkpoint]
    """That, uploaded."""


@pytest.fixture(scope="module")
def brought(world: World) -> Brought:
    rows = [row for row in map(pool_row, range(12)) if "prompt" not in row]
    pool = world.folder / "small.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.store.datasets.upload(pool, name="small")
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    own = world.train(dataset="small", lora=lora, epochs=5, scheduler="linear", seed=7).checkpoints
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    folder = world.folder / "trainer"
    _train([bruteforce.tokens_and_labels(row, tokenizer) for row in rows], world.model, folder)
    folders = [folder / "checkpoint-2", folder / "checkpoint-10"]
    return Brought([own[0], own[-1]], folders, [world.store.checkpoints.upload(folder) for folder in folders])


def _train(rows: list[tuple[list[int], list[int]]], model: Path, folder: Path) -> None:
    """Train as anybody would, with the hyper-parameters of the service's training."""

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch])
            for key, fill in fills.items()
        }

    torch.manual_seed(7)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, warmup_steps=0.03, save_strategy="epoch", logging_steps=1, use_cpu=True, seed=7,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in rows]
    Trainer(model=adapted, args=arguments, train_dataset=examples, data_collator=collate).train()


def test_a_trainers_checkpoint_gives_the_features_of_the_services_own_training(world: World, brought: Brought) -> None:
    own = [world.store.checkpoints.get(checkpoint) for checkpoint in brought.own]
    assert [checkpoint.step for checkpoint in brought.theirs] == [checkpoint.step for checkpoint in own] == [2, 10]
    for one, other in zip(own, brought.theirs, strict=True):
        assert one.id != other.id
        assert other.has_moments
        assert other.model == one.model
        assert other.learning_rate == pytest.approx(one.learning_rate, rel=1e-6)
    run = world.store.runs.create([checkpoint.id for checkpoint in brought.theirs], name="brought")
    asked: dict[str, Any] = {"dims": [256], "dtype": "float32", "dataset": "pool"}
    mine = world.gradients(run=None, checkpoints=brought.own, **asked)
    found = world.gradients(run=run.id, max_length=128, **asked)
    assert found.computed_rows == 2 * (ROWS + 1)
    for one, other in zip(mine.feature_sets, found.feature_sets, strict=True):
        expected, features = world.stored(one.id)[:ROWS], world.stored(other.id)[:ROWS]
        errors = np.linalg.norm(features - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() <= 1e-5


def test_moments_by_name_as_less_writes_them_are_the_moments_by_position(world: World, brought: Brought) -> None:
    folder = world.folder / "less"
    shutil.copytree(brought.folders[1], folder, ignore=shutil.ignore_patterns("optimizer.pt"))
    moments = load_file(world.service.folder / "checkpoints" / brought.theirs[1].id / "moments.safetensors")
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(".")
        states.setdefault(name, {"step": torch.tensor(10.0)})[kind] = value
    torch.save({"state": states, "param_groups": []}, folder / "optimizer.bin")
    assert world.store.checkpoints.upload(folder).id == brought.theirs[1].id


def test_an_adapter_without_moments_gives_no_adam_features_and_says_so_but_sgd(world: World, brought: Brought) -> None:
    folder = world.folder / "bare"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(brought.folders[1] / name, folder)
    bare = world.store.checkpoints.upload(folder, name="bare", learning_rate=1e-4)
    assert not bare.has_moments
    assert "optimizer.pt" in str(bare.moments_note)
    with pytest.raises(Invalid, match="no Adam moments") as caught:
        world.gradients(dataset="pool", run=None, checkpoints="bare", dims=[256])
    assert caught.value.problem.errors[0].pointer == "/kinds"
    asked: dict[str, Any] = {
        "dataset": "pool",
        "run": None,
        "kinds": ["sgd"],
        "dims": [256],
        "dtype": "float32",
        "max_length": 128,
    }
    [found] = world.gradients(checkpoints="bare", **asked).feature_sets
    [expected] = world.gradients(checkpoints=brought.theirs[1].id, **asked).feature_sets
    np.testing.assert_array_equal(world.stored(found.id), world.stored(expected.id))
    world.gradients(task="target", run=None, checkpoints="bare", dims=[256], dtype="float32", max_length=128)
    assert world.store.select(task="target", checkpoint="bare", k=1).recipe.kind == "sgd"


def test_an_optimizer_that_would_run_code_is_refused_and_does_not(world: World, brought: Brought) -> None:
    folder = world.folder / "harmful"
    shutil.copytree(brought.folders[0], folder)
    (folder / "optimizer.pt").write_bytes(f"cos\nsystem\n(S'touch {folder}/was-here'\ntR.".encode())
    with pytest.raises(Invalid, match=r"optimizer\.pt"):
        world.store.checkpoints.upload(folder)
    assert not (folder / "was-here").exists()


# Scores by brute force ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Raw gradients of the pool and the task at one checkpoint."""

    pool: Gradients
    task: Gradients
    moments: Path
    learning_rate: float

    def direction(self, name: str) -> Floats:
        """What is projected for the pool: the gradient, its sign, or one of Adam's directions."""
        if name in {"less", "exact"}:
            return bruteforce.adam_direction(self.pool, self.moments, form=name)
        return np.sign(self.pool.flat) if name == "sign" else self.pool.flat


def rows_of(world: World) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the pool that have a token to learn from, and the task's validation rows by subtask."""
    validation = bruteforce.lines_of(world.folder / "target" / "validation.jsonl")
    task = [row for part in ("sums", "talks") for row in validation if row["subtask"] == part]
    return [json.loads(line) for line in pool_lines(0, ROWS)[:ROWS]], task


@pytest.fixture(scope="module")
def truths(world: World) -> list[Truth]:
    """The brute force at every checkpoint, without the row that has no token to learn from."""
    pool, task = rows_of(world)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    found = []
    for checkpoint in world.store.runs.get("warm-up").checkpoints:
        adapter = world.store.checkpoints.download(checkpoint.id, world.folder / "checkpoints" / checkpoint.id)
        moments = world.service.folder / "checkpoints" / checkpoint.id / "moments.safetensors"
        of_pool, of_task = (bruteforce.raw_gradients(world.model, adapter, rows, tokenizer) for rows in (pool, task))
        rates = [point.learning_rate for point in world.warmup.loss_curve if math.ceil(point.epoch) == checkpoint.epoch]
        found.append(Truth(of_pool, of_task, moments, float(np.mean(rates))))
    return found


def brute_force(truths: list[Truth], direction: str, *, matrix: Floats | None) -> Floats:
    """The influence of every row on every validation row, projected by `matrix` or not at all."""
    pool, task = [truth.direction(direction) for truth in truths], [truth.task.flat for truth in truths]
    if matrix is not None:
        pool, task = [rows @ matrix for rows in pool], [rows @ matrix for rows in task]
    return bruteforce.influences(pool, task, [truth.learning_rate for truth in truths])


SUBTASKS = ["sums"] * 3 + ["talks"] * 3


@pytest.mark.parametrize(
    ("direction", "projection", "dim"),
    [
        ("less", "blocks", 256), ("less", "blocks", 1024), ("less", "sjlt", 256), ("less", "fft", 256),
        ("less", "rademacher", 4096), ("exact", "blocks", 256), ("sgd", "blocks", 256), ("sign", "blocks", 256),
    ],
)  # fmt: skip
def test_scores_are_those_of_a_brute_force_through_an_explicit_projection(
    world: World, truths: list[Truth], direction: str, projection: str, dim: int
) -> None:
    table = brute_force(truths, direction, matrix=bruteforce.matrix(projection, dim, 0, truths[0].pool.sizes))
    kind = {"kind": "adam", "adam": direction} if direction in {"less", "exact"} else {"kind": direction}
    for how in ("less", "avg", "max", "min"):
        served = world.scores(**kind, projection=projection, dim=dim, aggregate=how)
        assert len(served) == ROWS + 1
        assert served[ROWS] is None
        errors = np.array(served[:ROWS], dtype=np.float64) - bruteforce.aggregated(table, SUBTASKS, how)
        assert np.abs(errors).max() <= (1e-6 if projection == "rademacher" else 1e-4)  # float32 and float16 features


def test_what_is_told_of_a_row_is_that_of_the_brute_force(world: World, truths: list[Truth]) -> None:
    asked: dict[str, Any] = {
        "dims": [256],
        "dtype": "float16",
        "kinds": ["adam", "sgd", "sign", "hidden", "rds"],
        "adam": "both",
    }
    job = world.store.gradients.create(dataset="pool", run="warm-up", **asked)
    assert job.result is not None
    for found in job.result.feature_sets:
        truth = truths[world.warmup.checkpoints.index(found.checkpoint)]
        rows = list(world.store.gradients.rows(job.id, feature_set=found.id))
        assert [row.row for row in rows] == list(range(ROWS + 1))
        assert [row.reason is None for row in rows] == [True] * ROWS + [False]
        assert (rows[ROWS].norm, rows[ROWS].raw_norm, rows[ROWS].loss, rows[ROWS].tokens) == (None, None, None, 0)
        for name, expected in (("loss", truth.pool.losses), *lengths(truth, found.kind, found.adam)):
            told = np.array([getattr(row, name) for row in rows[:ROWS]])
            np.testing.assert_allclose(told, expected, rtol=1e-3)
        array = np.load(world.store.gradients.save_rows(job.id, world.folder / "rows.npy", feature_set=found.id))
        path = world.store.gradients.save_rows(job.id, world.folder / "rows.parquet", feature_set=found.id)
        assert pq.read_table(path).to_pylist() == [row.model_dump(exclude={"logodds"}) for row in rows]
        assert array["tokens"].tolist() == [row.tokens for row in rows]
        assert np.isnan(array["norm"]).tolist() == (array["reason"] > 0).tolist() == [False] * ROWS + [True]


def lengths(truth: Truth, kind: str, adam: str | None) -> list[tuple[str, Floats]]:
    """Lengths of the gradients, and of what is projected; hidden states have their own."""
    if kind in ("hidden", "rds"):
        return []
    mapped = truth.direction(adam or kind)
    return [("norm", np.linalg.norm(mapped, axis=1)), ("raw_norm", np.linalg.norm(truth.pool.flat, axis=1))]


@pytest.mark.parametrize("kind", ["hidden", "rds"])
def test_scores_of_hidden_states_are_their_cosines(world: World, kind: str) -> None:
    """At every checkpoint, from the hidden states that `transformers` gives out in double precision."""
    run = world.store.runs.get("warm-up")
    pool, task = rows_of(world)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    found: tuple[list[Floats], list[Floats]] = ([], [])
    for checkpoint in run.checkpoints:
        adapter = world.store.checkpoints.download(checkpoint.id, world.folder / kind / checkpoint.id)
        for states, rows in zip(found, (pool, task), strict=True):
            states.append(bruteforce.hidden_states(world.model, adapter, rows, tokenizer)[kind])
    rates = [checkpoint.learning_rate or 0.0 for checkpoint in run.checkpoints]
    how = "max" if kind == "rds" else "less"  # what its method does unless something else is asked for
    expected = bruteforce.aggregated(bruteforce.influences(*found, rates), SUBTASKS, how)
    served = world.scores(kind=kind)
    assert served[ROWS] is None
    np.testing.assert_allclose(np.array(served[:ROWS], dtype=np.float64), expected, atol=1e-3)  # float16 features
    selection = world.store.select(task="target", dataset="pool", run="warm-up", kind=kind, k=3)
    recipe = selection.recipe
    assert (recipe.kind, recipe.task_kind, recipe.dim, recipe.reduction) == (kind, kind, 32, None)
    assert [row.score for row in selection.data] == sorted((score for score in served if score), reverse=True)[:3]


def test_scores_at_a_full_fine_tune_are_those_of_the_weights_named(world: World) -> None:
    run = world.train(dataset="pool", fraction=0.5, method="full", epochs=1, learning_rate=1e-3).run
    weights = ["model.layers.1.mlp.*", "*.k_proj.weight"]
    world.gradients(dataset="pool", run=run, weights=weights, dims=[256])
    world.gradients(task="target", run=run, weights=weights, dims=[256])
    [checkpoint] = world.store.runs.get(run).checkpoints
    model = world.store.checkpoints.download(checkpoint.id, world.folder / "whole")
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    texts = ["model.layers.1.mlp.", ".k_proj.weight"]
    of_pool, of_task = (
        bruteforce.raw_gradients(model, None, rows, tokenizer, weights=texts) for rows in rows_of(world)
    )
    truth = Truth(of_pool, of_task, world.service.folder / "checkpoints" / checkpoint.id / "moments.safetensors", 1.0)
    table = brute_force([truth], "less", matrix=bruteforce.matrix("blocks", 256, 0, of_pool.sizes))
    served = np.array(world.scores(run=run)[:ROWS], dtype=np.float64)
    assert np.abs(served - bruteforce.aggregated(table, SUBTASKS)).max() <= 1e-4  # float16 features
    selection = world.store.select(task="target", dataset="pool", run=run, weights=weights, k=3)
    assert selection.recipe.weights == tuple(sorted(weights))
    assert [row.row for row in selection.data] == np.argsort(-served, kind="stable")[:3].tolist()
    with pytest.raises(Invalid, match=r"\*.c_attn.weight"):
        world.store.gradients.create(dataset="pool", run=run, weights="*.c_attn.weight")


@pytest.mark.parametrize(
    ("projection", "dim"), [("blocks", 256), ("blocks", 1024), ("sjlt", 256), ("fft", 256), ("rademacher", 4096)]
)
def test_scores_are_those_of_the_raw_gradients_within_the_johnson_lindenstrauss_bound(
    world: World, truths: list[Truth], projection: str, dim: int
) -> None:
    """The bound, and the usual size of errors.

    Of a projected cosine c of two vectors the standard deviation is about (1 − c²)/√k ≤ 1/√k for all maps, and means
    and weighted sums of them are not worse.

    For `rademacher`, Achlioptas (2003), theorem 1.1: |‖φu‖² − ‖u‖²| > ε‖u‖² with a probability of at most
    2·exp(−k(ε²/4 − ε³/6)). Where it holds for the unit vectors x (pool), y (task) and all x ± y, ⟨φx, φy⟩ is off by at
    most ε (polarisation) and a cosine, so also a score, by at most 2ε/(1 − ε). At k = 4096 and ε = 0.155 the
    probability that any vector of all checkpoints misses is below 1e-6.
    """
    truth = bruteforce.aggregated(brute_force(truths, "less", matrix=None), SUBTASKS)
    served = np.array(world.scores(kind="adam", adam="less", projection=projection, dim=dim)[:ROWS], dtype=np.float64)
    errors = served - truth
    assert np.sqrt(np.mean(errors**2)) <= 1 / math.sqrt(dim)
    assert np.corrcoef(served, truth)[0, 1] >= 0.9
    if projection == "rademacher":
        epsilon = 0.155
        vectors = len(truths) * (ROWS + len(SUBTASKS) + 2 * ROWS * len(SUBTASKS))
        assert vectors * 2 * math.exp(-dim * (epsilon**2 / 4 - epsilon**3 / 6)) < 1e-6
        assert np.abs(errors).max() <= 2 * epsilon / (1 - epsilon)
