"""A task's rows as a dataset takes them, repeated until there are so many: the baseline of training on the few alone.

CODS calls it "repeat": the few rows that a selection is for, as often as its budget has room for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from datastore.rows import Example
from datastore.strict_json import canonical

BATCH = 256  # lines that are sent at once


def repeated(examples: Sequence[Example], rows: int | None) -> Iterator[bytes]:
    """The examples as lines of JSON, several at a time, over and over until there are `rows`; each once where that is
    None.

    The second time and later an id ends in `#2`, `#3` and so on: no two rows share one.
    """
    total = len(examples) if rows is None else rows
    lines = (
        canonical(_row(example, again=number // len(examples) + 1)) + b"\n"
        for number, example in enumerate(islice(cycle(examples), total))
    )
    while batch := b"".join(islice(lines, BATCH)):
        yield batch


def _row(example: Example, *, again: int) -> dict[str, Any]:
    found: dict[str, Any] = {"dataset": example.origin}
    if example.id is not None:
        found["id"] = example.id if again == 1 else f"{example.id}#{again}"
    if example.messages:
        turns = [{"role": turn.role, "content": turn.prefix + turn.content} for turn in example.messages]
        return {**found, "messages": turns}
    return {**found, "prompt": example.prompt, "completion": example.completion}
