"""Garbage collection: only what nothing refers to goes, and a dry run removes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete

from datastore.catalog import utc_now
from datastore.errors import InUse
from datastore.garbage import garbage
from datastore.leftovers import OLD, Leftover
from datastore.schema import DatasetRow, IdempotencyRow, JobFeatureRow
from datastore.scores import TaskScores
from tests.stores import Store, numbers, request, store

__all__ = ["store"]


def collect(store: Store, *, older_than: float = 0) -> list[Leftover]:
    found = list(garbage(store, older_than=older_than))
    for each in found:
        each.remove()
    return found


@pytest.fixture
def filled(store: Store) -> Store:
    """A store with features of a pool, and scores made of them."""
    pool = store.pool(10, name="pool")
    store.features.start(request(dataset=pool.id))
    store.work(numbers)
    (segment, *_) = segments(store)
    scores = TaskScores(np.zeros(10, np.float32), np.zeros(10, np.int16), np.ones(10, np.bool_))
    store.scoring.cache.put("score_used", scores, made_from={"rows": [[segment, 0, 10]], "target_segments": []})
    return store


def segments(store: Store) -> list[str]:
    return sorted(path.name for path in store.store.root.glob("seg_*"))


def test_what_is_referred_to_is_no_garbage(filled: Store) -> None:
    before = sorted(filled.settings.data.rglob("*"))
    assert collect(filled) == []
    assert sorted(filled.settings.data.rglob("*")) == before


def index(data: Path) -> Path:
    folder = data / "indexes/index_gone"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"pieces": [[["seg_gone", 0, 10]]]}))
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda data: derived_scores(data, {"rows": [["seg_gone", 0, 10]]}),
        lambda data: derived_scores(data, {"rows": [], "texts": ["ds_gone"]}),
        index,
        lambda data: (data / "ngrams/runs_0123-13-v2.npz"),
        lambda data: (data / "questions/question_0123.npy"),
        lambda data: (data / "trainings/training_0123.json"),
        lambda data: (data / "datasets/sources/0123"),
        lambda data: (data / "selections/sel_0123.parquet"),
    ],
    ids=["scores", "text-scores", "index", "ngrams", "question", "training", "upload", "selection"],
)  # fmt: skip
def test_what_was_derived_of_what_is_gone_goes(filled: Store, make: Callable[[Path], Path]) -> None:
    path = make(filled.settings.data)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    assert list(garbage(filled, older_than=OLD)) == [], "somebody may be about to record what it belongs to"
    found = collect(filled)
    assert [each.place for each in found] == [str(path.relative_to(filled.settings.data))]
    assert found[0].bytes >= 5
    assert not path.exists()
    assert (filled.settings.scores / "score_used").is_dir()


def derived_scores(data: Path, made_from: dict[str, object]) -> Path:
    folder = data / "scores/score_gone"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"made_from": made_from}))
    return folder


def test_features_that_no_job_answers_with_go_and_then_what_was_derived_of_them(filled: Store) -> None:
    with filled.catalog.transaction() as session:
        session.execute(delete(JobFeatureRow))
    before = segments(filled)
    assert sorted(each.place for each in collect(filled)) == [f"features/{segment}" for segment in before]
    assert segments(filled) == []
    assert [each.place for each in collect(filled)] == ["scores/score_used"]
    assert collect(filled) == []


def test_keys_that_have_had_their_day_go(filled: Store) -> None:
    with filled.catalog.transaction() as session:
        for key, age in (("new", timedelta(0)), ("old", timedelta(days=2))):
            session.add(IdempotencyRow(key=key, fingerprint="f", status=200, created_at=utc_now() - age))
    (found,) = collect(filled)
    assert "1 Idempotency-Key" in found.detail
    with filled.catalog.reading() as session:
        assert session.get(IdempotencyRow, "new") is not None
        assert session.get(IdempotencyRow, "old") is None


def test_what_is_in_use_is_not_deleted(filled: Store) -> None:
    with pytest.raises(InUse, match=r"ds_\w+ is used by grad_"):
        filled.catalog.remove(DatasetRow, "pool")
    assert collect(filled) == []


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "store")
    store.catalog.close()
    folder = derived_scores_in(store.settings.data)
    status, lines = gc(store.settings.data, "--dry-run")
    assert (status, [line["removed"] for line in lines]) == (0, [False])
    assert folder.is_dir()
    status, lines = gc(store.settings.data)
    assert (status, [line["place"] for line in lines]) == (0, ["scores/score_gone"])
    assert not folder.exists()
    assert gc(store.settings.data) == (0, [])


def derived_scores_in(data: Path) -> Path:
    (data / "scores").mkdir(exist_ok=True)
    folder = derived_scores(data, {"rows": [["seg_gone", 0, 10]]})
    then = time.time() - 2 * OLD
    for path in (folder / "manifest.json", folder):
        os.utime(path, (then, then))
    return folder


def gc(data: Path, *options: str) -> tuple[int, list[dict[str, object]]]:
    command = [str(Path(sys.executable).with_name("gradstore")), "gc", "--data", str(data), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]
