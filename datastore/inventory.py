"""What lies in the store: each kind of thing told once, for the rooms that look after all of them.

The store opens a depot for each, usage counts their bytes, leftovers and garbage take what nothing names, a backup has
what nobody computes again by asking, and the doctor compares what is there with what the catalog says. What a kind has
to itself is in its own room; a new kind is an entry of `KINDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from datastore import thing_checks
from datastore.adapter_scores import adapter_of
from datastore.adapter_scores import recorded as recorded_scores
from datastore.errors import Damaged
from datastore.estimate_parts import recorded_arrays
from datastore.index import segments_of
from datastore.learned_scores import key_of
from datastore.removal import forget
from datastore.schema import (
    AdapterRow,
    CheckpointRow,
    ChunkRow,
    DatasetRow,
    JobRow,
    SegmentRow,
    SelectionRow,
    SourceRow,
    Table,
    TaskRow,
)
from datastore.scores import made_of
from datastore.selection.contamination import runs_prefix
from datastore.streams import matrices_of
from datastore.trainings import recorded as recorded_trainings

if TYPE_CHECKING:  # the store is opened with what is told here
    from datastore.findings import Finding
    from datastore.settings import Settings
    from datastore.store import OpenStore

Gone = Callable[[str], Collection[str]]
"""For the name of a derived thing, what it was made of that is gone; nothing of one that stays."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Things of one kind: files or folders below one folder, each with an id."""

    folder: str
    """Below the data folder; its first part is the part of the store that their bytes count for."""
    pattern: str
    """What their names match: the id, and the ending of a file."""
    ending: str = ""
    rows: tuple[type[Table], ...] = ()
    """The tables with a record for each, the first of which `GET /usage` counts; none where jobs record them."""
    owners: Select[str] | None = None
    """The ids with which a thing may lie there; one without is left behind, and goes once it is old."""
    gone: Callable[[OpenStore], Gone] | None = None
    """For what was derived, in place of `owners`: tells by the catalog, as it is now, what may go."""
    kept: Callable[[Session], set[str]] | None = None
    """The ids that a backup has: of what the catalog names, and nobody computes again by asking for it."""
    check: Callable[[OpenStore, Kind, bool], Iterator[Finding]] | None = None
    """What is wrong with those in a folder or, where no table records them, in a bucket; with True every byte is read.
    None where nothing misses a thing that is not there."""
    again: str | None = None
    """What makes one good again; None where that is to ask for it."""

    @property
    def part(self) -> str:
        """The part of the store that they lie in."""
        return PurePosixPath(self.folder).parts[0]

    @property
    def in_part(self) -> str:
        """The pattern of their places in the part's folder."""
        return str((PurePosixPath(self.folder) / self.pattern).relative_to(self.part))

    def place(self, id: str) -> str:
        """Where one lies, below the data folder."""
        return f"{self.folder}/{id}{self.ending}"

    def path(self, settings: Settings, id: str) -> Path:
        """Where one lies."""
        return settings.data / self.place(id)

    def ids(self, store: OpenStore) -> list[str]:
        """Those that there are, whether the catalog knows them or not."""
        folder = store.settings.data / self.folder
        return [name.removesuffix(self.ending) for name in store.depot(folder).names(folder, self.pattern)]

    def age(self, store: OpenStore, id: str) -> float:
        """Seconds since the last change of one; 0 where there is none."""
        path = self.path(store.settings, id)
        return store.depot(path).age(path)

    def bytes(self, store: OpenStore, id: str) -> int:
        """Bytes of one; 0 where there is none."""
        path = self.path(store.settings, id)
        return store.depot(path).size(path)

    def delete(self, store: OpenStore, id: str) -> None:
        """Remove one for good; nothing happens where there is none."""
        path = self.path(store.settings, id)
        forget(store.depot(path), path)


class Segments(Kind):
    """Segments of features, which the feature store keeps by itself, chunk by chunk."""

    def ids(self, store: OpenStore) -> list[str]:
        """Those that there are, whether the catalog knows them or not."""
        return store.store.names()

    def age(self, store: OpenStore, id: str) -> float:
        """Seconds since the last change of one."""
        return store.store.age(id)

    def bytes(self, store: OpenStore, id: str) -> int:
        """Bytes of one, attempts apart."""
        return store.store.bytes(id)

    def delete(self, store: OpenStore, id: str) -> None:
        """Remove one and all attempts at it."""
        store.store.delete(id)


# What the catalog says ------------------------------------------------------------------------------------------------


def _selected(ids: Select[str]) -> Callable[[Session], set[str]]:
    return lambda session: set(session.scalars(ids))


def _questions(session: Session) -> set[str]:
    plans = session.scalars(select(JobRow.plan).where(JobRow.kind == "attribution"))
    return {key for plan in plans for keys in plan["questions"] for key in keys}


def _learned_scores(session: Session) -> set[str]:
    """Scores that a model was trained for: those of features and texts are computed again."""
    return {key_of(id) for id in session.scalars(_SUCCEEDED.where(JobRow.kind.in_(_LEARNED)))}


# What was made of what is gone ----------------------------------------------------------------------------------------


def _unless(recorded: Callable[[Session], set[str]], owner: str) -> Callable[[OpenStore], Gone]:
    """What its owner has recorded stays."""

    def gone(store: OpenStore) -> Gone:
        with store.catalog.reading() as session:
            known = recorded(session)
        return lambda id: () if id in known else (owner,)

    return gone


