"""Signatures as a reader wants them: `**fields: Unpack[SomeTypedDict]` written out as keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Required, get_args, get_origin, get_type_hints


def expanded(function: Callable[..., Any]) -> inspect.Signature:
    """Get the signature of a function with its keyword dictionary written out, and without its return type.

    A key that may be left out has the default None here; what is left out is not passed on.
    """
    hints = get_type_hints(function, include_extras=True)
    written: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            written += _keys(get_args(hints[parameter.name])[0])
        else:
            written.append(parameter.replace(annotation=hints[parameter.name]))
    written.sort(key=lambda parameter: parameter.kind)
    return inspect.Signature(written)


def _keys(fields: type) -> Iterator[inspect.Parameter]:
    for name, hint in get_type_hints(fields, include_extras=True).items():
        required = get_origin(hint) is Required
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else None,
            annotation=get_args(hint)[0] if required else hint,
        )
