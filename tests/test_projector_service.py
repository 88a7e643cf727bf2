"""Ability spaces through the service: the clients and the command line, with a worker over the same store."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore import AsyncGradientStore, Conflict, GradientStore, Invalid, cli
from safetensors.numpy import load_file

from datastore.leases import Jobs
from tests.serving import Service
from worker.context import Context
from worker.jobs import KINDS, run

NAMES = ("algebra", "poetry", "law")
ROWS, DIM = 60, 12
CONFIG = {"width": 16, "blocks": 1, "dim": 8, "heads": 2, "epochs": 15, "adjustment_epochs": 1, "batch_size": 8}


@pytest.fixture
def store(service: Service) -> Iterator[GradientStore]:
    with GradientStore(service.url, backoff=0.01) as client:
        yield client


@pytest.fixture
def worker(service: Service) -> Context:
    return Context.open(service.backend.settings, torch.device("cpu"))


def work(context: Context) -> None:
    """Do what waits."""
    jobs: Jobs = context.jobs
    while (claim := jobs.claim(context.owner, kinds=KINDS)) is not None:
        assert run(claim, context) == "succeeded", jobs.get(claim.job).error


def sent(folder: Path, values: Any, ids: list[str]) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "rows.npy", np.asarray(values, np.float32))
    (folder / "ids.json").write_text(json.dumps(ids))
    return folder


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Lab:
    """A pool with a stream and labels, and a task with a stream."""

    def __init__(self, store: GradientStore, folder: Path) -> None:
        rng = np.random.default_rng(0)
        labels = np.eye(len(NAMES), dtype=bool)[rng.integers(len(NAMES), size=ROWS)]
        gradients = 3 * labels @ np.eye(len(NAMES), DIM) + 0.3 * rng.standard_normal((ROWS, DIM))
        ids = [f"row-{row}" for row in range(ROWS)]
        self.origins = [NAMES[number] for number in labels.argmax(axis=1)]
        rows = [
            {"dataset": origin, "id": id, "prompt": f"question {id}", "completion": "yes"}
            for id, origin in zip(ids, self.origins, strict=True)
        ]
        self.pool = store.datasets.upload(io.BytesIO(lines(rows)), name="pool", filename="pool.jsonl").id
        self.stream = store.streams.upload(sent(folder / "pool", gradients, ids), dataset="pool", name="of-pool").id
        store.annotations.create(dataset="pool", by="origin", name="origins")
        wanted = [f"want-{row}" for row in range(4)]
        task = [{"id": id, "prompt": id, "completion": "no", "subtask": "only"} for id in wanted]
        (folder / "task").mkdir()
        for split in ("validation", "test"):
            (folder / "task" / f"{split}.jsonl").write_bytes(lines(task))
        self.task = store.tasks.upload(folder / "task", kind="jsonl", name="target").id
        self.wanted = 3 * np.eye(len(NAMES), DIM)[[2] * 4] + 0.3 * rng.standard_normal((4, DIM))
        store.streams.upload(sent(folder / "of-task", self.wanted, wanted), task="target", name="of-task")


@pytest.fixture
def lab(store: GradientStore, tmp_path: Path) -> Lab:
    return Lab(store, tmp_path / "lab")


def test_a_dry_run_says_what_would_be_trained_and_placed_and_starts_nothing(
    store: GradientStore, worker: Context, lab: Lab
) -> None:
    asked: dict[str, Any] = {"streams": {"gradients": "of-pool"}, "annotations": "origins", "config": CONFIG}
    found = store.projectors.estimate(**asked)
    assert (found.training_rows, found.validation_rows, found.steps) == (48, 12, 16 * 6)
    assert (found.read_bytes, found.done, found.seconds) == (ROWS * DIM * 4, False, None)
    assert list(store.projectors.list()) == []
    job = store.projectors.create(**asked)
    assert job.progress.total == found.steps
    work(worker)
    result = store.projectors.wait(job).result
    again = store.projectors.estimate(**asked)
    assert (again.done, again.basis, again.seconds) == (True, "measured", pytest.approx(result.seconds))
    twice = store.projectors.estimate(**{**asked, "config": {**CONFIG, "epochs": 31}})
    assert (twice.done, twice.seconds) == (False, pytest.approx(2 * result.seconds))
    assert store.projectors.estimate(**{**asked, "config": {**CONFIG, "width": 32}}).seconds is None
    placed = store.embeddings.estimate(projector=job.id, streams={"gradients": "of-task"})
    assert (placed.rows, placed.read_bytes, placed.bytes) == (4, 4 * DIM * 4, 4 * 4 * (8 + 2 * len(NAMES)))
    assert list(store.embeddings.list()) == []
    of_task = store.embeddings.create(projector=job.id, streams={"gradients": "of-task"})
    work(worker)
    assert store.embeddings.wait(of_task).result.dim == 8
    assert store.embeddings.estimate(projector=job.id, streams={"gradients": "of-task"}).done
    with pytest.raises(Conflict, match="it can be used once it has succeeded"):
        store.embeddings.estimate(
            projector=store.projectors.create(**asked, seed=1).id, streams={"gradients": lab.stream}
        )


def test_a_projector_places_rows_and_selects_those_that_lie_near_a_task(
    store: GradientStore, worker: Context, lab: Lab, tmp_path: Path
) -> None:
    streams = {"gradients": "of-pool"}
    job = store.projectors.create(streams=streams, annotations="origins", config=CONFIG, name="space")
    assert store.projectors.epochs(job.id).data == []
    work(worker)
    done = store.projectors.wait(job)
    assert done.result.macro_f1 is not None
    assert done.result.macro_f1 > 0.9
    assert [row.name for row in done.result.capabilities] == sorted(NAMES)
    assert store.projectors.epochs("space").data == done.result.epochs
    network = load_file(store.projectors.download("space", tmp_path / "space.safetensors"))
    assert sum(value.size for name, value in network.items() if name.startswith("space.")) == done.result.parameters

    with pytest.raises(Conflict, match="POST /embeddings"):
        store.select(method="cods", task="target", dataset="pool", k=10)
    for owner in ("of-pool", "of-task"):
        placed = store.embeddings.create(projector="space", streams={"gradients": owner}, name=owner)
        work(worker)
        assert store.embeddings.wait(placed).result.absent_rows == 0
    rows = list(store.embeddings.rows("of-pool"))
    array = np.load(store.embeddings.save("of-pool", tmp_path / "places.npy"))
    np.testing.assert_allclose(array, [row.embedding for row in rows], atol=1e-7)
    arrays = load_file(store.embeddings.save("of-pool", tmp_path / "places.safetensors"))
    assert arrays["present"].all()
    np.testing.assert_allclose(arrays["probabilities"], [row.probabilities for row in rows], atol=1e-7)

    chosen = store.select(method="cods", task="target", k=10)
    assert (chosen.recipe.by, chosen.recipe.datasets) == (done.id, [lab.pool])
    assert {row.origin for row in chosen.data} == {"law"}
    scores = {row.row: row.score for row in store.scores(method="cods", task="target", strategy="prototype")}
    assert len(scores) == ROWS
    named = store.select(method="cods", by="space", strategy="capability", capabilities="poetry", k=8)
    counted = {row.name: row for row in store.projectors.histogram("space", selection=named.id).capabilities}
    assert counted["poetry"].selected == 8
    assert (counted["poetry"].enrichment or 0) > 2
    with pytest.raises(Invalid, match="chooses rows"):
        list(store.scores(method="cods", task="target", strategy="k-center"))  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="use"):
        store.projectors.delete("space")

    async def found() -> list[str]:
        async with AsyncGradientStore(store.url) as awaiting:
            return [each.id async for each in awaiting.projectors.list()]

    assert asyncio.run(found()) == [done.id]


def test_the_command_line_trains_places_and_counts(
    store: GradientStore,
    worker: Context,
    lab: Lab,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADSTORE_URL", store.url)

    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.app(list(words), prog_name="gradstore")
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    config = [part for name, value in CONFIG.items() for part in ("--config", f"{name}={value}")]
    create = ("projectors", "create", "--gradients", "of-pool", "--annotations", "origins", "--name", "space", *config)
    id = said(*create).strip()
    work(worker)
    assert "algebra" in said("projectors", "show", "space")
    assert len(said("projectors", "epochs", id, "--json").splitlines()) == 16
    said("embeddings", "create", "--projector", "space", "--gradients", "of-pool", "--name", "places")
    work(worker)
    assert "poetry" in said("embeddings", "show", "places")
    assert len(said("embeddings", "rows", "places", "--limit", "3").splitlines()) == 4
    said("embeddings", "download", "places", str(tmp_path / "places.npy"))
    assert np.load(tmp_path / "places.npy").shape == (ROWS, 8)
    selection = json.loads(
        said("select", "--method", "cods", "--strategy", "capability", "--capability", "law", "--k", "5", "--json")
    )
    assert "enrichment" in said("projectors", "histogram", "space", selection["id"])


def test_the_few_rows_of_a_task_are_repeated_up_to_a_budget(store: GradientStore, lab: Lab, tmp_path: Path) -> None:
    once = [
        json.loads(line) for line in store.tasks.download("target", tmp_path / "once.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in once] == [f"want-{row}" for row in range(4)]
    many = store.tasks.download("target", tmp_path / "many.jsonl", rows=11)
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    assert [row["id"] for row in rows[3:6]] == ["want-3", "want-0#2", "want-1#2"]
    assert len({row["id"] for row in rows}) == 11
    many_more = store.tasks.download("target", tmp_path / "many-more.jsonl", rows=603)
    assert len({json.loads(line)["id"] for line in many_more.read_text().splitlines()}) == 603
    with pytest.raises(Invalid, match="1000000"):
        store.tasks.download("target", tmp_path / "endless.jsonl", rows=1_000_001)
    stored = store.datasets.upload(many, name="repeat")
    assert stored.rows == 11
