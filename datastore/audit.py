"""The audit log: every request that was to change something, and every refusal of a key. No bodies, no queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from gradstore.types import AuditEntry, Page
from sqlalchemy import ColumnElement, delete, or_, select

from datastore.catalog import Catalog, take, utc_now
from datastore.errors import NotFound
from datastore.schema import ApiKeyRow, AuditRow

PAGE = 1000  # entries read at a time
LONGEST_PATH, LONGEST_TEXT = 4096, 255  # characters; what is longer is cut


@dataclass(frozen=True)
class Audit:
    """The audit log of a catalog."""

    catalog: Catalog
    days: int
    """How long an entry is kept."""

    def record(
        self, *, api_key: str | None, client: str | None, request_id: str, method: str, path: str, status: int
    ) -> None:
        """Add an entry, with the present time."""
        entry = AuditRow(
            at=utc_now(), api_key=api_key, client=client, request_id=request_id, method=_plain(method, LONGEST_TEXT),
            path=_plain(path, LONGEST_PATH), status=status,
        )  # fmt: skip
        with self.catalog.transaction() as session:
            session.add(entry)

    def page(
        self, *, key: str | None = None, since: datetime | None = None, limit: int, after: str | None = None
    ) -> Page[AuditEntry]:
        """A page of entries, the newest first: of a key by id or name, from a time on. Raises `NotFound`."""
        query = select(AuditRow)
        if since is not None:
            query = query.where(AuditRow.at >= since)
        if after is not None:
            query = query.where(AuditRow.id < _number(after))
        if key is not None:
            query = query.where(_of(key))
        with self.catalog.reading() as session:
            rows, has_more = take(session, query.order_by(AuditRow.id.desc()), limit)
            return Page[AuditEntry](data=[_describe(row) for row in rows], has_more=has_more)

    def entries(self, *, key: str | None = None, since: datetime | None = None) -> Iterator[AuditEntry]:
        """All entries, the newest first: of a key by id or name, from a time on."""
        after, has_more = None, True
        while has_more:
            page = self.page(key=key, since=since, limit=PAGE, after=after)
            yield from page.data
            after, has_more = page.data[-1].id if page.data else None, page.has_more

    def sweep(self) -> None:
        """Delete what is older than `days`."""
        with self.catalog.transaction() as session:
            session.execute(delete(AuditRow).where(AuditRow.at < utc_now() - timedelta(days=self.days)))


def _of(key: str) -> ColumnElement[bool]:
    named = select(ApiKeyRow.id).where(ApiKeyRow.name == key)
    return or_(AuditRow.api_key == key, AuditRow.api_key.in_(named))


def _number(id: str) -> int:
    number = id.removeprefix("audit_")
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise NotFound("entry of the audit log", id, collection="/audit")
    return int(number)


def _plain(text: str, length: int) -> str:
    """A text that every database takes: cut, and without control characters."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:length])


def _describe(row: AuditRow) -> AuditEntry:
    columns = ("at", "api_key", "client", "request_id", "method", "path", "status")
    return AuditEntry(id=f"audit_{row.id}", **{column: getattr(row, column) for column in columns})
