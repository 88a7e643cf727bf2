"""What the commands of the server share: the catalog they work on, and how they print and refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import OperationalError

from datastore.catalog import Catalog
from datastore.errors import GradstoreError
from datastore.settings import Settings

REFUSED = 1
"""Exit status of a command that could not be done."""

Row = dict[str, str | int | None]
"""A line of a table, by its headings."""
ItemT = TypeVar("ItemT")

Data = Annotated[Path | None, typer.Option(help="Folder of the store, else gradstore-data.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


@contextmanager
def opened(settings: Settings, *, new: bool = False) -> Iterator[Catalog]:
    """The catalog that the settings name, with this version's schema; where it may be `new`, it is made.

    What refuses inside, or a catalog that is not to be had, ends the command with its reason.
    """
    if not new and not settings.catalog:
        check_folder(settings)
    catalog = Catalog(settings.catalog_url)
    try:
        catalog.migrate()
        yield catalog
    except (GradstoreError, OSError) as error:
        refuse(str(error))
    except OperationalError as error:
        refuse(f"the catalog does not answer ({str(error.orig).strip()}): check GRADSTORE_CATALOG and GRADSTORE_DATA")
    finally:
        catalog.close()


def check_folder(settings: Settings) -> None:
    """End the command where the store's folder is not there: a new and empty one would be looked at in its place."""
    if not settings.data.is_dir():
        refuse(f"there is no store at {settings.data.absolute()}: name its folder with --data")


def say(message: str) -> None:
    """Print what is not data, to stderr."""
    typer.echo(message, err=True)


def refuse(reason: str) -> NoReturn:
    """End the command with a reason."""
    say(reason)
    raise typer.Exit(REFUSED)


def print_items(
    items: Iterable[ItemT], shown: Callable[[ItemT], Row], *, dump: Callable[[ItemT], str], as_json: bool
) -> None:
    """Print what `dump` makes of each, or a table, whose cells are never cut where no terminal reads it."""
    if as_json:
        for item in items:
            typer.echo(dump(item))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for item in items:
        row = shown(item)
        if not table.columns:
            for heading in row:
                table.add_column(heading, overflow="fold")
        table.add_row(*(Text("–" if value is None else str(value)) for value in row.values()))
    if table.columns:
        Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)
