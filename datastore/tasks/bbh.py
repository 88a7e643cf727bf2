"""BIG-Bench Hard: 27 kinds of reasoning with worked answers, three validation examples each.

Files: `bbh-three-shot.json` (task → its text, then blocks "Q: …\\nA: …" parted by blank lines) or, in its place, the
`cot-prompts/<task>.txt` it was made from; and `test/<task>.json` ({"examples": [{"input", "target"}]}).

Each block in turn is the example, the others stay as demonstrations (LESS). A test question comes after all of them; it
is judged by what a generated answer says after "the answer is", and its loss is that of the bare answer, since the test
files hold no worked one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datastore.tasks.reading import TaskExample, TaskFolder, TaskRows, question

THREE_SHOT, COT_PROMPTS = "bbh-three-shot.json", "cot-prompts"
PATTERN = r"(?i)the answer is:?\s*(.+?)(?:\.(?=\s|$)|\n|$)"
_BLOCK = re.compile(r"(?:^|\n\s*\n)(?=Q:)")
_CANARY_RULE = re.compile(r"\A.*?canary.*?\n-----\n", re.DOTALL)


@dataclass(frozen=True)
class _Prompt:
    """The text of a task and its blocks: (question from "Q:" on, answer after "A:")."""

    text: str
    blocks: tuple[tuple[str, str], ...]

    def user(self, asked: str, demonstrations: tuple[tuple[str, str], ...]) -> str:
        shown = [f"{question}\nA:{answer}" for question, answer in demonstrations]
        return "\n\n".join(part for part in (self.text, *shown, asked) if part)


class Bbh:
    """Reads `bbh-three-shot.json` (or `cot-prompts/`) and `test/*.json`."""

    kind = "bbh"

    def read(self, folder: Path) -> TaskRows:
        """Read the tasks in `folder`; a test file is known by its name.

        Files of other names are refused beside the prompts, and left alone elsewhere: they are another benchmark's.
        """
        task = TaskFolder(folder, kind=self.kind)
        home, prompts = _prompts(task)
        test: list[TaskExample] = []
        for path in task.find_test("*.json", but=[THREE_SHOT]):
            if path.stem in prompts or path.is_relative_to(home):
                test += _test(task, path, prompts)
        return task.finish(TaskRows([row for name in sorted(prompts) for row in _turns(name, prompts[name])], test))


def _prompts(task: TaskFolder) -> tuple[Path, dict[str, _Prompt]]:
    """The folder of the prompts, and those by the names of their tasks."""
    found = task.find(THREE_SHOT)
    if found:
        path = task.only(found)
        home = path.parent
        texts = task.json(path)
        if isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values()):
            parsed = {name: _prompt(task, path, name, text) for name, text in texts.items()}
        else:
            task.problem(path, "an object of task → text is needed")
            parsed = {}
    else:
        paths = task.require(task.find("*.txt"), f"{THREE_SHOT} or cot-prompts/<task>.txt")
        home = paths[0].parent.parent if paths[0].parent.name == COT_PROMPTS else paths[0].parent
        parsed = {path.stem: _prompt(task, path, path.stem, _CANARY_RULE.sub("", _lines(task, path))) for path in paths}
    return home, {name: prompt for name, prompt in parsed.items() if prompt is not None}


def _lines(task: TaskFolder, path: Path) -> str:
    """The text of a file with the line ends that the prompts were written with."""
    return task.text(path).replace("\r\n", "\n")


def _prompt(task: TaskFolder, path: Path, name: str, text: str) -> _Prompt | None:
    about, *blocks = _BLOCK.split(text.strip())
    pairs = [block.split("\nA:", 1) for block in blocks]
    if not pairs or any(len(pair) != 2 or not pair[1].strip() for pair in pairs):
        task.problem(path, f"{name}: blocks of 'Q: …' and 'A: …', parted by blank lines, are needed")
        return None
    return _Prompt(about.strip(), tuple((asked, answer) for asked, answer in pairs))


def _turns(name: str, prompt: _Prompt) -> list[TaskExample]:
    rows = []
    for number, (asked, answer) in enumerate(prompt.blocks):
        others = prompt.blocks[:number] + prompt.blocks[number + 1 :]
        said = re.search(PATTERN, answer)
        rows.append(_row(f"{name}_{number}", name, prompt.user(asked, others), answer, said[1] if said else answer))
    return rows


def _test(task: TaskFolder, path: Path, prompts: Mapping[str, _Prompt]) -> list[TaskExample]:
    name, content = path.stem, task.json(path)
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list):
        task.problem(path, 'an object {"examples": [{"input", "target"}, …]} is needed')
        return []
    if name not in prompts:
        task.problem(path, f"there are no worked examples for {name!r}; tasks with some: {', '.join(sorted(prompts))}")
        return []
    rows = []
    for number, item in enumerate(examples, start=1):
        row = _test_row(task, path, prompts[name], item, number)
        rows += [row] if row else []
    return rows


def _test_row(task: TaskFolder, path: Path, prompt: _Prompt, item: Any, number: int) -> TaskExample | None:
    fields = task.texts(path, item if isinstance(item, dict) else {}, "input", "target", line=number)
    if fields is None:
        return None
    asked, target = fields
    user = prompt.user(f"Q: {asked}", prompt.blocks)
    return _row(f"{path.stem}_test_{number - 1}", path.stem, user, f" So the answer is {target}.", target)


def _row(number: str, name: str, user: str, answer: str, target: str) -> TaskExample:
    return TaskExample(
        example=question("bbh", number, user, answer, prefix="A:"),
        subtask=name,
        metric="exact_match",
        answers=(target.strip(),),
        pattern=PATTERN,
    )


READER = Bbh()
