"""Features of other programs: read from their files, checked, stored, scored, and never mixed with those made here."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradstore import Conflict, GradientStore, Invalid, JobFailed, cli
from gradstore.types import ImportRequest, JobKind
from numpy.typing import NDArray
from safetensors.numpy import load, save_file
from typer.testing import CliRunner

from datastore.errors import ForeignProjection, InvalidFeatures
from datastore.imports import find
from datastore.leases import MAKE_FEATURES, collection
from datastore.parameters import Query
from datastore.store import OpenStore
from tests.bruteforce import aggregated, influences
from tests.serving import Service, problem_of, serving
from tests.stores import Store
from worker.context import Context
from worker.heartbeat import Heartbeat
from worker.imports import Table, open_table
from worker.jobs import KINDS, run
from worker.kinds import imports

ROWS, DIM = 1100, 24  # more than a chunk


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service with a pool, a task of three rows and a checkpoint; `tmp_path` is an allowed root."""
    with serving(tmp_path / "store", allowed_roots=(tmp_path,)) as running:
        running.pool(ROWS, name="pool")
        running.task("target")
        running.http.patch(f"/checkpoints/{running.checkpoint()['id']}", json={"name": "warm"})
        yield running


@pytest.fixture
def store(service: Service) -> Iterator[GradientStore]:
    with GradientStore(service.url, backoff=0.01) as client:
        yield client


def work(service: Service) -> list[str]:
    """Do what waits, as a worker over the same store does."""
    context = Context.open(service.backend.settings, torch.device("cpu"))
    outcomes: list[str] = []
    while (claim := context.jobs.claim("test", kinds=KINDS)) is not None:
        outcomes.append(run(claim, context))
    context.catalog.close()
    return outcomes


