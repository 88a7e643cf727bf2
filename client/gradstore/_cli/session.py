"""The server a command is for, and how a command ends: errors become messages and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

import gradstore
from gradstore import errors
from gradstore._cli.output import say
from gradstore._cli.words import in_commands

if TYPE_CHECKING:
    from gradstore import GradientStore

REFUSED, USAGE, FAILED, INTERRUPTED, UNREAD = 1, 2, 3, 130, 141


@dataclass(frozen=True)
class Server:
    """The server a command is for."""

    url: str | None
    api_key: str | None


@contextmanager
def session(ctx: typer.Context) -> Iterator[GradientStore]:
    """A client for a command; its errors become messages and exit codes."""
    server: Server = ctx.find_root().obj
    try:
        with gradstore.GradientStore(server.url, api_key=server.api_key) as store:
            yield store
    except errors.JobFailed as error:
        _end(FAILED, in_commands(error), error)
    except errors.ServerError as error:
        _end(REFUSED, f"{in_commands(error)}\n(request {error.request_id})", error)
    except errors.GradstoreError as error:
        _end(REFUSED, in_commands(error), error)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _end(REFUSED, in_commands(error), error)
    except ValueError as error:
        _end(USAGE, in_commands(error), error)
    except KeyboardInterrupt as error:
        _end(INTERRUPTED, "interrupted", error)


def _end(code: int, message: str, error: BaseException) -> None:
    say(message)
    raise typer.Exit(code) from error
