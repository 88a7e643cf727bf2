"""ScienceQA: school science in three subjects, multiple choice with two to five options.

Files, in ScienceQA's own layout: `problems.json` (pid → question, choices, hint, answer, subject, image) and
`pid_splits.json` (split → pids; without it each problem's own `split`): `val` to select for, `test` to evaluate on. Or
rows as MoLA keeps them: `*validation*.jsonl` (or `*train*.jsonl`) and `*test*.jsonl`. Questions with an image are left
out.

The user turn is MoLA's (context, question, options); the assistant's begins "Answer: The answer is", and what is learnt
is " X.". As `scienceqa-written` the same questions are answered by a text of the model's own, judged as MoLA does:
one that says "The answer is X." more than once has failed, also where it says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from datastore.tasks.reading import LETTERS, TaskExample, TaskFolder, TaskRows, question

PREFIX = "Answer: The answer is"
WRITTEN = r"The answer is ([A-Z])."
"""MoLA's to the letter: its full stop stands for any character, so an answer at a text's very end is not found."""

_Item = tuple[str, int | None, Any]
"""Id, line where there is one, and content of a question."""


class ScienceQa:
    """Reads `problems.json` with `pid_splits.json`, or MoLA's rows."""

    def __init__(self, *, written: bool = False) -> None:
        self.kind = "scienceqa-written" if written else "scienceqa"
        self._written = written

    def read(self, folder: Path) -> TaskRows:
        """Read the questions in `folder`; the subjects are the subtasks."""
        task = TaskFolder(folder, kind=self.kind)
        problems = task.find("problems.json")
        if problems:
            path = task.only(problems)
            splits = _problems(task, path)
            splits = {"validation": splits["val"], "test": splits["test"]}
            rows = {split: [(path, item) for item in items] for split, items in splits.items()}
        else:
            found = task.find("*validation*.jsonl*") or task.find("*train*.jsonl*")
            task.require(found, "problems.json with pid_splits.json, or validation.jsonl")
            rows = {
                "validation": list(_lines(task, found)),
                "test": list(_lines(task, task.find("*test*.jsonl*"))),
            }
        return _finish(task, rows, written=self._written)


def _problems(task: TaskFolder, path: Path) -> dict[str, list[_Item]]:
    content = task.json(path)
    if not isinstance(content, dict) or not all(isinstance(item, dict) for item in content.values()):
        task.problem(path, "an object of pid → problem is needed")
        return {"val": [], "test": []}
    splits = {split: [pid for pid, item in content.items() if item.get("split") == split] for split in ("val", "test")}
    found = task.find("pid_splits.json")
    if found:
        splits_path = task.only(found)
        listed = task.json(splits_path)
        if isinstance(listed, dict) and all(isinstance(listed.get(split), list) for split in splits):
            splits = {split: [str(pid) for pid in listed[split]] for split in splits}
            missing = [pid for pids in splits.values() for pid in pids if pid not in content]
            if missing:
                task.problem(splits_path, f"{len(missing)} pids are not in {path.name}, the first {missing[0]}")
        else:
            task.problem(splits_path, "an object with the lists val and test is needed")
    return {split: [(pid, None, content[pid]) for pid in pids if pid in content] for split, pids in splits.items()}


def _lines(task: TaskFolder, paths: Iterable[Path]) -> Iterator[tuple[Path, _Item]]:
    for path in paths:
        for line, row in task.rows(path):
            yield path, (f"{path.name.split('.')[0]}_{line}", line, row)


def _finish(task: TaskFolder, rows: dict[str, list[tuple[Path, _Item]]], *, written: bool) -> TaskRows:
    kept = {split: [(path, item) for path, item in items if not item[2].get("image")] for split, items in rows.items()}
    dropped = sum(len(rows[split]) - len(kept[split]) for split in rows)
    read = {
        split: [row for path, item in items if (row := _row(task, path, *item, written=written)) is not None]
        for split, items in kept.items()
    }
    notes = [f"{dropped:,} questions with an image were left out"] if dropped else []
    return task.finish(TaskRows(read["validation"], read["test"], notes))


def _row(
    task: TaskFolder, path: Path, number: str, line: int | None, item: dict[str, Any], *, written: bool
) -> TaskExample | None:
    choices, answer = item.get("choices"), item.get("answer")
    fields = task.texts(path, item, "question", "subject", line=line)
    if fields is None:
        return None
    if not _texts(choices) or not 2 <= len(choices) <= len(LETTERS):
        task.problem(path, f"{number}: choices must be a list of 2 to {len(LETTERS)} texts", line=line)
        return None
    letters = LETTERS[: len(choices)]
    position = letters.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < len(letters):
        task.problem(path, f"{number}: the answer {answer!r} is none of the {len(letters)} choices", line=line)
        return None
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    text = f"Context: {item.get('hint') or 'N/A'}\nQuestion: {fields[0]}\nOptions: {options}"
    if written:
        return TaskExample(
            example=question("scienceqa", number, text, f"{PREFIX} {letters[position]}."),
            subtask=fields[1],
            metric="exact_match",
            answers=(letters[position],),
            pattern=WRITTEN,
            on_multiple="fail",
        )
    return TaskExample(
        example=question("scienceqa", number, text, f" {letters[position]}.", prefix=PREFIX),
        subtask=fields[1],
        metric="choice",
        choices=tuple(f" {letter}" for letter in letters),
        answers=(f" {letters[position]}",),
    )


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


READER = ScienceQa()
