"""MMLU: multiple choice in 57 subjects, five validation questions each.

Files: `<subject>_dev.csv` to select for and `<subject>_test.csv` to evaluate on, as in `mmlu/dev/` and `mmlu/test/`.
Rows without a header: question, A, B, C, D, letter of the answer; cells may hold line ends and quotes.

The user turn ends in "Answer:", the assistant's begins "The answer is:", and what is learnt is " X" (LESS's prompt).
"""

from __future__ import annotations

from pathlib import Path

from datastore.tasks.reading import TaskExample, TaskFolder, TaskRows, question

CHOICES = ("A", "B", "C", "D")
PREFIX = "The answer is:"


class Mmlu:
    """Reads `*_dev.csv` and `*_test.csv`."""

    kind = "mmlu"

    def read(self, folder: Path) -> TaskRows:
        """Read the subjects in `folder`; a subject is known by its file's name."""
        task = TaskFolder(folder, kind=self.kind)
        dev = task.require(task.find("*_dev.csv"), "<subject>_dev.csv files (question,A,B,C,D,answer)")
        return task.finish(TaskRows(_split(task, dev, "dev"), _split(task, task.find("*_test.csv"), "test")))


def _split(task: TaskFolder, paths: list[Path], split: str) -> list[TaskExample]:
    rows: list[TaskExample] = []
    seen: set[str] = set()
    for path in sorted(paths, key=lambda path: path.name):
        subject = path.name.removesuffix(f"_{split}.csv")
        if subject in seen:
            task.problem(path, f"a second {split} file of {subject}")
            continue
        seen.add(subject)
        rows += _subject(task, path, subject, split)
    return rows


def _subject(task: TaskFolder, path: Path, subject: str, split: str) -> list[TaskExample]:
    rows: list[TaskExample] = []
    for line, cells in task.csv(path):
        if len(cells) != 6:
            task.problem(path, f"{len(cells)} cells; question,A,B,C,D,answer are needed", line=line)
        elif cells[5].strip() not in CHOICES:
            task.problem(path, f"the answer is {cells[5][:40]!r}; A, B, C or D is needed (no header)", line=line)
        else:
            rows.append(_row(subject, f"{subject}_{split}_{len(rows)}", cells))
    return rows


def _row(subject: str, number: str, cells: list[str]) -> TaskExample:
    options = "\n".join(f"{letter}. {cell}" for letter, cell in zip(CHOICES, cells[1:5], strict=True))
    text = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        f"{cells[0]}\n{options}\nAnswer:"
    )
    answer = f" {cells[5].strip()}"
    return TaskExample(
        example=question("mmlu", number, text, answer, prefix=PREFIX),
        subtask=subject,
        metric="choice",
        choices=tuple(f" {letter}" for letter in CHOICES),
        answers=(answer,),
    )


READER = Mmlu()
