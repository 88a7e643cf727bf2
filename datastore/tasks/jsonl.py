"""Any other task: JSONL of messages, prompt and completion, or another shape a dataset may have (`datastore.shapes`).

Files: `validation*.jsonl` (also `val*`, `dev*`) to select for and `test*.jsonl` to evaluate on, or one file of any
name, all of it to select for. JSON arrays and Parquet are read too, gzipped or not. Fields of a row beside its text:

    subtask   name of the part the row belongs to; "all" without one
    metric    choice, exact_match, token_f1 or none; by default choice with `choices`, exact_match with `pattern`
    choices   texts that may stand in the place of the answer (the last assistant content, or the completion)
    answers   a text or a list of them; by default the row's own answer (what `pattern` finds in it)
    pattern   regular expression of Python's; its first match (first group, where it has one) in a generated text is
              the answer
    on_multiple  which of several matches is the answer: first, last, or none of them (fail)
    rationale the answer and, after it, its reasons, as one text: what the perplexity of adapters is measured on when
              some are chosen for the task, in the place of the row's own answer

A message of an assistant may have a `prefix`: the beginning of its turn that is given to the model and not learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from gradstore.types import Metric

from datastore import shapes
from datastore.rows import Example
from datastore.tasks.patterns import BadPattern, OnMultiple, Patterns, SlowPattern
from datastore.tasks.reading import TaskExample, TaskFolder, TaskRows

LONGEST_PATTERN = 500  # characters
ROWS = ("*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.parquet")


class _Wrong(ValueError):
    """A field that cannot be used."""


class Jsonl:
    """Reads rows of any shape a dataset may have, with a subtask and a metric."""

    kind = "jsonl"

    def read(self, folder: Path) -> TaskRows:
        """Read the rows in `folder`."""
        task = TaskFolder(folder, kind=self.kind)
        found = task.require(task.find(*ROWS), "validation.jsonl, and test.jsonl to evaluate on")
        test = [path for path in found if path.name.startswith("test")]
        validation = [path for path in found if path.name.startswith(("val", "dev"))]
        if len(found) == 1:
            validation, test = found, []
        task.require(validation, "a file called validation.jsonl, or one file alone")
        with Patterns() as patterns:
            rows = TaskRows(list(_rows(task, validation, patterns)), list(_rows(task, test, patterns)))
        return task.finish(rows)


def _rows(task: TaskFolder, paths: Iterable[Path], patterns: Patterns) -> Iterator[TaskExample]:
    for path in paths:
        for line, row in task.rows(path):
            try:
                yield _row(row, file=path.name.split(".")[0], patterns=patterns)
            except (shapes.BadRow, BadPattern, _Wrong) as error:
                task.problem(path, str(error), line=line)
                if isinstance(error, SlowPattern):
                    return  # the rows behind it have perhaps the same pattern


def _row(row: dict[str, Any], *, file: str, patterns: Patterns) -> TaskExample:
    example, _ = shapes.example(row, file=file)
    example = _with_prefixes(example, row.get("messages"))
    subtask = "all" if row.get("subtask") is None else row["subtask"]
    if not isinstance(subtask, str) or not subtask.strip():
        raise _Wrong("subtask must be a text that is not empty")
    choices, pattern = _choices(row), _pattern(row, patterns)
    on_multiple = _on_multiple(row, pattern)
    metric = _metric(row, choices, pattern)
    answer = example.messages[-1].content if example.messages else example.completion or ""
    if metric == "exact_match" and pattern is not None and row.get("answers") is None:
        answer = _found(answer, pattern, on_multiple, patterns)
    answers = _answers(row, metric, answer, choices)
    return TaskExample(example, subtask, metric, choices, answers, pattern, on_multiple, _rationale(row))


def _with_prefixes(example: Example, turns: object) -> Example:
    if not example.messages or example.messages[-1].role != "assistant":
        if example.messages:
            raise _Wrong("the last message must be the assistant's: it is the answer")
        return example
    prefixes = [turn.get("prefix") or "" for turn in turns] if isinstance(turns, list) else [""] * len(example.messages)
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise _Wrong("prefix must be a text")
    if any(prefix and m.role != "assistant" for prefix, m in zip(prefixes, example.messages, strict=True)):
        raise _Wrong("only an assistant's message may have a prefix")
    messages = (replace(m, prefix=prefix) for prefix, m in zip(prefixes, example.messages, strict=True))
    return replace(example, messages=tuple(messages))


def _choices(row: dict[str, Any]) -> tuple[str, ...]:
    choices = row.get("choices")
    if choices is None:
        return ()
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise _Wrong("choices must be a list of texts")
    if len(set(choices)) != len(choices) or len(choices) < 2:
        raise _Wrong("choices must be at least two different texts")
    return tuple(choices)


def _pattern(row: dict[str, Any], patterns: Patterns) -> str | None:
    pattern = row.get("pattern")
    if pattern is None:
        return None
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise _Wrong(f"pattern must be a text of at most {LONGEST_PATTERN} characters")
    patterns.find(pattern, "")  # raises BadPattern for what is none
    return pattern


def _on_multiple(row: dict[str, Any], pattern: str | None) -> OnMultiple:
    said: OnMultiple | None = row.get("on_multiple")
    if said is None:
        return "first"
    if said not in get_args(OnMultiple):
        raise _Wrong(f"on_multiple {said!r} is none of {', '.join(get_args(OnMultiple))}")
    if pattern is None:
        raise _Wrong("only a row with a pattern has on_multiple")
    return said


def _rationale(row: dict[str, Any]) -> str | None:
    rationale = row.get("rationale")
    if rationale is not None and (not isinstance(rationale, str) or not rationale.strip()):
        raise _Wrong("rationale must be a text that is not empty")
    return rationale


def _metric(row: dict[str, Any], choices: tuple[str, ...], pattern: str | None) -> Metric:
    metric: Metric | None = row.get("metric")
    if metric is None:
        if row.get("answers") is not None and not choices and pattern is None:
            raise _Wrong("answers alone do not say how they are judged: add a metric, exact_match or token_f1")
        return "choice" if choices else "exact_match" if pattern else "none"
    if metric not in get_args(Metric):
        raise _Wrong(f"the metric {metric!r} is none of {', '.join(get_args(Metric))}")
    if (metric == "choice") != bool(choices):
        raise _Wrong("the metric choice needs choices, and only it has them")
    if pattern and metric != "exact_match":
        raise _Wrong("only the metric exact_match has a pattern")
    return metric


def _answers(row: dict[str, Any], metric: Metric, answer: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    given = row.get("answers")
    if metric == "none":
        return ()
    if given is None:
        given = [answer]
    elif isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise _Wrong("answers must be a text or a list of texts")
    if metric == "choice" and (len(given) != 1 or given[0] not in choices):
        raise _Wrong("the right answer must be one of choices, to the letter")
    return tuple(given)


def _found(answer: str, pattern: str, on_multiple: OnMultiple, patterns: Patterns) -> str:
    """What the pattern finds in the row's own answer."""
    found = patterns.find(pattern, answer, on_multiple=on_multiple)
    if found is None:
        raise _Wrong("pattern finds nothing in the row's own answer, and there are no answers")
    return found


READER = Jsonl()
