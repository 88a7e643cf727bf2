"""Annotations: multi-hot labels of rows, uploaded, taken from the rows' origins, or replied by a chat model.

An annotation is a job. Of an upload and of origins it has nothing left to do; a labeller's is one shard, so that one
worker keeps to its rate, and every reply is recorded as it comes (`ReplyRow`): a shard that is repeated goes on from
there. Replies that are no list of letters are kept beside the labels, and asked for again where another annotation says
so (`again`): a finished one never changes.

Labels of n rows and C capabilities take n·C bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from gradstore.types import (
    AnnotatedCapability,
    AnnotatedRow,
    AnnotatedRows,
    AnnotationEstimate,
    AnnotationRequest,
    AnnotationResult,
    AnnotationSource,
    AnyJob,
    Capability,
    Labeller,
    UnparsedReply,
)
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from datastore import files, taxonomies
from datastore.catalog import Catalog
from datastore.errors import Conflict, refusal
from datastore.identity import content_id, sha256_of
from datastore.json_rows import RawRow, Unreadable
from datastore.leases import Claim, Jobs, NewShard, payloads_of
from datastore.letters import MOST
from datastore.matrices import Matrices, Matrix
from datastore.owners import REPORTED, Owner, Owners, Problems, joined_once, row_problems, unknown_id
from datastore.redaction import redacted
from datastore.rows import Example
from datastore.schema import JobRow, ReplyRow
from datastore.settings import Settings
from datastore.strict_json import NotJson, parse

ANNOTATIONS_VERSION = 1
"""Counted up when the same request would give other labels, so that old ones are not found again."""
REPLY = 1024
"""Characters of a reply that could not be read, or of a reason, that are kept."""
_BARELY = {"calls_per_minute", "attempts", "parallel"}
"""Settings of a labeller that change no label."""

Labels = NDArray[np.bool_]


@dataclass(frozen=True)
class Reply:
    """What became of the question about a row."""

    row: int
    labels: Sequence[int] | None
    """Numbers of capabilities; None where there is no reply that counts."""
    said: str | None = None
    """Then, what was replied, or what went wrong."""


@dataclass(frozen=True)
class Annotations:
    """The annotations of a catalog."""

    catalog: Catalog
    jobs: Jobs
    owners: Owners
    matrices: Matrices
    settings: Settings

    # Users' side ------------------------------------------------------------------------------------------------------

    def start(self, request: AnnotationRequest) -> tuple[AnyJob, bool]:
        """Start an annotation by origins or by a labeller, or return the one of the same content; says whether there is
        work to do.

        Raises `NotFound`, `InvalidInput` and, for an `again` of what has not succeeded, `Conflict`.
        """
        plan, kept = self._resolved(request)
        payload: dict[str, Any] = {}
        if plan["by"] == "origin":
            labels, known = _of_origins(self.owners.origins(plan["owner"]), plan["capabilities"])
            payload = {"counts": labels.sum(0).tolist(), "known": int(known.sum())}
        if request.taxonomy is None and request.again is None:
            taxonomies.record(self.catalog, self._default(request, plan["owner"]))
        shard = NewShard(payload=payload, units=plan["rows"], finished=plan["by"] == "origin")
        return self._create(request, plan, shard, kept=kept)

    def estimate(self, request: AnnotationRequest) -> AnnotationEstimate:
        """What a request would cost. Raises what `start` does."""
        plan, kept = self._resolved(request)
        labeller = Labeller.model_validate(plan["labeller"]) if plan["by"] == "labeller" else None
        calls = 0 if labeller is None else plan["rows"] - len(kept)
        return AnnotationEstimate(
            rows=plan["rows"],
            calls=calls,
            reused_rows=len(kept),
            max_tokens=0 if labeller is None else calls * labeller.max_tokens,
            seconds=0.0 if labeller is None else 60 * calls / labeller.calls_per_minute,
        )

    def upload(self, request: AnnotationRequest, file: Path) -> tuple[AnyJob, bool]:
        """Take the labels of a file of {id, categories} (or category): JSONL, a JSON array or Parquet.

        Raises `NotFound`, and `InvalidInput` naming lines with unknown names, unknown ids or ids that come twice,
        unless these are to be left out.
        """
        owner = self.owners.find(dataset=request.dataset, task=request.task)
        if request.taxonomy is None:
            taxonomies.record(self.catalog, taxonomies.CODS)
        taxonomy, capabilities = self._taxonomy(request, owner)
        plan = self._plan("upload", owner, taxonomy, capabilities) | {
            "file": sha256_of(file),
            "on_error": request.on_error,
        }
        key = content_id("matrix", {"labels": plan})
        labels, problems = self._read(file, owner, capabilities)
        if request.on_error == "fail":
            problems.refuse()
        payload = {
            "matrix": key,
            "counts": labels.rows.sum(0).tolist(),
            "known": int(labels.present.sum()),
            "problems": [each.model_dump() for each in problems.first],
            "total_problems": problems.total,
        }
        self.matrices.put(key, labels, made_from=plan)
        created = self._create(request, plan, NewShard(payload=payload, units=owner.rows, finished=True))
        self.matrices.put(key, labels, made_from=plan)  # where the same was being deleted; now it is recorded
        return created

    def labels(self, reference: str) -> tuple[Labels, NDArray[np.bool_]]:
        """What the rows of an annotation (id or name) ask for: labels (n, C) and which rows are known (n,).

        Rows are those of its dataset, or of its task's validation rows; capabilities those of `capabilities`. Raises
        `NotFound`, `Conflict` before it has succeeded, and `Damaged`.
        """
        job = self.jobs.get(reference, kind="annotation")
        plan = self._finished(job)
        names = self.capabilities(job.id)
        if plan["by"] == "upload":
            matrix = self.matrices.get(self.jobs.payloads(job.id)[0]["matrix"])
            return matrix.rows, matrix.present
        if plan["by"] == "origin":
            return _of_origins(self.owners.origins(plan["owner"]), names)
        labels, known = _nothing(plan["rows"], len(names))
        for row, numbers in self._labelled(job.id).items():
            labels[row, numbers] = known[row] = True
        return labels, known

    def page(self, reference: str, *, after: int, limit: int, unparsed: bool = False) -> AnnotatedRows:
        """Rows from row `after` on with their ids and labels, or only those whose reply could not be read.

        Raises what `labels` does.
        """
        job = self.jobs.get(reference, kind="annotation")
        labels, known = self.labels(job.id)
        names = self.capabilities(job.id)
        query = select(ReplyRow.row, ReplyRow.reply).where(ReplyRow.annotation_id == job.id)
        with self.catalog.reading() as session:
            found = session.execute(query.where(ReplyRow.reply.is_not(None), ReplyRow.row >= after)).all()
        replies: dict[int, str] = {row: reply or "" for row, reply in found}
        places = sorted(replies) if unparsed else list(range(after, len(known)))
        ids = self.owners.ids(self.jobs.plan(job.id)["owner"])
        data = [
            AnnotatedRow(
                row=row,
                id=ids[row],
                categories=[names[number] for number in np.flatnonzero(labels[row])] if known[row] else None,
                reply=replies.get(row),
            )
            for row in places[:limit]
        ]
        following = places[limit] if len(places) > limit else None
        return AnnotatedRows(annotation=job.id, data=data, has_more=following is not None, next=following)

    def capabilities(self, reference: str) -> tuple[str, ...]:
        """The names of an annotation's capabilities, in the order of its labels' columns. Raises `NotFound`."""
        plan = self.jobs.plan(self.jobs.get(reference, kind="annotation").id)
        return tuple(each.name for each in self.catalog.taxonomy(plan["taxonomy"]).capabilities)

    def remove(self, reference: str) -> str:
        """Delete an annotation and its labels; returns its id. Raises `NotFound`, `Conflict` and `InUse`."""

        def forget(session: Session, job: JobRow) -> None:
            self.matrices.delete(payload["matrix"] for payload in payloads_of(session, job.id) if "matrix" in payload)

        return self.jobs.remove(reference, kind="annotation", before=forget)

    def result(self, session: Session, job: JobRow) -> dict[str, Any]:
        """The result of an annotation whose rows are all done."""
        plan, payload = job.plan, payloads_of(session, job.id)[0]
        owner = Owner(plan["owner"], plan["rows"])
        counts, known = (payload["counts"], payload["known"]) if "counts" in payload else _counted(session, job)
        unparsed = select(ReplyRow).where(ReplyRow.annotation_id == job.id, ReplyRow.reply.is_not(None))
        total = session.scalar(select(func.count()).select_from(unparsed.subquery())) or 0
        first = list(session.scalars(unparsed.order_by(ReplyRow.row).limit(REPORTED)))
        ids = self.owners.ids(owner.id) if first else []
        return AnnotationResult(
            by=plan["by"],
            dataset=owner.dataset,
            task=owner.task,
            taxonomy=plan["taxonomy"],
            capabilities=[
                AnnotatedCapability(name=name, rows=count)
                for name, count in zip(plan["capabilities"], counts, strict=True)
            ],
            rows=owner.rows,
            labelled_rows=known,
            problems=row_problems(payload.get("problems", [])),
            total_problems=payload.get("total_problems", 0),
            unparsed=[UnparsedReply(row=each.row, id=ids[each.row], reply=each.reply or "") for each in first],
            total_unparsed=total,
        ).model_dump(mode="json")

    # Workers' side ----------------------------------------------------------------------------------------------------

    def asked(self, claim: Claim) -> set[int]:
        """The rows that a labeller has replied about."""
        with self.catalog.reading() as session:
            return set(session.scalars(select(ReplyRow.row).where(ReplyRow.annotation_id == claim.job)))

    def to_ask(self, claim: Claim, *, asked: Collection[int]) -> Iterator[tuple[int, Example]]:
        """The other rows with their examples."""
        for row, example in enumerate(self.owners.examples(claim.plan["owner"])):
            if row not in asked:
                yield row, example

    def taxonomy(self, claim: Claim) -> list[Capability]:
        """The capabilities that a labeller is asked about."""
        return self.catalog.taxonomy(claim.plan["taxonomy"]).capabilities

    def record(self, claim: Claim, replies: Sequence[Reply]) -> bool:
        """Keep replies; False where the shard is not to be gone on with."""

        def write(session: Session) -> None:
            for each in replies:
                said = None if each.said is None else redacted(each.said)[:REPLY]
                labels = None if each.labels is None else list(each.labels)
                session.add(ReplyRow(annotation_id=claim.job, row=each.row, labels=labels, reply=said))

        return self.jobs.record(claim, write)

    # ------------------------------------------------------------------------------------------------------------------

    def _resolved(self, request: AnnotationRequest) -> tuple[dict[str, Any], dict[int, list[int]]]:
        """What an annotation depends on, and the labels of rows that are not asked for again. Raises what `start`
        does; records nothing.
        """
        if request.by == "upload" and request.again is None:
            raise refusal("send the labels as a file of a form, or say by=origin or by=labeller", "/by")
        if request.again is not None:
            before = self.jobs.get(request.again, kind="annotation")
            plan = {**self._finished(before), "again": before.id}
            if plan["by"] != "labeller":
                raise refusal(f"{before.id} has asked no labeller: there is nothing to ask for again", "/again")
            return plan, self._labelled(before.id)
        owner = self.owners.find(dataset=request.dataset, task=request.task)
        return (self._by_labeller if request.by == "labeller" else self._by_origin)(request, owner), {}

    def _by_labeller(self, request: AnnotationRequest, owner: Owner) -> dict[str, Any]:
        labeller = cast("Labeller", request.labeller)
        taxonomy, capabilities = self._taxonomy(request, owner)
        if len(capabilities) > MOST:
            raise refusal(f"a labeller chooses among letters: at most {MOST} capabilities", "/taxonomy")
        asked = labeller.model_copy(update={"url": allowed_url(labeller.url, self.settings)})
        return self._plan("labeller", owner, taxonomy, capabilities) | {"labeller": asked.model_dump(), "again": None}

    def _by_origin(self, request: AnnotationRequest, owner: Owner) -> dict[str, Any]:
        found = self.owners.origins(owner.id)
        taxonomy, capabilities = self._taxonomy(request, owner)
        strange = sorted(set(found) - {each.name for each in capabilities})
        if strange and request.on_error == "fail":
            raise refusal(
                f"the taxonomy has no capability called {strange[0]!r}, as the origin of {found.count(strange[0]):,} "
                "rows is: leave taxonomy out, or send on_error=skip to leave such rows without labels",
                "/taxonomy",
            )
        return self._plan("origin", owner, taxonomy, capabilities)

    def _plan(
        self, by: AnnotationSource, owner: Owner, taxonomy: str, capabilities: Sequence[Capability]
    ) -> dict[str, Any]:
        names = [each.name for each in capabilities]
        plan: dict[str, Any] = {"version": ANNOTATIONS_VERSION, "by": by, "owner": owner.id, "rows": owner.rows}
        return plan | {"taxonomy": taxonomy, "capabilities": names}

    def _taxonomy(self, request: AnnotationRequest, owner: Owner) -> tuple[str, Sequence[Capability]]:
        """The id and the capabilities of a request's taxonomy, which is not recorded where it is the default."""
        if request.taxonomy is None:
            capabilities = self._default(request, owner.id)
            return taxonomies.taxonomy_id(capabilities), capabilities
        found = self.catalog.taxonomy(request.taxonomy)
        return found.id, found.capabilities

    def _default(self, request: AnnotationRequest, owner: str) -> Sequence[Capability]:
        """The capabilities where no taxonomy is named."""
        if request.by != "origin":
            return taxonomies.CODS
        return [Capability(name=name) for name in sorted(set(self.owners.origins(owner)))]

    def _create(
        self,
        request: AnnotationRequest,
        plan: dict[str, Any],
        shard: NewShard,
        *,
        kept: Mapping[int, list[int]] | None = None,
    ) -> tuple[AnyJob, bool]:
        again = plan.get("again")

        def before(session: Session, job: JobRow) -> list[NewShard]:
            session.add_all(
                ReplyRow(annotation_id=job.id, row=row, labels=labels, reply=None)
                for row, labels in (kept or {}).items()
            )
            return [shard]

        return self.jobs.create(
            id=content_id("ann", _meant(plan)),
            kind="annotation",
            request=request.model_dump(mode="json"),
            plan=plan,
            name=request.name,
            uses=[plan["owner"], plan["taxonomy"], *([again] if again else [])],
            before=before,
        )

    def _finished(self, job: AnyJob) -> dict[str, Any]:
        """The plan of an annotation that has succeeded. Raises `Conflict` for any other."""
        if job.status != "succeeded":
            raise Conflict(f"{job.id} is {job.status}: its labels are known once it has succeeded")
        return self.jobs.plan(job.id)

    def _labelled(self, id: str) -> dict[int, list[int]]:
        """The labels of each row that a labeller's reply has given."""
        query = select(ReplyRow.row, ReplyRow.labels).where(ReplyRow.annotation_id == id, ReplyRow.reply.is_(None))
        with self.catalog.reading() as session:
            return {row: labels or [] for row, labels in session.execute(query)}

    def _read(self, file: Path, owner: Owner, capabilities: Sequence[Capability]) -> tuple[Matrix, Problems]:
        """The labels of a file, and what is wrong with its entries."""
        packaging = files.sniff(file)
        places = self.owners.places(owner)
        numbers = {each.name: number for number, each in enumerate(capabilities)}
        problems = Problems("line" if packaging.format == "jsonl" else "entry")
        labels, known = _nothing(owner.rows, len(numbers))
        seen: dict[str, int] = {}
        for raw in files.read(file, packaging):
            try:
                id, names = _entry(raw)
            except _BadEntry as error:
                problems.add(raw.line, str(error))
                continue
            strange = [f"the taxonomy has no capability called {name!r}" for name in names if name not in numbers]
            wrong = joined_once(seen, id, raw.line) or (None if id in places else unknown_id(id, owner))
            if wrong or strange:
                problems.add(raw.line, wrong or strange[0])
                continue
            for row in places[id]:
                known[row] = True
                labels[row, [numbers[name] for name in names]] = True
        return Matrix(labels, known), problems


