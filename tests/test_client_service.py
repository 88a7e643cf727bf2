"""The client and the command line through the real service: what one sends, the other takes, and the way back."""

from __future__ import annotations

import asyncio
import io
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradstore import (
    AsyncGradientStore,
    Conflict,
    GradientStore,
    Invalid,
    JobFailed,
    NotAuthenticated,
    NotFound,
    cli,
    recipes,
)
from gradstore.types import FinetuneRequest, GradientsRequest, LoraSettings

from tests.serving import Service, jsonl, peft_files, serving, task_files


@pytest.fixture
def store(service: Service) -> Iterator[GradientStore]:
    with GradientStore(service.url, backoff=0.01) as client:
        yield client


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_dataset_comes_back_byte_for_byte(store: GradientStore, tmp_path: Path) -> None:
    rows = '{"prompt": "a ", "completion": "é ☃"}\r\n'.encode() * 3 + jsonl(5)
    (tmp_path / "pool.jsonl").write_bytes(rows)
    stored = store.datasets.upload(tmp_path / "pool.jsonl", name="a pool, 100% ☃")
    assert stored.created
    assert not store.datasets.upload(io.BytesIO(rows), filename="pool.jsonl").created
    assert store.datasets.get("a pool, 100% ☃").id == stored.id
    lines = list(store.datasets.lines(stored.id))
    assert len(lines) == 8
    source = stored.sources[0].sha256
    assert store.datasets.download(stored.id, tmp_path / "back", source=source).read_bytes() == rows
    assert b"\n".join(lines) + b"\n" == store.datasets.download(stored.id, tmp_path / "rows").read_bytes()


def test_names_move_and_things_go(store: GradientStore) -> None:
    first = store.datasets.upload(io.BytesIO(jsonl(3)), name="pool", filename="a.jsonl")
    with pytest.raises(Conflict, match="replace"):
        store.datasets.upload(io.BytesIO(jsonl(4)), name="pool", filename="b.jsonl")
    second = store.datasets.upload(io.BytesIO(jsonl(4)), name="pool", filename="b.jsonl", replace=True)
    assert store.datasets.get("pool").id == second.id
    assert second.prefix == first.id
    grown = store.datasets.upload(io.BytesIO(jsonl(2, first=4)), filename="c.jsonl", append_to="pool")
    assert grown.rows == 6
    assert store.datasets.rename("pool", None).name is None
    store.datasets.delete(first.id)
    with pytest.raises(NotFound, match="GET /datasets"):
        store.datasets.get(first.id)
    assert [dataset.id for dataset in store.datasets.list()] == [grown.id, second.id]


def test_bad_rows_are_told_with_their_lines(store: GradientStore) -> None:
    rows = jsonl(2) + b"nonsense\n" + jsonl(1, first=9)
    with pytest.raises(Invalid, match=r"\n  line 3: ") as caught:
        store.datasets.upload(io.BytesIO(rows), filename="pool.jsonl")
    assert caught.value.problem.total_errors == 1
    assert caught.value.request_id
    report = store.datasets.upload(io.BytesIO(rows), filename="pool.jsonl", on_error="skip").report
    assert (report.rows, report.skipped, report.problems[0].line) == (3, 1, 3)


def test_every_list_walks_its_pages(store: GradientStore) -> None:
    ids = [store.datasets.upload(io.BytesIO(jsonl(1, first=number)), filename="a").id for number in range(105)]
    assert [dataset.id for dataset in store.datasets.list()] == ids[::-1]
    for dataset in store.datasets.list():
        store.datasets.delete(dataset.id)
    for noun in (
        "tasks",
        "checkpoints",
        "adapters",
        "adapter_choices",
        "runs",
        "gradients",
        "conversions",
        "selections",
        "finetunes",
        "evaluations",
        "generations",
        "validations",
        "predictors",
        "cascades",
        "attributions",
        "estimates",
        "estimate_validations",
        "streams",
        "annotations",
        "taxonomies",
        "jobs",
        "datasets",
    ):
        assert list(getattr(store, noun).list()) == []


