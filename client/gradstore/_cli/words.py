"""What the service advises, in the words of the command line: it speaks of requests, whoever reads this of commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gradstore import errors
from gradstore.types import Problem

REQUESTS = (
    (r"GET /(\w+) lists what there is", r"`gradstore \1 list` shows what there is"),
    (r'POST /checkpoints \{"model": "([^"]*)"\}', r"gradstore checkpoints register --model '\1'"),
    (r"POST /jobs/(\w+)/(\w+)", r"gradstore jobs \2 \1"),
    (r"DELETE /(\w+)/(\w+)", r"gradstore \1 delete \2"),
    (r"\bsend replace=true", "say --replace"),
    (r"\bsend on_error=skip", "say --on-error skip"),
    (r"\btask_kind\b", "--task-kind"),
    (r"^/(\w+): ", r"\1: "),
)


def in_commands(error: Exception) -> str:
    """The message of an error, with commands where it names requests."""
    if isinstance(error, errors.Conflict) and error.problem.type == "ambiguous":
        return _choices(error.problem)
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    text = re.sub(r"POST /(gradients|conversions) (\{[^{}]*\})", _create, str(error))
    for request, command in REQUESTS:
        text = re.sub(request, command, text)
    return text


def _create(found: re.Match[str]) -> str:
    return f"gradstore {found[1]} create {_options(json.loads(found[2]))}"


def _choices(problem: Problem) -> str:
    """Say what an answer could be about, each by the options in which it differs from the others."""
    asked = [parse_qs(urlsplit(choice.detail).query) for choice in problem.errors]
    names = {name: {tuple(one.get(name, ())) for one in asked} for one in asked for name in one}
    lines = [_options({name: one[name] for name in one if len(names[name]) > 1}) for one in asked]
    return "\n  ".join([f"{problem.detail.partition(';')[0]}: say which one is meant", *lines])


def _options(fields: Mapping[str, Any]) -> str:
    """Fields of a request as options: a list by repeating one whose name is the singular."""
    return " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, values in _singular(fields.items())
        for value in values
    )


def _singular(fields: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, list[Any]]]:
    for name, value in fields:
        yield (name.removesuffix("s"), value) if isinstance(value, list) else (name, [value])
