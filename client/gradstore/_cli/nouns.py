"""The group of a noun, with the commands that every noun has: list, show, rename and delete."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gradstore._cli.names import Names
from gradstore._cli.once import App
from gradstore._cli.options import Json, Limit, Reference
from gradstore._cli.output import Columns, print_list, print_object
from gradstore._cli.session import session

if TYPE_CHECKING:
    from gradstore import GradientStore

VERBS = (
    *(
        "upload",
        "register",
        "choose",
        "create",
        "preview",
        "list",
        "show",
        "epochs",
        "rows",
        "histogram",
        "explain",
        "lengths",
        "features",
        "content",
    ),
    *("export", "provenance", "download"),
    *("wait", "watch", "prioritise", "cancel", "retry", "rename", "delete"),
)


def resource(store: GradientStore, noun: str) -> Any:
    """What the client has for a noun."""
    return getattr(store, noun.replace("-", "_"))


class Verbs(TyperGroup):
    """The commands of a noun, in the order of their use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return sorted(super().list_commands(ctx), key=VERBS.index)


def group_of(
    noun: str, columns: Columns | Callable[[Names], Columns], *, help: str, own_show: bool = False
) -> typer.Typer:
    """The group of a noun with what every noun has; `columns` are those of its list, and `own_show` leaves show out."""
    made = bare_group(noun, help=help)
    add_list(made, noun, columns)
    if not own_show:
        add_show(made, noun)
    add_rename(made, noun)
    add_delete(made, noun)
    return made


def bare_group(noun: str, *, help: str) -> typer.Typer:
    """The group of a noun, without a command."""
    return App(name=noun, cls=Verbs, no_args_is_help=True, help=help)


def add_list(
    group: typer.Typer, noun: str, columns: Columns | Callable[[Names], Columns], *, order: str = "the newest first"
) -> None:
    """Add the command that lists all; its columns may need the names of other things."""

    @group.command("list", help=f"List the {noun}, {order}.")
    def list_all(ctx: typer.Context, *, limit: Limit = None, as_json: Json = False) -> None:
        with session(ctx) as store:
            shown = columns(Names(store)) if callable(columns) else columns
            print_list(islice(resource(store, noun).list(), limit), shown, as_json=as_json)


def add_show(group: typer.Typer, noun: str) -> None:
    """Add the command that prints one."""

    @group.command("show", help="Print everything known about one.")
    def show(ctx: typer.Context, reference: Reference, *, as_json: Json = False) -> None:
        with session(ctx) as store:
            print_object(resource(store, noun).get(reference), as_json=as_json)


def add_rename(group: typer.Typer, noun: str) -> None:
    """Add the command that gives one another name."""

    @group.command("rename", help="Give one another name; without a new name, take its name away.")
    def rename(
        ctx: typer.Context,
        reference: Reference,
        name: Annotated[str | None, typer.Argument(metavar="NAME", help="The new name.")] = None,
    ) -> None:
        with session(ctx) as store:
            typer.echo(resource(store, noun).rename(reference, name).id)


def add_delete(
    group: typer.Typer, noun: str, *, help: str = "Delete some; refused while something else needs them."
) -> None:
    """Add the command that deletes some."""

    @group.command("delete", help=help)
    def delete(
        ctx: typer.Context,
        references: Annotated[list[str], typer.Argument(metavar="ID", help="Ids or names.")],
    ) -> None:
        with session(ctx) as store:
            for reference in references:
                resource(store, noun).delete(reference)
