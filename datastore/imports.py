"""Imports: features that another program has computed become a feature set, under a projection that stays foreign.

The files are read by a worker, since LESS's are torch's (worker/imports.py). Nothing is recorded of them before all
their rows are found sound: a refused import leaves nothing behind. The projection of others is a random matrix that
nobody here can make again, so features of it are compared only with features that their importer calls by the same
name (`projection_id`); see `SHARED` of datastore/parameters.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.types import AnyJob, ExcludedRow, ImportRequest, ImportResult
from sqlalchemy import select
from sqlalchemy.orm import Session

from datastore.catalog import Catalog
from datastore.depot import LOCAL, Depot, evict
from datastore.errors import Conflict, InvalidFeatures, InvalidInput, NotEnoughSpace
from datastore.features import MAX_REPORTED, Plan, PlannedFeatureSet, described, excluded_rows, record
from datastore.identity import content_id
from datastore.leases import Claim, Jobs, NewShard
from datastore.parameters import FOREIGN
from datastore.schema import FeatureSetRow, JobFeatureRow, JobRow, ShardRow
from datastore.segments import stored_bytes
from datastore.settings import Settings
from datastore.sizes import free_bytes

LESS_FILES = ("all_unormalized.pt", "all_orig.pt")
"""What LESS writes in the end, the more telling first: `all_orig` is normalised."""
_PIECE = re.compile(r"grads-(\d+)\.pt")
_DIM = re.compile(r"dim(\d+)")
_ENDINGS = (".pt", ".npy", ".safetensors")


@dataclass(frozen=True)
class Imports:
    """The imports of a catalog."""

    catalog: Catalog
    jobs: Jobs
    settings: Settings
    depot: Depot = LOCAL

    def start(self, request: ImportRequest, files: Path, *, fingerprint: object, uploaded: bool) -> tuple[AnyJob, bool]:
        """Start the job that reads these files, or return the one that has; says whether there is work to do.

        `fingerprint` tells the content of the files from any other. Uploaded files are moved into the store until they
        are imported. Raises `NotFound` and `InvalidInput`.
        """
        plan = self._plan(request)
        id = content_id("imp", {"files": fingerprint, "plan": plan})
        plan["files"] = None if uploaded else str(files)
        plan["segments"], plan["found"] = [], None
        if uploaded:
            self.settings.imports.mkdir(parents=True, exist_ok=True)
            self.depot.keep(files, self.settings.imports / id)
        rows = plan["rows"]
        job, new = self.jobs.create(
            id=id,
            kind="import",
            request=request.model_dump(mode="json"),
            plan=plan,
            shards=[NewShard(payload={"start": 0, "stop": rows, "outputs": []}, units=rows)],
            name=request.name,
            uses=[plan["owner"], plan["parameters"]["checkpoint"]],
        )
        if job.status == "succeeded":
            self.forget(id)
        return job, new

    def forget(self, id: str) -> None:
        """Remove an import's uploaded files."""
        self.depot.delete(self.settings.imports / id)
        evict(self.settings.imports / id)

    def files(self, claim: Claim) -> Path:
        """The files of a claimed import, uploaded or of the server. Raises `Conflict` where they are not there."""
        if claim.plan["files"] is not None:
            return Path(claim.plan["files"])
        uploaded = self.settings.imports / claim.job
        if not self.depot.ensure(uploaded):
            raise Conflict(f"the uploaded files of {claim.job} are gone: send them again")
        return uploaded

    def prepare(self, claim: Claim, *, dim: int, found: Mapping[str, Any]) -> PlannedFeatureSet:
        """Record the feature set that the files of a claimed import hold, again without effect; returns it.

        `found` becomes part of the result. Raises `Conflict` where other files have been imported as the same features,
        and `NotEnoughSpace`.
        """
        feature = planned(claim.plan, dim=dim)
        needed, free = stored_bytes(feature.rows, dim=dim, dtype=feature.dtype), free_bytes(self.settings)
        if needed > free:
            raise NotEnoughSpace(needed=needed, free=free)
        segment = feature.segments[0][0]
        with self.catalog.transaction() as session:
            _refuse_others(session, feature.id, job=claim.job)
            job, shard = session.get_one(JobRow, claim.job), session.get_one(ShardRow, claim.shard)
            job.plan = {**job.plan, "segments": [segment], "found": dict(found)}
            shard.payload = {**shard.payload, "outputs": [{"segment": segment, "base": 0}]}
            if session.get(JobFeatureRow, (claim.job, 0)) is None:
                plan = Plan(
                    id=claim.job, owner=claim.plan["owner"], is_task=claim.plan["is_task"], rows=feature.rows,
                    settings={}, feature_sets=[feature],
                )  # fmt: skip
                record(session, plan)
        return feature

    def result(self, session: Session, job: JobRow) -> dict[str, Any]:
        """The result of an import whose rows are all published."""
        query = select(JobFeatureRow.feature_set_id).where(JobFeatureRow.job_id == job.id)
        row = session.get_one(FeatureSetRow, session.scalars(query).one())
        excluded: list[ExcludedRow] = excluded_rows(session, [row])
        return ImportResult(
            **job.plan["found"],
            feature_set=described(session, row),
            rows=row.rows,
            excluded=excluded[:MAX_REPORTED],
            total_excluded=len(excluded),
        ).model_dump(mode="json")

    def _plan(self, request: ImportRequest) -> dict[str, Any]:
        """The request resolved to ids."""
        checkpoint = self.catalog.checkpoint(request.checkpoint)
        kind = request.kind or ("sgd" if request.task else "adam")
        if request.dataset is not None:
            dataset = self.catalog.dataset(request.dataset)
            owner, rows = dataset.id, dataset.rows
        else:
            task = self.catalog.task(request.task or "")
            owner, rows = task.id, task.validation
            if not rows:
                raise InvalidInput(f"the task {task.name} has no validation rows: there is nothing to have features")
        return {
            "owner": owner,
            "is_task": request.task is not None,
            "rows": rows,
            "dim": request.dim,
            "on_error": request.on_error,
            "parameters": {
                "checkpoint": checkpoint.id,
                "kind": kind,
                "adam": request.adam if kind == "adam" else None,
                "weights": None,
                "reduction": request.reduction,
                "projection": FOREIGN,
                "projection_id": request.projection_id,
                "projection_version": None,
                "seed": None,
                "dtype": request.dtype,
                "template": request.template,
                "max_length": request.max_length,
                "precision": request.precision or checkpoint.precision,
                "quantisation": None,
            },
        }


