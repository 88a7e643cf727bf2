"""Shards under workers that die, stall, double or fail: each is done once, and nobody waits in the dark."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from gradstore.types import Checkpoint, EvaluationRequest, FinetuneRequest, GradientsRequest, Problem
from huggingface_hub import constants
from numpy.typing import NDArray
from sqlalchemy import select

from datastore.errors import Ambiguous, GradientsMissing, InvalidInput
from datastore.evaluations import passes
from datastore.parameters import Query
from datastore.schema import ChunkRow, JobRow, ShardRow
from tests import bruteforce
from tests.hub import Hub
from tests.processes import wait_for
from tests.tiny import save_tiny_model
from tests.workplace import Workplace, numbered, worker_process
from worker import budgets, moments
from worker.batches import encode
from worker.directions import Kind
from worker.evaluate import first_rows, work
from worker.gradients import GradientEngine
from worker.jobs import run, tend, tidy
from worker.loaded import Base
from worker.loop import work_until_left
from worker.models import DTYPES, load_adapter, load_model, load_tokenizer

ENDLESS = {"prompt": "and so on " * 40, "completion": "The end."}


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return Workplace.at(tmp_path, model=model)


@pytest.fixture
def impatient(tmp_path: Path, model: Path) -> Workplace:
    """A store whose leases end within half a second."""
    return Workplace.at(tmp_path, model=model, lease=0.5)


@pytest.fixture
def hurried(tmp_path: Path, model: Path) -> Workplace:
    """A store for workers in processes of their own: on a busy machine these may be a second late with a heartbeat."""
    return Workplace.at(tmp_path, model=model, lease=1.5)


def gradients(place: Workplace, rows: int = 12, **changes: Any) -> GradientsRequest:
    """A request for a dataset of its own and one checkpoint."""
    dataset, checkpoint = place.pool(numbered(range(rows))), place.checkpoint()
    values = {"dataset": dataset.id, "checkpoints": [checkpoint.id], "dims": [32], "dtype": "float32"}
    return GradientsRequest.model_validate(values | changes)


def training(place: Workplace, **changes: Any) -> FinetuneRequest:
    """A request for two epochs of three steps."""
    values = {
        "dataset": place.pool(numbered(range(12))).id, "model": str(place.model), "epochs": 2, "batch_size": 4,
        "device_batch_size": 2, "learning_rate": 1e-2, "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
    }  # fmt: skip
    return FinetuneRequest.model_validate(values | changes)


def chunks(place: Workplace) -> dict[tuple[str, int], tuple[int, str]]:
    """(attempt, digest) of every committed chunk."""
    with place.context.catalog.reading() as session:
        return {(row.segment_id, row.start): (row.attempt, row.digest) for row in session.scalars(select(ChunkRow))}


def shards(place: Workplace, job: str) -> list[str]:
    """The states of a job's shards."""
    with place.context.catalog.reading() as session:
        query = select(ShardRow.status).where(ShardRow.job_id == job).order_by(ShardRow.number)
        return list(session.scalars(query))


# Gradients ------------------------------------------------------------------------------------------------------------


def test_a_worker_stores_the_engines_numbers_for_every_row_and_dim(place: Workplace) -> None:
    asked = gradients(place, dims=[32, 64], kinds=["adam"])
    result = place.done(asked)
    checkpoint = place.context.catalog.checkpoint(asked.checkpoints[0])  # type: ignore[index]
    adapted = load_adapter(load_model(str(place.model)), place.context.checkpoints.weights(checkpoint.id))
    stored = place.context.checkpoints.moments(checkpoint.id)
    assert stored is not None
    engine = GradientEngine(adapted, kinds=[Kind("adam")], moments=moments.read(stored), dims=[32, 64], seed=0)
    tokenizer = load_tokenizer(str(place.model))
    rows = [
        encode(row, tokenizer=tokenizer, template="tulu", max_length=64)
        for row in place.context.datasets.examples(asked.dataset or "")
    ]
    found_by_kind = engine.features(rows, pad_id=tokenizer.pad_token_id, token_budget=result["token_budget"])
    expected = found_by_kind[Kind("adam")]
    for found in result["feature_sets"]:
        np.testing.assert_array_equal(place.stored(found["id"]), expected.by_dim[found["dim"]])
    view = place.context.store.view(place.context.features.segments(result["feature_sets"][0]["id"]))
    np.testing.assert_array_equal(view.norms, expected.norms)
    np.testing.assert_array_equal(view.raw_norms, expected.raw_norms)
    np.testing.assert_array_equal(view.losses, expected.losses)
    np.testing.assert_array_equal(view.tokens, expected.tokens)
    assert (result["rows"], result["computed_rows"], result["total_excluded"]) == (12, 12, 0)
    assert result["tokens"] == sum(len(row.input_ids) for row in rows)


class model_passes:  # noqa: N801 - used like a function
    """Counts the forward and backward passes of any model."""

    forward = backward = 0

    def __enter__(self) -> Self:
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._look)
        self._backward = torch.autograd.backward
        torch.autograd.backward = self._go_back
        return self

    def __exit__(self, *_: object) -> None:
        torch.autograd.backward = self._backward
        self._handle.remove()

    def _look(self, module: torch.nn.Module, _: tuple[Any, ...]) -> None:
        self.forward += isinstance(module, torch.nn.Embedding)

    def _go_back(self, *arguments: Any, **settings: Any) -> None:
        self.backward += 1
        self._backward(*arguments, **settings)


ALL_KINDS: dict[str, Any] = {"kinds": ["adam", "sgd", "sign", "hidden"], "adam": "both", "dims": [32, 64]}


def test_all_kinds_and_dims_come_from_one_pass_and_are_those_of_a_job_each(place: Workplace) -> None:
    asked = gradients(place, token_budget=128)
    with model_passes() as one_kind:
        place.done(asked)
    together = Workplace.at(place.folder / "together", model=place.model)
    several = gradients(together, token_budget=128, **ALL_KINDS)
    with model_passes() as all_kinds:
        result = together.done(several)
    assert (all_kinds.forward, all_kinds.backward) == (one_kind.forward, one_kind.backward)
    assert all_kinds.backward == all_kinds.forward - 1 > 1, "one more shows that the model does not look ahead"
    described = [(found["kind"], found["adam"], found["dim"]) for found in result["feature_sets"]]
    forms = [("adam", "less"), ("adam", "exact"), ("sgd", None), ("sign", None)]
    assert described == [(*form, dim) for form in forms for dim in (32, 64)] + [("hidden", None, 16)]
    for found in result["feature_sets"]:
        alone = Workplace.at(place.folder / f"{found['kind']}-{found['adam']}-{found['dim']}", model=place.model)
        changes = {"kinds": [found["kind"]], "adam": found["adam"] or "less", "dims": [found["dim"]]}
        with model_passes() as of_one:
            [one] = alone.done(gradients(alone, token_budget=128, **changes))["feature_sets"]
        assert of_one.forward == all_kinds.forward
        assert of_one.backward == (0 if found["kind"] == "hidden" else all_kinds.backward)
        assert one == found
        views = [each.context.store.view(each.context.features.segments(one["id"])) for each in (together, alone)]
        np.testing.assert_array_equal(*(view.stored(0, view.rows) for view in views))
        for name in ("norms", "raw_norms", "losses", "tokens", "reason"):
            np.testing.assert_array_equal(*(view.column(name) for view in views))