def test_tasks_are_taken_as_folder_zip_or_file(store: GradientStore, tmp_path: Path) -> None:
    folder = written(tmp_path / "target", task_files("target"))
    task = store.tasks.upload(folder, name="target", kind="jsonl")
    assert (task.validation, task.test) == (3, 2)
    with zipfile.ZipFile(tmp_path / "target.zip", "w") as archive:
        for name, content in task_files("target").items():
            archive.writestr(name, content)
    assert store.tasks.upload(tmp_path / "target.zip", name="target", kind="jsonl").id == task.id
    with pytest.raises(Invalid):
        store.tasks.upload(folder, name="target", kind="unheard of")
    store.tasks.delete("target")


def test_the_task_of_a_recipe_is_the_stored_one_of_the_same_content(store: GradientStore, tmp_path: Path) -> None:
    """Whatever its folder is called; a stored task of other content is neither taken nor replaced."""
    pool = store.datasets.upload(io.BytesIO(jsonl(9)), filename="pool.jsonl").id
    stored = store.tasks.upload(written(tmp_path / "mine", task_files("x")), name="mine", kind="jsonl")
    written(tmp_path / "renamed", task_files("x"))
    other = written(tmp_path / "other" / "mine", task_files("y"))
    steps: list[str] = []

    def less(task: Path | str, kind: str | None) -> None:
        steps.clear()
        recipes.less(store, pool=pool, task=task, task_kind=kind, model="no model", say=steps.append, progress=False)

    for folder in ("mine", "renamed"):
        with pytest.raises(Invalid, match="no model"):
            less(tmp_path / folder, "jsonl")
        assert len(steps) == 2
    with pytest.raises(Conflict) as refused:
        less(other, "jsonl")
    assert f"{stored.id} is called 'mine' and is another task than {other}: give that id" in str(refused.value)
    assert len(steps) == 1
    assert [task.id for task in store.tasks.list()] == [stored.id]


