"""`gradstore doctor`, `gc`, `backup` and `restore`: done on the server itself, beside the service or without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from datastore import backups, logs
from datastore.console import Data, Json, Row, check_folder, opened, print_items, say
from datastore.doctor import examine
from datastore.errors import Conflict
from datastore.findings import Finding, mended
from datastore.garbage import garbage
from datastore.leftovers import OLD, Leftover
from datastore.options import configured
from datastore.store import OpenStore, open_store

UNSOUND = 3
"""Exit status: something was found that is not mended."""
OlderThan = Annotated[
    float,
    typer.Option(min=0, help="Seconds after which unfinished work counts as left behind; 0 where nothing else runs."),
]


def doctor(
    *,
    data: Data = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare the checksums of all bytes, too: reads the whole store.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended, and say what was done.")] = False,
    older_than: OlderThan = OLD,
    as_json: Json = False,
) -> None:
    """Compare the store with the catalog, beside a running service or without one.

    Exit code 0: all is well, or is now; 3: something was found that is not mended.
    """
    with _opened(data) as store:
        _refuse_strangers(store)
        found = examine(store, older_than=older_than, deep=deep)
        shown = [mended(finding) if repair else finding for finding in found]
    print_items(shown, _finding, dump=lambda finding: finding.model_dump_json(), as_json=as_json)
    left = sum(not finding.mended for finding in shown)
    say(f"{len(shown):,} found, {len(shown) - left:,} mended" if shown else "the store and its catalog agree")
    if left:
        raise typer.Exit(UNSOUND)


def _finding(finding: Finding) -> Row:
    return {
        "what": finding.kind,
        "where": finding.place,
        "bytes": finding.bytes,
        "found": finding.detail,
        "repair": finding.repair or ("--repair" if finding.mend else None),
    }


def gc(
    *,
    data: Data = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    older_than: OlderThan = OLD,
    as_json: Json = False,
) -> None:
    """Remove what nothing refers to any more: leftovers of killed processes, and what was derived of deleted things.

    No answer changes. What somebody could still ask for is not garbage; delete that by its noun.
    """
    with _opened(data) as store:
        _refuse_strangers(store)
        found = list(garbage(store, older_than=older_than))
        for each in found if not dry_run else ():
            each.remove()
    print_items(
        found, _left, dump=lambda each: json.dumps({**_left(each), "removed": not dry_run}), as_json=as_json
    )  # fmt: skip
    total = sum(each.bytes for each in found)
    say(f"{len(found):,} {'would be' if dry_run else 'were'} removed, {total:,} bytes")


def _left(each: Leftover) -> Row:
    return {"kind": each.kind, "place": each.place, "bytes": each.bytes, "detail": each.detail}


def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; what is there already stays as it is.")],
    *,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Back up catalog and files into a folder, beside a running service; again, and only what is new is copied.

    Of a store in a bucket the catalog only: copy the bucket afterwards, by its own means.
    """
    with _opened(data) as store:
        _refuse_strangers(store)
        _print_copied(backups.backup(store, folder), as_json=as_json)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What gradstore backup has filled.")],
    *,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Fill an empty store from a backup; its catalog may be another kind of database than the one backed up.

    Of a store in a bucket the catalog only, over a bucket that has the objects.
    """
    with _opened(data, new=True) as store:
        _print_copied(backups.restore(store, folder), as_json=as_json)


def _print_copied(copied: backups.Copied, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(copied)))
    elif copied.bucket is not None:
        typer.echo(f"{copied.rows:,} rows of the catalog; the files are those in {copied.bucket}, and were not copied")
    else:
        typer.echo(
            f"{copied.rows:,} rows of the catalog and {copied.files:,} files, "
            f"of which {copied.copied:,} were copied ({copied.bytes:,} bytes)"
        )


def _refuse_strangers(store: OpenStore) -> None:
    """Raise `Conflict` for an empty catalog over a bucket that is filled: all that is there would look left behind."""
    if store.bucket is not None and not backups.has(store.catalog) and any(store.bucket.inside("")):
        raise Conflict(
            f"the catalog is empty and {store.bucket.url} is not: set GRADSTORE_CATALOG to the catalog of this bucket, "
            "or restore a backup of it"
        )


@contextmanager
def _opened(data: Path | None, *, new: bool = False) -> Iterator[OpenStore]:
    """The store that options and environment name."""
    settings = configured(data=data)
    if not new and not settings.store:
        check_folder(settings)
    logs.begin(settings)
    with opened(settings, new=new) as catalog:
        yield open_store(settings, catalog)