def allowed_url(url: str | None, settings: Settings) -> str:
    """The URL of a labeller that the settings allow, or the only one. Raises `InvalidInput`."""
    allowed = settings.labellers
    wanted = url.rstrip("/") if url is not None else allowed[0] if len(allowed) == 1 else None
    if wanted in allowed and wanted is not None:
        return wanted
    which = "say which" if url is None else f"{url!r} is none of them"
    there = f"GRADSTORE_LABELLERS allows {', '.join(allowed)}: {which}"
    detail = there if allowed else "this server asks no labeller: its operator names some in GRADSTORE_LABELLERS"
    raise refusal(detail, "/labeller/url")


class _BadEntry(Exception):
    """An entry of an upload that cannot be taken."""


def _entry(raw: RawRow | Unreadable) -> tuple[str, list[str]]:
    """The id and the names of an entry. Raises `_BadEntry`."""
    if isinstance(raw, Unreadable):
        raise _BadEntry(raw.detail)
    try:
        entry = parse(raw.text)
    except NotJson as error:
        raise _BadEntry(str(error)) from error
    if not isinstance(entry, dict):
        raise _BadEntry('an entry is an object such as {"id": "7", "categories": ["OCR"]}')
    id = entry.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise _BadEntry("it has no id, text or a whole number")
    keys = [key for key in ("categories", "category") if entry.get(key) is not None]
    if len(keys) != 1:
        raise _BadEntry("it has one of categories and category, a list of names")
    found = entry[keys[0]]
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _BadEntry(f"{keys[0]} is a list of names")
    return str(id), names