def test_a_name_that_a_path_happens_to_have_too_is_the_stored_tasks(
    store: GradientStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = store.datasets.upload(io.BytesIO(jsonl(9)), filename="pool.jsonl").id
    written(tmp_path / "mine", task_files("y"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="say what it holds with task_kind"):
        recipes.less(store, pool=pool, task="mine", model="no model", progress=False)
    store.tasks.upload(written(tmp_path / "x", task_files("x")), name="mine", kind="jsonl")
    with pytest.raises(Invalid, match="no model"):
        recipes.less(store, pool=pool, task="mine", model="no model", progress=False)
    with pytest.raises(ValueError, match="say what it holds with task_kind"):
        recipes.less(store, pool=pool, task=Path("mine"), model="no model", progress=False)


def test_an_adapter_goes_up_as_a_folder_and_comes_down_as_one(store: GradientStore, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", peft_files(1))
    checkpoint = store.checkpoints.upload(folder, name="mine", learning_rate=1e-4, step=3)
    assert (checkpoint.model, checkpoint.step, checkpoint.learning_rate) == ("org/base", 3, 1e-4)
    back = store.checkpoints.download("mine", tmp_path / "back")
    assert (back / "adapter_model.safetensors").read_bytes() == peft_files(1)["adapter_model.safetensors"]
    run = store.runs.create([checkpoint.id], name="run")
    assert run.checkpoints[0].id == checkpoint.id
    with pytest.raises(Conflict, match="run_"):
        store.checkpoints.delete("mine")
    with pytest.raises(Invalid, match="allowed folders"):
        store.checkpoints.register(folder)


def test_a_model_that_nobody_has_trained_is_a_checkpoint_too(store: GradientStore, tmp_path: Path) -> None:
    checkpoint = store.checkpoints.register(model="org/base", name="untrained", precision="bfloat16")
    assert (checkpoint.method, checkpoint.precision, checkpoint.has_moments) == ("none", "bfloat16", False)
    with pytest.raises(Conflict, match="nothing is stored here"):
        store.checkpoints.download("untrained", tmp_path / "back")


def test_a_job_is_found_again_waited_for_and_followed(service: Service, store: GradientStore, tmp_path: Path) -> None:
    pool = service.pool()
    job = store.finetunes.create(dataset=pool["id"], model="org/base", epochs=2, lora=LoraSettings(r=8), name="warmup")
    assert job.status == "queued"
    assert job.request.lora == LoraSettings(r=8)
    assert store.finetunes.create(dataset=pool["id"], model="org/base", epochs=2, lora={"r": 8}).id == job.id
    states: list[str] = []
    following = threading.Thread(target=lambda: states.extend(state.status for state in store.jobs.events("warmup")))
    following.start()
    while not states:
        time.sleep(0.01)
    training = threading.Timer(0.1, service.train, [tmp_path])
    training.start()
    done = store.finetunes.wait("warmup", timeout=30, progress=True)
    following.join(30)
    assert states[0] == "queued"
    assert states[-1] == "succeeded"
    assert len(done.result.checkpoints) == 2
    assert store.jobs.wait(job.id).id == job.id
    assert [run.id for run in store.runs.list()] == [done.result.run]
    assert (store.finetunes.download("warmup", tmp_path / "adapter") / "adapter_config.json").is_file()


def test_a_job_is_cancelled_and_goes_on(service: Service, store: GradientStore) -> None:
    job = store.finetunes.create(dataset=service.pool()["id"], model="org/base")
    assert store.finetunes.cancel(job.id).status == "cancelled"
    with pytest.raises(JobFailed, match="cancelled"):
        store.finetunes.wait(job)
    assert [found.id for found in store.jobs.list(status="cancelled", kind="finetune")] == [job.id]
    assert not list(store.jobs.list(status="queued"))
    assert store.jobs.retry(job.id).status == "queued"


def test_a_cost_is_told_before_anything_starts(service: Service, store: GradientStore, tmp_path: Path) -> None:
    pool = service.pool()["id"]
    assert store.finetunes.estimate(dataset=pool, model="org/base", fraction=0.5).rows == 5
    store.finetunes.create(dataset=pool, model="org/base", epochs=2)
    run = service.train(tmp_path)["result"]["run"]
    assert store.gradients.estimate(dataset=pool, run=run, dims=64, kinds="sgd").rows == 20
    assert not list(store.gradients.list())


def test_a_question_without_gradients_says_what_to_send(service: Service, store: GradientStore, tmp_path: Path) -> None:
    service.pool(name="pool")
    service.task("target")
    store.finetunes.create(dataset="pool", model="org/base", epochs=2)
    service.train(tmp_path)
    with pytest.raises(Conflict, match="POST /gradients") as caught:
        store.select(task="target", pct=0.05)
    assert caught.value.problem.type == "gradients-missing"


def test_a_percentage_is_corrected(service: Service, store: GradientStore) -> None:
    service.task("target")
    with pytest.raises(Invalid, match=r"5 % is 0\.05"):
        store.select(task="target", pct=5)


def test_what_the_types_leave_out_the_server_decides(service: Service, store: GradientStore, tmp_path: Path) -> None:
    pool = service.pool()["id"]
    job = store.finetunes.create(dataset=pool, model="org/base")
    assert job.request == FinetuneRequest(dataset=pool, model="org/base")
    run = service.train(tmp_path)["result"]["run"]
    made = store.gradients.create(dataset=pool, run=run, kinds="sgd")
    assert made.request == GradientsRequest(dataset=pool, run=run, kinds=["sgd"])


def test_a_key_is_asked_for_and_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path / "store", api_key="secret") as service:
        with GradientStore(service.url) as store, pytest.raises(NotAuthenticated, match="GRADSTORE_API_KEY"):
            store.datasets.get("x")
        with GradientStore(service.url, api_key="secret") as store:
            assert store.health().version
        with pytest.raises(SystemExit) as ended:
            cli.app(["--url", service.url, "--api-key", "secret", "datasets", "list"])
        assert ended.value.code == 0
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.app(["--url", service.url, "--api-key", "wrong", "datasets", "list"])
        assert ended.value.code == 1
        assert "key" in capsys.readouterr().err


def test_the_awaiting_client_does_the_same(service: Service, tmp_path: Path) -> None:
    async def use() -> tuple[int, str, list[str]]:
        async with AsyncGradientStore(service.url) as store:
            pool = await store.datasets.upload(io.BytesIO(jsonl(4)), filename="pool.jsonl")
            folder = written(tmp_path / "target", task_files("target"))
            task, job = await asyncio.gather(
                store.tasks.upload(folder, name="target", kind="jsonl"),
                store.finetunes.create(dataset=pool.id, model="org/base", epochs=1),
            )
            training = asyncio.to_thread(service.train, tmp_path)
            done, _ = await asyncio.gather(store.finetunes.wait(job), training)
            lines = [line async for line in store.datasets.lines(pool.id)]
            return len(lines), task.name, done.result.checkpoints

    count, name, checkpoints = asyncio.run(use())
    assert (count, name, len(checkpoints)) == (4, "target", 1)