def _of_scores(store: OpenStore) -> Gone:
    with store.catalog.reading() as session:
        known = {id for noun in (SegmentRow, TaskRow, DatasetRow) for id in session.scalars(select(noun.id))}
        known |= set(session.scalars(select(JobRow.id).where(JobRow.kind.in_(_LEARNED))))
    return lambda id: made_of(_manifest(store, store.settings.scores / id)) - known


def _of_adapter(store: OpenStore) -> Gone:
    with store.catalog.reading() as session:
        known = set(session.scalars(select(AdapterRow.id)))
    return lambda id: {adapter_of(id)} - known


def _of_index(store: OpenStore) -> Gone:
    with store.catalog.reading() as session:
        segments = set(session.scalars(select(SegmentRow.id)))

    def gone(id: str) -> Collection[str]:
        manifest = _manifest(store, store.settings.indexes / id)
        return () if manifest is None else segments_of(json.loads(manifest)["pieces"]) - segments

    return gone


def _of_runs(store: OpenStore) -> Gone:
    with store.catalog.reading() as session:
        kept = tuple(runs_prefix(task) for task in session.scalars(select(TaskRow.id)))
    return lambda id: () if id.startswith(kept) else ("its task",)


def _manifest(store: OpenStore, path: Path) -> bytes | None:
    """The manifest of a thing; None where it was deleted at this moment, or is damaged, which the doctor tells."""
    with suppress(Damaged):
        return store.depot(path).read(path, "manifest.json")
    return None


# The kinds ------------------------------------------------------------------------------------------------------------

_LEARNED = ("predictor", "cascade")
_SUCCEEDED = select(JobRow.id).where(JobRow.status == "succeeded")
_UNFINISHED = select(JobRow.id).where(JobRow.status != "succeeded")
_UPLOAD = "upload the same file again"

FEATURES = Segments(
    folder="features", pattern="seg_*", rows=(SegmentRow, ChunkRow), owners=select(SegmentRow.id)
)  # fmt: skip
"""A backup copies their chunks, and the doctor looks at them, each in ways of their own."""

KINDS: tuple[Kind, ...] = (
    Kind(
        folder="datasets", pattern="ds_*", rows=(DatasetRow,), owners=select(DatasetRow.id),
        kept=_selected(select(DatasetRow.id)), check=thing_checks.datasets, again=_UPLOAD,
    ),
    Kind(
        folder="datasets/sources", pattern="*", rows=(SourceRow,), owners=select(SourceRow.sha256),
        kept=_selected(select(SourceRow.sha256)), check=thing_checks.sources, again=_UPLOAD,
    ),
    Kind(
        folder="tasks", pattern="task_*", rows=(TaskRow,), owners=select(TaskRow.id),
        kept=_selected(select(TaskRow.id)), check=thing_checks.tasks,
        again="upload the same files again",
    ),
    Kind(
        folder="checkpoints", pattern="ck_*", rows=(CheckpointRow,), owners=select(CheckpointRow.id),
        kept=_selected(select(CheckpointRow.id)), check=thing_checks.checkpoints,
        again="register the same files again, or train again",
    ),
    FEATURES,
    Kind(folder="features-cache", pattern="*"),  # of chunks in a bucket: it keeps its own bound
    Kind(folder="scores", pattern="score_*", gone=_of_scores, kept=_learned_scores),
    Kind(
        folder="selections", pattern="sel_*.parquet", ending=".parquet", rows=(SelectionRow,),
        owners=select(SelectionRow.id), kept=_selected(select(SelectionRow.id)),
        check=thing_checks.selections, again="ask for the selection again, by its recipe or its question",
    ),
    Kind(folder="ngrams", pattern="runs_*", gone=_of_runs),
    Kind(folder="indexes", pattern="index_*", gone=_of_index),
    Kind(
        folder="questions", pattern="question_*.npy", ending=".npy", gone=_unless(_questions, "its attribution"),
    ),
    Kind(
        folder="trainings", pattern="training_*.json", ending=".json", gone=_unless(recorded_trainings, "its job"),
        kept=recorded_trainings,
    ),
    Kind(
        folder="estimates", pattern="*_*", gone=_unless(recorded_arrays, "its estimates"), kept=recorded_arrays,
        check=thing_checks.estimates, again="delete the estimates and send them again",
    ),
    Kind(
        folder="adapter-scores", pattern="ad_*", gone=_of_adapter, kept=recorded_scores,
        check=thing_checks.adapter_scores, again="delete the choice and send it again",
    ),
    Kind(
        folder="matrices", pattern="matrix_*", gone=_unless(matrices_of, "its stream, annotation or embedding"),
        kept=matrices_of, check=thing_checks.matrices,
        again="delete its stream, annotation or embedding, and make it again",
    ),
    Kind(
        folder="projectors", pattern="proj_*", owners=select(JobRow.id),
        kept=_selected(_SUCCEEDED.where(JobRow.kind == "projector")),
        check=thing_checks.projectors, again="delete the projector and train it again",
    ),
    Kind(
        folder="imports", pattern="imp_*", owners=_UNFINISHED,
        kept=_selected(_UNFINISHED.where(JobRow.kind == "import")),
        again="send the same files again",
    ),
    Kind(folder="work", pattern="ft_*", owners=_UNFINISHED),
)  # fmt: skip
PARTS = tuple(dict.fromkeys(kind.part for kind in KINDS))
"""The parts of the store: folders below the data folder."""


def of_part(folder: str) -> list[Kind]:
    """The kinds that lie in a part of the store. Raises `KeyError` for a folder that is none."""
    found = [kind for kind in KINDS if kind.part == folder]
    if not found:
        raise KeyError(f"{folder} is no part of the store: tell what lies there in datastore/inventory.py")
    return found