def planned(plan: Mapping[str, Any], *, dim: int) -> PlannedFeatureSet:
    """The feature set that an import's plan and the dim of its files name."""
    parameters = {**plan["parameters"], "dim": dim}
    recipe = content_id("recipe", parameters)
    segment = content_id("seg", {"recipe": recipe, "owner": plan["owner"], "start": 0})
    rows = plan["rows"]
    return PlannedFeatureSet(
        id=content_id("feat", {"recipe": recipe, "owner": plan["owner"]}), recipe=recipe,
        checkpoint=parameters["checkpoint"], parameters=parameters, rows=rows, covered=0,
        segments=[(segment, 0, rows)], shard_rows=rows, exists=False,
    )  # fmt: skip


def find(files: Path, *, dim: int | None) -> list[Path]:
    """The files with the features, in the order of their rows: a file itself, or those of a folder.

    LESS's folder (`collect_grads`) has one `dim8192` for each dim; in it the rows of all batches merged, normalised and
    not, and those of 160 batches each in `grads-160.pt`, `grads-320.pt` and so on. Raises `InvalidFeatures`.
    """
    if files.is_file():
        return [files]
    folder = _folder_of_dim(files, dim)
    for name in LESS_FILES:
        if (folder / name).is_file():
            return [folder / name]
    pieces = {int(found[1]): path for path in folder.iterdir() if (found := _PIECE.fullmatch(path.name))}
    if pieces:
        return [pieces[number] for number in sorted(pieces)]
    arrays = sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS)
    if len(arrays) == 1:
        return arrays
    shown = ", ".join(path.name for path in arrays[:5]) or "none of these"
    raise InvalidFeatures(
        f"features are one file in {', '.join(_ENDINGS)}, or LESS's {', '.join(LESS_FILES)} or grads-*.pt: "
        f"here is {shown}; name the file that is meant"
    )


def fingerprint(files: Path) -> list[list[Any]]:
    """What tells files of the server from others: names, sizes and times of change."""
    found = [files] if files.is_file() else sorted(path for path in files.rglob("*") if path.is_file())
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def _folder_of_dim(folder: Path, dim: int | None) -> Path:
    """The folder itself, or the one inside it that has the features of a dim."""
    dims = {int(found[1]): path for path in folder.iterdir() if path.is_dir() and (found := _DIM.fullmatch(path.name))}
    if dim is not None and dim in dims:
        return dims[dim]
    if len(dims) > 1 or (dims and dim is not None):
        raise InvalidFeatures(
            f"the folder has features of the dims {', '.join(map(str, sorted(dims)))}: send one as dim"
        )
    inner = [path for path in folder.iterdir() if path.is_dir()]
    if dims:
        return next(iter(dims.values()))
    if len(inner) == 1 and not any(path.is_file() for path in folder.iterdir()):
        return _folder_of_dim(inner[0], dim)  # a zip of a folder has it inside
    return folder


def _refuse_others(session: Session, feature_set: str, *, job: str) -> None:
    """Raise `Conflict` where another import has brought these features."""
    query = select(JobFeatureRow.job_id).where(JobFeatureRow.feature_set_id == feature_set, JobFeatureRow.job_id != job)
    other = session.scalar(query.limit(1))
    if other is not None:
        raise Conflict(
            f"{other} has imported these features from other files: DELETE /imports/{other} first, or give these "
            "another projection_id"
        )
