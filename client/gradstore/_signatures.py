"""Signatures as a reader wants them: `**fields: Unpack[SomeTypedDict]` written out as keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, Required, get_args, get_origin, get_type_hints

KEYWORDS = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


def expanded(function: Callable[..., Any]) -> inspect.Signature:
    """Get the signature of a function with its keyword dictionary written out, and without its return type.

    A key that may be left out has the default None here; what is left out is not passed on. Only the annotations of
    keywords are evaluated: a recipe's first argument is a client, and the command line does without importing that.
    """
    parameters = inspect.signature(function).parameters.values()
    hints = _evaluated(function, {parameter.name for parameter in parameters if parameter.kind in KEYWORDS})
    written: list[inspect.Parameter] = []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            written += _keys(get_args(hints[parameter.name])[0])
        else:
            written.append(parameter.replace(annotation=hints.get(parameter.name, parameter.annotation)))
    return inspect.Signature(written)


def _evaluated(function: Callable[..., Any], names: set[str]) -> dict[str, Any]:
    plain = inspect.unwrap(function)
    assert isinstance(plain, FunctionType)  # noqa: S101  # for the type checker
    part = FunctionType(plain.__code__, plain.__globals__, closure=plain.__closure__)
    part.__annotations__ = {name: hint for name, hint in plain.__annotations__.items() if name in names}
    return get_type_hints(part, include_extras=True)


def _keys(fields: type) -> Iterator[inspect.Parameter]:
    for name, hint in get_type_hints(fields, include_extras=True).items():
        required = get_origin(hint) is Required
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else None,
            annotation=get_args(hint)[0] if required else hint,
        )