def drawn(rows: int, *, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def less_folder(folder: Path, features: NDArray[np.float32], *, merged: bool = True) -> Path:
    """What LESS's collect_grads leaves: rows of 160 batches each, and merged, normalised and not."""
    inner = folder / f"dim{features.shape[1]}"
    inner.mkdir(parents=True)
    tensor = torch.from_numpy(features).to(torch.float16)
    for start in range(0, len(features), 160):
        torch.save(tensor[start : start + 160].clone(), inner / f"grads-{min(start + 160, len(features))}.pt")
    if merged:
        torch.save(tensor, inner / "all_unormalized.pt")
        torch.save(torch.nn.functional.normalize(tensor.float(), dim=1).half(), inner / "all_orig.pt")
    return folder


FIELDS: dict[str, Any] = {"checkpoint": "warm", "projection_id": "less seed 0", "dtype": "float32"}


def imported(store: GradientStore, service: Service, path: Path, **fields: Any) -> Any:
    job = store.imports.upload(path, **{**FIELDS, **fields})
    assert work(service) == ["succeeded"]
    return store.imports.wait(job, timeout=5).result


def test_lesss_folder_becomes_a_feature_set_that_is_scored_as_by_hand(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    pool, target = drawn(ROWS).astype(np.float16), drawn(3, seed=1).astype(np.float16)
    pool[7] = 0
    result = imported(store, service, less_folder(tmp_path / "train", pool), dataset="pool")
    assert result.files == ["all_unormalized.pt"]
    assert (result.source_dtype, result.normalised, result.rows) == ("float16", False, ROWS)
    assert [(row.row, row.reason) for row in result.excluded] == [(7, "feature is zero")]
    lengths = np.linalg.norm(np.delete(pool, 7, axis=0).astype(np.float64), axis=1)
    norms = result.norms
    np.testing.assert_allclose(
        [norms.smallest, norms.median, norms.largest], [lengths.min(), np.median(lengths), lengths.max()], rtol=1e-6
    )
    features = result.feature_set
    assert (features.projection, features.projection_id, features.kind, features.dim) == (
        "foreign",
        "less seed 0",
        "adam",
        DIM,
    )
    imported(store, service, less_folder(tmp_path / "valid", target), task="target")
    with np.errstate(invalid="ignore"):  # of the row of zeros
        table = influences([pool.astype(np.float64)], [target.astype(np.float64)], [1])
    wanted = aggregated(np.nan_to_num(table, nan=-9), ["only"] * 3)
    scores = [row.score for row in store.scores(task="target", timeout=30)]
    assert scores[7] is None
    np.testing.assert_allclose(np.delete(np.array(scores, float), 7), np.delete(wanted, 7), atol=1e-6)
    selection = store.select(task="target", k=10)
    assert selection.recipe.projection_id == "less seed 0"
    assert [row.row for row in selection.data] == np.argsort(-wanted, kind="stable")[:10].tolist()
    told = store.selections.provenance(selection.id)
    assert service.http.get(told.request.removeprefix("GET ")).json()["id"] == selection.id
    view = service.backend.features.view(features)
    np.testing.assert_array_equal(view.features(0, ROWS), pool.astype(np.float32))
    np.testing.assert_allclose(view.norms[:7], np.linalg.norm(pool[:7].astype(np.float64), axis=1), rtol=1e-6)


def every_form(folder: Path, features: NDArray[np.float32]) -> dict[str, Path]:
    """The same features in files of every form that is read."""
    found = {name: folder / name for name in ("pieces", "normalised", "npy", "safetensors", "pt", "zip")}
    for name, path in found.items():
        path.mkdir(parents=True)
        if name in {"pieces", "normalised"}:
            less_folder(path, features, merged=name == "normalised")
            (path / f"dim{DIM}" / "all_unormalized.pt").unlink(missing_ok=True)
    _saved(found["npy"] / "features.npy", features)
    save_file({"features": features, "ids": np.arange(ROWS)}, found["safetensors"] / "features.safetensors")
    torch.save(torch.nn.Parameter(torch.from_numpy(features).bfloat16()), found["pt"] / "mine.pt")
    with zipfile.ZipFile(folder / "files.zip", "w") as archive:
        archive.write(found["npy"] / "features.npy", "inner/features.npy")
    return {**found, "pt": found["pt"] / "mine.pt", "zip": folder / "files.zip"}


def test_every_form_of_the_files_gives_the_same_rows(store: GradientStore, service: Service, tmp_path: Path) -> None:
    features = drawn(ROWS).astype(np.float16).astype(np.float32)
    for form, path in every_form(tmp_path / "forms", features).items():
        result = imported(store, service, path, dataset="pool", projection_id=form)
        got = service.backend.features.view(result.feature_set).features(0, ROWS)
        assert result.normalised == (form == "normalised")
        length = np.linalg.norm(features, axis=1, keepdims=True) if result.normalised else 1
        tolerance = {"pt": 2e-2, "normalised": 1e-3}  # bfloat16, and float16 after the division
        np.testing.assert_allclose(got, features / length, atol=tolerance.get(form, 0), err_msg=form)
        if form == "pieces":
            assert result.files[:2] == ["grads-160.pt", "grads-320.pt"]
    assert not list((tmp_path / "store" / "imports").glob("imp_*"))


def test_exported_features_can_be_imported(store: GradientStore, service: Service, tmp_path: Path) -> None:
    first = imported(store, service, _saved(tmp_path / "a.npy", drawn(ROWS)), dataset="pool")
    values = service.backend.features.view(first.feature_set).features(0, ROWS)
    save_file({"features": values}, tmp_path / "b.safetensors")
    second = imported(store, service, tmp_path / "b.safetensors", dataset="pool", projection_id="another")
    assert second.feature_set.id != first.feature_set.id
    again = service.backend.features.view(second.feature_set).features(0, ROWS)
    np.testing.assert_array_equal(again, values)


def test_a_folder_of_the_server_is_read_in_place_and_asking_again_gives_the_same(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    folder = less_folder(tmp_path / "train", drawn(ROWS))
    job = store.imports.register(folder, dataset="pool", name="mine", **FIELDS)
    assert (job.status, job.kind, job.request.path) == ("queued", "import", str(folder))
    assert work(service) == ["succeeded"]
    assert store.imports.register(folder, dataset="pool", **FIELDS).id == store.imports.get("mine").id == job.id
    assert work(service) == []
    assert [one.id for one in store.imports.list()] == [job.id]
    assert folder.is_dir()
    problem_of(service.http.post("/imports", json={"path": "/etc", "dataset": "pool", **FIELDS}), 422)
    refused = problem_of(service.http.post("/imports", json={"dataset": "pool", **FIELDS}), 422)
    assert refused.errors[0].pointer == "/path"
    feature_set = store.imports.get("mine").result.feature_set.id  # type: ignore[union-attr]
    store.imports.delete("mine")
    assert not service.backend.features.complete(datasets=[job.request.dataset or "", store.datasets.get("pool").id])
    segments = list((tmp_path / "store" / "features").glob("seg_*"))
    assert not segments, feature_set


def _saved(path: Path, features: NDArray[Any]) -> Path:
    np.save(path, features)
    return path


class Evil:
    """Would make a file if it were unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("harm", "w"))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that must be refused, and a word of the reason."""
    broken = drawn(ROWS)
    broken[[3, 1050], 5] = np.nan, np.inf
    folder.mkdir()
    torch.save({"a": torch.ones(2, 2)}, folder / "dict.pt")
    torch.save(Evil(), folder / "evil.pt")
    torch.save(torch.ones(ROWS, DIM, dtype=torch.int64), folder / "ints.pt")
    np.save(folder / "objects.npy", np.array([Evil()], object), allow_pickle=True)
    torch.save(torch.ones(ROWS, DIM).to_sparse(), folder / "sparse.pt")
    torch.save(torch.empty(ROWS, DIM, device="meta"), folder / "meta.pt")
    torch.save(torch.ones(ROWS, 1).expand(ROWS, 1 << 40), folder / "expanded.pt")
    save_file({"a": drawn(2), "b": drawn(2)}, folder / "two.safetensors")
    (folder / "cut.pt").write_bytes(b"PK\x03\x04 nothing")
    (folder / "text.csv").write_text("1,2\n")
    less_folder(folder / "several", drawn(ROWS))
    less_folder(folder / "several/x", drawn(4, dim=8))
    (folder / "several/x/dim8").rename(folder / "several/dim8")
    pieces = less_folder(folder / "uneven", drawn(160), merged=False) / f"dim{DIM}"
    torch.save(torch.ones(ROWS - 160, 8), pieces / "grads-1100.pt")
    return {
        "short": (_saved(folder / "short.npy", drawn(990)), r"990 rows and the dataset pool has 1,100"),
        "broken": (
            _saved(folder / "broken.npy", broken),
            r"2 rows hold a NaN, an infinity or more than float32 holds \(rows 3, 1050",
        ),
        "flat": (_saved(folder / "flat.npy", drawn(ROWS)[:, 0]), r"shape \(1100,\)"),
        "zeros": (_saved(folder / "zeros.npy", np.zeros((ROWS, DIM), np.float32)), "no row has a direction"),
        "dict": (folder / "dict.pt", "holds a dict"),
        "evil": (folder / "evil.pt", "perhaps code, and was not opened"),
        "ints": (folder / "ints.pt", "type int64"),
        "sparse": (folder / "sparse.pt", "sparse, quantised or empty tensor"),
        "meta": (folder / "meta.pt", "sparse, quantised or empty tensor"),
        "expanded": (folder / "expanded.pt", r"shown again and again .* save its clone"),
        "objects": (folder / "objects.npy", "pickled objects, which are not opened"),
        "two": (folder / "two.safetensors", "one called 'features'"),
        "cut": (folder / "cut.pt", "cannot be read"),
        "text": (folder / "text.csv", "no file of features"),
        "several": (folder / "several", "dims 8, 24: send one as dim"),
        "uneven": (folder / "uneven", "rows of different lengths"),
    }


def test_files_that_do_not_fit_are_refused_in_words_and_leave_nothing(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    for name, (path, reason) in bad_files(tmp_path / "bad").items():
        job = store.imports.register(path, dataset="pool", **FIELDS)
        assert work(service) == ["failed"], name
        with pytest.raises(JobFailed, match=reason) as caught:
            store.imports.wait(job, timeout=5)
        assert caught.value.problem.type == "invalid-features", name
        assert service.backend.jobs.get(job.id).progress.done == 0
    assert not Path("harm").exists()
    assert not list((tmp_path / "store" / "features").glob("seg_*"))
    wrong = store.imports.register(_saved(tmp_path / "a.npy", drawn(ROWS)), dataset="pool", dim=8, **FIELDS)
    assert work(service) == ["failed"]
    assert "dim says 8" in str(store.imports.get(wrong.id).error)


def test_rows_that_are_not_finite_can_be_skipped(store: GradientStore, service: Service, tmp_path: Path) -> None:
    features = drawn(ROWS)
    features[[3, 1050], 5] = np.nan, np.inf
    result = imported(store, service, _saved(tmp_path / "a.npy", features), dataset="pool", on_error="skip")
    assert [(row.row, row.reason) for row in result.excluded] == [
        (3, "feature is not finite"),
        (1050, "feature is not finite"),
    ]
    assert result.feature_set.excluded == 2


def test_other_files_under_the_same_name_wait_until_the_first_are_deleted(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    first = store.imports.upload(_saved(tmp_path / "a.npy", drawn(ROWS)), dataset="pool", **FIELDS)
    second = store.imports.upload(_saved(tmp_path / "b.npy", drawn(ROWS, seed=5)), dataset="pool", **FIELDS)
    assert first.id != second.id
    assert work(service) == ["succeeded", "failed"]
    with pytest.raises(JobFailed, match=f"DELETE /imports/{first.id} first"):
        store.imports.wait(second, timeout=5)
    store.imports.delete(first.id)
    store.imports.retry(second.id)
    assert work(service) == ["succeeded"]
    result = store.imports.wait(second, timeout=5).result
    np.testing.assert_array_equal(service.backend.features.view(result.feature_set).features(0, 9), drawn(9, seed=5))


def test_a_killed_import_is_done_by_the_next_worker(store: GradientStore, service: Service, tmp_path: Path) -> None:
    job = store.imports.upload(_saved(tmp_path / "a.npy", drawn(ROWS)), dataset="pool", **FIELDS)
    context = Context.open(service.backend.settings, torch.device("cpu"))
    claim = context.jobs.claim("killed", kinds=KINDS)
    assert claim is not None
    with Heartbeat(context.jobs, claim, leaving=context.leaving) as heartbeat:
        commit = imports.work(claim, context, heartbeat)  # written, and never committed
    context.jobs.release(claim)
    assert work(service) == ["succeeded"]
    assert not commit()
    result = store.imports.wait(job, timeout=5).result
    np.testing.assert_array_equal(service.backend.features.view(result.feature_set).features(0, ROWS), drawn(ROWS))


def ours(service: Service, *, numbers: NDArray[np.float32] | None = None, **owner: Any) -> None:
    """Features that were computed here: these numbers."""
    body = {
        "checkpoints": ["warm"],
        "kinds": ["sgd"],
        "dims": [DIM],
        "dtype": "float32",
        "max_length": 2048,
        "template": "tulu",
    }
    assert service.http.post("/gradients", json={**body, **owner}).status_code == 202
    opened = Store(**{part.name: getattr(service.backend, part.name) for part in fields(OpenStore)})
    opened.work(lambda _, start, stop, dim: (drawn(stop, dim=dim) if numbers is None else numbers)[start:stop])


def worked(service: Service, path: str, body: dict[str, Any]) -> str:
    """Ask for a job by JSON and do what waits; returns its id."""
    answer = service.http.post(path, json=body)
    assert answer.status_code == 202, answer.text
    work(service)
    id: str = answer.json()["id"]
    assert service.http.get(f"/jobs/{id}").json()["status"] == "succeeded"
    return id


def made(kind: JobKind, features: NDArray[np.float32], service: Service, folder: Path) -> str:
    """A job of this kind, called by it, that leaves these features of the pool; returns its id."""
    if kind == "gradients":
        ours(service, dataset="pool", name=kind, numbers=features)
        job: dict[str, Any] = service.http.get(f"/gradients/{kind}").json()
        return str(job["id"])
    path = str(_saved(folder / f"{kind}.npy", features))
    body = {**FIELDS, "path": path, "dataset": "pool", "projection_id": kind}
    if kind == "import":
        return worked(service, "/imports", {**body, "name": kind})
    imported = worked(service, "/imports", body)
    return worked(service, "/conversions", {"gradients": imported, "dtype": "float16", "name": kind})


@pytest.mark.parametrize("kind", MAKE_FEATURES)
def test_the_features_of_every_kind_of_job_are_read_and_converted(
    kind: JobKind, store: GradientStore, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = drawn(ROWS).astype(np.float16).astype(np.float32)  # which a conversion to float16 keeps
    features[7] = 0
    wanted = features.copy()
    wanted[7] = np.nan
    job = made(kind, features, service, tmp_path)
    for reference in (job, kind):
        answer = service.http.get(f"/gradients/{reference}/features")
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), wanted)
        described = answer.headers["link"].partition(">")[0].removeprefix("<")
        assert service.http.get(described).json()["id"] == job
    part = load(service.http.get(f"/gradients/{job}/features?format=safetensors&start=5&stop=9").content)
    np.testing.assert_array_equal(part["features"], wanted[5:9])
    rows = list(store.gradients.rows(job))
    assert [(row.row, row.norm is None) for row in rows] == [(row, row == 7) for row in range(ROWS)]
    lengths = np.linalg.norm(features[:7].astype(np.float64), axis=1) if kind != "gradients" else np.ones(7)
    np.testing.assert_allclose([row.norm for row in rows[:7]], lengths, rtol=1e-6)
    table = np.load(store.gradients.save_rows(kind, tmp_path / "rows.npy"))
    np.testing.assert_allclose(table["norm"][:7], lengths, rtol=1e-6)
    monkeypatch.setenv("GRADSTORE_URL", service.url)
    done = CliRunner().invoke(cli.app, ["gradients", "features", kind, "--output", str(tmp_path / "all.npy")])
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), wanted)
    problem = problem_of(service.http.get(f"/gradients/{job}/rows?feature_set=feat_9"), 404)
    assert f"GET {collection(kind)}/{job} lists" in problem.detail
    done = CliRunner().invoke(cli.app, ["conversions", "create", "--gradients", kind, "--dtype", "int8"])
    assert done.exit_code == 0, done.output
    work(service)
    narrower = np.load(store.gradients.save_features(done.stdout.strip(), tmp_path / "narrower.npy"))
    largest = np.abs(features).max(axis=1, keepdims=True)
    assert (np.isnan(narrower) == np.isnan(wanted)).all()
    assert (np.abs(np.delete(narrower - features, 7, axis=0)) <= np.delete(largest, 7, axis=0) / 127).all()


def test_a_name_that_several_jobs_have_is_the_gradients_jobs(service: Service, tmp_path: Path) -> None:
    features = {kind: drawn(ROWS, seed=seed) for seed, kind in enumerate(MAKE_FEATURES)}
    jobs = {kind: made(kind, features[kind], service, tmp_path) for kind in ("import", "conversion")}
    for kind, job in jobs.items():
        assert service.http.patch(f"{collection(kind)}/{job}", json={"name": "same"}).is_success
    assert "name the job by its id" in problem_of(service.http.get("/gradients/same/features"), 409).detail
    ours(service, dataset="pool", name="same", numbers=features["gradients"])
    found = np.load(io.BytesIO(service.http.get("/gradients/same/features").content))
    np.testing.assert_array_equal(found, features["gradients"])


def test_features_of_no_job_or_of_one_at_work_are_not_read(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    job = store.imports.upload(_saved(tmp_path / "a.npy", drawn(ROWS)), dataset="pool", **FIELDS)
    evaluation = service.http.post("/evaluations", json={"model": "org/base", "tasks": ["target"]}).json()["id"]
    for read in ("features", "rows"):
        assert "is queued" in problem_of(service.http.get(f"/gradients/{job.id}/{read}"), 409).detail
        for reference in ("nothing", evaluation):
            assert "GET /jobs lists" in problem_of(service.http.get(f"/gradients/{reference}/{read}"), 404).detail
    asked = {"gradients": job.id, "dtype": "int8"}
    assert "is queued" in problem_of(service.http.post("/conversions", json=asked), 409).detail
    problem_of(service.http.post("/conversions", json={**asked, "gradients": evaluation}), 404)


def test_imported_features_are_never_compared_with_others(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    path, targets = _saved(tmp_path / "a.npy", drawn(ROWS)), _saved(tmp_path / "t.npy", drawn(3))
    imported(store, service, path, dataset="pool", kind="sgd")
    ours(service, task="target")
    refused = problem_of(service.http.get("/select?task=target&k=3"), 409)
    assert refused.type == "foreign-projection"
    assert "'less seed 0', of which the task target has none" in refused.detail
    with pytest.raises(ForeignProjection):  # an attribution's gradient is projected here
        service.backend.recipes.pools(Query(tasks=()), path="/attributions")
    ours(service, dataset="pool")
    assert store.select(task="target", k=3).recipe.projection == "blocks"  # the only ones that go together
    assert problem_of(service.http.get("/select?task=target&k=3&projection=foreign"), 409).type == "foreign-projection"
    imported(store, service, targets, task="target", projection_id="less seed 1")
    assert store.select(task="target", k=3).recipe.projection == "blocks"
    refused = problem_of(service.http.get("/select?task=target&k=3&projection_id=less%20seed%201"), 409)
    assert "the pool has no imported features with the projection_id 'less seed 1'" in refused.detail
    imported(store, service, targets, task="target")
    with pytest.raises(Conflict, match="sets of features fit"):
        store.select(task="target", k=3)
    selection = store.select(task="target", k=3, projection="foreign")
    assert (selection.recipe.projection, selection.recipe.projection_id) == ("foreign", "less seed 0")
    other = service.pool(20, name="other")
    refused = problem_of(service.http.get("/select?task=target&k=3&projection=foreign&dataset=pool&dataset=other"), 409)
    assert f"of which {other['id']} has none" in refused.detail
    mixed = problem_of(service.http.get("/select?task=target&k=3&dataset=pool&dataset=other"), 409)
    assert mixed.type == "gradients-missing"
    assert "foreign" not in mixed.detail


def test_features_imported_at_one_checkpoint_of_a_run_are_found_by_themselves(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    warm = service.http.get("/checkpoints/warm").json()["id"]
    store.runs.create([warm, service.checkpoint(1)["id"]], name="run")
    imported(store, service, _saved(tmp_path / "a.npy", drawn(ROWS)), dataset="pool", kind="sgd")
    imported(store, service, _saved(tmp_path / "t.npy", drawn(3)), task="target")
    found = store.select(task="target", k=3, projection_id="less seed 0")
    assert (found.recipe.run, found.recipe.checkpoints) == (None, [warm])
    for asked in ({"projection_id": "nope"}, {"projection": "foreign", "dim": 3}):
        refused = problem_of(service.http.get("/select", params={"task": "target", "k": 3, **asked}), 409)
        assert "the pool has no imported features" in refused.detail
        assert "None" not in refused.detail


def test_features_of_a_task_that_are_foreign_are_told_where_ours_are_missing(
    store: GradientStore, service: Service, tmp_path: Path
) -> None:
    ours(service, dataset="pool")
    imported(store, service, _saved(tmp_path / "t.npy", drawn(3)), task="target")
    refused = problem_of(service.http.get("/select?task=target&k=3"), 409)
    assert refused.type == "gradients-missing"
    assert "its imported ones have the foreign projection 'less seed 0'" in refused.detail


def test_foreign_is_nothing_to_compute(service: Service) -> None:
    body = {"dataset": "pool", "checkpoints": ["warm"], "projection": "foreign"}
    assert problem_of(service.http.post("/gradients", json=body), 422).errors[0].pointer == "/projection"


def test_the_command_imports_and_waits(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work_once_there_is_some() -> None:
        while not work(service):
            time.sleep(0.1)

    monkeypatch.setenv("GRADSTORE_URL", service.url)
    folder = less_folder(tmp_path / "train", drawn(ROWS))
    options = ["--dataset", "pool", "--checkpoint", "warm", "--projection-id", "less"]
    worker = threading.Thread(target=work_once_there_is_some, daemon=True)
    worker.start()
    done = CliRunner().invoke(cli.app, ["imports", "create", str(folder), *options, "--on-server", "--wait", "--json"])
    worker.join()
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["result"]["normalised"] is False
    refused = CliRunner().invoke(cli.app, ["imports", "create", str(tmp_path / "none"), *options])
    assert refused.exit_code == 1


def test_what_an_import_needs_is_said_at_once(store: GradientStore, service: Service, tmp_path: Path) -> None:
    path = _saved(tmp_path / "a.npy", drawn(ROWS))
    with pytest.raises(Invalid, match="either a dataset or a task"):
        store.imports.upload(path, **FIELDS)
    with pytest.raises(Invalid, match="projection_id"):
        store.imports.upload(path, dataset="pool", checkpoint="warm")  # type: ignore[call-arg]
    assert ImportRequest(dataset="d", checkpoint="c", projection_id="p").max_length == 2048


def test_rows_of_many_files_are_one_table(tmp_path: Path) -> None:
    features = drawn(37)
    inner = tmp_path / "dim24"
    inner.mkdir()
    for number, (start, stop) in enumerate([(0, 5), (5, 6), (6, 37)], start=1):
        torch.save(torch.from_numpy(features[start:stop].copy()), inner / f"grads-{number * 9}.pt")
    paths = find(tmp_path, dim=None)
    assert [path.name for path in paths] == ["grads-9.pt", "grads-18.pt", "grads-27.pt"]
    table: Table = open_table(paths, rows=37, owner="it", dim=24)
    for start, stop in [(0, 37), (4, 7), (5, 6), (36, 37), (6, 20)]:
        np.testing.assert_array_equal(table.read(start, stop), features[start:stop])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidFeatures, match="none of these"):
        find(tmp_path / "empty", dim=None)