def test_a_job_for_more_kinds_computes_only_those_that_are_missing(place: Workplace) -> None:
    asked = gradients(place)
    place.done(asked)
    before = chunks(place)
    more = asked.model_copy(update={"kinds": ["adam", "hidden"]})
    with model_passes() as counted:
        result = place.done(more)
    assert counted.forward > counted.backward == 0
    assert chunks(place).items() > before.items()
    assert [found["kind"] for found in result["feature_sets"]] == ["adam", "hidden"]
    assert place.done(asked.model_copy(update={"kinds": ["hidden"]}))["computed_rows"] == 0


def test_the_sum_of_the_losses_gives_features_of_their_own(place: Workplace) -> None:
    asked = gradients(place, kinds=["sgd", "hidden"])
    mean = place.done(asked)["feature_sets"]
    total = place.done(asked.model_copy(update={"reduction": "sum"}))["feature_sets"]
    assert [found["reduction"] for found in (*mean, *total)] == ["mean", None, "sum", None]
    assert mean[1] == total[1], "hidden states know no loss"
    tokens = place.context.store.view(place.context.features.segments(mean[0]["id"])).tokens
    expected = place.stored(mean[0]["id"]) * tokens[:, None]
    np.testing.assert_allclose(place.stored(total[0]["id"]), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_a_model_whose_output_layer_is_narrower_than_its_config_says_has_no_hidden_states_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace.at(tmp_path)
    monkeypatch.setattr("datastore.models.hidden_size", lambda *_: 48)
    job = place.start(gradients(place, kinds=["hidden"]))
    assert place.work() == ["failed"]
    error = place.job(job.id).error
    assert error is not None
    assert "promises hidden states of 48 numbers" in error.detail


def test_a_row_without_a_token_to_learn_from_is_reported_and_the_others_are_as_without_it(place: Workplace) -> None:
    dataset = place.pool([*numbered(range(3)), ENDLESS, *numbered(range(3, 6))])
    asked = gradients(place, 6)
    with_it = place.done(asked.model_copy(update={"dataset": dataset.id}))
    without = place.done(asked)
    [excluded] = with_it["excluded"]
    assert (excluded["row"], with_it["total_excluded"]) == (3, 1)
    assert "truncation leaves no token to learn from" in excluded["reason"]
    features = place.stored(with_it["feature_sets"][0]["id"])
    assert not features[3].any()
    np.testing.assert_array_equal(np.delete(features, 3, 0), place.stored(without["feature_sets"][0]["id"]))


def test_a_dataset_of_nothing_but_such_rows_is_done_too(place: Workplace) -> None:
    dataset = place.pool([ENDLESS])
    result = place.done(gradients(place, 1).model_copy(update={"dataset": dataset.id}))
    assert result["total_excluded"] == result["rows"] == 1


def test_a_tasks_validation_rows_have_features_in_their_order(place: Workplace) -> None:
    task, checkpoint = place.task(3), place.checkpoint()
    result = place.done(GradientsRequest(task=task.id, checkpoints=[checkpoint.id], dims=[32], dtype="float32"))
    rows = [row.example for row in place.context.tasks.validation(task.id)]
    dataset = place.pool({"prompt": row.prompt, "completion": row.completion} for row in rows)
    same = place.done(
        GradientsRequest(dataset=dataset.id, checkpoints=[checkpoint.id], dims=[32], dtype="float32", kinds=["sgd"])
    )
    found = [place.stored(each["feature_sets"][0]["id"]) for each in (result, same)]
    np.testing.assert_array_equal(*found)


def test_a_grown_dataset_computes_its_new_rows_only(place: Workplace) -> None:
    asked = gradients(place, 10)
    place.done(asked)
    before = chunks(place)
    grown = place.pool(numbered(range(14)))
    result = place.done(asked.model_copy(update={"dataset": grown.id}))
    assert result["computed_rows"] == 4
    assert chunks(place).items() > before.items()
    apart = place.done(asked.model_copy(update={"dataset": place.pool(numbered(range(10, 14))).id}))
    np.testing.assert_array_equal(
        place.stored(result["feature_sets"][0]["id"])[10:], place.stored(apart["feature_sets"][0]["id"])
    )


def test_the_checkpoints_of_a_run_take_turns_on_one_base_model(place: Workplace) -> None:
    asked = gradients(place, 4)
    others = [place.checkpoint(number).id for number in (0, 1, 0, 2)]
    together = place.done(asked.model_copy(update={"checkpoints": list(dict.fromkeys(others))}))
    for found in together["feature_sets"]:
        alone = Workplace.at(place.folder / found["checkpoint"], model=place.model)
        shutil.copytree(place.context.settings.checkpoints, alone.context.settings.checkpoints)
        alone.context.catalog.add_checkpoint(place.context.catalog.checkpoint(found["checkpoint"]))
        dataset = alone.pool(numbered(range(4)))
        one = alone.done(asked.model_copy(update={"dataset": dataset.id, "checkpoints": [found["checkpoint"]]}))
        np.testing.assert_array_equal(place.stored(found["id"]), alone.stored(one["feature_sets"][0]["id"]))


def test_batches_that_do_not_fit_the_memory_are_halved(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    asked = gradients(place, token_budget=4096)
    job = place.start(asked)
    with device_of(tokens=100), caplog.at_level(logging.WARNING):
        assert place.work() == ["succeeded"]
    budgets = [record.token_budget for record in caplog.records if hasattr(record, "token_budget")]
    assert budgets == [4096 >> halvings for halvings in range(1, len(budgets) + 1)]
    assert budgets[-1] >= 64, "halved no further than it had to be"
    small = Workplace.at(place.folder / "small", model=place.model)
    result = small.done(gradients(small, token_budget=budgets[-1]))
    found = place.job(job.id).result
    assert found is not None
    np.testing.assert_array_equal(
        place.stored(found.model_dump()["feature_sets"][0]["id"]), small.stored(result["feature_sets"][0]["id"])
    )


def test_a_budget_that_did_not_fit_the_memory_is_not_tried_again_in_its_job(
    place: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    place.start(gradients(place, 1500, token_budget=4096))
    with device_of(tokens=3000), caplog.at_level(logging.WARNING):
        assert place.work() == ["succeeded", "succeeded"]
    assert [record.token_budget for record in caplog.records if hasattr(record, "token_budget")] == [2048]


def test_a_token_budget_is_found_once_recorded_on_the_job_and_remembered_for_the_next(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []

    def find(*arguments: Any, **options: Any) -> int | None:
        searches.append(look(*arguments, **options))
        return searches[-1]

    look = budgets.find
    monkeypatch.setattr(budgets, "WORTHWHILE", 2)
    monkeypatch.setattr(budgets, "find", find)
    asked = gradients(place, 1500)
    job = place.start(asked)
    assert place.context.jobs.plan(job.id)["token_budget"] is None
    assert place.work() == ["succeeded", "succeeded"]
    [found] = searches
    assert found is not None
    recorded = place.context.jobs.plan(job.id)["token_budget"]
    result = place.job(job.id).result
    assert result is not None
    assert result.model_dump()["token_budget"] == recorded == found
    again = place.done(asked.model_copy(update={"dataset": place.pool(numbered(range(10))).id}))
    assert (again["token_budget"], len(searches)) == (found, 1)
    same = Workplace.at(place.folder / "same", model=place.model)
    said = same.done(gradients(same, 1500, token_budget=found))
    np.testing.assert_array_equal(
        same.stored(said["feature_sets"][0]["id"]), place.stored(result.model_dump()["feature_sets"][0]["id"])
    )


def test_of_two_workers_that_find_a_token_budget_the_first_one_counts(place: Workplace) -> None:
    job = place.start(gradients(place, 1500))
    first, second = place.claim(), place.another().claim()
    settle = place.context.jobs.settle
    assert (settle(first, "token_budget", 700), settle(second, "token_budget", 900)) == (700, 700)
    place.context.jobs.cancel(job.id)
    place.context.jobs.retry(job.id)
    assert place.context.jobs.plan(job.id)["token_budget"] == 700


def test_few_rows_get_the_usual_token_budget(place: Workplace) -> None:
    assert place.done(gradients(place, 4))["token_budget"] == budgets.RANGES["cpu"].usual


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "flash_attention_2"}, "computes in 16 bits"),
        ({"attention": "flash_attention_2", "precision": "bfloat16"}, "runs on a GPU"),
        ({"quantisation": "nf4"}, "needs bitsandbytes, which is not installed"),
        ({"quantisation": "int8"}, "needs bitsandbytes, which is not installed"),
    ],
)
def test_what_this_machine_cannot_do_fails_its_job_with_the_reason(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    job = place.start(gradients(place, 2, **changes))
    assert place.work() == ["failed"]
    error = place.job(job.id).error
    assert error is not None
    assert (error.type, error.status) == ("model-error", 422)
    assert message in error.detail


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("org/gated", "accept them on its page, and start the server and its workers with a token"),
        ("org/nowhere", "the hub has no model 'org/nowhere' that this server may see: check its name"),
        ("org/base", "'org/base' has no branch, tag or commit '1111"),
        ("org/pickled", "name a revision that has them, or a folder that save_pretrained"),
    ],
)
def test_what_the_hub_refuses_a_worker_is_said_on_its_job_with_what_to_do(
    place: Workplace, hub: Hub, name: str, detail: str
) -> None:
    """The service takes a commit's digits as they are: it is the worker who meets the hub."""
    hub.publish("org/gated", {"config.json": b"{}"}, gated=True)
    files = {path.name: path.read_bytes() for path in place.model.iterdir() if path.suffix != ".safetensors"}
    commit = hub.publish("org/pickled", files | {"pytorch_model.bin": b""})
    place.task(1)
    commit = commit if name == "org/pickled" else "1" * 40
    for asked in (
        EvaluationRequest(model=name, revision=commit, tasks=["target"]),
        training(place, model=name, revision=commit),
    ):
        job = place.start(asked)
        assert place.work() == ["failed"]
        error = failed(place, job.id)
        assert error.status == 422
        assert detail in error.detail
        assert "Traceback" not in error.detail
        assert "use_safetensors" not in error.detail


