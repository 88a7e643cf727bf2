"""What the command line prints: tables for people, JSON for programs, one object per line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradstore.types import FinetuneResult, GradientsResult, Turn

Columns = Mapping[str, Callable[[Any], object]]


def say(message: str) -> None:
    """Tell something beside the data, on stderr."""
    typer.echo(message, err=True)


def say_lost_rows(result: BaseModel | None) -> None:
    """Tell of rows that a job did without."""
    if isinstance(result, FinetuneResult) and result.skipped_rows:
        say(f"{result.skipped_rows:,} rows were not trained on: truncation left them nothing to learn from")
    if isinstance(result, GradientsResult) and result.total_excluded:
        first = result.excluded[0]
        lost = f"{result.total_excluded:,} features are missing (of a row, at a checkpoint)"
        say(f"{lost}; the first is that of row {first.row}: {first.reason}")


def print_json(body: BaseModel) -> None:
    """Print one object as a line of JSON."""
    typer.echo(body.model_dump_json())


def print_list(items: Iterable[BaseModel], columns: Columns, *, as_json: bool) -> None:
    """Print a list: a line of JSON each, as it comes, or a table."""
    if as_json:
        for item in items:
            print_json(item)
    else:
        print_table(items, columns)


def print_table(items: Iterable[Any], columns: Columns) -> None:
    """Print a table; cells are never cut when it is not a terminal that reads it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for item in items:
        table.add_row(*(Text(_cell(show(item))) for show in columns.values()))
    _console().print(table)


def print_object(body: BaseModel, *, as_json: bool, without: Collection[str] = ()) -> None:
    """Print one object: a line of JSON, or a line for each value in it, `without` the fields that others show."""
    if as_json:
        print_json(body)
        return
    fields = list(_flat(body.model_dump(mode="json", exclude=set(without))))
    width = max((len(name) for name, _ in fields), default=0)
    for name, shown in fields:
        typer.echo(f"{name:<{width}}  {shown}")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The names and values of what an object holds at any depth: `gradients.rows`, or `inputs.0.rows` in a list."""
    inner: dict[str, Any] | None = value if isinstance(value, dict) else None
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        inner = {str(number): one for number, one in enumerate(value)}
    if inner:
        for each, one in inner.items():
            yield from _flat(one, f"{name}.{each}" if name else each)
    elif name:
        yield name, ", ".join(map(_plain, value)) if isinstance(value, list) and value else _plain(value)


def _plain(value: Any) -> str:
    """A value as people read it: text as it is, six digits of a float that count, and a dash for a list of nothing."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict) and not value:
        return "–"
    return json.dumps(float(f"{value:.6g}") if isinstance(value, float) else value)


def print_lines(lines: Iterable[bytes]) -> None:
    """Print lines byte for byte."""
    for line in lines:
        sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def is_terminal() -> bool:
    """Whether somebody watches stderr: progress is for them."""
    return sys.stderr.isatty()


def ago(moment: datetime) -> str:
    """How long ago something was, roughly."""
    seconds = max((datetime.now(UTC) - moment).total_seconds(), 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def beginning(turns: Iterable[Turn], length: int) -> str:
    """What is said in these turns, as one line of at most so many characters."""
    text = " ⏎ ".join(turn.prefix + turn.content for turn in turns)
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Pipe(Console):
    """A console whose reader may go away; rich would exit with status 1."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - rich calls this while it handles the BrokenPipeError


def _console() -> Console:
    return _Pipe(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 1000, highlight=False)
