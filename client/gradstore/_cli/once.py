"""Commands that refuse an option given twice where it takes one value: the first would be dropped without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption


class Once(TyperCommand):
    """A command whose options are given once, but for those that may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line. Ends with a usage error for an option of one value that is given twice."""
        refuse_repeated(self, ctx, args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # pydantic's, which typer asks
            raise


def refuse_repeated(command: TyperCommand | TyperGroup, ctx: Any, args: list[str]) -> None:
    """End with a usage error where an option of one value is given twice."""
    _, _, given = command.make_parser(ctx).parse_args(args=list(args))
    for parameter, times in Counter(given).items():
        if isinstance(parameter, TyperOption) and times > 1 and not (parameter.multiple or parameter.is_flag):
            ctx.fail(f"{parameter.opts[0]} takes one value, and is given {times} times")


class App(typer.Typer):
    """Commands of the kind `Once`."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Add a command."""
        return super().command(name, cls=Once, **settings)
