"""Streams, annotations and taxonomies through the service, by the client and the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gradstore import Conflict, GradientStore, Invalid, NotFound, cli
from gradstore.types import Dataset
from numpy.typing import NDArray
from safetensors import safe_open

from datastore import feature_files
from datastore.annotations import Reply
from tests.serving import Service, problem_of, serving

ROWS = 4


@pytest.fixture
def store(service: Service) -> Iterator[GradientStore]:
    with GradientStore(service.url, backoff=0.01) as client:
        yield client


@pytest.fixture
def pool(store: GradientStore) -> Dataset:
    rows = [
        {"id": f"row-{row}", "prompt": f"Say {row}.", "completion": str(row), "dataset": "ab"[row % 2]}
        for row in range(ROWS)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return store.datasets.upload(io.BytesIO(text.encode()), filename="pool.jsonl", name="pool")


def folder_of(folder: Path, ids: list[str]) -> Path:
    folder.mkdir()
    np.save(folder / "rows.npy", np.arange(2 * len(ids), dtype=np.float16).reshape(-1, 2))
    (folder / "ids.json").write_text(json.dumps(ids))
    return folder


def test_rows_go_up_as_a_folder_and_are_described(
    service: Service, store: GradientStore, pool: Dataset, tmp_path: Path
) -> None:
    job = store.streams.upload(folder_of(tmp_path / "mine", ["row-3", "row-1"]), dataset="pool", name="mine")
    assert job.result is not None
    assert (job.status, job.result.present_rows, job.result.dim) == ("succeeded", 2, 2)
    assert [row.id for row in job.result.absent] == ["row-0", "row-2"]
    assert store.streams.get("mine").id == job.id
    assert [each.id for each in store.streams.list()] == [job.id]
    assert service.backend.streams.matrix("mine")[0].tolist() == [[0, 0], [2, 3], [0, 0], [0, 1]]
    with pytest.raises(Conflict, match="str_"):
        store.datasets.delete("pool")
    with pytest.raises(Invalid, match="line 1: no row of"):
        store.streams.upload(folder_of(tmp_path / "strange", ["stranger"]), dataset="pool")
    skipped = store.streams.upload(tmp_path / "strange", dataset=pool.id, on_error="skip").result
    assert skipped is not None
    assert (skipped.total_problems, skipped.total_absent) == (1, ROWS)
    assert store.usage().counts["streams"] == 2
    store.streams.rename("mine", "yours")
    store.streams.delete("yours")
    with pytest.raises(NotFound):
        store.streams.get(job.id)


def awkward() -> NDArray[np.float32]:
    """Numbers that a careless step would change: signed zeros, the smallest and the largest, one of few bits more."""
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    return np.array([[0.0, -0.0, tiny], [huge, -huge, 1 + 2**-23], [1 / 3, -tiny, 0.1]], np.float32)


def test_rows_come_back_bit_for_bit_with_their_ids(
    service: Service, store: GradientStore, pool: Dataset, tmp_path: Path
) -> None:
    ids = ["row-3", "row-0", "row-1"]
    sent = folder_of(tmp_path / "mine", ids)
    np.save(sent / "rows.npy", awkward())
    stream = store.streams.upload(sent, dataset="pool", name="mine").id
    wanted = np.full((ROWS, 3), np.nan, np.float32)
    wanted[[3, 0, 1]] = awkward()

    whole = np.load(store.streams.save("mine", tmp_path / "whole.npy"))
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole.view("u4"), wanted.view("u4"))
    part = store.streams.save("mine", tmp_path / "part.safetensors", start=1, stop=4)
    with safe_open(part, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("rows").view("u4"), wanted[1:4].view("u4"))
        assert json.loads(file.metadata()["ids"]) == ["row-1", "row-2", "row-3"]
        assert json.loads(file.metadata()["gradstore"])["id"] == stream

    again = store.streams.upload(
        store.streams.save(stream, tmp_path / "all.safetensors"), dataset="pool", on_error="skip"
    )
    rows, present = service.backend.streams.matrix(again.id)
    assert present.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(rows[present].view("u4"), wanted[present].view("u4"))


def test_what_is_asked_of_a_streams_rows_is_checked(
    service: Service, store: GradientStore, pool: Dataset, tmp_path: Path
) -> None:
    job = store.streams.upload(folder_of(tmp_path / "mine", ["row-2"]), dataset=pool.id, name="mine")
    where = f"/streams/{job.id}/content"
    for query in ("start=3&stop=2", f"stop={ROWS + 1}", f"start={ROWS + 1}"):
        assert "has the rows 0 to 4" in problem_of(service.http.get(f"{where}?{query}"), 422).detail
    assert np.load(io.BytesIO(service.http.get(f"{where}?start=2&stop=2").content)).shape == (0, 2)
    answer = service.http.get(where, headers={"Accept": "application/x-safetensors"})
    assert answer.content == service.http.get(f"{where}?format=safetensors").content
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["link"].startswith(f"</streams/{job.id}>")
    assert (
        service.http.get(where, headers={"If-None-Match": service.http.get(where).headers["etag"]}).status_code == 304
    )
    with pytest.raises(ValueError, match=r"streams are saved as \.npy or \.safetensors"):
        store.streams.save("mine", tmp_path / "rows.csv")
    service.checkpoint()
    waiting = store.streams.create(kind="hidden", dataset="pool", checkpoint=store.checkpoints.list().__next__().id)
    with pytest.raises(Conflict, match="is queued: its rows are known once it has succeeded"):
        store.streams.save(waiting.id, tmp_path / "rows.npy")
    (matrix,) = service.backend.settings.matrices.glob("matrix_*")
    (matrix / "rows.npy").write_bytes(b"damaged")
    assert "delete what it is part of" in problem_of(service.http.get(where), 500).detail


def test_ids_that_no_header_of_safetensors_holds_are_refused_and_fewer_rows_or_npy_are_not(
    service: Service, store: GradientStore, pool: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.streams.upload(folder_of(tmp_path / "mine", ["row-2"]), dataset=pool.id, name="mine")
    where = f"/streams/{job.id}/content"
    whole = service.http.get(f"{where}?format=safetensors").content
    header = int.from_bytes(whole[:8], "little")
    monkeypatch.setattr(feature_files, "MAX_HEADER", header - 1)
    told = problem_of(service.http.get(f"{where}?format=safetensors"), 422).detail
    assert f"at most {header - 1:,} bytes" in told
    assert service.http.get(f"{where}?format=safetensors&stop=1").is_success
    assert np.load(io.BytesIO(service.http.get(where).content)).shape == (ROWS, 2)
    monkeypatch.setattr(feature_files, "MAX_HEADER", header)
    assert service.http.get(f"{where}?format=safetensors").content == whole


def test_labels_go_up_and_come_back_by_row(store: GradientStore, pool: Dataset) -> None:
    taxonomy = store.taxonomies.create([{"name": "sums"}, {"name": "prose", "definition": "Writing."}], name="two")
    assert store.taxonomies.create(taxonomy.capabilities).id == taxonomy.id
    assert len(store.taxonomies.create().capabilities) == 13
    lines = b'{"id": "row-2", "category": ["prose", "sums"]}\n{"id": "row-0", "categories": ["sums"]}\n'
    job = store.annotations.upload(io.BytesIO(lines), dataset=pool.id, taxonomy="two", name="labels")
    assert job.result is not None
    assert [(each.name, each.rows) for each in job.result.capabilities] == [("sums", 2), ("prose", 1)]
    rows = list(store.annotations.rows("labels"))
    assert [(row.id, row.categories) for row in rows] == [
        ("row-0", ["sums"]), ("row-1", None), ("row-2", ["sums", "prose"]), ("row-3", None),
    ]  # fmt: skip
    with pytest.raises(Conflict, match="ann_"):
        store.taxonomies.delete("two")
    with pytest.raises(Invalid, match="line 1: the taxonomy has no capability called 'prose'"):
        store.annotations.upload(io.BytesIO(lines), dataset=pool.id)
    origins = store.annotations.create(dataset="pool", by="origin")
    assert [row.categories for row in store.annotations.rows(origins.id)] == [["a"], ["b"], ["a"], ["b"]]
    store.annotations.delete("labels")
    store.taxonomies.delete("two")


def test_a_dry_run_of_an_annotation_counts_the_calls_and_records_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, labellers="http://127.0.0.1:1/v1") as service, GradientStore(service.url) as store:
        service.pool(ROWS, name="pool")
        labeller = {"model": "m", "calls_per_minute": 2, "max_tokens": 10}
        asked = store.annotations.estimate(dataset="pool", by="labeller", labeller=labeller)
        assert (asked.rows, asked.calls, asked.reused_rows, asked.max_tokens, asked.seconds) == (4, 4, 0, 40, 120)
        free = store.annotations.estimate(dataset="pool", by="origin")
        assert (free.rows, free.calls, free.seconds) == (ROWS, 0, 0)
        assert list(store.annotations.list()) == []
        assert list(store.taxonomies.list()) == []
        job = store.annotations.create(dataset="pool", by="labeller", labeller=labeller)
        claim = service.backend.jobs.claim("test", kinds=["annotation"])
        assert claim is not None
        replies = [Reply(0, [1]), Reply(1, []), Reply(2, None, "?"), Reply(3, None, "?")]
        assert service.backend.annotations.record(claim, replies)
        assert service.backend.jobs.succeed(claim)
        again = store.annotations.estimate(again=job.id)
        assert (again.calls, again.reused_rows, again.seconds) == (2, 2, 60)
        with pytest.raises(Invalid, match="dry_run goes with"):
            store.annotations.estimate(dataset="pool")


def test_pages_of_labels_follow_one_another(service: Service, store: GradientStore, pool: Dataset) -> None:
    job = store.annotations.create(dataset=pool.id, by="origin")
    first = service.http.get(f"/annotations/{job.id}/rows", params={"limit": 3}).json()
    assert (len(first["data"]), first["has_more"], first["next"]) == (3, True, 3)
    rest = service.http.get(f"/annotations/{job.id}/rows", params={"limit": 3, "after": first["next"]}).json()
    assert ([row["row"] for row in rest["data"]], rest["has_more"], rest["next"]) == ([3], False, None)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/streams", {"dataset": "pool"}, "send the rows as a file"),
        ("/streams", {"kind": "hidden", "dataset": "pool"}, "name the checkpoint"),
        ("/streams", {"kind": "gradients", "dataset": "pool"}, "takes gradients, a job"),
        ("/streams", {"kind": "routing", "dataset": "pool", "checkpoint": "c", "layers": [1]}, "kind=hidden"),
        ("/streams", {"kind": "hidden", "dataset": "pool", "checkpoint": "c", "layers": [2, 1]}, "ascending"),
        ("/annotations", {"dataset": "pool"}, "send the labels as a file"),
        ("/annotations", {"dataset": "pool", "by": "labeller"}, "the labeller to ask"),
        ("/annotations", {"by": "origin"}, "either a dataset or a task"),
        ("/annotations", {"again": "x", "by": "origin"}, "leave everything else out"),
        ("/annotations", {"dataset": "pool", "by": "labeller", "labeller": {"model": "m"}}, "GRADSTORE_LABELLERS"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    service: Service, pool: Dataset, path: str, body: dict[str, object], said: str
) -> None:
    assert pool.rows == ROWS
    answer = service.http.post(path, json=body)
    assert answer.status_code == 422
    assert said in answer.text


def test_the_command_line_uploads_labels_and_prints_them(
    service: Service, pool: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_URL", service.url)

    def run(*words: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            cli.app(list(words))
        assert left.value.code in (0, None)
        said = capsys.readouterr()
        return said.out, said.err

    (tmp_path / "two.json").write_text('[{"name": "sums"}, {"name": "prose"}]')
    (tmp_path / "labels.jsonl").write_text('{"id": "row-2", "categories": "prose"}\n{"id": "x", "categories": []}\n')
    taxonomy = run("taxonomies", "create", str(tmp_path / "two.json"))[0].strip()
    words = ("annotations", "upload", str(tmp_path / "labels.jsonl"), "--dataset", pool.id, "--taxonomy", taxonomy)
    out, err = run(*words, "--on-error", "skip", "--name", "labels")
    assert out.startswith("ann_")
    assert "2: no row of" in err
    out, err = run("annotations", "show", "labels")
    assert "prose" in out
    assert "1 of 4 rows have labels" in err
    shown = [json.loads(line) for line in run("annotations", "rows", "labels", "--json")[0].splitlines()]
    assert [row["categories"] for row in shown] == [None, None, ["prose"], None]
    folder = folder_of(tmp_path / "mine", ["row-0"])
    stream = run("streams", "upload", str(folder), "--dataset", "pool")[0].strip()
    assert stream.startswith("str_")
    saved = run("streams", "content", stream, "--output", str(tmp_path / "rows.npy"), "--stop", "2")[0].strip()
    np.testing.assert_array_equal(np.load(saved), [[0, 1], [np.nan, np.nan]])
