"""Real rows through a real service: pools, awkward files and target tasks, as people upload and register them."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gradstore import GradientStore
from gradstore.errors import Invalid
from gradstore.types import Problem, UploadedDataset

from tests.processes import ServiceProcess
from tests.test_awkward_files import CASES

TASKS = {"mmlu": (57, 285), "bbh": (27, 81), "tydiqa": (9, 9), "gsm8k": (1, 30)}
"""Subtasks and validation rows of each kind (LESS, appendix A; GSM8K: the 30 rows of the folder)."""


@pytest.fixture(scope="module")
def service(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service without a worker: nothing here needs one."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "allowed").mkdir()
    options = ("--no-worker", "--allow", str(shared_data / "eval"))
    with ServiceProcess(folder / "store", *options, allow=folder / "allowed") as running:
        yield running


@pytest.fixture(scope="module")
def store(service: ServiceProcess) -> Iterator[GradientStore]:
    with service.client() as client:
        yield client


# Pools ----------------------------------------------------------------------------------------------------------------


def test_a_pool_of_four_thousand_rows_comes_back_byte_for_byte_however_it_was_packed(
    store: GradientStore, shared_data: Path, tmp_path: Path
) -> None:
    original = shared_data / "train" / "mixed" / "mixed_4000.jsonl"
    pool = store.datasets.upload(original, name="mixed")
    assert (pool.rows, pool.created, pool.report.problems) == (4000, True, [])
    assert sum(pool.origins.values()) == 4000
    assert store.datasets.download("mixed", tmp_path / "copy.jsonl").read_bytes() == original.read_bytes()
    packed = tmp_path / "mixed.jsonl.gz"
    packed.write_bytes(gzip.compress(original.read_bytes(), 1))
    again = store.datasets.upload(packed)
    assert (again.id, again.created, len(again.sources)) == (pool.id, False, 2)
    source = store.datasets.download(pool.id, tmp_path / "copy.gz", source=again.sources[-1].sha256)
    assert source.read_bytes() == packed.read_bytes()


def test_a_pool_in_two_parts_is_the_pool_in_one(store: GradientStore, shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "train" / "mixed" / "mixed_4000.jsonl").read_bytes().splitlines(keepends=True)
    whole = store.datasets.upload(shared_data / "train" / "mixed" / "mixed_4000.jsonl")
    for name, part in (("first", lines[:3600]), ("second", lines[3600:])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(part))
    first = store.datasets.upload(tmp_path / "first.jsonl")
    assert store.datasets.upload(tmp_path / "second.jsonl", append_to=first.id).id == whole.id


# Awkward files --------------------------------------------------------------------------------------------------------


def send(service: ServiceProcess, file: Path, *, on_error: str) -> httpx.Response:
    with file.open("rb") as content:
        form = {"files": {"file": (file.name, content)}, "data": {"on_error": on_error}}
        return httpx.post(f"{service.url}/datasets", **form, timeout=60)  # type: ignore[arg-type]  # httpx's own types


def stored(store: GradientStore) -> set[str]:
    return {dataset.id for dataset in store.datasets.list()}


@pytest.mark.parametrize("name", CASES)
def test_an_awkward_file_is_taken_without_its_bad_rows_or_has_none_that_is_good(
    service: ServiceProcess, store: GradientStore, shared_data: Path, name: str
) -> None:
    case, before = CASES[name], stored(store)
    answer = send(service, shared_data / "awkward" / name, on_error="skip")
    if not case.rows:
        assert answer.status_code == 422
        assert Problem.model_validate_json(answer.content).detail
        assert stored(store) == before
        return
    found = UploadedDataset.model_validate_json(answer.content)
    assert answer.status_code == (201 if found.created else 200)
    assert found.created == (found.id not in before)
    assert (found.rows, found.report.rows, found.report.skipped) == (case.rows, case.rows, len(case.bad))
    assert tuple(problem.line for problem in found.report.problems) == case.bad
    assert tuple(note.line for note in found.report.notes) == case.noted
    assert len(list(store.datasets.lines(found.id))) == case.rows


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bad or not case.rows])
def test_an_awkward_file_is_refused_with_its_lines_unless_told_to_skip_them(
    service: ServiceProcess, store: GradientStore, shared_data: Path, name: str
) -> None:
    case, before = CASES[name], stored(store)
    answer = send(service, shared_data / "awkward" / name, on_error="fail")
    problem = Problem.model_validate_json(answer.content)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert tuple(item.line for item in problem.errors) == case.bad
    assert problem.total_errors == len(case.bad)
    assert all(item.detail for item in problem.errors)
    assert stored(store) == before


# Tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_the_same_from_a_folder_a_zip_and_a_place_on_the_server(
    service: ServiceProcess, store: GradientStore, shared_data: Path, tmp_path: Path, kind: str
) -> None:
    folder = shared_data / "eval" / kind
    task = store.tasks.upload(folder, name=kind, kind=kind)
    assert (len(task.subtasks), task.validation) == TASKS[kind]
    assert task.test > 0
    archive = tmp_path / f"{kind}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in folder.rglob("*"):
            packed.write(path, Path(kind) / path.relative_to(folder))  # as people zip a folder: with its own name
    assert store.tasks.upload(archive, name=kind, kind=kind).id == task.id
    assert store.tasks.register(folder, name=kind, kind=kind).id == task.id
    again = httpx.post(f"{service.url}/tasks", json={"path": str(folder), "name": kind, "kind": kind})
    assert (again.status_code, again.json()["id"]) == (200, task.id)


@pytest.mark.parametrize("name", ["../outside.jsonl", "deep/../../outside.jsonl", "/tmp/outside.jsonl", "C:\\o.jsonl"])  # noqa: S108 - refused
@pytest.mark.parametrize("noun", ["tasks", "checkpoints"])
def test_an_archive_that_leads_out_of_its_folder_is_refused_and_writes_nothing(
    service: ServiceProcess, tmp_path: Path, noun: str, name: str
) -> None:
    archive = tmp_path / "task.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("validation.jsonl", '{"prompt": "a", "completion": "b"}\n')
        packed.writestr(name, '{"prompt": "c", "completion": "d"}\n')
    fields = {"name": "out", "kind": "jsonl"} if noun == "tasks" else {"name": "out"}
    before = set(service.folder.parent.rglob("*.jsonl"))
    answer = httpx.post(
        f"{service.url}/{noun}", data=fields, files={"files": ("task.zip", archive.read_bytes(), "application/zip")}
    )
    assert answer.status_code == 422, answer.text
    assert repr(name) in Problem.model_validate_json(answer.content).detail
    assert set(service.folder.parent.rglob("*.jsonl")) == before
    assert not Path("/tmp/outside.jsonl").exists()  # noqa: S108 - where an absolute name would lead


def test_a_link_in_an_archive_is_refused(service: ServiceProcess, tmp_path: Path) -> None:
    archive = tmp_path / "task.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        link = zipfile.ZipInfo("validation.jsonl")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, "/etc/passwd")
    answer = httpx.post(
        f"{service.url}/tasks", data={"name": "link", "kind": "jsonl"}, files={"files": ("t.zip", archive.read_bytes())}
    )
    assert answer.status_code == 422
    assert "link" in answer.json()["detail"]


def test_nothing_outside_the_allowed_folders_is_registered(
    service: ServiceProcess, store: GradientStore, shared_data: Path
) -> None:
    allowed = service.folder.parent / "allowed"
    (allowed / "link").symlink_to(shared_data / "targets")
    for path in (shared_data / "targets", allowed / ".." / "store", allowed / "link", Path("/nowhere"), Path(os.sep)):
        with pytest.raises(Invalid, match="allowed folders") as caught:
            store.tasks.register(path, name="outside", kind="jsonl")
        assert str(caught.value).count("No such file") == 0
        with pytest.raises(Invalid, match="allowed folders"):
            store.checkpoints.register(path)
    assert "outside" not in {task.name for task in store.tasks.list()}
