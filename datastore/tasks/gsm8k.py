"""GSM8K: grade-school arithmetic with worked answers that end in "#### <number>".

Files: `validation*.jsonl`, also `val*` and `dev*` (or `train*.jsonl` where there is none) to select for and
`test*.jsonl` to evaluate on; rows of `question` and `answer`, as published. Judged by the number after "####",
thousands commas ignored.
"""

from __future__ import annotations

import re
from pathlib import Path

from datastore.tasks.reading import TaskExample, TaskFolder, TaskRows, question

PATTERN = r"####\s*\$?(-?[\d,]*\.?\d+)"
MANY = 1000  # validation rows from which on a note says that fewer will do


class Gsm8k:
    """Reads rows of question and answer."""

    kind = "gsm8k"

    def read(self, folder: Path) -> TaskRows:
        """Read the rows in `folder`; they are one subtask."""
        task = TaskFolder(folder, kind=self.kind)
        validation = task.find("val*.jsonl*", "dev*.jsonl*") or task.find("train*.jsonl*")
        task.require(validation, "validation.jsonl (or train.jsonl) with question and answer in each row")
        rows = _rows(task, validation)
        note = f"{len(rows):,} validation rows: a few dozen are enough to select for, and cost as much less"
        return task.finish(TaskRows(rows, _rows(task, task.find("test*.jsonl*")), [note] if len(rows) > MANY else []))


def _rows(task: TaskFolder, paths: list[Path]) -> list[TaskExample]:
    rows = []
    for path in paths:
        for line, row in task.rows(path):
            fields = task.texts(path, row, "question", "answer", line=line)
            if fields is None:
                continue
            asked, worked = fields
            number = re.search(PATTERN, "".join(worked.rpartition("####")[1:]))
            if number is None:
                task.problem(path, "the answer does not end in '#### <number>'", line=line)
                continue
            rows.append(
                TaskExample(
                    example=question("gsm8k", f"{path.name.split('.')[0]}_{line}", asked, worked),
                    subtask="gsm8k",
                    metric="exact_match",
                    answers=(number[1],),
                    pattern=PATTERN,
                )
            )
    return rows


READER = Gsm8k()
