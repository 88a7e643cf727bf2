"""What a doctor finds, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from datastore.errors import GradstoreError

if TYPE_CHECKING:  # which is opened with what the checks' inventory tells
    from datastore.store import OpenStore

FindingKind = Literal[
    "leftover", "orphan", "unregistered", "damaged", "unpublished", "missing", "dangling", "lease", "catalog"
]


class Finding(BaseModel):
    """Something that is not as it should be."""

    model_config = ConfigDict(frozen=True)

    kind: FindingKind
    place: str
    """File or folder below the data folder, object of the bucket, or table and key of the catalog."""
    detail: str
    bytes: int = 0
    """Bytes that a repair frees."""
    repair: str | None = None
    """What a repair has done, or why there was none; null where none was asked for or none is known."""
    mended: bool = False
    mend: Callable[[], str] | None = Field(None, exclude=True)


def mended(finding: Finding) -> Finding:
    """The finding after its repair, which says what was done."""
    if finding.mend is None:
        return finding
    try:
        said = finding.mend()
    except (GradstoreError, OSError) as error:
        return finding.model_copy(update={"repair": f"not mended: {error}"})
    return finding.model_copy(update={"repair": said, "mended": not said.startswith("not mended")})


def done(step: Callable[[], object], said: str) -> str:
    """Do it, and say so."""
    step()
    return said


def ids(store: OpenStore, noun: Any) -> list[str]:
    """The ids of the records of a noun."""
    with store.catalog.reading() as session:
        return list(session.scalars(select(noun.id).order_by(noun.id)))


def known(store: OpenStore, noun: Any, id: str) -> bool:
    """Whether it is still there: what somebody deletes while the doctor looks is not missing."""
    with store.catalog.reading() as session:
        return session.get(noun, id) is not None
