"""The study of a bank on real rows: its shots are no test rows, and its pools hold no question of its tasks."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.adapters import POOLS, Target, _arc, _bare, _pools, _scienceqa
from datastore.tasks import TaskExample, readers


def asked(row: TaskExample) -> str:
    return row.example.messages[0].content if row.example.messages else row.example.prompt or ""


def test_the_studys_tasks_can_be_read_and_no_shot_is_a_test_row(shared_data: Path, tmp_path: Path) -> None:
    sizes = {}
    for target in (_arc(tmp_path, shared_data), _scienceqa(tmp_path, shared_data)):
        rows = readers()[target.kind].read(target.folder)
        shots, test = ([_bare(asked(row)) for row in split] for split in (rows.validation, rows.test))
        assert not set(shots) & set(test)
        assert {row.metric for row in [*rows.validation, *rows.test]} == {"choice"}
        assert all(any(question in text for question in target.questions) for text in [*shots, *test])
        assert len(target.shots.read_text().splitlines()) == len(shots)
        sizes[target.name] = len(shots), len(test)
    assert sizes == {"ARC-Challenge": (25, 25), "ScienceQA": (50, 148)}


def test_rows_that_hold_a_question_are_left_out_of_their_pool(shared_data: Path, tmp_path: Path) -> None:
    first = json.loads((shared_data / "train/processed/dolly/dolly_data.jsonl").read_text().splitlines()[0])
    asked = first["messages"][0]["content"]
    target = Target("none", "jsonl", tmp_path, tmp_path, frozenset({_bare(asked.upper())}))
    pools = _pools(tmp_path, shared_data, rows=50, targets=[target])
    assert set(pools) == set(POOLS)
    found = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in pools.items()}
    assert all(len(rows) == 50 for rows in found.values())
    assert first["id"] not in {row["id"] for row in found["dolly"]}