def test_a_worker_whom_the_hub_does_not_answer_says_so_and_tries_again(
    place: Workplace, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish("org/far", place.model)
    place.task(1)
    asked = EvaluationRequest(model="org/far", revision=commit, tasks=["target"], max_new_tokens=2)
    job = place.start(asked)
    with hub.answering(0):
        assert place.work() == ["failed"] * place.context.jobs.max_attempts
    error = failed(place, job.id)
    assert error.type == "download-failed"
    assert "the Hugging Face Hub does not give 'org/far'" in error.detail
    assert "send the same request again when the hub answers" in error.detail
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        place.start(asked)
        place.work()
        assert "(HF_HUB_OFFLINE is set)" in failed(place, job.id).detail
    place.start(asked)
    assert place.work() == ["succeeded"]


def test_a_failed_job_that_is_asked_for_otherwise_is_done_so(place: Workplace) -> None:
    request = gradients(place, 2, attention="flash_attention_2", token_budget=10**6)
    job = place.start(request)
    assert place.work() == ["failed"]
    again = place.start(request.model_copy(update={"attention": "sdpa", "token_budget": 64}))
    assert again.id == job.id
    assert place.work() == ["succeeded"]
    result = place.job(job.id).result
    assert result is not None
    assert result.model_dump()["token_budget"] == 64


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("quantisation", "least"), [("int8", 0.9), ("nf4", 0.5)])
def test_a_quantised_base_gives_nearly_the_features_of_the_whole_one(
    tmp_path: Path, quantisation: str, least: float
) -> None:
    model = save_tiny_model(tmp_path / "wide", hidden_size=64, num_key_value_heads=4)
    place = Workplace.at(tmp_path, model=model)
    asked = gradients(place, 6, kinds=["sgd"])
    results = [place.done(asked.model_copy(update={"quantisation": each})) for each in (None, quantisation)]
    expected, found = (place.stored(result["feature_sets"][0]["id"]) for result in results)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert not np.array_equal(found, expected)
    assert (cosines >= least).all(), cosines


def test_attention_checkpointing_and_precision_are_those_asked_for_and_the_features_nearly_the_same(
    place: Workplace,
) -> None:
    asked = gradients(place, 6, kinds=["sgd"])
    expected = place.stored(place.done(asked)["feature_sets"][0]["id"])
    ways: tuple[tuple[dict[str, Any], float], ...] = (
        ({"attention": "eager"}, 0.99999),
        ({"gradient_checkpointing": True}, 0.99999),
        ({"precision": "bfloat16"}, 0.98),
        ({"precision": "float16"}, 0.999),
    )
    for changes, least in ways:
        [name] = changes
        own = Workplace.at(place.folder / str(least) / name, model=place.model)
        own.checkpoint()
        own.pool(numbered(range(6)))
        found = own.stored(own.done(asked.model_copy(update=changes))["feature_sets"][0]["id"])
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert (cosines >= least).all(), changes
        base = own.context.loaded.base(Base(str(place.model), **changes))
        assert base.config._attn_implementation == changes.get("attention", "sdpa")
        assert base.is_activation_checkpointing == changes.get("gradient_checkpointing", False)
        assert base.dtype == DTYPES[changes.get("precision", "float32")]


def test_an_example_that_does_not_fit_the_memory_fails_its_job_with_advice(place: Workplace) -> None:
    job = place.start(gradients(place))
    with device_of(tokens=1):
        assert place.work() == ["failed"]
    error = place.job(job.id).error
    assert error is not None
    assert (error.type, error.status) == ("out-of-memory", 422)
    assert "gradient_checkpointing=true" in error.detail


