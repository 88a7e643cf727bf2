"""`gradstore keys` and `gradstore audit`: for whoever runs the server, on its machine, on the catalog itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import typer
from gradstore.types import ApiKey, AuditEntry, KeyScope
from pydantic import BaseModel

from datastore.audit import Audit
from datastore.console import Data, Json, Row, opened, print_items, say
from datastore.keys import Keys
from datastore.options import configured

BodyT = TypeVar("BodyT", bound=BaseModel)
Name = Annotated[str, typer.Argument(metavar="NAME", help="What the key is called.")]

keys = typer.Typer(
    name="keys", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False,
    help="Make, list and revoke the API keys of a store, on its server. Once there is one, every request needs a key.",
)  # fmt: skip


@keys.command()
def create(
    name: Name,
    *,
    scope: Annotated[
        KeyScope,
        typer.Option(help="read: look; write: also change and start jobs; admin: also the audit log."),
    ],
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Most requests a minute, else GRADSTORE_REQUESTS_PER_MINUTE.")
    ] = None,
    max_upload_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest upload in bytes, else GRADSTORE_MAX_UPLOAD_BYTES.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make an API key and print it; it is shown this once, and stored as a hash."""
    with opened(configured(data=data), new=True) as catalog:
        made = Keys(catalog).create(
            name, scope=scope, requests_per_minute=requests_per_minute, max_upload_bytes=max_upload_bytes
        )
        typer.echo(made.model_dump_json() if as_json else made.key)
        say(f"{name!r} may {', '.join(made.scopes)}. Keep the key now: it cannot be shown again.")


@keys.command("list")
def list_keys(*, data: Data = None, as_json: Json = False) -> None:
    """List the keys, the revoked ones too; never the secrets."""
    with opened(configured(data=data)) as catalog:
        _print(Keys(catalog).all(), _shown_key, as_json=as_json)


@keys.command()
def revoke(name: Name, *, data: Data = None, as_json: Json = False) -> None:
    """Have a key refused from now on: running API processes notice within a second."""
    with opened(configured(data=data)) as catalog:
        _print([Keys(catalog).revoke(name)], _shown_key, as_json=as_json)


def audit(
    *,
    key: Annotated[str | None, typer.Option(help="Only of this key, by name or id.")] = None,
    since: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only from this time (UTC) on."),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Print who changed what, or was refused for their key, the newest first."""
    settings = configured(data=data)
    with opened(settings) as catalog:
        names = {known.id: known.name for known in Keys(catalog).all()}
        entries = Audit(catalog, settings.audit_days).entries(
            key=key, since=since.replace(tzinfo=UTC) if since else None
        )

        def shown(entry: AuditEntry) -> Row:
            return {
                "at": _time(entry.at),
                "key": names.get(entry.api_key or "", entry.api_key),
                "from": entry.client,
                "status": entry.status,
                "request": entry.request_id,
                "what": f"{entry.method} {entry.path}",
            }

        _print(entries, shown, as_json=as_json)


def _shown_key(key: ApiKey) -> Row:
    return {
        "name": key.name,
        "id": key.id,
        "scopes": " ".join(key.scopes),
        "requests a minute": key.requests_per_minute,
        "upload bytes": key.max_upload_bytes,
        "made": _time(key.created_at),
        "used": _time(key.used_at),
        "revoked": _time(key.revoked_at),
    }


def _print(items: Iterable[BodyT], shown: Callable[[BodyT], Row], *, as_json: bool) -> None:
    print_items(items, shown, dump=lambda item: item.model_dump_json(), as_json=as_json)


def _time(moment: datetime | None) -> str | None:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment else None