def _counted(session: Session, job: JobRow) -> tuple[list[int], int]:
    """How many rows of a labeller's annotation ask for each capability, and how many are known."""
    counts = np.zeros(len(job.plan["capabilities"]), np.int64)
    query = select(ReplyRow.labels).where(ReplyRow.annotation_id == job.id, ReplyRow.reply.is_(None))
    known = 0
    for labels in session.scalars(query):
        counts[labels] += 1
        known += 1
    return counts.tolist(), known


def _of_origins(origins: Sequence[str], names: Sequence[str]) -> tuple[Labels, NDArray[np.bool_]]:
    """Labels by origin; rows of an origin without a capability are not known."""
    numbers = {name: number for number, name in enumerate(names)}
    labels, known = _nothing(len(origins), len(names))
    for row, origin in enumerate(origins):
        if origin in numbers:
            labels[row, numbers[origin]] = known[row] = True
    return labels, known


def _nothing(rows: int, capabilities: int) -> tuple[Labels, NDArray[np.bool_]]:
    return np.zeros((rows, capabilities), np.bool_), np.zeros(rows, np.bool_)


def _meant(plan: dict[str, Any]) -> dict[str, Any]:
    """All of a plan that its labels depend on."""
    labeller = plan.get("labeller")
    if labeller is None:
        return plan
    return {**plan, "labeller": {name: value for name, value in labeller.items() if name not in _BARELY}}