class device_of:  # noqa: N801 - used like a function
    """A device whose memory holds so many padded tokens: any embedding of more fails as a GPU's would."""

    def __init__(self, *, tokens: int) -> None:
        self.tokens = tokens

    def __enter__(self) -> None:
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._look)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _look(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and arguments[0].numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")


# Workers that die, stall and double -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """The features of 2,500 rows, three shards, computed in peace."""
    place = Workplace.at(tmp_path_factory.mktemp("peace"), model=model)
    result = place.done(gradients(place, 2500, token_budget=512))
    return place.stored(result["feature_sets"][0]["id"])


@pytest.mark.slow
def test_a_killed_worker_loses_its_shard_only_and_the_features_are_the_same(
    hurried: Workplace, uninterrupted: NDArray[np.float32]
) -> None:
    job = hurried.start(gradients(hurried, 2500, token_budget=512))
    with worker_process(hurried, "--queues", "gradients") as process:
        wait_for(lambda: shards(hurried, job.id)[:2] == ["succeeded", "running"])
        process.kill()
        process.wait()
    finished = chunks(hurried)
    assert len(finished) == 1
    wait_for(lambda: bool(hurried.context.jobs.sweep()))
    assert hurried.work() == ["succeeded", "succeeded"]
    assert chunks(hurried).items() > finished.items()
    done = hurried.job(job.id)
    assert done.status == "succeeded", done.error
    assert done.result is not None
    found = hurried.stored(done.result.model_dump()["feature_sets"][0]["id"])
    np.testing.assert_array_equal(found, uninterrupted)


@pytest.mark.slow
def test_a_fine_tune_whose_worker_is_killed_comes_to_the_same_checkpoints(
    hurried: Workplace, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peace = Workplace.at(tmp_path / "peace", model=model)
    expected = peace.done(training(peace, epochs=30))
    job = hurried.start(training(hurried, epochs=30))
    with worker_process(hurried) as process:
        wait_for(lambda: hurried.job(job.id).progress.done > 6)
        process.kill()
        process.wait()
    wait_for(lambda: bool(hurried.context.jobs.sweep()))
    with caplog.at_level(logging.INFO):
        assert hurried.work() == ["succeeded"]
    assert [each for each in caplog.records if each.message == "fine-tune goes on"]
    done = hurried.job(job.id).result
    assert done is not None
    assert done.model_dump()["checkpoints"] == expected["checkpoints"]


@pytest.mark.slow
def test_two_workers_share_the_shards_and_come_to_the_same_features(
    place: Workplace, uninterrupted: NDArray[np.float32]
) -> None:
    job = place.start(gradients(place, 2500, token_budget=512))
    workers = [place, place.another()]
    threads = [
        threading.Thread(target=work_until_left, args=(each.context,), kwargs={"once": True}) for each in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = place.job(job.id)
    assert done.status == "succeeded", done.error
    assert done.result is not None
    np.testing.assert_array_equal(place.stored(done.result.model_dump()["feature_sets"][0]["id"]), uninterrupted)
    assert len(chunks(place)) == 3


def test_a_stalled_worker_that_wakes_late_changes_nothing(impatient: Workplace) -> None:
    job = impatient.start(gradients(impatient))
    stalled, other = impatient.claim(), impatient.another()
    wait_for(lambda: bool(other.context.jobs.sweep()))
    assert other.work() == ["succeeded"]
    before, result = chunks(impatient), impatient.job(job.id).result
    assert run(stalled, impatient.context) in {"lost", "stopped"}
    assert chunks(impatient) == before
    assert impatient.job(job.id).result == result
    assert not impatient.context.store.attempts()


def test_a_stalled_fine_tune_that_wakes_late_records_nothing(impatient: Workplace) -> None:
    job = impatient.start(training(impatient))
    stalled, other = impatient.claim(), impatient.another()
    wait_for(lambda: bool(other.context.jobs.sweep()))
    other.work()
    other.context.finetunes.remove(job.id)
    assert run(stalled, impatient.context) in {"lost", "stopped"}
    assert impatient.context.catalog.all_runs() == []
    assert impatient.context.catalog.checkpoints(limit=10).data == []


def test_what_a_dead_worker_committed_is_published_by_another(place: Workplace) -> None:
    job = place.start(gradients(place))
    claim = place.claim()
    place.context.store.publish = _refuse  # type: ignore[method-assign]  # the worker dies between commit and publication
    with pytest.raises(SystemExit):
        run(claim, place.context)
    other = place.another()
    assert other.job(job.id).status == "running"
    waiting = tend(other.context)
    assert [publication.attempt for publication in waiting] == [claim.token]
    assert other.job(job.id).status == "running"  # its own worker has its time first
    tend(other.context, waiting)
    assert other.job(job.id).status == "succeeded"
    assert not tend(other.context)


def committed_only(place: Workplace) -> Path:
    """Do a shard whose worker dies between commit and publication; returns what its attempt has written."""
    publish, place.context.store.publish = place.context.store.publish, _refuse  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        run(place.claim(), place.context)
    place.context.store.publish = publish  # type: ignore[method-assign]
    return next(place.context.settings.features.glob("*/attempts/*"))


def lose_the_attempt(attempt: Path) -> None:
    shutil.rmtree(attempt)


def lose_half_of_it_while_it_is_published(attempt: Path) -> None:
    segment = attempt.parent.parent
    (segment / "receipts" / "0.json").write_bytes((attempt / "manifest.json").read_bytes())
    (attempt / "norms.c.0").rename(segment / "data.zarr" / "norms" / "c.0")
    shutil.rmtree(attempt)


def lose_the_whole_segment(attempt: Path) -> None:
    shutil.rmtree(attempt.parent.parent)


def find_the_rows_taken_by_other_bytes(attempt: Path) -> None:
    segment = attempt.parent.parent
    other = json.loads((attempt / "manifest.json").read_bytes())
    other["files"]["norms/c.0"]["sha256"] = "0" * 64
    (segment / "receipts" / "0.json").write_text(json.dumps(other))
    (segment / "data.zarr" / "norms" / "c.0").write_bytes(b"other bytes")


@pytest.mark.parametrize(
    "lose",
    [
        lose_the_attempt,
        lose_half_of_it_while_it_is_published,
        lose_the_whole_segment,
        find_the_rows_taken_by_other_bytes,
    ],
)
def test_rows_whose_bytes_are_lost_before_their_publication_are_computed_again(
    place: Workplace, lose: Callable[[Path], None]
) -> None:
    asked = gradients(place)
    job = place.start(asked)
    lose(committed_only(place))
    other = place.another()
    tend(other.context, tend(other.context))
    assert (other.job(job.id).status, shards(other, job.id), chunks(other)) == ("running", ["queued"], {})
    assert other.job(job.id).progress.done == 0
    assert other.work() == ["succeeded"]
    done = other.job(job.id)
    assert done.status == "succeeded"
    assert done.result is not None
    peace = Workplace.at(place.folder / "peace", model=place.model)
    expected = peace.done(gradients(peace))["feature_sets"][0]["id"]
    found = done.result.model_dump()["feature_sets"][0]["id"]
    np.testing.assert_array_equal(other.stored(found), peace.stored(expected))
    np.testing.assert_array_equal(
        *(each.context.store.view(each.context.features.segments(expected)).norms for each in (other, peace))
    )


def test_rows_that_are_lost_every_time_fail_their_job_with_the_reason(place: Workplace) -> None:
    job = place.start(gradients(place))
    for _ in range(place.context.settings.max_attempts):
        lose_the_attempt(committed_only(place))
        tend(place.context, tend(place.context))
    error = failed(place, job.id)
    assert error.type == "bytes-lost"
    assert "lost before it was published" in error.detail
    assert not tend(place.context)
    place.context.jobs.retry(job.id)
    assert place.work() == ["succeeded"]
    assert place.job(job.id).status == "succeeded"


def test_lost_rows_are_computed_for_every_job_that_waits_for_them(place: Workplace) -> None:
    asked = gradients(place)
    first = place.start(asked)
    attempt = committed_only(place)
    second = place.start(asked.model_copy(update={"dims": [32, 64]}))
    third = place.start(asked.model_copy(update={"checkpoints": [*(asked.checkpoints or []), place.checkpoint(1).id]}))
    assert (shards(place, second.id), shards(place, third.id)) == (["queued"], ["succeeded", "queued"])
    lose_the_attempt(attempt)
    tend(place.context, tend(place.context))
    assert (shards(place, first.id), shards(place, third.id)) == (["queued"], ["queued", "queued"])
    place.work()
    assert {place.job(job.id).status for job in (first, second, third)} == {"succeeded"}


def test_bytes_that_are_lost_with_their_deleted_job_concern_nobody(place: Workplace) -> None:
    job = place.start(gradients(place))
    committed_only(place)
    waiting = tend(place.context)
    place.context.jobs.cancel(job.id)
    place.context.features.remove(job.id)
    assert tend(place.context, waiting) == []
    assert place.context.jobs.page(limit=1).data == []


def test_a_store_that_is_away_loses_no_commit(place: Workplace) -> None:
    job = place.start(gradients(place))
    committed_only(place)
    features = place.context.settings.features
    features.rename(features.with_name("away"))
    with pytest.raises(FileNotFoundError, match="nothing was given up"):
        tend(place.context, tend(place.context))
    features.with_name("away").rename(features)
    tend(place.context, tend(place.context))
    assert place.job(job.id).status == "succeeded"


def feature_set_of(place: Workplace, job: str) -> str:
    result = place.job(job).result
    assert result is not None
    return str(result.model_dump()["feature_sets"][0]["id"])


def _refuse(*_: object, **__: object) -> None:
    raise SystemExit


def test_what_an_attempt_left_behind_is_removed_after_an_hour(place: Workplace) -> None:
    job = place.start(gradients(place))
    claim = place.claim()
    place.context.store.publish = _refuse  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        run(claim, place.context)
    other = place.another()
    [left] = other.context.store.attempts()
    folder = other.context.store.root / left.segment / "attempts" / f"{left.start}-{left.attempt}"
    orphan = folder.with_name(f"{left.start}-{left.attempt + 1}")
    shutil.copytree(folder, orphan)
    for path in (folder, orphan):
        _age_all(path, 7200)
    tidy(other.context)
    assert [each.attempt for each in other.context.store.attempts()] == [left.attempt]  # that one is committed
    tend(other.context, other.context.jobs.unpublished())
    assert other.job(job.id).status == "succeeded"


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def _age_all(folder: Path, seconds: float) -> None:
    for path in (folder, *folder.rglob("*")):
        _age(path, seconds)


def age_everything(place: Workplace) -> None:
    for folder in place.context.settings.data.glob("*/*_*"):
        _age_all(folder, 7200)


def folders(place: Workplace) -> dict[str, set[str]]:
    """What lies under ids in the store."""
    settings = place.context.settings
    places = {"ck": settings.checkpoints, "seg": settings.features, "ft": settings.work}
    return {kind: {path.name for path in root.glob(f"{kind}_*")} for kind, root in places.items()}


def after_each_checkpoint(place: Workplace, then: Callable[[], object]) -> None:
    """Have something happen whenever a checkpoint has got its place, before it is recorded."""
    add = place.context.checkpoints.add

    def added(*arguments: Any, **options: Any) -> Checkpoint:
        found = add(*arguments, **options)
        then()
        return found

    place.context.checkpoints.add = added  # type: ignore[method-assign]


def test_a_selection_that_a_killed_process_was_writing_is_removed_after_an_hour(place: Workplace) -> None:
    left = place.context.settings.selections / ".sel_1.parquet.0a1b"
    left.parent.mkdir()
    left.touch()
    tidy(place.context)
    assert left.exists()
    _age(left, 7200)
    tidy(place.context)
    assert not left.exists()


def test_checkpoints_of_an_attempt_that_was_cancelled_at_its_end_are_removed_after_an_hour(place: Workplace) -> None:
    kept = place.checkpoint().id
    job = place.start(training(place))
    after_each_checkpoint(place, lambda: place.context.jobs.cancel(job.id))
    assert place.work() == ["lost"]
    tidy(place.context)
    assert len(folders(place)["ck"]) == 3  # its worker might be about to record them
    age_everything(place)
    tidy(place.context)
    assert folders(place) == {"ck": {kept}, "seg": set(), "ft": {job.id}}  # a retry goes on from there
    place.context.jobs.retry(job.id)
    assert place.another().work() == ["succeeded"]
    age_everything(place)
    tidy(place.context)
    assert len(folders(place)["ck"]) == 3


def test_a_checkpoint_that_is_found_where_another_attempt_left_it_is_not_taken_for_left_behind(
    place: Workplace,
) -> None:
    job = place.start(training(place))
    after_each_checkpoint(place, lambda: place.context.jobs.cancel(job.id))
    place.work()
    age_everything(place)
    place.context.jobs.retry(job.id)
    other = place.another()
    after_each_checkpoint(other, lambda: tidy(place.context))
    assert other.work() == ["succeeded"]
    assert len(folders(place)["ck"]) == 2


def test_a_fine_tune_whose_checkpoints_vanish_before_they_are_recorded_is_tried_again(place: Workplace) -> None:
    job = place.start(training(place))
    ages = iter([7200.0])

    def tidied() -> None:
        for folder in place.context.settings.checkpoints.glob("ck_*"):
            _age_all(folder, next(ages, 0.0))
        tidy(place.context)

    after_each_checkpoint(place, tidied)
    assert place.work() == ["failed", "succeeded"]
    result = place.job(job.id).result
    assert result is not None
    assert folders(place)["ck"] == set(result.model_dump()["checkpoints"])


def test_a_deleted_segment_that_a_stalled_worker_makes_again_is_removed_after_an_hour(place: Workplace) -> None:
    asked = gradients(place)
    kept = place.start(asked.model_copy(update={"dims": [64]}))
    place.work()
    job = place.start(asked)
    stalled = place.claim()
    place.context.jobs.cancel(job.id)
    place.context.features.remove(job.id)
    [output] = stalled.payload["outputs"]
    place.context.store.create(
        output["segment"], rows=output["rows"], dim=32, dtype="float32", attributes=output["attributes"]
    )
    tidy(place.context)
    assert len(folders(place)["seg"]) == 2
    age_everything(place)
    tidy(place.context)
    assert folders(place)["seg"] == set(place.context.features.segments(feature_set_of(place, kept.id)))
    again = place.start(asked)
    assert place.work() == ["succeeded"]
    assert place.job(again.id).status == "succeeded"


def test_a_segment_that_is_wanted_again_is_not_removed_however_old_its_folder_is(place: Workplace) -> None:
    asked = gradients(place)
    job = place.start(asked)
    [output] = place.claim().payload["outputs"]
    place.context.store.create(
        output["segment"], rows=output["rows"], dim=32, dtype="float32", attributes=output["attributes"]
    )
    age_everything(place)
    tidy(place.context)
    assert folders(place)["seg"] == {output["segment"]}
    assert place.job(job.id).status == "running"


def test_what_a_training_left_is_removed_with_its_job(place: Workplace) -> None:
    job = place.start(training(place))
    left = place.context.settings.work / job.id / "1"
    left.mkdir(parents=True)
    age_everything(place)
    tidy(place.context)
    assert left.is_dir()
    place.context.jobs.cancel(job.id)
    place.context.finetunes.remove(job.id)
    left.mkdir(parents=True)
    age_everything(place)
    tidy(place.context)
    assert folders(place)["ft"] == set()


def test_two_jobs_on_one_segment_are_both_done_with_its_rows(place: Workplace) -> None:
    asked = gradients(place)
    first = place.start(asked.model_copy(update={"dims": [32]}))
    second = place.start(asked.model_copy(update={"dims": [32, 64]}))
    assert first.id != second.id
    assert place.work() == ["succeeded", "succeeded"]
    assert {place.job(job.id).status for job in (first, second)} == {"succeeded"}
    assert not place.context.store.attempts()


# Asked to stop --------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_stops_within_a_heartbeat_and_a_retry_keeps_what_was_finished(impatient: Workplace) -> None:
    job = impatient.start(gradients(impatient, 1600, token_budget=128))
    worker = threading.Thread(target=impatient.work)
    worker.start()
    wait_for(lambda: shards(impatient, job.id)[0] == "succeeded" and impatient.job(job.id).progress.done > 1024)
    impatient.context.jobs.cancel(job.id)
    worker.join(10)
    assert not worker.is_alive()
    assert impatient.job(job.id).status == "cancelled"
    assert shards(impatient, job.id) == ["succeeded", "queued"]
    finished = chunks(impatient)
    impatient.context.jobs.retry(job.id)
    assert impatient.work() == ["succeeded"]
    assert impatient.job(job.id).status == "succeeded"
    assert chunks(impatient).items() > finished.items()


def test_a_cancelled_fine_tune_stops_and_a_retry_goes_on(
    impatient: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    job = impatient.start(training(impatient, epochs=30))
    worker = threading.Thread(target=impatient.work)
    worker.start()
    wait_for(lambda: impatient.job(job.id).progress.done > 3)
    impatient.context.jobs.cancel(job.id)
    worker.join(10)
    assert not worker.is_alive()
    assert impatient.job(job.id).status == "cancelled"
    assert impatient.context.catalog.all_runs() == []
    impatient.context.jobs.retry(job.id)
    with caplog.at_level(logging.INFO):
        assert impatient.work() == ["succeeded"]
    [record] = [each for each in caplog.records if each.message == "fine-tune goes on"]
    assert record.step >= 3  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_worker_that_is_asked_to_leave_gives_its_shard_back(place: Workplace) -> None:
    job = place.start(gradients(place, 2500, token_budget=64))
    with worker_process(place) as process:
        wait_for(lambda: [each.job for each in place.context.jobs.workers()] == [job.id])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "running" not in shards(place, job.id)
    assert place.context.jobs.workers() == []


@pytest.mark.slow
def test_a_worker_that_is_asked_many_times_at_once_ends_and_holds_nothing_back(place: Workplace) -> None:
    job = place.start(gradients(place, 2500, token_budget=64))
    with worker_process(place) as process:
        wait_for(lambda: [each.job for each in place.context.jobs.workers()] == [job.id])
        for _ in range(50):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.0005)
        assert process.wait(20) in {0, 128 + signal.SIGTERM}


# Failures -------------------------------------------------------------------------------------------------------------


def failed(place: Workplace, job: str) -> Problem:
    """The error of a failed job."""
    found = place.job(job)
    assert found.status == "failed"
    assert found.error is not None
    return found.error


def test_an_error_of_the_users_fails_the_job_at_once_in_words(place: Workplace, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place.model, copy)
    job = place.start(training(place, model=str(copy)))
    shutil.rmtree(copy)
    assert place.work() == ["failed"]
    error = failed(place, job.id)
    assert (error.type, error.status) == ("model-error", 422)
    assert str(copy) in error.detail


def test_a_job_whose_dataset_is_gone_is_not_tried_again(place: Workplace) -> None:
    asked = gradients(place)
    job = place.start(asked)
    shutil.rmtree(place.context.settings.datasets / str(asked.dataset))
    assert place.work() == ["failed"]
    assert failed(place, job.id).type == "not-found"


def test_a_poisoned_row_fails_its_job_and_no_other(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    poisoned, healthy = gradients(place, 12), gradients(place, 5)
    job, other = place.start(poisoned), place.start(healthy)
    lines = place.context.datasets.content(str(poisoned.dataset))
    lines.write_bytes(lines.read_bytes().replace(b"The", b"\xff\xfe\x00", 1))
    assert place.work() == ["failed", "failed", "failed", "succeeded"]
    error = failed(place, job.id)
    assert (error.type, error.status) == ("unexpected-error", 500)
    assert f"the traceback is in the worker's log under {error.instance}" in error.detail
    traceback = next(each for each in caplog.records if getattr(each, "id", None) == error.instance).exc_text
    assert "Traceback" in str(traceback)
    assert "Traceback" not in error.detail
    assert place.job(other.id).status == "succeeded"


def test_a_job_planned_for_other_projections_says_which_versions_meet(place: Workplace) -> None:
    job = place.start(gradients(place))
    with place.context.catalog.transaction() as session:
        row = session.get_one(JobRow, job.id)
        row.plan = {**row.plan, "projection_version": 99}
    assert place.work() == ["failed"]
    assert "version 99 of the projections and this worker has version" in failed(place, job.id).detail


# Fine-tunes and evaluations -------------------------------------------------------------------------------------------


def test_a_fine_tune_records_its_run_and_checkpoints_and_cleans_up(place: Workplace) -> None:
    result = place.done(training(place, name="warm", fraction=0.5))
    found = place.context.catalog.run("warm")
    assert (found.id, [each.id for each in found.checkpoints]) == (result["run"], result["checkpoints"])
    assert [each.epoch for each in found.checkpoints] == [1, 2]
    assert all(each.has_moments and each.template == "tulu" for each in found.checkpoints)
    assert result["rows"] == 6
    assert not list(place.context.settings.work.iterdir())
    sets = place.done(GradientsRequest(dataset=place.pool(numbered(range(4))).id, run="warm", dims=[32]))
    assert len(sets["feature_sets"]) == 2


def test_the_seconds_of_a_resumed_fine_tune_are_those_of_all_its_attempts(impatient: Workplace) -> None:
    job = impatient.start(training(impatient, epochs=30))
    worker = threading.Thread(target=impatient.work)
    first = time.monotonic()
    worker.start()
    wait_for(lambda: impatient.job(job.id).progress.done > 3)
    impatient.context.jobs.cancel(job.id)
    worker.join()
    first = time.monotonic() - first
    time.sleep(3 * first)  # nobody works
    impatient.context.jobs.retry(job.id)
    second = time.monotonic()
    assert impatient.work() == ["succeeded"]
    second = time.monotonic() - second
    result = impatient.job(job.id).result
    assert result is not None
    # the last attempt alone has taken less than the second time, and the pause is longer than both
    assert second < result.model_dump()["seconds"] < first + second + 0.1


def test_a_name_that_another_run_has_stays_where_it_is(place: Workplace) -> None:
    first = place.done(training(place, name="warm"))
    place.context.finetunes.jobs.rename("warm", None, kind="finetune")
    second = place.done(training(place, name="warm", seed=1))
    assert place.context.catalog.run("warm").id == first["run"] != second["run"]
    assert place.context.catalog.run(second["run"]).name is None


def test_progress_counts_steps_of_the_rows_that_are_left(place: Workplace) -> None:
    asked = training(place, max_length=64)
    dataset = place.pool([*numbered(range(4)), *[{**ENDLESS, "id": str(n)} for n in range(8)]])
    job = place.start(asked.model_copy(update={"dataset": dataset.id}))
    assert job.progress.total == 6
    place.work()
    done = place.job(job.id)
    assert done.result is not None
    assert done.result.model_dump()["steps"] == 2
    assert done.progress.done == done.progress.total


def test_a_selection_is_trained_on_whole(place: Workplace) -> None:
    pool, task = place.pool(numbered(range(20))), place.task(2)
    run_found = place.done(training(place))["run"]
    for owner in ({"dataset": pool.id}, {"task": task.id}):
        place.done(GradientsRequest.model_validate({**owner, "run": run_found, "dims": [32]}))
    context = place.context
    recipe, sources = context.recipes.resolve(Query(tasks=[task.id], datasets=[pool.id], k=5), path="/select")
    scoring = context.scoring
    job = scoring.start(recipe, sources)
    claim = context.jobs.claim("test", kinds=["scoring"])
    assert claim is not None
    scoring.work(claim, lambda _: None)
    assert context.jobs.succeed(claim)
    assert place.job(job.id).status == "succeeded"
    scores = scoring.known(recipe, sources)
    assert scores is not None
    selection = context.answers.select(recipe, sources, scores, limit=5)
    result = place.done(training(place, dataset=None, selection=selection.id, epochs=1))
    assert result["rows"] == 5


def test_a_training_whose_last_step_leaves_no_numbers_has_diverged(place: Workplace) -> None:
    """Its last loss was one: nothing but the weights tells."""
    job = place.start(training(place, epochs=1, batch_size=6, learning_rate=1e308))
    assert place.work() == ["failed"]
    error = failed(place, job.id)
    assert error.type == "diverged"
    assert error.detail.startswith("after epoch 1 the weights or their moments are not finite: lower learning_rate")


def test_an_evaluation_measures_the_base_model_beside_the_tuned_one(place: Workplace) -> None:
    task = place.task(3, name="sums")
    tuned = place.done(training(place, name="tuned", epochs=20, learning_rate=5e-2))
    job = place.start(EvaluationRequest(finetune="tuned", tasks=["sums"], bootstrap_samples=50))
    assert place.work() == ["succeeded"]
    done = place.job(job.id)
    assert done.progress.total == job.progress.total
    assert done.result is not None
    rows = done.result.model_dump()["rows"]
    assert [(row["model"], row["subtask"]) for row in rows] == [
        (subject, subtask) for subject in ("base", "tuned") for subtask in ("even", "odd", None)
    ]
    assert {(row["task"], row["task_name"]) for row in rows} == {(task.id, "sums")}
    base, trained = rows[2], rows[5]
    assert trained["loss"] < base["loss"]
    assert trained["loss_interval"]["low"] <= trained["loss"] <= trained["loss_interval"]["high"]
    assert done.progress.done == done.progress.total
    alone = place.done(EvaluationRequest(checkpoint=tuned["checkpoints"][-1], tasks=[task.id], baseline=False))
    assert [row["model"] for row in alone["rows"]] == ["tuned"] * 3
    assert alone["rows"][2]["loss"] == trained["loss"]


def test_what_was_measured_stands_in_the_order_of_the_request(place: Workplace) -> None:
    """The base model first, then the tuned one; tasks as they were named, subtasks by name, their mean last."""
    for rows, name in enumerate("bac", 1):
        place.task(rows, name=name)
    place.done(training(place, name="tuned", epochs=1))
    for tasks in (["c", "a", "b"], ["a", "b", "c"]):
        rows = place.done(EvaluationRequest(finetune="tuned", tasks=tasks, bootstrap_samples=2))["rows"]
        assert [(row["model"], row["task_name"], row["subtask"]) for row in rows] == [
            (model, task, subtask) for model in ("base", "tuned") for task in tasks for subtask in ("even", "odd", None)
        ]


def test_a_pattern_that_takes_for_ever_fails_its_evaluation_in_words(place: Workplace) -> None:
    row = {"prompt": "Q", "completion": "x", "answers": ["x"], "pattern": r"(?s)^(.+)+\Z(?!\Z)"}
    place.task(1, name="slow", **row)
    job = place.start(EvaluationRequest(model=str(place.model), tasks=["slow"], max_new_tokens=40))
    assert place.work() == ["failed"]
    error = place.job(job.id).error
    assert error is not None
    assert (error.type, error.status) == ("invalid-task", 422)
    assert "takes too long on a text of" in error.detail


@pytest.mark.parametrize("at_most", [None, 1, 2])
def test_an_evaluation_counts_from_its_start_the_passes_that_it_takes(place: Workplace, at_most: int | None) -> None:
    folder = place.folder / "task"
    folder.mkdir()
    kinds = {"none": {}, "choice": {"choices": ["yes", "no"], "answer": "yes"}, "exact_match": {"answers": ["yes"]}}
    rows = [
        {"prompt": f"Question {number}", "completion": "yes", "subtask": metric, "metric": metric, **values}
        for metric, values in kinds.items()
        for number in range(3 if metric == "choice" else 1)
    ]
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = place.context.tasks.store("jsonl", folder)
    task = place.context.catalog.add_task(
        id=stored.id, name="mixed", kind="jsonl", subtasks=stored.subtasks, notes=stored.notes, replace=False
    )
    assert [subtask.metric for subtask in task.subtasks] == ["choice", "exact_match", "none"]
    assert passes(task, at_most) == work(first_rows(place.context.tasks.test(task.id), at_most))
    job = place.start(EvaluationRequest(model=str(place.model), tasks=["mixed"], max_rows=at_most))
    assert job.progress.total == passes(task, at_most)
    assert place.work() == ["succeeded"]
    assert place.job(job.id).progress.total == job.progress.total


def test_a_model_alone_is_measured_as_the_base(place: Workplace) -> None:
    place.task(2, name="sums")
    result = place.done(EvaluationRequest(model=str(place.model), tasks=["sums"]))
    assert {row["model"] for row in result["rows"]} == {"base"}


def test_a_full_fine_tune_is_evaluated_as_the_model_it_is(place: Workplace) -> None:
    place.task(2, name="sums")
    place.done(training(place, method="full", learning_rate=1e-2, epochs=10, name="full"))
    result = place.done(EvaluationRequest(finetune="full", tasks=["sums"]))
    losses = {row["model"]: row["loss"] for row in result["rows"] if row["subtask"] is None}
    assert losses["tuned"] < 0.8 * losses["base"]


# Weights of models without an adapter ---------------------------------------------------------------------------------

PROJECTIONS = ["*.q_proj.weight", "model.layers.0.mlp.*"]


def of_weights(place: Workplace, checkpoint: str, **changes: Any) -> GradientsRequest:
    """A request for the gradients of some weights at one checkpoint."""
    dataset = place.pool(numbered(range(12))).id
    values = {"dataset": dataset, "checkpoints": [checkpoint], "weights": PROJECTIONS, "dtype": "float32", "dims": [64]}
    return GradientsRequest.model_validate(values | changes)


def fine_tuned(place: Workplace, **changes: Any) -> Checkpoint:
    """The checkpoint of a full fine-tune."""
    result = place.done(training(place, method="full", learning_rate=1e-3, max_length=64, **changes))
    return place.context.catalog.checkpoint(result["checkpoints"][-1])


def truth_of(place: Workplace, weights: Path) -> bruteforce.Gradients:
    """Float64 autograd of the same weights, one row after the other."""
    texts = [".q_proj.weight", "model.layers.0.mlp."]
    return bruteforce.raw_gradients(weights, None, numbered(range(12)), load_tokenizer(str(place.model)), weights=texts)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_full_fine_tune_has_the_gradients_of_the_weights_named(place: Workplace, kind: str) -> None:
    checkpoint = fine_tuned(place)
    truth = truth_of(place, place.context.checkpoints.weights(checkpoint.id))
    assert len(truth.sizes) == 2 + 3
    wanted = truth.flat
    if kind == "adam":
        kept = place.context.checkpoints.moments(checkpoint.id)
        assert kept is not None
        wanted = bruteforce.adam_direction(truth, kept, form="less")
    asked = of_weights(place, checkpoint.id, kinds=[kind], projection="none", dims=[wanted.shape[1]])
    [found] = place.done(asked)["feature_sets"]
    assert found["weights"] == sorted(PROJECTIONS)
    errors = np.linalg.norm(place.stored(found["id"]) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert errors.max() < 1e-5


def test_a_base_model_itself_has_gradients_and_hidden_states(place: Workplace) -> None:
    base = place.base()
    assert (base.method, base.parameters, base.has_moments) == ("none", 0, False)
    asked = of_weights(place, base.id, kinds=["sgd", "sign", "hidden"])
    found = place.done(asked)["feature_sets"]
    assert [(one["kind"], one["weights"] is None) for one in found] == [
        ("sgd", False),
        ("sign", False),
        ("hidden", True),
    ]
    view = place.context.store.view(place.context.features.segments(found[0]["id"]))
    np.testing.assert_allclose(view.norms, np.linalg.norm(truth_of(place, place.model).flat, axis=1), rtol=1e-5)
    with model_passes() as counted:
        alone = place.done(of_weights(place, base.id, weights=None, kinds=["hidden"]))["feature_sets"]
    assert (alone, counted.forward) == (found[2:], 0)
    with pytest.raises(InvalidInput, match="a base model has none before its training"):
        place.start(of_weights(place, base.id, kinds=["adam"]))


def test_weights_are_a_part_of_what_features_are(place: Workplace) -> None:
    base = place.base()
    first = of_weights(place, base.id, kinds=["sgd"])
    [one] = place.done(first)["feature_sets"]
    [same] = place.done(of_weights(place, base.id, kinds=["sgd"], weights=[*PROJECTIONS[::-1], PROJECTIONS[0]]))[
        "feature_sets"
    ]
    assert one == same
    [other] = place.done(of_weights(place, base.id, kinds=["sgd"], weights=["*.k_proj.weight"]))["feature_sets"]
    assert other["id"] != one["id"]
    assert not np.array_equal(place.stored(other["id"]), place.stored(one["id"]))


def test_a_weight_that_does_not_exist_fails_the_job_with_those_that_do(place: Workplace) -> None:
    job = place.start(of_weights(place, place.base().id, kinds=["sgd"], weights=["*.c_attn.weight"]))
    assert place.work() == ["failed"]
    error = place.job(job.id).error
    assert error is not None
    assert error.status == 422
    assert "no parameter '*.c_attn.weight'; it has model.embed_tokens.weight, model.layers.*.self_attn" in error.detail


def test_a_weight_that_a_full_fine_tune_does_not_have_is_refused_at_once(place: Workplace) -> None:
    checkpoint = fine_tuned(place)
    with pytest.raises(InvalidInput, match=r"no parameter 'q_proj'; it has .*model.layers.\*.self_attn.q_proj.weight"):
        place.start(of_weights(place, checkpoint.id, weights=["q_proj"]))
    with pytest.raises(InvalidInput, match=r"dims=\[\d+\]"):
        place.start(of_weights(place, checkpoint.id, projection="none"))


def test_tied_weights_go_by_the_name_of_the_first(tmp_path: Path) -> None:
    place = Workplace.at(tmp_path, model=save_tiny_model(tmp_path / "model", hidden_size=16, tie_word_embeddings=True))
    checkpoint = fine_tuned(place, epochs=1)
    asked = of_weights(place, checkpoint.id, weights=["*.embed_tokens.weight"])
    folder, tokenizer = place.context.checkpoints.weights(checkpoint.id), load_tokenizer(str(place.model))
    truth = bruteforce.raw_gradients(folder, None, numbered(range(12)), tokenizer, weights=["embed_tokens"])
    [found] = place.done(asked.model_copy(update={"projection": "none", "dims": [truth.flat.shape[1]]}))["feature_sets"]
    kept = place.context.checkpoints.moments(checkpoint.id)
    assert kept is not None
    np.testing.assert_allclose(
        place.stored(found["id"]), bruteforce.adam_direction(truth, kept, form="less"), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(InvalidInput, match=r"no parameter 'lm_head.weight'.*has the name of the first one"):
        place.start(of_weights(place, checkpoint.id, weights=["lm_head.weight"]))


def test_features_of_weights_leave_the_base_model_as_it_was_for_adapters(place: Workplace) -> None:
    asked = gradients(place, kinds=["sgd"], token_budget=128)
    alone = Workplace.at(place.folder / "alone", model=place.model)
    [expected] = alone.done(gradients(alone, kinds=["sgd"], token_budget=128))["feature_sets"]
    place.done(of_weights(place, place.base().id, kinds=["sgd"]))
    [found] = place.done(asked)["feature_sets"]
    np.testing.assert_array_equal(place.stored(found["id"]), alone.stored(expected["id"]))
    place.done(of_weights(place, place.base().id, kinds=["sgd"], weights=["*.k_proj.weight"]))
    model = place.context.loaded.base(Base(str(place.model), place.base().revision))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_base_model_registered_as_a_checkpoint_is_evaluated_as_the_base(place: Workplace) -> None:
    place.task(2, name="sums")
    result = place.done(EvaluationRequest(checkpoint=place.base().id, tasks=["sums"]))
    assert {row["model"] for row in result["rows"]} == {"base"}


def test_a_selection_compares_features_of_the_same_weights(place: Workplace) -> None:
    place.task(2, name="sums")
    base = place.base()
    changes = {"kinds": ["sgd"], "max_length": 64}
    place.done(of_weights(place, base.id, **changes))
    query = Query(tasks=["sums"], checkpoints=[base.id], k=2)
    other = of_weights(place, base.id, **changes, dataset=None, task="sums", weights=["*.k_proj.weight"])
    place.done(other)
    with pytest.raises(GradientsMissing) as missing:
        place.context.recipes.resolve(query, path="/select")
    assert missing.value.body["weights"] == tuple(sorted(PROJECTIONS))
    place.done(GradientsRequest.model_validate(missing.value.body))
    recipe, _ = place.context.recipes.resolve(query, path="/select")
    assert recipe.weights == tuple(sorted(PROJECTIONS))
    place.done(of_weights(place, base.id, **changes, weights=["*.k_proj.weight"]))
    with pytest.raises(Ambiguous, match="weights") as several:
        place.context.recipes.resolve(query, path="/select")
    assert len(several.value.choices) == 2
    narrowed = replace(query, weights=("*.k_proj.weight",))
    recipe, _ = place.context.recipes.resolve(narrowed, path="/select")
    assert recipe.weights == ("*.k_proj.weight",)
