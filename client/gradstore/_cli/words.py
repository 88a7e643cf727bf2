"""What the service advises, in the words of the command line: it speaks of requests, whoever reads this of commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from gradstore import errors
from gradstore.types import Problem

_CREATED = "annotations|cascades|conversions|embeddings|estimates|gradients|predictors|projectors|streams"
REQUESTS = (
    (
        r"GET /(\w+) and GET /(\w+) list what there is",
        r"`gradstore \1 list` and `gradstore \2 list` show what there is",
    ),
    (r"GET /(\w+) lists what there is", r"`gradstore \1 list` shows what there is"),
    (r"GET /(\w+)/(\w+) lists what there is", r"`gradstore \1 show \2` shows what there is"),
    (r'POST /checkpoints \{"model": "([^"]*)"\}', r"gradstore checkpoints register --model '\1'"),
    (r"POST /gradients with dtype=(\w+)", r"gradstore gradients create --dtype \1"),
    (r"are at GET /selections/(\w+)", r"are printed by gradstore selections rows \1"),
    (r"GET /gradients shows", "gradstore gradients rows shows"),
    (r"POST /(datasets|tasks)\b", r"gradstore \1 upload"),
    (rf"POST /({_CREATED}|imports)\b", r"gradstore \1 create"),
    (r"Authorization: Bearer <[^<>]*>", "--api-key, or better the variable GRADSTORE_API_KEY"),
    (r"POST /jobs/(\w+)/(\w+)", r"gradstore jobs \2 \1"),
    (r"DELETE /(\w+)/(\w+)", r"gradstore \1 delete \2"),
    (r"\bsend replace=true", "say --replace"),
    (r"\bsend on_error=skip", "say --on-error skip"),
    (r"\btask_kind\b", "--task-kind"),
    (r"^/(\w+): ", r"\1: "),
)

_ITEM = r'(?:"[^"]*"|\d+)'
_SAID = {"missing": "this is required", "extra_forbidden": "there is no such field"}
_SHOWN = 3  # places of a request that one message names


def in_commands(error: Exception) -> str:
    """The message of an error, with commands where it names requests."""
    if isinstance(error, errors.Conflict) and error.problem.type == "ambiguous":
        return _choices(error.problem)
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, OSError) and error.strerror is not None:
        wanted = str(error.filename2 or error.filename).removesuffix(".part")  # under which it is written at first
        return f"{wanted}: {error.strerror}"
    text = re.sub(rf"POST /({_CREATED}) (\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})", _create, str(error))
    text = re.sub(rf"\b(\w+)=(\[{_ITEM}(?:, {_ITEM})*\])", _repeated, text)
    for request, command in REQUESTS:
        text = re.sub(request, command, text)
    return text


def _invalid(error: ValidationError) -> str:
    """Say which fields of a request cannot be: the first of them, one to a line."""
    found = [(".".join(map(str, one["loc"])), one) for one in error.errors(include_url=False, include_input=False)]
    lines = [f"{place}: {_SAID.get(one['type'], one['msg'].removeprefix('Value error, '))}" for place, one in found]
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    whole = " (`gradstore selections show --json` prints a whole one)" if error.title == "SelectionRecipe" else ""
    return "\n  ".join([f"this is no {error.title}{whole}:", *lines[:_SHOWN], *more])


def _create(found: re.Match[str]) -> str:
    fields = json.loads(found[2])
    fields |= fields.pop("streams", {})  # each of which has an option of its own
    return f"gradstore {found[1]} create {_options(fields)}"


def _repeated(found: re.Match[str]) -> str:
    return _options({found[1]: json.loads(found[2])})


def _choices(problem: Problem) -> str:
    """Say what an answer could be about, each by the options in which it differs from the others."""
    asked = [_asked(choice.detail) for choice in problem.errors]
    names = {name: {tuple(one.get(name, ())) for one in asked} for one in asked for name in one}
    lines = [_options({name: one[name] for name in one if len(names[name]) > 1}) for one in asked]
    return "\n  ".join([f"{problem.detail.partition(';')[0]}: say which one is meant", *lines])


def _asked(choice: str) -> dict[str, list[Any]]:
    """The parameters of a choice: a URL, or fields of a request's body."""
    if not choice.startswith("{"):
        return parse_qs(urlsplit(choice).query)
    return {name: value if isinstance(value, list) else [value] for name, value in json.loads(choice).items()}


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
