"""The audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from gradstore.types import AuditEntry, Page
from pydantic import AwareDatetime, BeforeValidator

from service.dependencies import BackendDep, Paging
from service.routing import Router

router = Router(tag="service", admin=True)


def _written_out(value: str) -> str:
    """Refuse a number, which pydantic would take for Unix seconds."""
    if value.lstrip("+-").replace(".", "", 1).isdecimal():
        raise ValueError("a time is written out: 2026-11-29T13:00:00Z")
    return value


class AuditFilter(Paging):
    """Which entries are listed."""

    key: str | None = None
    """Those of a key, by id or name; `environment` is GRADSTORE_API_KEY."""
    since: Annotated[AwareDatetime, BeforeValidator(_written_out)] | None = None
    """Those from a time on."""


@router.get("/audit")
def list_audit(backend: BackendDep, wanted: Annotated[AuditFilter, Query()]) -> Page[AuditEntry]:
    """A page of the audit log, newest first; for keys with the scope `admin`."""
    return backend.audit.page(key=wanted.key, since=wanted.since, limit=wanted.limit, after=wanted.after)
